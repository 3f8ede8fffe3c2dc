"""One spatial dimension of a convolution: what it reads, and the circle that it fits onto."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Axis", "count_outputs"]


def count_outputs(size: int, kernel: int, stride: int, dilation: int, left: int, right: int) -> int:
    """Return the outputs of a convolution along one dim, below 1 where the kernel does not fit."""
    return (size + left + right - dilation * (kernel - 1) - 1) // stride + 1


class Axis(NamedTuple):
    """One spatial dim: y[i] = sum_t w[t] x[i stride + t dilation - left], for i < outputs."""

    size: int
    kernel: int
    stride: int
    dilation: int
    left: int
    right: int
    circular: bool

    @property
    def outputs(self) -> int:
        """How many outputs there are."""
        return count_outputs(
            self.size, self.kernel, self.stride, self.dilation, self.left, self.right
        )

    @property
    def repeats(self) -> int:
        """How often one tap may read the same input."""
        return self.torus()[2]

    def torus(self, extra: int = 0) -> tuple[int, int, int]:
        """A circle, a stride that divides it, and how often one of its rows may be read.

        The axis is a selection of rows and columns of the circular convolution on that circle,
        which may be `extra` strides longer than it must if the padding is zero.
        """
        if not self.circular:  # inputs 0..size-1, the rest is zero and must not fold onto them
            needed = max(self.size + max(self.left, self.right), self.stride * self.outputs)
            return self.stride * (math.ceil(needed / self.stride) + extra), self.stride, 1
        distinct = self.size // math.gcd(self.size, self.stride)
        repeats = math.ceil(self.outputs / distinct)
        return self.size, self.stride if self.size % self.stride == 0 else 1, repeats

    def taps(self) -> Tensor:
        """The 0/1 tensor (kernel, outputs, size) that places tap t; zero where nothing is read."""
        tap = torch.arange(self.kernel)[:, None, None] * self.dilation
        read = torch.arange(self.outputs)[None, :, None] * self.stride + tap - self.left
        if self.circular:
            read = read % self.size
        return (read == torch.arange(self.size)).to(torch.float64)
