"""What the recipes beyond classification share: their report, and one training loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.files import versions, write_atomically, write_json
from orthonet.recipes.running.log import Log
from orthonet.recipes.running.options import training_fields
from orthonet.recipes.running.processes import rank_and_size, replica_of, totals
from orthonet.recipes.running.resume import Resumable

__all__ = ["BeyondReport", "Training", "grid", "optimize"]


class Training(Protocol):
    """What `optimize` reads of the dataclass that configures a recipe."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def iterations(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def lr(self) -> float:
        """Highest learning rate."""
        ...


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


def optimize(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    generator: torch.Generator,
    config: Training,
    *,
    progress: bool,
    name: str,
    folder: Path,
    resume: bool,
    tensorboard: bool,
) -> list[dict[str, float]]:
    """Adam on a one-cycle schedule; a row of the history for each fiftieth of the iterations.

    The rows go into `log.csv` in `folder`, and into TensorBoard if wanted; with each `state.pt` is
    replaced, from which `resume` goes on. Where torch.distributed is initialized, `loss_of` is the
    mean over this process' part of what all have drawn from `generator`, and the gradient is
    averaged over them.

    Raises:
        ValueError: The loss is not finite, or `state.pt` is that of another configuration.
    """
    iterations, lr, fields = config.iterations, config.lr, training_fields(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(4, iterations), pct_start=0.1 if iterations >= 20 else 0.5
    )
    rank, size = rank_and_size()
    progress = progress and rank == 0
    state, every = Resumable(model, optimizer, schedule, generator), max(1, iterations // 50)
    history = state.load(folder / "state.pt", fields) if resume else []
    done = int(history[-1]["iteration"]) if history else 0
    bar = None
    if progress:
        bar = require_package("tqdm", "tqdm").tqdm(total=iterations, initial=done, desc=name)
    replica = replica_of(_Loss(model, loss_of))
    model.train()
    with Log(None if rank else folder, "iteration", history, tensorboard=tensorboard) as log:
        for iteration in range(done + 1, iterations + 1):
            loss = replica()
            value = loss.item()
            _checks.require(
                math.isfinite(value),
                f"orthonet train {name}",
                "the loss must stay finite",
                "Lower the learning rate",
                iteration=iteration,
                lr=lr,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iteration < iterations:
                schedule.step()
            if iteration % every == 0 or iteration == iterations:
                history.append({"iteration": iteration, "loss": totals(value)[0] / size})
                if rank == 0:
                    state.save(folder / "state.pt", fields, history)
                log.add(history[-1])
            if bar is not None:
                bar.update()
    if bar is not None:
        bar.close()
    model.eval()
    return history


class _Loss(nn.Module):
    """The loss as the output of a module, whose gradients `DistributedDataParallel` averages."""

    def __init__(self, model: nn.Module, loss_of: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self) -> Tensor:
        return self.loss_of()


def grid(low: float, high: float, number: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Centers of number x number squares, (number, number, 2): rows, the second coordinate."""
    edge = (torch.arange(number, dtype=dtype) + 0.5) * ((high - low) / number) + low
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    return torch.stack((x, y), -1)
