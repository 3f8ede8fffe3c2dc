"""The training loop: one process, one seed, one-cycle Adam or SGD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.models import create
from orthonet.recipes._augment import random_affine, random_crop
from orthonet.recipes._config import TrainConfig
from orthonet.recipes._data import Images, Split, require_package
from orthonet.recipes._files import write_csv
from orthonet.recipes._resume import Resumable

FOLLOWED_RADIUS = 0.5


def build(config: TrainConfig) -> nn.Module:
    """The untrained model of a run; torch's global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = create(config.model, ortho_params=config.preset, **config.model_arguments)
    return model.to(config.device)


def fit(
    config: TrainConfig,
    data: Split,
    *,
    progress: bool = False,
    folder: Path | None = None,
    resume: bool = False,
) -> tuple[nn.Module, list[dict[str, float]]]:
    r"""Train the model of `config`.

    Args:
        config: What to train, and how.
        data: Training images; the test images are only looked at.
        progress: Whether to show a progress bar (of tqdm) on the standard error stream.
        folder: Where `state.pt` (all that the rest of the training depends on) and `log.csv` are
            replaced after every epoch; nothing is written without it.
        resume: Whether to go on from `state.pt`, if there is one. What follows is what an
            uninterrupted training would have done.

    Returns:
        The model in eval mode, and a row for every epoch: its number, learning rate, mean training
        loss and accuracy (on the augmented images, while the weights move), accuracy on the test
        images, and the share of test images whose margin exceeds \(\sqrt 2 \cdot 0.5 K\) (the
        certified accuracy at radius 0.5 if the constant is the K that was asked for).

    Raises:
        ValueError: The images do not fit the model, the loss is not finite, or `state.pt` is that
            of another configuration.
        ModuleNotFoundError: A progress bar is asked for and tqdm is missing.
    """
    model = build(config)
    generator = torch.Generator().manual_seed(config.seed)
    train, test = (Images(*(t.to(config.device) for t in images)) for images in data)
    steps = config.epochs * math.ceil(len(train.x) / config.batch_size)
    loss_fn = OffsetCrossEntropyLoss(config.offset, config.temperature)
    optimizer = optimizer_of(config, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=steps,
        pct_start=config.warmup,
        cycle_momentum=config.optimizer == "adam",
    )
    history: list[dict[str, float]] = []
    state = Resumable(model, optimizer, schedule, generator)
    if folder is not None and resume:
        history = state.load(folder / "state.pt", config)
    bar = _progress_bar(config.epochs) if progress else None
    if bar is not None:
        bar.update(len(history))
    for epoch in range(len(history) + 1, config.epochs + 1):
        model.train()
        rate, total, right = schedule.get_last_lr()[0], 0.0, 0
        for x, y in _batches(train, config, generator):
            logits = model(x)
            loss = loss_fn(logits, y)
            _checks.require(
                math.isfinite(loss.item()), "fit", "the loss must stay finite",
                "Lower the learning rate", epoch=epoch, lr=rate,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
            right += int((logits.argmax(1) == y).sum())
        accuracy, followed = _follow(model, test, config.lipschitz)
        row = {
            "epoch": epoch,
            "lr": rate,
            "loss": total / len(train.y),
            "train_accuracy": right / len(train.y),
            "test_accuracy": accuracy,
            "test_margin_accuracy": followed,
        }
        history.append(row)
        if folder is not None:
            state.save(folder / "state.pt", config, history)
            write_csv(folder / "log.csv", history)
        if bar is not None:
            bar.set_postfix(loss=f"{row['loss']:.3f}", test=f"{accuracy:.1%}")
            bar.update()
    if bar is not None:
        bar.close()
    return model.eval(), history


def optimizer_of(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=config.lr)


def _batches(
    images: Images, config: TrainConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images.y), generator=generator).to(images.y.device)
    for batch in order.split(config.batch_size):
        x = random_affine(
            images.x[batch],
            generator,
            shift=config.shift,
            rotation=config.rotation,
            zoom=config.zoom,
            shear=config.shear,
        )
        x = random_crop(x, generator, crop=config.crop, flip=config.flip)
        yield x, images.y[batch]


@torch.no_grad()
def _follow(model: nn.Module, test: Images, lipschitz: float) -> tuple[float, float]:
    logits = model.eval()(test.x)
    true = logits.gather(1, test.y[:, None]).squeeze(1)
    others = logits.scatter(1, test.y[:, None], -math.inf).amax(1)
    margin = true - others
    wanted = math.sqrt(2) * lipschitz * FOLLOWED_RADIUS
    return (margin > 0).float().mean().item(), (margin > wanted).float().mean().item()


def _progress_bar(epochs: int) -> Any:
    return require_package("tqdm", "tqdm").tqdm(total=epochs, unit="epoch", desc="training")
