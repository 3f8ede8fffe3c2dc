"""Sequences: the copying problem, and images read pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.recipes.data.digits import Images, Split
from orthonet.recipes.data.sets import load
from orthonet.recipes.sequences.config import ALPHABET, COPIED, SequenceConfig

__all__ = ["Batch", "MARKER", "Task", "copying_batch", "task_of"]

MARKER = ALPHABET + 1


class Batch(NamedTuple):
    """Sequences (time, batch, features), and what is wanted: a class each, or one a step."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """A source of training batches, the batches to test on, and the sizes they need."""

    draw: Callable[[torch.Generator], Batch]
    test: list[Batch]
    features: int
    classes: int


def copying_batch(delay: int, batch: int, generator: torch.Generator) -> Batch:
    """Draw sequences of the copying problem.

    Args:
        delay: Number of blanks, the last of them the marker.
        batch: Number of sequences.
        generator: Source of randomness, on the CPU.

    Returns:
        Inputs (delay + 20, batch, 10), one-hot: blank, the eight symbols, the marker; and the
        classes wanted (delay + 20, batch): 0 for blank, 1 to 8 for the symbols.
    """
    symbols = torch.randint(1, ALPHABET + 1, (COPIED, batch), generator=generator)
    tokens = torch.zeros(delay + 2 * COPIED, batch, dtype=torch.long)
    tokens[:COPIED] = symbols
    tokens[COPIED + delay - 1] = MARKER
    wanted = torch.zeros_like(tokens)
    wanted[-COPIED:] = symbols
    return Batch(torch.nn.functional.one_hot(tokens, ALPHABET + 2).float(), wanted)


def task_of(config: SequenceConfig) -> Task:
    """The task of a configuration, on its device."""
    device = config.device
    if config.task == "copying":

        def draw(generator: torch.Generator) -> Batch:
            batch = copying_batch(config.delay, config.batch_size, generator)
            return Batch(*(t.to(device) for t in batch))

        unseen = torch.Generator().manual_seed(config.seed + 1_000_003)
        return Task(draw, [draw(unseen)], ALPHABET + 2, ALPHABET + 1)
    train, test = _images(config)
    order = torch.arange(train.x.shape[1])
    if config.permuted:  # one order for all runs, so that they can be compared
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(92916))
    sets = [Images(x[:, order].to(device), y.to(device)) for x, y in (train, test)]

    def pick(images: Images, chosen: Tensor) -> Batch:
        return Batch(images.x[chosen].T.unsqueeze(-1), images.y[chosen])

    def draw_images(generator: torch.Generator) -> Batch:
        number = len(sets[0].y)
        return pick(sets[0], torch.randint(number, (config.batch_size,), generator=generator))

    parts = torch.arange(len(sets[1].y)).split(500)
    return Task(draw_images, [pick(sets[1], part) for part in parts], 1, 10)


def _images(config: SequenceConfig) -> Split:
    """Pixels in [0, 1] as (number, pixels)."""
    return Split(*(Images(x.flatten(1), y) for x, y in load(config.task, config.data_root)))
