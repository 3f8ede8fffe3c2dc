"""What the factors of an orthogonal convolution kernel are, and the kernel that they compose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet.linalg.kernels.convolution import block_convolution
from orthonet.linalg.kernels.projector_product import multiplications, multiply_projectors

__all__ = ["KernelFactors", "KernelGeometry", "chosen", "sharpened"]


class KernelFactors(NamedTuple):
    """Orthogonal factors of a kernel, each (groups, ...); None where the kernel has none."""

    outer: Tensor | None  # (g, out, channels * block)
    embedding: Tensor | None  # (g, channels, in)
    bases: Tensor | None  # (g, factors, channels, rank)
    weights: Tensor | None = None  # (g, factors, rank) of zeros and ones; None: all ones

    def one(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Basis and weights of one projector."""
        base = cast(Tensor, self.bases)[:, index]
        return base, None if self.weights is None else self.weights[:, index]


@dataclasses.dataclass(frozen=True)
class KernelGeometry:
    """Sizes of an [`OrthoKernel`][orthonet.reparametrizers.OrthoKernel] and of its factors.

    Attributes:
        out_channels: Channels out, of all groups.
        in_channels: Channels in, of all groups.
        kernel_size: Taps per dimension.
        stride: Stride per dimension, in taps.
        groups: Number of groups.
        ranks: "half" or "free".
        gain: A constant by which the kernel is multiplied.
        shape: Shape of the kernel, (out, in / groups, *taps).
        out: Channels out of one group.
        inner: Channels in of one group.
        block: Taps of the outer factor.
        contracting: Whether there are at most as many values out as in.
        channels: Channels on which the paraunitary factors act.
        delays: Number of paraunitary factors per dimension.
        dims: The dimension of each paraunitary factor.
        rank: Columns of the basis of a projector.
        composing: Multiplications per group that composing the kernel takes.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int = 1
    ranks: str = "half"
    gain: float = 1.0
    shape: torch.Size = dataclasses.field(init=False, repr=False, compare=False)
    out: int = dataclasses.field(init=False, repr=False, compare=False)
    inner: int = dataclasses.field(init=False, repr=False, compare=False)
    block: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    contracting: bool = dataclasses.field(init=False, repr=False, compare=False)
    channels: int = dataclasses.field(init=False, repr=False, compare=False)
    delays: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    dims: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    rank: int = dataclasses.field(init=False, repr=False, compare=False)
    composing: float = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = list(zip(self.kernel_size, self.stride, strict=True))
        out, inner = self.out_channels // self.groups, self.in_channels // self.groups
        block = tuple(min(k, s) for k, s in pairs)
        contracting = out <= inner * math.prod(block)
        channels = inner if contracting else out // math.prod(block)
        delays = tuple(max(k - s, 0) for k, s in pairs)
        derived = {
            "shape": torch.Size((self.out_channels, inner, *self.kernel_size)),
            "out": out,
            "inner": inner,
            "block": block,
            "contracting": contracting,
            "channels": channels,
            "delays": delays,
            "dims": tuple(d for d, count in enumerate(delays) for _ in range(count)),
            "rank": channels if self.ranks == "free" else channels // 2,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        taps = self.block if self.contracting else (1,) * len(self.stride)
        rows = self.out if self.contracting else self.inner
        composing = multiplications(taps, rows, self.channels, self.rank, self.dims)
        object.__setattr__(self, "composing", composing)

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

    def repeated(self, count: int) -> KernelGeometry:
        """That of as many kernels of this geometry as one kernel with more groups."""
        return dataclasses.replace(
            self,
            out_channels=self.out_channels * count,
            in_channels=self.in_channels * count,
            groups=self.groups * count,
        )

    def compose_all(self, values: Sequence[Tensor], scores: Sequence[Tensor], count: int) -> Tensor:
        """The kernels of `count` sets of factors, (count, *shape), gain included.

        Args:
            values: The factors that the kernel has, in order, of all sets along the first
                dimension; further dimensions of batches may be merged with it.
            scores: The scores of the projectors' columns with free ranks; else nothing.
            count: Number of sets.
        """
        kernel = self.repeated(count).compose(self.factors_of(values, scores))
        kernel = kernel if self.gain == 1.0 else self.gain * kernel
        return kernel.view(count, *self.shape)

    def factors_of(self, values: Sequence[Tensor], scores: Sequence[Tensor]) -> KernelFactors:
        """The factors of one or more kernels, from values and scores as of `compose_all`."""
        given = iter(values)
        outer, embedding, bases = (
            None if shape is None else next(given).reshape(-1, *shape[1:])
            for shape in self.factor_shapes()
        )
        bases = None if bases is None else sharpened(bases)
        return KernelFactors(outer, embedding, bases, chosen(scores[0]) if scores else None)

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


def sharpened(bases: Tensor) -> Tensor:
    r"""Take the orthogonality error out of the bases to first order: \(V + V (I - V^\top V) / 2\).

    An error e of V becomes up to 4 e in a factor, and a kernel of k taps multiplies k - 1 factors a
    dimension. The gradient passes as it is: for orthonormal V the map is the identity.
    """
    held = bases.detach()
    defect = held.mT @ held
    defect.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return bases.sub(held @ defect, alpha=0.5)


def chosen(scores: Tensor) -> Tensor:
    """Zeros and ones, whose gradient goes to the scores."""
    return (scores > 0).to(scores.dtype) + (scores - scores.detach())
