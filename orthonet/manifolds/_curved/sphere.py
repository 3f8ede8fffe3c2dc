r"""Spheres, and matrices whose columns lie on spheres."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthonet.linalg.rotation import (
    complement_reflector,
    times_complement,
    times_complement_adjoint,
)
from orthonet.manifolds._base import Manifold, check_radius, root
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import ProjectedParametrization
from orthonet.manifolds.trivialization import Trivialization

__all__ = ["Curved", "Oblique", "Sphere", "SphereTrivialization", "arc_ratio", "cos_sinc", "unit"]


def unit(x: Tensor) -> Tensor:
    """Return x / ||x|| along the last dimension, of any scale; the first axis where x is zero."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    axis = torch.zeros_like(x)
    axis[..., 0] = 1.0
    scaled = torch.where(zero, axis, x / torch.where(zero, torch.ones_like(largest), largest))
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def cos_sinc(s: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return \(\cos\sqrt s\) and \(\sin\sqrt s / \sqrt s\), smooth at 0."""
    small = s < 1e-3
    root = torch.where(small, torch.ones_like(s), s).sqrt()
    near = torch.where(small, s, torch.zeros_like(s))
    cos = 1.0 - near / 2.0 * (1.0 - near / 12.0 * (1.0 - near / 30.0 * (1.0 - near / 56.0)))
    sinc = 1.0 - near / 6.0 * (1.0 - near / 20.0 * (1.0 - near / 42.0 * (1.0 - near / 72.0)))
    return torch.where(small, cos, root.cos()), torch.where(small, sinc, root.sin() / root)


def arc_ratio(s: Tensor, c: Tensor) -> Tensor:
    r"""Return \(\arcsin\sqrt s / \sqrt{s c}\), \(c = 1 - s\), smooth at 0; 1 for c = 0.

    An angle over its sine, from the square s of the sine of its half; for an s below 0 the same
    with hyperbolic functions.
    """
    small = s.abs() < 1e-3
    near = torch.where(small, s, torch.zeros_like(s))
    series = torch.ones_like(s)
    for n in (5, 4, 3, 2, 1):
        series = 1.0 + near * (2 * n / (2 * n + 1)) * series
    far = ~small & (c > 0)
    size, c = torch.where(far, s.abs(), 0.5).sqrt(), torch.where(far, c, 0.5).sqrt()
    arc = torch.where(s < 0, torch.asinh(size), torch.atan2(size, c))
    return torch.where(small, series, torch.where(far, arc / (size * c), 1.0))


@dataclass(frozen=True)
class Curved(Manifold):
    """Vectors in a space of constant curvature."""

    radius: float = 1.0
    event_ndim = 1

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        return None if shape[-1] >= 1 else "the vectors must have at least one entry"


@dataclass(frozen=True)
class Sphere(Curved):
    r"""Vectors of norm `radius` along the last dimension, \(\|x\| = r\).

    Attributes:
        radius: Positive.

    Examples:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(Sphere().distance(x, y).item(), 4)
        1.5708
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n - 1."""
        return shape[-1] - 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        norm = torch.linalg.vector_norm(x, dim=-1)
        yield f"the norm must be {self.radius:g}", (norm / self.radius - 1.0).abs()

    def project(self, x: Tensor) -> Tensor:
        r"""Return \(r\,x / \|x\|\); for x = 0 the first axis."""
        return self.radius * unit(x)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the part of `v` orthogonal to `x`."""
        return v - x * (x * v).sum(-1, keepdim=True) / self.radius**2

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the great circle from `x` in direction `v`."""
        cos, sinc = cos_sinc((v * v).sum(-1, keepdim=True) / self.radius**2)
        return self.project(x * cos + v * sinc)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent vector that leads to `y`; zero if that is opposite."""
        minus, plus = x - y, x + y
        halves = ((t * t).sum(-1, keepdim=True) / (4.0 * self.radius**2) for t in (minus, plus))
        return self.tangent(x, -minus) * arc_ratio(*halves)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the length of the shorter arc; accurate for near and for opposite points."""
        minus = torch.linalg.vector_norm(x - y, dim=-1)
        plus = torch.linalg.vector_norm(x + y, dim=-1)
        return 2.0 * self.radius * torch.atan2(minus, plus)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport `v` in parallel along the shortest arc from `x` to `y` (not opposite to it)."""
        factor = (y * v).sum(-1, keepdim=True) / (self.radius**2 + (x * y).sum(-1, keepdim=True))
        return v - factor * (x + y)

    def parametrization(self, shape: Sequence[int], *, embedded: bool = False) -> Parametrization:
        r"""Return great circles from a base (n - 1 coordinates), or \(x \mapsto r x / \|x\|\).

        Args:
            shape: Of values, (*batch, n).
            embedded: Take the second map, of n coordinates.
        """
        return (ProjectedParametrization if embedded else SphereTrivialization)(self, shape)


class SphereTrivialization(Trivialization):
    r"""\(x = r (B \cos t + B_\perp c\,\tfrac{\sin t}{t})\), \(t = \|c\|\), n - 1 coordinates c.

    Args:
        space: The sphere.
        shape: Of values, (*batch, n).
    """

    reflector: Tensor
    space: Sphere

    def __init__(self, space: Sphere, shape: Sequence[int]) -> None:
        super().__init__(space, shape)
        base = torch.zeros(self.shape)
        base[..., 0] = 1.0
        self.register_buffer("base", base * space.radius)
        reflector = torch.empty_like(base) if base.is_meta else self._reflector(base)
        self.register_buffer("reflector", reflector)

    @staticmethod
    def _reflector(unit_base: Tensor) -> Tensor:
        return complement_reflector(unit_base[..., None])[..., 0]

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, n - 1)."""
        return (*self.batch_shape, self.shape[-1] - 1)

    def _point(self, coordinates: Tensor) -> Tensor:
        cos, sinc = cos_sinc((coordinates * coordinates).sum(-1, keepdim=True))
        reflector = self.reflector.to(coordinates.dtype)[..., None]
        side = times_complement(reflector, coordinates[..., None])[..., 0]
        base = self.base.to(coordinates.dtype)
        x = base * cos + (self.space.radius * sinc) * side
        norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
        return x * (self.space.radius / norm)  # rounding only

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        super()._move(x)
        self.reflector.copy_(self._reflector(self.base / self.space.radius))

    def tangent_coordinates(self, v: Tensor) -> Tensor:
        """Return coordinates of a tangent vector at the base."""
        side = times_complement_adjoint(self.reflector.to(v.dtype)[..., None], v[..., None])
        return side[..., 0] / self.space.radius


@dataclass(frozen=True)
class Oblique(Manifold):
    """Matrices with columns of norm `radius`: a product of spheres, one for each column.

    Attributes:
        radius: Positive.

    Examples:
        >>> Oblique().project(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 1.0000]])
    """

    radius: float = 1.0

    @property
    def sphere(self) -> Sphere:
        """The sphere of one column."""
        return Sphere(self.radius)

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        return None if shape[-2] >= 1 else "the columns must have at least one entry"

    def dimension(self, shape: Sequence[int]) -> int:
        """Return (n - 1) k."""
        return (shape[-2] - 1) * shape[-1]

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        norm = torch.linalg.vector_norm(x, dim=-2)
        yield f"the norm of each column must be {self.radius:g}", (norm / self.radius - 1.0).abs()

    def project(self, x: Tensor) -> Tensor:
        """Divide every column by its norm."""
        return self.sphere.project(x.mT).mT

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return each column of `v` without its part along that of `x`."""
        return self.sphere.tangent(x.mT, v.mT).mT

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return great circles of the columns."""
        return self.sphere.exp(x.mT, v.mT).mT

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return logarithms of the columns."""
        return self.sphere.log(x.mT, y.mT).mT

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root of the sum of the squared distances of the columns."""
        return root(self.sphere.distance(x.mT, y.mT).square().sum(-1))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport `v` in parallel, by columns."""
        return self.sphere.transport(x.mT, y.mT, v.mT).mT

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        """Return great circles from a base, (n - 1) k coordinates in shape (*batch, k, n - 1)."""
        return ObliqueTrivialization(self, shape)


class ObliqueTrivialization(Parametrization):
    """The trivialization of the sphere, for each column.

    Args:
        space: The oblique manifold.
        shape: Of values, (*batch, n, k).
    """

    def __init__(self, space: Oblique, shape: Sequence[int]) -> None:
        super().__init__(space, shape)
        *batch, n, k = self.shape
        self.columns = SphereTrivialization(space.sphere, (*batch, k, n))

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, k, n - 1)."""
        return self.columns.coordinate_shape

    def _point(self, coordinates: Tensor) -> Tensor:
        return self.columns(coordinates).mT

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.columns._coordinates(x.mT)

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the base to the present point."""
        return self.columns.update_base(coordinates, *vectors)
