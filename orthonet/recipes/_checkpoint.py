"""Files that are either whole or not there: checkpoints and JSON."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes._config import TrainConfig
from orthonet.recipes._train import build

FORMAT = "orthonet checkpoint 1"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Whoever reads `path` sees the old file or the new one, never a part; if `write` fails, the old
    file stays and the temporary one goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, config: TrainConfig) -> Path:
    """Write the weights and the configuration of a model, atomically.

    Args:
        path: The file; missing folders are made.
        model: A model built from `config`.
        config: What `model` was built and trained from.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written.
    """
    content = {"format": FORMAT, "config": config.to_dict(), "state_dict": model.state_dict()}
    return write_atomically(Path(path), lambda file: torch.save(content, file))


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, TrainConfig]:
    """Read a checkpoint; no code in it is run (`weights_only=True`).

    Args:
        path: A file of [`save_checkpoint`][orthonet.recipes.save_checkpoint].

    Returns:
        The model in eval mode, on the CPU, and its configuration, with `device="cpu"`.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is not such a checkpoint.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _checks.fail(
            "load_checkpoint", "the file must be a checkpoint of orthonet train",
            "Train one with: orthonet train digits", path=str(path),
        )  # fmt: skip
    config = TrainConfig.from_dict({**content["config"], "device": "cpu"})
    model = build(config)
    model.load_state_dict(content["state_dict"])
    return model.eval(), config
