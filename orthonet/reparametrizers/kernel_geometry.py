"""What the factors of an orthogonal convolution kernel are, and the kernel that they compose."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet.linalg import block_convolution
from orthonet.linalg._projector_product import multiplications, multiply_projectors

__all__ = ["KernelFactors", "KernelGeometry"]


class KernelFactors(NamedTuple):
    """Orthogonal factors of a kernel, each (groups, ...); None where the kernel has none."""

    outer: Tensor | None  # (g, out, channels * block)
    embedding: Tensor | None  # (g, channels, in)
    bases: Tensor | None  # (g, factors, channels, rank)
    weights: Tensor | None = None  # (g, factors, rank) of zeros and ones; None: all ones

    def one(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Basis and weights of one projector."""
        base = self.bases[:, index]  # type: ignore[index]
        return base, None if self.weights is None else self.weights[:, index]


@dataclasses.dataclass(frozen=True)
class KernelGeometry:
    """Sizes of a kernel and of its factors, see [`OrthoKernel`][orthonet.reparametrizers.OrthoKernel].

    Attributes:
        out_channels: Channels out, of all groups.
        in_channels: Channels in, of all groups.
        kernel_size: Taps per dimension.
        stride: Stride per dimension, in taps.
        groups: Number of groups.
        ranks: "half" or "free".
        gain: A constant by which the kernel is multiplied.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int = 1
    ranks: str = "half"
    gain: float = 1.0

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Shape of the kernel, (out, in / groups, *taps)."""
        return torch.Size((self.out_channels, self.inner, *self.kernel_size))

    @functools.cached_property
    def out(self) -> int:
        """Channels out of one group."""
        return self.out_channels // self.groups

    @functools.cached_property
    def inner(self) -> int:
        """Channels in of one group."""
        return self.in_channels // self.groups

    @functools.cached_property
    def block(self) -> tuple[int, ...]:
        """Taps of the outer factor."""
        return tuple(min(k, s) for k, s in zip(self.kernel_size, self.stride, strict=True))

    @functools.cached_property
    def contracting(self) -> bool:
        """Whether there are at most as many values out as in."""
        return self.out <= self.inner * math.prod(self.block)

    @functools.cached_property
    def channels(self) -> int:
        """Channels on which the paraunitary factors act."""
        return self.inner if self.contracting else self.out // math.prod(self.block)

    @functools.cached_property
    def delays(self) -> tuple[int, ...]:
        """Number of paraunitary factors per dimension."""
        return tuple(max(k - s, 0) for k, s in zip(self.kernel_size, self.stride, strict=True))

    @functools.cached_property
    def dims(self) -> tuple[int, ...]:
        """The dimension of each paraunitary factor."""
        return tuple(d for d, count in enumerate(self.delays) for _ in range(count))

    @functools.cached_property
    def rank(self) -> int:
        """Columns of the basis of a projector."""
        return self.channels if self.ranks == "free" else self.channels // 2

    @property
    def orthogonal(self) -> bool:
        """Whether all non-trivial singular values on a torus are 1."""
        readable = all(k >= s for k, s in zip(self.kernel_size, self.stride, strict=True))
        return self.gain == 1.0 and (self.contracting or readable)

    def factor_shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of outer factor, embedding and bases; None where the kernel has none."""
        area, g, c = math.prod(self.block), self.groups, self.channels
        outer = (g, self.out, c * area) if self.contracting or area > 1 else None
        embedding = (g, c, self.inner) if c > self.inner else None
        bases = (g, len(self.dims), c, self.rank) if self.dims and self.rank else None
        return outer, embedding, bases

    @functools.cached_property
    def composing(self) -> float:
        """Multiplications per group that composing the kernel takes."""
        taps = self.block if self.contracting else (1,) * len(self.stride)
        rows = self.out if self.contracting else self.inner
        return multiplications(taps, rows, self.channels, self.rank, self.dims)

    def repeated(self, count: int) -> KernelGeometry:
        """That of as many kernels of this geometry as one kernel with more groups."""
        return dataclasses.replace(
            self, out_channels=self.out_channels * count, in_channels=self.in_channels * count,
            groups=self.groups * count,
        )  # fmt: skip

    def compose_all(
        self, values: Sequence[Tensor], scores: Sequence[Tensor], count: int
    ) -> Tensor:
        """The kernels of `count` sets of factors, (count, *shape), gain included.

        Args:
            values: The factors that the kernel has, in order, of all sets along the first
                dimension; further dimensions of batches may be merged with it.
            scores: The scores of the projectors' columns with free ranks; else nothing.
            count: Number of sets.
        """
        all_of_them = self.repeated(count)
        given = iter(values)
        factors = [
            None if shape is None else next(given).reshape(-1, *shape[1:])
            for shape in self.factor_shapes()
        ]
        weights = chosen(scores[0]) if scores else None
        kernel = all_of_them.compose(KernelFactors(*factors, weights=weights))
        kernel = kernel if self.gain == 1.0 else self.gain * kernel
        return kernel.view(count, *self.shape)

    def compose(self, factors: KernelFactors) -> Tensor:
        """The kernel that a set of orthogonal factors makes, without the gain."""
        kernel = self.delayed(factors)
        if not self.contracting and factors.outer is not None:
            outer = factors.outer.unflatten(-1, (self.channels, *self.block))
            kernel = block_convolution(outer, kernel, spatial_dims=len(self.stride))
        return kernel.reshape(self.shape)

    def start(self, factors: KernelFactors) -> Tensor:
        """What the paraunitary factors act on.

        Returns:
            R, (groups, out, channels, *taps), when contracting; when expanding U (or I) with a
            single tap, (groups, channels, in, *taps).
        """
        outer, embedding = factors.outer, factors.embedding
        ones = (1,) * len(self.stride)
        if embedding is not None:
            return embedding.view(*embedding.shape, *ones)
        if outer is None:
            _checks.fail(self, "a kernel has an outer factor or an embedding", "Pass factors()")
        if self.contracting:
            return outer.unflatten(-1, (self.channels, *self.block))
        eye = torch.eye(self.channels, dtype=outer.dtype, device=outer.device)
        return eye.view(1, *eye.shape, *ones).expand(self.groups, *eye.shape, *ones)

    def delayed(self, factors: KernelFactors) -> Tensor:
        """`start`, in that layout, multiplied by all paraunitary factors."""
        start, bases, weights = self.start(factors), factors.bases, factors.weights
        if bases is None:
            return F.pad(start, [n for d in reversed(self.delays) for n in (d // 2, d - d // 2)])
        left = bases if weights is None else bases * weights.unsqueeze(-2)
        right = None if weights is None else bases
        return multiply_projectors(
            start, left, right, self.dims, channels_first=not self.contracting
        )


def chosen(scores: Tensor) -> Tensor:
    """Zeros and ones, whose gradient goes to the scores."""
    return (scores > 0).to(scores.dtype) + (scores - scores.detach())
