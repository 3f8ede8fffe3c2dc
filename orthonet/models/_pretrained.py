"""Trained networks inside the package, each with the file of its certificate."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from orthonet import _checks
from orthonet.certify.proof import named_constants
from orthonet.convert import to_plain

__all__ = ["PRETRAINED", "Pretrained", "certificate_path", "deployed", "read_pretrained"]

FOLDER = Path(__file__).parent / "checkpoints"


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
        builder: The model, a name of `list_models()`.
        arguments: Its keywords.
        sha256: SHA-256 of the certificate, which holds the SHA-256 of each weight.
    """

    builder: str
    arguments: Mapping[str, Any]
    sha256: str


_SERIES = {"width": 32}
PRETRAINED = {
    "fashion": Pretrained(
        "convnet_zoo",
        {"in_shape": (1, 28, 28), "layer": "cholesky", "width": 28},
        "f092bbcb606ec0ca9a32e91a36a1685708dfa056218c1085ce7b00b32eacd6b6",
    ),
    "italy_power_demand": Pretrained(
        "convnet_series",
        {"in_shape": (1, 24), "num_classes": 2, **_SERIES},
        "e51eb2fec611003d81da87b3bdf4d41a353fd86b942b636745fb99bfd3e82513",
    ),
    "japanese_vowels": Pretrained(
        "convnet_series",
        {"in_shape": (12, 29), "num_classes": 9, **_SERIES},
        "4ba7b99b35a3fcc6db292e50b86193db472ddd18978d0010f4f23f5f788f3ea0",
    ),
}


def certificate_path(name: str) -> Path:
    """Return the file of the certificate of a pretrained network.

    `LipschitzCertificate.load` reads it, and `orthonet-check` verifies it. The safetensors file
    next to it holds the weights.

    Args:
        name: One of `list_models(pretrained=True)`.

    Raises:
        ValueError: An unknown name.
    """
    _checks.one_of("certificate_path", tuple(sorted(PRETRAINED)), name=name)
    return FOLDER / f"{name}.json"


def deployed(model: nn.Sequential) -> nn.Sequential:
    """Return a copy in eval mode whose layers with a weight are those of `torch.nn`.

    Activations and rearrangements stay as they are, so that the certificate has a rule for each.

    Args:
        model: A network of this library.
    """
    model = model.eval()
    parts = OrderedDict(
        (name, to_plain(layer) if any(True for _ in layer.parameters()) else layer)
        for name, layer in model.named_children()
    )
    return nn.Sequential(parts).eval()


def read_pretrained(name: str, model: nn.Sequential) -> nn.Sequential:
    """Return the deployed copy of an untrained network with the weights of a certificate.

    Args:
        name: A key of `PRETRAINED`.
        model: The network that the builder makes.

    Raises:
        ValueError: A file is not the published one.
    """
    path = certificate_path(name)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    _checks.require(
        found == PRETRAINED[name].sha256,
        "create",
        "the certificate must be the published one",
        "Install orthonet again",
        file=str(path),
        sha256=found,
    )
    plain = deployed(model)
    weights = named_constants(path)
    state = {key: weights[key].view(value.shape) for key, value in plain.state_dict().items()}
    with torch.no_grad():
        plain.load_state_dict(state)
    return plain
