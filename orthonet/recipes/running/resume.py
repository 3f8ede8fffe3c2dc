"""The state of a training between two epochs (rows of its log), in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes.running.files import write_atomically
from orthonet.recipes.running.reading import FOREIGN, Wanted, read_tensors, reason_of

__all__ = ["Resumable"]

_FORMAT = "orthonet training 1"
_WANTED = Wanted(
    "--resume",
    "the state of an interrupted orthonet train",
    "Remove it and train anew, or train into another folder",
)


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

    def save(self, path: Path, fields: Mapping[str, Any], history: list[dict[str, float]]) -> Path:
        """Replace the file in one step; `fields` is all that identifies the training."""
        content = {
            "format": _FORMAT,
            "config": dict(fields),
            "history": history,
            "generator": self.generator.get_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        return write_atomically(path, lambda file: torch.save(content, file))

    def load(
        self, path: Path, fields: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> list[dict[str, float]]:
        """Take up the state of the file, if there is one, and return its rows.

        Raises:
            ValueError: The file is damaged, no state, or the state of another training.
        """
        if not path.exists():
            return []
        content, _ = read_tensors(path, _WANTED, device=device)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            _WANTED.fail(path, f"it does not say that its format is {_FORMAT!r}")
        found = content.get("config")
        if not isinstance(found, dict):
            _WANTED.fail(path, "it holds no configuration")
        _check_fields(found, fields, path)
        try:
            self.generator.set_state(content["generator"].cpu())
            for name, part in self.parts.items():
                part.load_state_dict(content[name])
            return [dict(row) for row in content["history"]]
        except FOREIGN as error:
            _WANTED.fail(path, reason_of(error))


def _check_fields(found: Mapping[str, Any], fields: Mapping[str, Any], path: Path) -> None:
    """States from before hold more fields, those that training does not depend on."""
    different = {
        name: f"{value!r} (there {found.get(name)!r})"
        for name, value in fields.items()
        if name not in found or found[name] != value
    }
    _checks.require(
        not different,
        "--resume",
        "the state to go on from must be that of the same training",
        "Resume with the options of the first run, or train into another folder",
        path=str(path),
        **different,
    )
