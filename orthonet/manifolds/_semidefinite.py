r"""Positive definite and semidefinite matrices, of full, of given, and of bounded rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.spectral_map import eigen_map
from orthonet.manifolds._base import Manifold, root
from orthonet.manifolds._factorized import EigenParametrization, raised
from orthonet.manifolds._linear import Symmetric
from orthonet.manifolds._low_rank import Init, filled
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.scalar import Scalar, absolute, positive_map
from orthonet.manifolds.trivialization import Triv

__all__ = ["PSD", "PSSD", "PSSDFixedRank", "PSSDLowRank"]


@dataclass(frozen=True)
class _Semidefinite(Manifold):
    """What the four spaces share."""

    square = True

    def _rank(self, shape: Sequence[int]) -> int:
        return shape[-1]

    def _strict(self) -> bool:
        return False

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is None and self._rank(shape) > shape[-1]:
            problem = f"the rank {self._rank(shape)} must be at most {shape[-1]}"
        return problem

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n r - r (r - 1) / 2, with r the rank."""
        n, r = shape[-1], self._rank(shape)
        return n * r - r * (r - 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from Symmetric()._violations(x)
        values = torch.linalg.eigvalsh(0.5 * (x + x.mT))
        largest = values.abs().amax(-1)
        scale = largest.clamp_min(torch.finfo(values.dtype).tiny)
        yield "no eigenvalue may be negative (relatively)", (-values[..., 0] / scale).clamp_min(0.0)
        n, r = x.shape[-1], self._rank(x.shape)
        if r < n:
            reason = f"all eigenvalues but the largest {r} must be 0 (relatively)"
            yield reason, values[..., n - r - 1].abs() / scale
        if self._strict():
            # An eigenvalue that rounding made negative counts as positive, exact zero does not.
            reason = f"the largest {r} eigenvalues must not be 0"
            yield reason, torch.where(values[..., n - r] != 0, 0.0, torch.inf)

    def project(self, x: Tensor) -> Tensor:
        """Keep the r largest eigenvalues of the symmetric part, and set negative ones to 0.

        Where they must not be 0, eigenvalues near it are raised to 0.001 of the largest.
        """
        r, eps = self._rank(x.shape), torch.finfo(x.dtype).eps

        def kept(values: Tensor) -> tuple[Tensor, Tensor]:
            largest = values[..., values.shape[-1] - r :].clamp_min(0.0)
            image = torch.zeros_like(values)
            image[..., values.shape[-1] - r :] = (
                raised(largest, eps) if self._strict() and r else largest
            )
            return image, ((image == values) & (values != 0)).to(values.dtype)

        result = eigen_map(x, kept)
        return 0.5 * (result + result.mT)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return the symmetric part, less what is outside of the range of x on both sides."""
        s = 0.5 * (v + v.mT)
        r = self._rank(x.shape)
        if r == x.shape[-1]:
            return s
        inside = eigen_map(x, lambda values: _largest(values, r))  # the projector onto the range
        outside = s - inside @ s
        return s - (outside - outside @ inside)

    def _draw(
        self, shape: tuple[int, ...], made: dict[str, Any], init_: Init | None = None
    ) -> Tensor:
        scale, columns = max(shape[-1], 1) ** -0.5, self._rank(shape)
        w = filled(shape, made, init_, scale)[..., :columns]
        return w @ w.mT


@dataclass(frozen=True)
class PSD(_Semidefinite):
    r"""Positive definite matrices: an open cone, with the affine-invariant geometry.

    Samples of this and the following cones are \(W W^\top\) with W of as many columns as the rank,
    of variance 1 / n.

    \(\langle u, v\rangle_x = \operatorname{tr}(x^{-1} u\,x^{-1} v)\). Any two points are joined by
    one geodesic.

    Examples:
        >>> x, y = torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2)
        >>> round(PSD().distance(x, y).item(), 4)  # log 4
        1.3863

    References:
        Bhatia, *Positive Definite Matrices*, 2007, chapter 6; Moakher, SIAM J. Matrix Anal. Appl.
        26 (2005).
    """

    def _strict(self) -> bool:
        return True

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the affine-invariant inner product."""
        return (torch.linalg.solve(x, u) * torch.linalg.solve(x, v).mT).sum((-2, -1))

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return x sym(G) x."""
        return x @ (0.5 * (grad + grad.mT)) @ x

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(L\,e^{L^{-1} v L^{-\top}} L^\top\) with \(x = L L^\top\)."""
        lower = _factor(x)
        return _congruent(lower, torch.linalg.matrix_exp(_whitened(lower, v)))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(L \log(L^{-1} y L^{-\top})\,L^\top\) with \(x = L L^\top\)."""
        lower = _factor(x)
        return _congruent(lower, eigen_map(_whitened(lower, y), _logarithm))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(\|\log(L^{-1} y L^{-\top})\|_F\) with \(x = L L^\top\)."""
        values = torch.linalg.eigvalsh(_whitened(_factor(x), y))
        return root(values.log().square().sum(-1))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        r"""Transport `v` along the geodesic: \(E v E^\top\), \(E = (y x^{-1})^{1/2}\)."""
        lower = _factor(x)
        middle = eigen_map(_whitened(lower, y), _square_root)
        return _congruent(lower @ middle, _whitened(lower, v))

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(x + v + \tfrac12 v x^{-1} v\): of second order, always positive definite."""
        return x + v + 0.5 * (v @ torch.linalg.solve(x, v))

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "softplus", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(Q \operatorname{diag}(f(s))\,Q^\top\).

        Args:
            shape: Of values.
            f: A map to the positive numbers: "softplus", "exp", "absolute", a function, or a pair
                of a function and its inverse.
            triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
        """
        f = positive_map(self, f)
        return EigenParametrization(self, shape, self._rank(shape), f, f.inverse, triv)


@dataclass(frozen=True)
class PSSD(_Semidefinite):
    """Positive semidefinite matrices: a closed convex cone.

    Examples:
        >>> PSSD().project(torch.diag(torch.tensor([2.0, -3.0]))).diagonal()
        tensor([2., 0.])
    """

    def parametrization(
        self, shape: Sequence[int], *, triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(Q \operatorname{diag}(|s|)\,Q^\top\), with the slope 1 at s = 0."""
        return EigenParametrization(self, shape, self._rank(shape), absolute, absolute, triv)


@dataclass(frozen=True)
class PSSDLowRank(PSSD):
    """Positive semidefinite matrices of rank at most `rank`.

    Attributes:
        rank: Largest rank.

    Examples:
        >>> PSSDLowRank(1).project(torch.diag(torch.tensor([3.0, 2.0]))).diagonal()
        tensor([3., 0.])
    """

    rank: int

    def __post_init__(self) -> None:
        _checks.positive_int(self, rank=self.rank)

    def _rank(self, shape: Sequence[int]) -> int:
        return self.rank


@dataclass(frozen=True)
class PSSDFixedRank(_Semidefinite):
    """Positive semidefinite matrices of rank exactly `rank`.

    Attributes:
        rank: The rank.

    Examples:
        >>> PSSDFixedRank(2).dimension((5, 5))
        9
    """

    rank: int

    def __post_init__(self) -> None:
        _checks.positive_int(self, rank=self.rank)

    def _rank(self, shape: Sequence[int]) -> int:
        return self.rank

    def _strict(self) -> bool:
        return True

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "softplus", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(Q \operatorname{diag}(f(s))\,Q^\top\) with Q of `rank` columns; see `PSD`."""
        f = positive_map(self, f)
        return EigenParametrization(self, shape, self.rank, f, f.inverse, triv)


def _largest(values: Tensor, r: int) -> tuple[Tensor, Tensor]:
    image = torch.zeros_like(values)
    image[..., values.shape[-1] - r :] = 1.0
    return image, torch.zeros_like(values)


def _logarithm(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.log(), 1.0 / values


def _square_root(values: Tensor) -> tuple[Tensor, Tensor]:
    roots = values.sqrt()
    return roots, 0.5 / roots


def _factor(x: Tensor) -> Tensor:
    """L of x = L L^T."""
    try:
        return torch.linalg.cholesky(0.5 * (x + x.mT))
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        _checks.fail(
            "PSD",
            f"x must be positive definite to the rounding of {x.dtype}",
            "Convert it to float64, or raise its eigenvalues, e.g. PSD().project(x)",
            shape=tuple(x.shape),
        )


def _congruent(a: Tensor, x: Tensor) -> Tensor:
    """Return a x A^T of symmetric x."""
    result = a @ x @ a.mT
    return 0.5 * (result + result.mT)


def _whitened(lower: Tensor, x: Tensor) -> Tensor:
    """L^-1 x L^-T of symmetric x."""
    half = torch.linalg.solve_triangular(lower, x, upper=False)
    result = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return 0.5 * (result + result.mT)
