r"""Products: one space for each block of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._parametrization import Parametrization

__all__ = ["ProductManifold", "ProductParametrization"]


@dataclass(frozen=True)
class ProductManifold(Manifold):
    """Blocks of a matrix, side by side along one of its two dimensions, each on its space.

    The recurrent kernel of an `nn.LSTM`, (4h, h), is four blocks along `dim=-2`.

    Attributes:
        spaces: One space a block.
        dim: -2 (blocks of rows) or -1 (blocks of columns).
        sizes: Sizes of the blocks along `dim`; None for equal ones.

    Examples:
        >>> from orthonet.manifolds import Stiefel
        >>> space = ProductManifold((Stiefel(), Stiefel()))
        >>> space.dimension((6, 3))
        6
    """

    spaces: tuple[Manifold, ...]
    dim: int = -2
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = self.spaces if isinstance(self.spaces, (tuple, list)) else (self.spaces,)
        object.__setattr__(self, "spaces", tuple(given))
        _checks.require(
            len(self.spaces) > 0 and all(isinstance(space, Manifold) for space in self.spaces),
            self,
            "spaces must be one or more manifolds",
            "Pass e.g. (SO(), Stiefel())",
            spaces=self.spaces,
        )
        _checks.one_of(self, (-2, -1), dim=self.dim)
        object.__setattr__(self, "has_complex", all(space.has_complex for space in self.spaces))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
            _checks.require(
                len(self.sizes) == len(self.spaces),
                self,
                "sizes must hold one size a space",
                "Leave it out for equal blocks",
                sizes=self.sizes,
            )

    def _sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.sizes is not None:
            return self.sizes
        return (shape[self.dim] // len(self.spaces),) * len(self.spaces)

    def block_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return shapes of the blocks of a tensor of this shape."""
        shapes = []
        for size in self._sizes(shape):
            block = list(shape)
            block[self.dim] = size
            shapes.append(tuple(block))
        return shapes

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        if sum(self._sizes(shape)) != shape[self.dim]:
            return f"the blocks {self._sizes(shape)} must add up to the size {shape[self.dim]}"
        for space, block in zip(self.spaces, self.block_shapes(shape), strict=True):
            problem = space._shape_problem(block)
            if problem is not None:
                return f"block {space!r}: {problem}"
        return None

    def blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the blocks of a tensor, as views."""
        return x.split(list(self._sizes(x.shape)), self.dim)

    def _map(self, method: str, *tensors: Tensor) -> Tensor:
        parts = zip(self.spaces, *(self.blocks(t) for t in tensors), strict=True)
        return torch.cat([getattr(space, method)(*blocks) for space, *blocks in parts], self.dim)

    def dimension(self, shape: Sequence[int]) -> int:
        """Return the sum over the blocks (rows that are points of their own are counted each)."""
        total = 0
        for space, block in zip(self.spaces, self.block_shapes(shape), strict=True):
            copies = math.prod(block[len(block) - 2 : len(block) - space.event_ndim])
            total += copies * space.dimension(block)
        return total

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        for i, (space, block) in enumerate(zip(self.spaces, self.blocks(x), strict=True)):
            for reason, violation in space._violations(block):
                yield f"in block {i}, {reason}", violation

    def tolerance(self, x: Tensor) -> float:
        """Return the largest of the blocks."""
        pairs = zip(self.spaces, self.blocks(x), strict=True)
        return max(space.tolerance(block) for space, block in pairs)

    def project(self, x: Tensor) -> Tensor:
        """Project each block."""
        return self._map("project", x)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the tangent part of each block."""
        return self._map("tangent", x, v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the Riemannian gradient of each block."""
        return self._map("gradient", x, grad)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract each block."""
        return self._map("retract", x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport each block."""
        return self._map("transport", x, y, v)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the sum of the blocks' inner products."""
        total: Any = 0.0
        for space, *parts in zip(self.spaces, *(self.blocks(t) for t in (x, u, v)), strict=True):
            product = space.inner(*parts)
            total = total + product.reshape(*x.shape[:-2], -1).sum(-1)
        return total

    def sample(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return independent samples of the blocks, which all get the options."""
        sizes = self.check_shape(shape)
        common = {"dtype": dtype, "device": device, "generator": generator, **options}
        blocks = zip(self.spaces, self.block_shapes(sizes), strict=True)
        return torch.cat([space.sample(block, **common) for space, block in blocks], self.dim)

    def parametrization(self, shape: Sequence[int], **options: Any) -> Parametrization:
        """Return the parametrizations of the blocks, which all get the options."""
        return ProductParametrization(self, shape, **options)


class ProductParametrization(Parametrization):
    """The coordinates of all blocks in one vector, which is of one dimension.

    Args:
        space: The product.
        shape: Of values.
        **options: Options of every block's parametrization.
    """

    space: ProductManifold

    def __init__(self, space: ProductManifold, shape: Sequence[int], **options: Any) -> None:
        super().__init__(space, shape)
        blocks = zip(space.spaces, space.block_shapes(self.shape), strict=True)
        self.blocks = nn.ModuleList(s.parametrization(block, **options) for s, block in blocks)

    def _parts(self) -> list[Parametrization]:
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(d,): everything flattened."""
        return (sum(math.prod(part.coordinate_shape) for part in self._parts()),)

    def split(self, coordinates: Tensor) -> list[Tensor]:
        """Return coordinates of each block, in its shape."""
        shapes = [part.coordinate_shape for part in self._parts()]
        pieces = coordinates.split([math.prod(shape) for shape in shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _point(self, coordinates: Tensor) -> Tensor:
        pieces = zip(self._parts(), self.split(coordinates), strict=True)
        return torch.cat([part._point(piece) for part, piece in pieces], self.space.dim)

    def _coordinates(self, x: Tensor) -> Tensor:
        pieces = zip(self._parts(), self.space.blocks(x), strict=True)
        return torch.cat([part._coordinates(piece).flatten() for part, piece in pieces])

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base of every block."""
        split = zip(*(self.split(t) for t in (coordinates, *vectors)), strict=True)
        moved = [
            part.update_base(*pieces) for part, pieces in zip(self._parts(), split, strict=True)
        ]
        return [torch.cat([t.flatten() for t in each]) for each in zip(*moved, strict=True)]

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        """Return the sum over all blocks and batch entries, a single number."""
        pieces = zip(self._parts(), self.split(coordinates), strict=True)
        return torch.stack([part.log_abs_det(piece).sum() for part, piece in pieces]).sum()
