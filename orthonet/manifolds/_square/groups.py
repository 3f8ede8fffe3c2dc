r"""Unitary frames and the symplectic group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.packing import pack_symmetric, unpack_symmetric
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._stiefel import Stiefel
from orthonet.manifolds.trivialization import Triv, Trivialization, check_triv

__all__ = ["Symplectic", "SymplecticTrivialization", "Unitary"]


@dataclass(frozen=True)
class Unitary(Stiefel):
    r"""Complex matrices with orthonormal columns, \(X^* X = I\): the complex `Stiefel`.

    Examples:
        >>> Unitary().dimension((2, 2))
        4
    """

    has_complex = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return 2 n k - k², the real dimension."""
        n, k = max(shape[-2:]), min(shape[-2:])
        return 2 * n * k - k * k

    def parametrization(
        self,
        shape: Sequence[int],
        *,
        triv: Triv = "exponential",
        dtype: torch.dtype | None = None,
    ) -> Parametrization:
        """Return a dynamic trivialization by skew-Hermitian matrices, with complex coordinates.

        Args:
            shape: Of values.
            triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
            dtype: A complex dtype; the default is that of `torch.get_default_dtype`.
        """
        dtype = torch.get_default_dtype().to_complex() if dtype is None else dtype
        _checks.require(
            dtype.is_complex, self, "the dtype must be complex", "Use Stiefel()", dtype=dtype
        )
        return super().parametrization(shape, triv=triv, dtype=dtype)


def _form(like: Tensor) -> Tensor:
    """Return J = (0, I; -I, 0)."""
    half = like.shape[-1] // 2
    identity = torch.eye(half, dtype=like.dtype, device=like.device)
    zero = torch.zeros_like(identity)
    return torch.cat([torch.cat([zero, identity], -1), torch.cat([-identity, zero], -1)], -2)


@dataclass(frozen=True)
class Symplectic(Manifold):
    r"""2m x 2m matrices with \(X^\top J X = J\), where J has the blocks 0, I, -I, 0.

    Samples are \(e^{J S}\) with S symmetric Gaussian, of spectral norm about 1, or the identity:
    `distribution` is "gaussian" or "identity".

    An unbounded group of determinant 1: condition numbers grow with the distance from the identity.

    Examples:
        >>> x = Symplectic().sample((4, 4), dtype=torch.float64)
        >>> round(torch.det(x).item(), 6)
        1.0
    """

    square = True

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is None and shape[-1] % 2:
            problem = "the size must be even"
        return problem

    def dimension(self, shape: Sequence[int]) -> int:
        """Return m (2 m + 1) for size 2m."""
        return shape[-1] * (shape[-1] + 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        j = _form(x)
        scale = torch.linalg.matrix_norm(x).square().clamp_min(1.0)
        residual = torch.linalg.matrix_norm(x.mT @ j @ x - j)
        yield "X^T J X must be J (relative to the squared norm of X)", residual / scale

    def project(self, x: Tensor) -> Tensor:
        r"""Return the symplectic factor of the generalized polar decomposition.

        \(X \leftarrow (X + X^{-\star}) / 2\), \(X^\star = J^\top X^\top J\).

        Raises:
            ValueError: The iteration does not converge: x is too far from the group.

        References:
            Higham, Mackey, Mackey & Tisseur, *Functions preserving matrix groups and iterations for
            the matrix square root*, SIAM J. Matrix Anal. Appl. 26 (2005).
        """
        if 0 in x.shape or x.is_meta:
            return x
        j, high = _form(x), x.to(torch.promote_types(x.dtype, torch.float64))
        j = j.to(high.dtype)
        for _ in range(60):
            star = j.mT @ high.mT @ j
            inverse, info = torch.linalg.inv_ex(star)
            if bool((info != 0).any()):
                break
            new = 0.5 * (high + inverse)
            moved, size = torch.linalg.matrix_norm(new - high), torch.linalg.matrix_norm(new)
            high = new
            if bool((moved <= 1e-14 * size).all()):
                break
        found = self.contains(high, 1e-10)
        _checks.require(
            bool(found),
            self,
            "the matrix is too far from the symplectic group to be projected",
            "Start from a point on it, e.g. init='identity' or init='sample'",
            distance=found.distance,
        )
        return high.to(x.dtype)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Project by \(x J^{-1} \mathrm{sym}(J x^{-1} v)\), which commutes with the group."""
        j = _form(x)
        s = j @ torch.linalg.solve(x, v)
        return x @ (j.mT @ (0.5 * (s + s.mT)))

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(x\,e^{x^{-1} v}\)."""
        return x @ torch.linalg.matrix_exp(torch.linalg.solve(x, v))

    def _draw(
        self, shape: tuple[int, ...], made: dict[str, Any], distribution: str = "gaussian"
    ) -> Tensor:
        _checks.one_of(self, ("gaussian", "identity"), distribution=distribution)
        s = torch.randn(shape, **made)
        s = (s + s.mT) * (0.35 * max(shape[-1], 1) ** -0.5)
        return torch.linalg.matrix_exp(_form(s) @ s * (distribution == "gaussian"))

    def parametrization(
        self, shape: Sequence[int], *, triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(B\,\varphi(J S)\), S symmetric, by the exponential or an own map."""
        return SymplecticTrivialization(self, shape, triv)


class SymplecticTrivialization(Trivialization):
    r"""\(X = B\,\varphi(J S)\) with S symmetric.

    Args:
        space: `Symplectic`.
        shape: (*batch, 2m, 2m).
        triv: "exponential", "cayley" (undefined where J S has the eigenvalue 2), or a map of
            Hamiltonian matrices to symplectic ones that takes 0 to I.
    """

    def __init__(self, space: Symplectic, shape: Sequence[int], triv: Triv = "exponential") -> None:
        super().__init__(space, shape)
        self.triv = check_triv(self, triv)
        n = self.shape[-1]
        self.register_buffer("base", torch.eye(n).expand(self.shape).clone())

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, m (2 m + 1))."""
        return (*self.batch_shape, self.dimension)

    def _point(self, coordinates: Tensor) -> Tensor:
        a = _form(self.base).to(coordinates.dtype) @ unpack_symmetric(coordinates, self.shape[-1])
        if callable(self.triv):
            factor = self.triv(a)
        elif self.triv == "cayley":
            identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            factor = torch.linalg.solve(identity - 0.5 * a, identity + 0.5 * a)
        else:
            factor = torch.linalg.matrix_exp(a)
        return self.base.to(coordinates.dtype) @ factor

    def tangent_coordinates(self, v: Tensor) -> Tensor:
        """Return coordinates of a tangent vector at the base."""
        base = self.base.to(v.dtype)
        s = _form(base).mT @ torch.linalg.solve(base, v)
        return pack_symmetric(0.5 * (s + s.mT))
