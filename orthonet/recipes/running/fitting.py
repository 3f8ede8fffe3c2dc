"""Training by Adam on a one-cycle schedule: the loop of all recipes that draw their batches."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.log import Log
from orthonet.recipes.running.options import training_fields
from orthonet.recipes.running.processes import joined, rank_and_size, replica_of, totals
from orthonet.recipes.running.resume import Resumable

__all__ = ["Training", "fitted", "optimize", "seeded"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside the context, and leave them as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


def fitted(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    generator: torch.Generator,
    config: Training,
    name: str,
    out: str | os.PathLike[str],
    **switches: bool,
) -> list[dict[str, float]] | None:
    """Train in all processes of `torchrun`, see `optimize`; return the history in the first one."""
    with joined("cpu") as rank:
        history = optimize(
            model, loss_of, generator, config, name=name, folder=Path(out), **switches
        )
    return history if rank == 0 else None


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
