"""What the recipes beyond classification share: their report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet.recipes.running.files import versions, write_atomically, write_json

__all__ = ["BeyondReport", "grid"]


@dataclasses.dataclass(frozen=True)
class BeyondReport:
    """What came out of a recipe beyond classification.

    Attributes:
        recipe: Its name.
        config: What was run, as plain values.
        figures: The outcome, by name.
        text: The outcome in lines.
        history: Rows of the training.
        files: What was written.
    """

    recipe: str
    config: Mapping[str, Any]
    figures: Mapping[str, float]
    text: tuple[str, ...]
    history: list[dict[str, float]]
    files: tuple[Path, ...] = ()

    def summary(self) -> str:
        """The outcome in a few lines of text."""
        written = ["written:", *(f"  {path}" for path in self.files)] if self.files else []
        return "\n".join([*self.text, *written])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the file names, as JSON can hold it."""
        return {
            "recipe": self.recipe,
            "config": dict(self.config),
            "figures": dict(self.figures),
            "history": self.history,
            "versions": versions(),
        }

    def written(self, folder: Path, model: nn.Module, picture: Path) -> BeyondReport:
        """The same after `metrics.json` and the weights, `model.pt`, are written."""
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        weights = write_atomically(folder / "model.pt", lambda file: torch.save(state, file))
        metrics = write_json(folder / "metrics.json", self.to_dict())
        return dataclasses.replace(self, files=(weights, metrics, picture))


def grid(low: float, high: float, number: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Centers of number x number squares, (number, number, 2): rows, the second coordinate."""
    edge = (torch.arange(number, dtype=dtype) + 0.5) * ((high - low) / number) + low
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    return torch.stack((x, y), -1)
