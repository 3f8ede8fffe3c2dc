"""Checkpoints of trained models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet.recipes.data.digits import require_package
from orthonet.recipes.images.config import TrainConfig
from orthonet.recipes.images.train import build
from orthonet.recipes.running.files import write_atomically
from orthonet.recipes.running.reading import (
    FOREIGN,
    Wanted,
    load_weights,
    read_tensors,
    reason_of,
)

__all__ = ["FORMAT", "load_checkpoint", "save_checkpoint"]

FORMAT = "orthonet checkpoint 1"
_WANTED = Wanted(
    "load_checkpoint", "a checkpoint of orthonet train", "Train one with: orthonet train digits"
)


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
    content, metadata = read_tensors(path, _WANTED)
    if path.suffix == ".safetensors":
        content = {**metadata, "state_dict": content}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _WANTED.fail(path, f"it does not say that its format is {FORMAT!r}")
    config = _config_of(content.get("config"), path)
    try:
        model = build(config)
    except FOREIGN as error:
        _WANTED.fail(path, f"its model cannot be built: {reason_of(error)}")
    load_weights(model, content.get("state_dict"), path, _WANTED)
    return model.eval(), config


def _config_of(found: Any, path: Path) -> TrainConfig:
    try:
        values = json.loads(found) if isinstance(found, str) else dict(found)
        return TrainConfig.from_dict({**values, "device": "cpu"})
    except FOREIGN as error:
        _WANTED.fail(path, f"its configuration cannot be used: {reason_of(error)}")
