"""The training loop: one process or several, one seed, one-cycle Adam or SGD."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.convert import to_plain
from orthonet.layers import Abs, GroupSort, MaxMin
from orthonet.losses import EMMALoss, LogitAnnealingLoss, OffsetCrossEntropyLoss
from orthonet.models import arguments_for, create
from orthonet.recipes.data.digits import Images, Split, require_package
from orthonet.recipes.data.sets import IMAGE_SETS
from orthonet.recipes.data.sources import InMemory, Source
from orthonet.recipes.images.config import TrainConfig
from orthonet.recipes.running.fitting import seeded
from orthonet.recipes.running.log import Log
from orthonet.recipes.running.options import training_fields
from orthonet.recipes.running.processes import rank_and_size, replica_of, totals
from orthonet.recipes.running.resume import Resumable

__all__ = ["build", "fit", "loss_of", "optimizer_of"]

_POSITIONS = 2000  # of the learning rate in a training of limited time


def build(config: TrainConfig) -> nn.Module:
    """The untrained model of a run; torch's global generators are left as they were."""
    known = IMAGE_SETS.get(config.dataset)  # a folder says it in model_arguments
    sizes = arguments_for(config.model, known.shape, known.classes) if known else {}
    arguments = {**sizes, **config.model_arguments}
    with seeded(config.seed):
        model = create(config.model, ortho_params=config.preset, **arguments)
    if config.unconstrained:
        model = _unconstrained(model)
    return model.to(config.device)


def _unconstrained(model: nn.Module) -> nn.Module:
    """The plain copy, with ReLU in place of the activations that keep the norm of a gradient."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (Abs, GroupSort, MaxMin)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.ReLU())
    return to_plain(model).requires_grad_()


def fit(
    config: TrainConfig,
    data: Split | Source,
    *,
    progress: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    model: nn.Module | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    r"""Train the model of `config`.

    Where torch.distributed is initialized, the processes train one model together: each takes its
    part of every batch, and the gradient is that of the whole batch. Only the first one writes.

    Args:
        config: What to train, and how.
        data: Training images; the test images are only looked at. Or a source of batches, as the
            recipe for folders has it.
        progress: Whether to show a progress bar (of tqdm) on the standard error stream.
        folder: Where `state.pt` (all that the rest of the training depends on) and `log.csv` are
            replaced after every epoch; nothing is written without it.
        resume: Whether to go on from `state.pt`, if there is one. What follows is what an
            uninterrupted training would have done.
        tensorboard: Whether to write every row into `folder / "tensorboard"` too.
        model: An untrained model that takes the place of the one that `config` names.

    Returns:
        The model in eval mode, and a row for every epoch: its number, learning rate, mean training
        loss and accuracy (on the augmented images, while the weights move), accuracy on the test
        images, and the share of test images whose margin exceeds \(\sqrt 2 \cdot 0.5 K\), or 0.2 K
        in l-infinity (the certified accuracy at radius 0.5, or 0.1, if the constant is the K that
        was asked for). With `cpu_seconds` also the number of steps and the process time that they
        took so far.

    Raises:
        ValueError: The images do not fit the model, the loss is not finite, `state.pt` is that
            of another configuration, or several processes share a limited time.
        ModuleNotFoundError: A progress bar or TensorBoard is asked for and its package is missing.
    """
    model = build(config) if model is None else model.to(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    source = InMemory(config, data) if isinstance(data, Split) else data
    _require_logits(model, config, source.shape)
    steps = config.epochs * math.ceil(source.number / config.batch_size)
    steps = steps if not config.cpu_seconds else _POSITIONS
    loss_fn = loss_of(config)
    optimizer = optimizer_of(config, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=steps,
        pct_start=config.warmup,
        cycle_momentum=config.optimizer == "adam",
    )
    rank, size = rank_and_size()
    replica = replica_of(model)
    state = Resumable(model, optimizer, schedule, generator)
    history: list[dict[str, float]] = []
    fields = {**training_fields(config), "images": source.number}
    if folder is not None and resume:
        history = state.load(folder / "state.pt", fields, config.device)
    writes = folder is not None and rank == 0
    log = Log(folder if writes else None, "epoch", history, tensorboard=tensorboard)
    clock = _Clock(config.cpu_seconds, schedule, history)
    _checks.require(
        not config.cpu_seconds or size == 1,
        "fit",
        "a training of limited time must run in one process",
        "Leave out cpu_seconds, or start it without torchrun",
        cpu_seconds=config.cpu_seconds,
        processes=size,
    )
    bar = _progress_bar(None if config.cpu_seconds else config.epochs) if progress else None
    if bar is not None:
        bar.update(len(history))
    with log:
        epoch = len(history)
        while not clock.ended if config.cpu_seconds else epoch < config.epochs:
            epoch += 1
            model.train()
            rate, sums = schedule.get_last_lr()[0], (0.0, 0.0, 0.0)
            clock.start()
            for part in source.batches(epoch, generator, rank, size):
                logits = replica(part.x)
                loss = loss_fn(logits, part.y)
                _checks.require(
                    math.isfinite(loss.item()),
                    "fit",
                    "the loss must stay finite",
                    "Lower the learning rate",
                    epoch=epoch,
                    lr=rate,
                )
                optimizer.zero_grad()
                (loss * part.share).backward()
                optimizer.step()
                right = float((logits.argmax(1) == part.y).float().mean())
                found = (loss.item() * part.counted, right * part.counted, part.counted)
                sums = tuple(map(sum, zip(sums, found, strict=True)))
                clock.step()
                if clock.ended:
                    break
            total, right, number = totals(*sums, device=config.device)
            accuracy, followed = _follow(model, source.tests(rank, size), config)
            row = {
                "epoch": epoch,
                "lr": rate,
                "loss": total / number,
                "train_accuracy": right / number,
                "test_accuracy": accuracy,
                "test_margin_accuracy": followed,
                **clock.row(),
            }
            history.append(row)
            if folder is not None and rank == 0:
                state.save(folder / "state.pt", fields, history)
            log.add(row)
            if bar is not None:
                bar.set_postfix(loss=f"{row['loss']:.3f}", test=f"{accuracy:.1%}")
                bar.update()
    if bar is not None:
        bar.close()
    return model.eval(), history


def _require_logits(model: nn.Module, config: TrainConfig, shape: tuple[int, ...]) -> None:
    """The model must make a row of logits of an image."""
    example = torch.zeros(1, *shape, device=config.device)
    try:
        with torch.no_grad():
            found = tuple(model.eval()(example).shape)
    except (RuntimeError, ValueError) as error:
        found = " ".join(str(error).partition(". ")[0].split())
    _checks.require(
        isinstance(found, tuple) and len(found) == 2 and found[0] == 1,
        "fit",
        f"the model must make (N, classes) logits of images (N, {', '.join(map(str, shape))})",
        "Choose a model that takes the size of the images, such as convnet_images or mlp",
        model=config.model,
        found=found,
    )


def loss_of(config: TrainConfig) -> nn.Module:
    """Return the loss that the configuration names."""
    if config.loss == "emma":
        return EMMALoss(config.offset / math.sqrt(2), 1.0)  # whose radius is one in l2
    kind = LogitAnnealingLoss if config.loss == "annealing" else OffsetCrossEntropyLoss
    return kind(config.offset, config.temperature)


class _Clock:
    """Move the schedule after each step: by one, or to where the spent time puts it."""

    def __init__(
        self,
        limit: float,
        schedule: torch.optim.lr_scheduler.OneCycleLR,
        history: list[dict[str, float]],
    ) -> None:
        self.limit, self.schedule = limit, schedule
        last = history[-1] if limit and history else {}
        self.steps, self.spent = last.get("steps", 0), last.get("cpu_seconds", 0.0)
        self.since = 0.0

    @property
    def ended(self) -> bool:
        """Whether a limited time is spent."""
        return bool(self.limit) and self.spent >= self.limit

    def start(self) -> None:
        """Count the time from here on."""
        self.since = time.process_time()

    def step(self) -> None:
        """Count a step."""
        self.steps += 1
        if not self.limit:
            self.schedule.step()
            return
        now = time.process_time()
        self.spent, self.since = self.spent + now - self.since, now
        position = min(1.0, self.spent / self.limit) * (_POSITIONS - 1)
        while self.schedule.last_epoch < int(position):
            self.schedule.step()

    def row(self) -> dict[str, float]:
        """Return what a row of the history tells of a limited time."""
        return {"steps": self.steps, "cpu_seconds": self.spent} if self.limit else {}


def optimizer_of(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=config.lr)


@torch.no_grad()
def _follow(
    model: nn.Module, batches: Iterable[Images], config: TrainConfig
) -> tuple[float, float]:
    """Accuracy, and the share of margins above the one that is followed, over all processes."""
    model.eval()
    wanted = config.margin(config.followed)
    right = followed = number = 0
    for x, y in batches:
        logits = model(x)
        true = logits.gather(1, y[:, None]).squeeze(1)
        margin = true - logits.scatter(1, y[:, None], -math.inf).amax(1)
        right += int((margin > 0).sum())
        followed += int((margin > wanted).sum())
        number += len(y)
    right, followed, number = totals(right, followed, number, device=config.device)
    return right / number, followed / number


def _progress_bar(epochs: int | None) -> Any:
    return require_package("tqdm", "tqdm").tqdm(total=epochs, unit="epoch", desc="training")
