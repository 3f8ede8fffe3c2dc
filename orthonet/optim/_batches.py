"""Parameters of one shape as one batch of tall matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Block", "blocks"]

_ALONE_FROM = 384  # smaller side from which one matrix fills a processor


class Block:
    """Some parameters whose matrices have one shape, dtype and device."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.shape = params[0].shape[-2:]
        self.wide = self.shape[0] < self.shape[1]
        self.counts = [math.prod(p.shape[:-2]) for p in params]
        self.alone = len(params) == 1 and params[0].ndim == 2

    @property
    def cost(self) -> float:
        """Multiplications of one product, up to a factor."""
        n, k = max(self.shape), min(self.shape)
        return float(sum(self.counts) * n * k * k)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors that belong to the parameters, as tall matrices: (m, n) or (count, m, n)."""
        if self.alone:
            x = tensors[0]
        else:
            x = torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])
        return x.mT if self.wide else x

    def gather_scalars(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same for one number of each matrix, (*batch, 1, 1)."""
        return tensors[0] if self.alone else torch.cat([t.reshape(-1, 1, 1) for t in tensors])

    def spread(self, x: Tensor) -> list[Tensor]:
        """Back: one tensor of the parameter's shape for each."""
        scalar = x.shape[-2:] == (1, 1)
        if self.wide and not scalar:
            x = x.mT
        if self.alone:
            return [x]
        sizes = [(*p.shape[:-2], *x.shape[-2:]) for p in self.params]
        pieces = x.split(self.counts)
        return [piece.reshape(size) for piece, size in zip(pieces, sizes, strict=True)]


def blocks(params: Sequence[Tensor]) -> Iterator[Block]:
    """The parameters in blocks: one batched call for each shape.

    On the processor, large matrices stay alone: there a batch gains nothing and is copied.
    """
    buckets: dict[object, list[Tensor]] = {}
    for p in params:
        buckets.setdefault((p.shape[-2:], p.dtype, p.device), []).append(p)
    for bucket in buckets.values():
        p = bucket[0]
        if p.device.type == "cpu" and min(p.shape[-2:]) >= _ALONE_FROM:
            yield from (Block([p]) for p in bucket)
        else:
            yield Block(bucket)
