"""Where the batches of a training come from: tensors in memory, or the files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orthonet.recipes.data.augment import random_affine, random_crop, random_noise
from orthonet.recipes.data.digits import Images, Split
from orthonet.recipes.images.config import TrainConfig

__all__ = ["InMemory", "Part", "Source"]


class Part(NamedTuple):
    """What one process takes of a batch.

    Attributes:
        x: Images.
        y: Their classes.
        share: Factor of the mean loss, so that the mean over the processes is that of the batch.
        counted: Number of images that this process answers for in sums over all processes.
    """

    x: Tensor
    y: Tensor
    share: float
    counted: float


class Source(Protocol):
    """Batches for `size` processes; each of them asks for those of its `rank`."""

    number: int  # of training images
    shape: tuple[int, ...]  # of an image

    def batches(
        self, epoch: int, generator: torch.Generator, rank: int, size: int
    ) -> Iterator[Part]:
        """The training images in random order, changed at random."""
        ...

    def tests(self, rank: int, size: int) -> Iterator[Images]:
        """The test images of this process; each image belongs to one of them."""
        ...


class InMemory:
    """Images that lie on the device; every process draws the same batches and takes its part."""

    def __init__(self, config: TrainConfig, data: Split) -> None:
        self.config = config
        self.train, self.test = (Images(*(t.to(config.device) for t in part)) for part in data)
        self.number, self.shape = len(self.train.y), tuple(self.train.x.shape[1:])

    def batches(
        self, epoch: int, generator: torch.Generator, rank: int, size: int
    ) -> Iterator[Part]:
        """The images in random order, moved, turned, cropped, mirrored and noisy."""
        config, images = self.config, self.train
        order = torch.randperm(self.number, generator=generator).to(images.y.device)
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
            x = random_noise(x, generator, deviation=config.noise)
            y, whole = images.y[batch], len(batch)
            if whole < size:  # fewer images than processes: each takes all of them
                yield Part(x, y, 1.0, whole / size)
            else:
                x, y = x[rank::size], y[rank::size]
                yield Part(x, y, len(y) * size / whole, len(y))

    def tests(self, rank: int, size: int) -> Iterator[Images]:
        """One batch."""
        yield Images(self.test.x[rank::size], self.test.y[rank::size])
