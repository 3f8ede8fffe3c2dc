r"""Norms of absolute values: what the rounding of a forward pass is proportional to.

A sum of k products is computed with an error of at most $\gamma_k |W| |x|$, entry by entry, so
that a chain of maps $y = W_m s(\dots s(W_1 x + b_1))$ with activations of slopes at most 1 errs by
at most $\gamma_K (\alpha \|x\| + \beta)$: K is the sum of the counts, $\alpha$ the product of the
norms of the $|W_i|$, and $\beta$ what the same recursion makes of the offsets.

N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 3 and 24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Chained", "Rounding", "absolute_convolution", "absolute_matrix", "fourier_roundings"]


class Rounding(NamedTuple):
    r"""A bound of the rounding of one operation: $\gamma_{count} (size \|x\| + offset)$ in l2.

    Half precision rounds what is stored three times in each of `stages`.
    """

    count: float
    size: float
    offset: float = 0.0
    stages: int = 1


_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself
_LARGEST_PRIME = 13  # of a size whose transform is a product of short ones
_FUNCTION = 64.0  # of an elementary function


def absolute_matrix(matrix: Tensor) -> float:
    """A bound of the norm of |A|, the largest over batch dims: by its row and column sums."""
    if not matrix.numel():
        return 0.0
    size = matrix.detach().cpu().abs().double()
    rows, columns = size.sum(-1).amax(-1), size.sum(-2).amax(-1)
    frobenius = torch.linalg.vector_norm(size, dim=(-2, -1))
    return float(torch.minimum((rows * columns).sqrt(), frobenius).max()) * _SAFE


def absolute_convolution(kernel: Tensor, groups: int) -> float:
    """A bound of the norm of the convolution with |w|, of any padding, stride and dilation."""
    size = kernel.detach().cpu().abs().double()
    parts = size.unflatten(0, (groups, size.shape[0] // groups)).flatten(3).sum(3)
    first, second = float(parts.sum(1).max()), float(parts.sum(2).max())
    return math.sqrt(first * second) * _SAFE


def fourier_roundings(size: tuple[int, ...]) -> float | None:
    r"""The roundings of a transform of this size, relative to its norm; None for large primes.

    A transform is a product of sparse unitary steps, one for each prime p of the size. A step
    errs by $\gamma_{2p + 8}$ times its modulus, whose norm is $\sqrt p$ times that of the step.
    """
    total = 0.0
    for n in size:
        p = 2
        while n > 1:
            if p > _LARGEST_PRIME:
                return None
            if n % p:
                p += 1
            else:
                n //= p
                total += math.sqrt(p) * (2 * p + 8)
    return total


@dataclass(frozen=True)
class Chained:
    """The recursion: `size` and `offset` bound the values, `count` their roundings.

    Half precision rounds what is stored `stages` times.
    """

    size: float = 1.0
    offset: float = 0.0
    count: float = 0.0
    stages: int = 0

    def map(self, norm: float, count: float, offset: float = 0.0) -> Chained:
        """Behind a linear map whose modulus has this norm, and an offset of this norm."""
        return Chained(
            self.size * norm * _SAFE,
            (self.offset * norm + offset) * _SAFE,
            self.count + count,
            self.stages + 1,
        )

    def activation(self, at_zero: float = 0.0) -> Chained:
        """Behind a function of slopes at most 1, with the norm of its value at zero."""
        return self.map(1.0, _FUNCTION, at_zero)

    def plus(self, other: Chained) -> Chained:
        """The sum of two values that were computed next to each other."""
        return Chained(
            (self.size + other.size) * _SAFE,
            (self.offset + other.offset) * _SAFE,
            max(self.count, other.count) + 1.0,
            max(self.stages, other.stages) + 1,
        )

    def rounding(self) -> Rounding:
        """The sum, as what a rule returns."""
        return Rounding(self.count, self.size, self.offset, max(1, self.stages))
