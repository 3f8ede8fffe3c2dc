"""Parameters of one shape as one batch of tall matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from orthonet.linalg.matrix import batches, split, stacked

__all__ = ["Block", "blocks"]


class Block:
    """Some parameters whose matrices have one shape, dtype and device."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.shape = params[0].shape[-2:]
        self.count = sum(math.prod(p.shape[:-2]) for p in params)

    @property
    def cost(self) -> float:
        """Multiplications of one product, up to a factor."""
        n, k = max(self.shape), min(self.shape)
        return float(self.count * n * k * k)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors that belong to the parameters, (m, n) or (count, m, n), with m >= n."""
        x = stacked(tensors)
        return x.mT if x.shape[-2] < x.shape[-1] else x

    def spread(self, x: Tensor) -> list[Tensor]:
        """Back: one tensor of the parameter's shape, or of one number a matrix, for each."""
        wide = self.shape[0] < self.shape[1]
        return split(x.mT if wide else x, self.params)


def blocks(params: Sequence[Tensor]) -> Iterator[Block]:
    """The parameters in blocks: one batched call for each."""
    return map(Block, batches(params, lambda p: p))
