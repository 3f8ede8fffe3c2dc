"""The state of a training between two epochs (rows of its log), in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes.running.files import write_atomically

__all__ = ["Resumable"]

_FORMAT = "orthonet training 1"


class Resumable:
    """All that the rest of a training depends on: model, optimizer, schedule, random numbers."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        generator: torch.Generator,
    ) -> None:
        self.parts: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            **({} if schedule is None else {"schedule": schedule}),
        }
        self.generator = generator

    def save(self, path: Path, config: Mapping[str, Any], history: list[dict[str, float]]) -> Path:
        """Replace the file in one step."""
        content = {
            "format": _FORMAT,
            "config": dict(config),
            "history": history,
            "generator": self.generator.get_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        return write_atomically(path, lambda file: torch.save(content, file))

    def load(
        self, path: Path, config: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> list[dict[str, float]]:
        """Take up the state of the file, if there is one, and return its rows."""
        if not path.exists():
            return []
        content = torch.load(path, map_location=device, weights_only=True)
        found = content.get("config") if isinstance(content, dict) else None
        _checks.require(
            found == dict(config) and content.get("format") == _FORMAT,
            "--resume",
            "the state to go on from must be that of the same configuration",
            "Resume with the options of the first run, or train into another folder",
            path=str(path),
        )
        self.generator.set_state(content["generator"].cpu())
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        return list(content["history"])
