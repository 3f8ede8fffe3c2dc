"""Checkpoints of trained models."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.images.config import TrainConfig
from orthonet.recipes.images.train import build
from orthonet.recipes.running.files import write_atomically

__all__ = ["FORMAT", "load_checkpoint", "save_checkpoint"]

FORMAT = "orthonet checkpoint 1"


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, config: TrainConfig) -> Path:
    """Write the weights and the configuration of a model, atomically.

    Args:
        path: The file; missing folders are made. With the suffix `.safetensors` it is written by
            that package, with the configuration in its metadata.
        model: A model built from `config`.
        config: What `model` was built and trained from.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written.
        ModuleNotFoundError: The package safetensors is wanted and missing.
    """
    path, state = Path(path), model.state_dict()
    if path.suffix == ".safetensors":
        package = require_package("safetensors.torch", "safetensors")
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        metadata = {"format": FORMAT, "config": json.dumps(config.to_dict())}
        data = package.save(tensors, metadata=metadata)
        return write_atomically(path, lambda file: file.write(data))
    content = {"format": FORMAT, "config": config.to_dict(), "state_dict": state}
    return write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, TrainConfig]:
    """Read a checkpoint; no code in it is run (`weights_only=True`, or safetensors).

    Args:
        path: A file of [`save_checkpoint`][orthonet.recipes.save_checkpoint].

    Returns:
        The model in eval mode, on the CPU, and its configuration, with `device="cpu"`.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is not such a checkpoint, or it is a pickle of other objects than
            tensors, which could run code.
        ModuleNotFoundError: The package safetensors is needed and missing.
    """
    path = Path(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if content is None:
        _checks.fail(
            "load_checkpoint", "the file must be a checkpoint of orthonet train",
            "Train one with: orthonet train digits", path=str(path),
        )  # fmt: skip
    config = TrainConfig.from_dict({**content["config"], "device": "cpu"})
    model = build(config)
    model.load_state_dict(content["state_dict"])
    return model.eval(), config


def _read_torch(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, LookupError, ValueError):
            return None
        except pickle.UnpicklingError as error:
            if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
                _refuse_pickle(path, file, error)
            return None
    good = isinstance(content, dict) and content.get("format") == FORMAT
    return content if good else None


def _refuse_pickle(path: Path, file: BinaryIO, error: Exception) -> None:
    """Refuse pickled objects; a file that is no pickle at all is left to the caller."""
    file.seek(0)
    if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return
    found = re.search(r"GLOBAL\s+(\S+)", str(error))
    _checks.fail(
        "load_checkpoint",
        "a checkpoint must hold tensors and plain values only; this file is a pickle of other "
        "objects, and reading it could run any code",
        "Save model.state_dict() with save_checkpoint, or as safetensors, where you trust the file",
        path=str(path),
        object=found[1] if found else "unknown",
    )


def _read_safetensors(path: Path) -> dict[str, Any] | None:
    package = require_package("safetensors", "safetensors")
    path.open("rb").close()  # an OSError where there is no such file
    try:
        with package.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError:
        return None
    if metadata.get("format") != FORMAT:
        return None
    return {"config": json.loads(metadata["config"]), "state_dict": state}
