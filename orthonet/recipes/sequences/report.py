"""What came out of a run on sequences, as text and as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from orthonet.recipes.running.files import versions
from orthonet.recipes.sequences.config import SequenceConfig

__all__ = ["SequenceReport", "SequenceResult"]


@dataclasses.dataclass(frozen=True)
class SequenceResult:
    """What became of one model.

    Attributes:
        model: Its name.
        parameters: Number of trained numbers.
        loss: Mean cross-entropy on sequences that it was not trained on.
        score: Share of right classes there; in "copying" among the symbols to be recalled.
        seconds: Duration of the training.
        history: Rows of the training.
        flow: Norm of the gradient of the test loss with respect to the state after each step.
        orthogonality: Largest distance of a singular value of the recurrent kernel from 1.
    """

    model: str
    parameters: int
    loss: float
    score: float
    seconds: float
    history: list[dict[str, float]]
    flow: list[float]
    orthogonality: float


@dataclasses.dataclass(frozen=True)
class SequenceReport:
    """What came out of a run on sequences.

    Attributes:
        config: What was run.
        results: One entry for each model, in the order of the configuration.
        skipped: Models whose library is not installed.
        files: What was written.
    """

    config: SequenceConfig
    results: tuple[SequenceResult, ...]
    skipped: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def summary(self) -> str:
        """The outcome in a few lines of text."""
        config = self.config
        share = "recall" if config.task == "copying" else "accuracy"
        lines = [
            f"{config.title}, hidden {config.hidden}, batch {config.batch_size}, "
            f"{config.iterations} iterations, seed {config.seed}",
            f"loss without memory   {config.baseline:.5f}",
            f"model        test loss   {share:>8}   seconds   parameters   max |sigma - 1|",
        ]
        lines += [
            f"{r.model:<10} {r.loss:>11.5f}   {r.score:>8.1%}   {r.seconds:>7.1f}   "
            f"{r.parameters:>10}   {r.orthogonality:>15.0e}"
            for r in self.results
        ]
        lines += [f"{name:<10} skipped: not installed" for name in self.skipped]
        if self.files:
            lines += ["written:", *(f"  {path}" for path in self.files)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the file names, as JSON can hold it."""
        return {
            "config": self.config.to_dict(),
            "baseline": self.config.baseline,
            "results": [dataclasses.asdict(result) for result in self.results],
            "skipped": list(self.skipped),
            "versions": versions(),
        }
