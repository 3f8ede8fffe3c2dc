"""The network of the comparison, of our layers or of those of another library."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from orthonet import _checks
from orthonet.layers import OrthoConv2d, OrthoLinear, available
from orthonet.models import convnet_zoo
from orthonet.recipes.running.fitting import seeded

__all__ = ["PEERS", "Peer", "deployed", "method_names", "missing", "network", "width_for"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """The layers of another library that take part in the comparison.

    Attributes:
        package: What must be importable.
        install: What pip installs.
        conv: Makes a circular 3x3 convolution of (inputs, outputs) channels, or one of one tap.
        linear: Makes a linear layer of (inputs, outputs) features.
    """

    package: str
    install: str
    conv: Callable[[int, int], nn.Module]
    linear: Callable[[int, int], nn.Module]

    @property
    def installed(self) -> bool:
        """Whether the library can be imported."""
        found = importlib.util.find_spec(self.package.partition(".")[0]) is not None
        return found and importlib.util.find_spec(self.package) is not None


class _Pointwise(nn.Module):
    """A convolution of one tap with the matrix of a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix to the channels of each pixel."""
        return F.conv2d(x, self.layer.weight[:, :, None, None], self.layer.bias)


def _circular(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular")


def _of(module: str, name: str) -> Callable[..., nn.Module]:
    """A class that is imported when it is called."""
    return lambda *args, **options: getattr(importlib.import_module(module), name)(*args, **options)


_AOC = _of("orthogonium.layers", "AdaptiveOrthoConv2d")
_AOL = _of("orthogonium.layers.conv.AOL", "AOLConv2D")
_ORTHOGONIUM_LINEAR = _of("orthogonium.layers", "OrthoLinear")
_TORCHLIP_CONV = _of("deel.torchlip", "SpectralConv2d")
_TORCHLIP_LINEAR = _of("deel.torchlip", "SpectralLinear")
_SAME = {"padding": 1, "padding_mode": "circular"}

PEERS = {
    "orthogonium-aoc": Peer(
        "orthogonium", "orthogonium", lambda i, o: _AOC(i, o, 3, **_SAME), _ORTHOGONIUM_LINEAR
    ),
    "orthogonium-aol": Peer(
        "orthogonium", "orthogonium", lambda i, o: _AOL(i, o, 3, **_SAME), _ORTHOGONIUM_LINEAR
    ),
    "torchlip-spectral": Peer(
        "deel.torchlip",
        "deel-torchlip",
        lambda i, o: _TORCHLIP_CONV(i, o, 3, **_SAME),
        _TORCHLIP_LINEAR,
    ),
    "torch-orthogonal": Peer(
        "torch",
        "torch",
        lambda i, o: _Pointwise(orthogonal(nn.Linear(i, o))),
        lambda i, o: orthogonal(nn.Linear(i, o)),
    ),
    "torch-spectral-norm": Peer(
        "torch",
        "torch",
        lambda i, o: spectral_norm(_circular(i, o)),
        lambda i, o: spectral_norm(nn.Linear(i, o)),
    ),
}


def method_names() -> tuple[str, ...]:
    """Return the names of all methods: ours, then the peers'."""
    return (*available("conv"), *PEERS)


def missing(name: str) -> str:
    """Return why a method cannot run on this machine, in a sentence; empty if it can."""
    if name not in PEERS or PEERS[name].installed:
        return ""
    peer = PEERS[name]
    return f"{name} is skipped: {peer.package} is missing. Run: pip install {peer.install}"


def network(name: str, shape: tuple[int, ...], width: int, seed: int = 0) -> nn.Module:
    """Build the untrained network of a method; torch's global generators are left as they were.

    The network of a peer is that of [`convnet_zoo`][orthonet.models.convnet_zoo] with each
    convolution and each linear layer replaced by the peer's.

    Args:
        name: One of `method_names()`.
        shape: Channels, height and width of an image.
        width: Channels of the convolutions.
        seed: Seed of the weights.

    Raises:
        ModuleNotFoundError: The library of the method is missing.
    """
    with seeded(seed):
        if name not in PEERS:
            return convnet_zoo(shape, layer=name, width=width)
        peer = PEERS[name]
        _checks.require(
            peer.installed,
            "network",
            f"the package {peer.package} must be installed",
            f"Run: pip install {peer.install}",
            ModuleNotFoundError,
            method=name,
        )
        model = convnet_zoo(shape, layer="ortho", width=width)
        for path, layer in list(model.named_children()):
            if isinstance(layer, OrthoConv2d):
                setattr(model, path, peer.conv(layer.in_channels, layer.out_channels))
            elif isinstance(layer, OrthoLinear):
                setattr(model, path, peer.linear(layer.in_features, layer.out_features))
    return model


def deployed(name: str, model: nn.Module) -> nn.Module:
    """Return a copy of a trained network as it is judged: on the CPU, in eval mode, in float64.

    The layers of peers become `nn.Conv2d` and `nn.Linear` with the weight that they have in eval
    mode; ours stay as they are.

    Args:
        name: The method that `model` was built by.
        model: The network.
    """
    model = model.eval()
    if name in PEERS:
        with torch.no_grad():
            parts = [(path, _plain(layer)) for path, layer in model.named_children()]
        copied: nn.Module = nn.Sequential(OrderedDict(parts))
    else:
        copied = copy.deepcopy(model)
    return copied.to("cpu", torch.float64).eval().requires_grad_(False)


def _plain(layer: nn.Module) -> nn.Module:
    """Copy a peer's layer with its weight of now."""
    inner: Any = layer.layer if isinstance(layer, _Pointwise) else layer
    plain: Any
    if isinstance(layer, nn.Conv2d):
        plain = _circular(layer.in_channels, layer.out_channels)
    elif isinstance(layer, _Pointwise):
        plain = nn.Conv2d(inner.in_features, inner.out_features, 1)
    elif isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features)
    else:
        return layer  # without a weight
    plain.weight.data = inner.weight.detach().clone().view(plain.weight.shape)
    plain.bias.data = inner.bias.detach().clone()
    return plain


@functools.cache
def width_for(name: str, parameters: int, shape: tuple[int, ...]) -> int:
    """Return the width, a multiple of 4, whose network has the number nearest to `parameters`."""

    def size(width: int) -> int:
        return sum(p.numel() for p in network(name, shape, width).parameters())

    low, high = 4, 8
    while high < 1024 and size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 4:
        middle = 4 * round((low + high) / 8)
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - parameters))
