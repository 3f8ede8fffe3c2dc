r"""Invertible matrices of positive determinant, and those of determinant one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet.linalg.matrix import compute_dtype, high
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._factorized import SingularParametrization, raised
from orthonet.manifolds._low_rank import Init, filled
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.scalar import Scalar, ScalarMap, at_least, positive_map
from orthonet.manifolds.trivialization import Triv

__all__ = ["SL", "GLp"]


@dataclass(frozen=True)
class GLp(Manifold):
    """Invertible n x n matrices of positive determinant: an open set, of dimension n².

    Samples are projected from entries of variance 1 / n.

    Examples:
        >>> bool(torch.det(GLp().project(-torch.eye(3))) > 0)
        True
    """

    square = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n²."""
        return shape[-1] ** 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        sign, _ = torch.linalg.slogdet(x)
        reason = "the determinant must be positive (negate a row to change its sign)"
        yield reason, torch.where(sign > 0, 0.0, torch.inf)

    def project(self, x: Tensor) -> Tensor:
        """Return a near matrix, zero singular values raised to 0.001 of the largest.

        A matrix of negative determinant has no nearest point in this open set; here the singular
        direction of the smallest singular value is reversed.
        """
        u, sigma, vh = torch.linalg.svd(high(x))
        sigma = raised(sigma, torch.finfo(x.dtype).eps)
        signs = torch.ones_like(sigma)
        if x.shape[-1]:
            signs[..., -1] = (torch.linalg.det(u) * torch.linalg.det(vh)).sign()
        return ((u * (sigma * signs)[..., None, :]) @ vh).to(x.dtype)

    def _draw(
        self, shape: tuple[int, ...], made: dict[str, Any], init_: Init | None = None
    ) -> Tensor:
        return self.project(filled(shape, made, init_, max(shape[-1], 1) ** -0.5))

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "softplus", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(f(s)) V^\top\) with U and V of the same determinant."""
        f = positive_map(self, f)
        return _PositiveParametrization(self, shape, shape[-1], f, f.inverse, triv)


class _PositiveParametrization(SingularParametrization):
    """The factorization, kept so far from singular matrices that rounding flips no determinant."""

    def _coordinates(self, x: Tensor) -> Tensor:
        u, sigma, vh = torch.linalg.svd(high(x))
        least = 16.0 * torch.finfo(x.dtype).eps * self.rank * sigma[..., :1]
        return super()._coordinates((u * torch.maximum(sigma, least)[..., None, :]) @ vh)


@dataclass(frozen=True)
class SL(GLp):
    """n x n matrices of determinant 1: the special linear group, of dimension n² - 1.

    Examples:
        >>> x = SL().sample((3, 3), dtype=torch.float64)
        >>> round(torch.det(x).item(), 9)
        1.0
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n² - 1."""
        return shape[-1] ** 2 - 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from super()._violations(x)
        # Rounding of the entries moves the logarithm by up to this many units roundoff.
        reason = "the determinant must be 1 (its logarithm 0, relative to the condition number)"
        yield reason, torch.linalg.slogdet(x)[1].abs() / _condition(x)

    def project(self, x: Tensor) -> Tensor:
        """Return a matrix of positive determinant, see `GLp`, divided by the n-th root of that."""
        n, work = max(x.shape[-1], 1), x.to(compute_dtype(x.dtype))
        sign, logarithm = torch.linalg.slogdet(work)
        inside = (sign > 0) & (_condition(work) < 0.125 / torch.finfo(work.dtype).eps)
        if not x.is_meta and not bool(inside.all()):
            work = super().project(work)
            logarithm = torch.linalg.slogdet(work)[1]
        return (work * torch.exp(-logarithm / n)[..., None, None]).to(x.dtype)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return the part of `v` orthogonal to \(x^{-\top}\), the normal."""
        normal = torch.linalg.inv(x).mT
        size = (normal * normal).sum((-2, -1), keepdim=True)
        return v - normal * ((normal * v).sum((-2, -1), keepdim=True) / size)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Follow the one-parameter subgroup, \(x\,e^{x^{-1} v}\), which is no geodesic."""
        return x @ torch.linalg.matrix_exp(torch.linalg.solve(x, v))

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "softplus", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(\sigma) V^\top\), with 1 as geometric mean of \(\sigma\).

        Before that, the first singular value is f(1) and the others are f(s): any ratios, each
        in one way, with n² - 1 coordinates.

        Args:
            shape: Of values.
            f: See `GLp`; whatever it is, the determinant is 1.
            triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
        """
        f = positive_map(self, f)
        values, inverse = _UnitProduct(f), _UnitProductInverse(f)
        return _SpecialParametrization(self, shape, shape[-1], values, inverse, triv)


def _condition(x: Tensor) -> Tensor:
    """Return the condition number in the Frobenius norm."""
    x = x.detach()
    return torch.linalg.matrix_norm(torch.linalg.inv_ex(x)[0]) * torch.linalg.matrix_norm(x)


@dataclass(frozen=True)
class _UnitProduct:
    f: Callable[[Tensor], Tensor]

    def __call__(self, s: Tensor) -> Tensor:
        values = self.f(torch.cat([torch.ones_like(s[..., :1]), s[..., 1:]], -1))
        logarithm = at_least(torch.finfo(s.dtype).eps, values).log()  # bounds the condition number
        return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


@dataclass(frozen=True)
class _UnitProductInverse:
    f: ScalarMap

    def __call__(self, sigma: Tensor) -> Tensor:
        first = self.f(sigma.new_ones(()))
        s = self.f.inverse(sigma / sigma[..., :1] * first)
        return torch.cat([torch.zeros_like(s[..., :1]), s[..., 1:]], -1)


class _SpecialParametrization(SingularParametrization):
    """The factorization for determinant 1, whose first value is no coordinate."""

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, n² - 1)."""
        sizes = [part.coordinate_shape[-1] for part in self._parts()]
        return (*self.batch_shape, max(sum(sizes) + self.rank - 1, 0))

    def split(self, coordinates: Tensor) -> list[Tensor]:
        """Return coordinates of both frames, then of the values; the first is fixed at 0."""
        d = self.left.coordinate_shape[-1] + self.right.coordinate_shape[-1]
        frames, s = coordinates[..., :d], coordinates[..., d:]
        fixed = s.new_zeros(*s.shape[:-1], min(self.rank, 1))
        return super().split(torch.cat([frames, fixed, s], -1))

    def _coordinates(self, x: Tensor) -> Tensor:
        return self._drop(super()._coordinates(x))

    def _drop(self, coordinates: Tensor) -> Tensor:
        d = self.left.coordinate_shape[-1] + self.right.coordinate_shape[-1]
        return torch.cat([coordinates[..., :d], coordinates[..., d + 1 :]], -1)

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the bases of the frames to the present point."""
        return [self._drop(t) for t in super().update_base(coordinates, *vectors)]

    def _log_slope(self, s: Tensor) -> Tensor:
        def values(free: Tensor) -> Tensor:
            return self.values(torch.cat([torch.zeros_like(free[..., :1]), free], -1))

        free = s[..., 1:]
        if not free.shape[-1]:
            return s.new_zeros(s.shape[:-1])
        units = torch.eye(free.shape[-1], dtype=s.dtype, device=s.device)
        columns = [
            torch.autograd.functional.jvp(
                values, free, unit.expand_as(free).contiguous(), create_graph=s.requires_grad
            )[1]
            for unit in units
        ]
        j = torch.stack(columns, -1)  # type: ignore[arg-type]
        return 0.5 * torch.linalg.slogdet(j.mT @ j).logabsdet
