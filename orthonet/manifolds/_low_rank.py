r"""Matrices of a given rank, or of at most that, and matrices with singular values near 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg import polar
from orthonet.linalg.matrix import high
from orthonet.linalg.spectral_map import singular_map
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._factorized import SingularParametrization, raised
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._stiefel import Stiefel
from orthonet.manifolds.scalar import Scalar, ScalarMap, bounded_map, positive_map
from orthonet.manifolds.trivialization import Triv

__all__ = ["AlmostOrthogonal", "FixedRank", "Init", "LowRank", "filled"]


Init = Callable[[Tensor], object]


def filled(
    shape: tuple[int, ...], made: dict[str, Any], init_: Init | None, scale: float
) -> Tensor:
    """Return Gaussian entries times `scale`, or what `init_` makes of them in place."""
    x = torch.randn(shape, **made)
    if init_ is None:
        return x * scale
    with torch.no_grad():
        init_(x)
    return x


def _identity(s: Tensor) -> Tensor:
    return s


@dataclass(frozen=True)
class LowRank(Manifold):
    r"""n x k matrices of rank at most `rank` (a variety, smooth where the rank is that).

    Samples are projected from entries of variance \(2 / (n + k)\).

    Attributes:
        rank: Largest rank.

    Examples:
        >>> LowRank(1).project(torch.diag(torch.tensor([3.0, 2.0]))).diagonal()
        tensor([3., 0.])
    """

    rank: int

    def __post_init__(self) -> None:
        _checks.positive_int(self, rank=self.rank)

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        if self.rank <= min(shape[-2:]):
            return None
        return f"the rank {self.rank} must be at most the smaller side of {tuple(shape[-2:])}"

    def dimension(self, shape: Sequence[int]) -> int:
        """Return (n + k - rank) rank."""
        return (shape[-2] + shape[-1] - self.rank) * self.rank

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        sigma = torch.linalg.svdvals(x)
        largest = sigma[..., :1].clamp_min(torch.finfo(sigma.dtype).tiny)
        if sigma.shape[-1] > self.rank:
            reason = f"the singular values after the first {self.rank} must be 0 (relatively)"
            yield reason, sigma[..., self.rank] / largest[..., 0]

    def _truncated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, vh = torch.linalg.svd(high(x), full_matrices=False)
        return u[..., : self.rank], sigma[..., : self.rank], vh[..., : self.rank, :]

    def project(self, x: Tensor) -> Tensor:
        """Return the truncated singular value decomposition."""
        return singular_map(x, self._kept)

    def _ones(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        _, slope = self._kept(sigma)
        return slope, torch.zeros_like(sigma)

    def _kept(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.zeros_like(sigma)
        slope[..., : self.rank] = 1.0
        return sigma * slope, slope

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(P_U v + v P_V - P_U v P_V\), where x has full rank `rank`.

        References:
            Vandereycken, *Low-rank matrix completion by Riemannian optimization*, SIAM J. Optim. 23
            (2013), eq. 2.5.
        """
        w = singular_map(x, self._ones)
        left = w @ (w.mT @ v)
        return left + (v - left) @ w.mT @ w

    def _draw(
        self, shape: tuple[int, ...], made: dict[str, Any], init_: Init | None = None
    ) -> Tensor:
        return self.project(filled(shape, made, init_, (2.0 / max(sum(shape[-2:]), 1)) ** 0.5))

    def parametrization(
        self, shape: Sequence[int], *, triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(s) V^\top\) with any real s."""
        return SingularParametrization(self, shape, self.rank, _identity, _identity, triv)


@dataclass(frozen=True)
class FixedRank(LowRank):
    """n x k matrices of rank exactly `rank`.

    Attributes:
        rank: The rank.

    Examples:
        >>> FixedRank(2).dimension((5, 4))
        14
    """

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from super()._violations(x)
        smallest = torch.linalg.svdvals(x)[..., self.rank - 1]
        reason = f"the singular value number {self.rank} must not be 0"
        yield reason, torch.where(smallest > 0, 0.0, torch.inf)

    def project(self, x: Tensor) -> Tensor:
        """Truncate the decomposition; singular values near 0 become 0.001 of the largest."""
        u, sigma, vh = self._truncated(x)
        sigma = raised(sigma, torch.finfo(x.dtype).eps)
        return ((u * sigma[..., None, :]) @ vh).to(x.dtype)

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "softplus", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(f(s)) V^\top\)."""
        f = positive_map(self, f)
        return SingularParametrization(self, shape, self.rank, f, f.inverse, triv)


@dataclass(frozen=True)
class AlmostOrthogonal(Manifold):
    r"""Matrices with all singular values in \([1 - \lambda, 1 + \lambda]\).

    Attributes:
        lam: \(\lambda\), in [0, 1].

    Examples:
        >>> AlmostOrthogonal(0.1).project(torch.diag(torch.tensor([2.0, 0.5]))).diagonal()
        tensor([1.1000, 0.9000])
    """

    lam: float

    def __post_init__(self) -> None:
        _checks.in_range(self, 0.0, 1.0, lam=self.lam)

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n k; for `lam` 0 that of the Stiefel manifold."""
        if self.lam == 0.0:
            return Stiefel().dimension(shape)
        return shape[-2] * shape[-1]

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        sigma = torch.linalg.svdvals(x)
        reason = f"all singular values must be in [{1 - self.lam:g}, {1 + self.lam:g}]"
        yield reason, ((sigma - 1.0).abs() - self.lam).clamp_min(0.0)

    def project(self, x: Tensor) -> Tensor:
        """Clamp the singular values to the interval."""
        if self.lam == 0.0:
            return polar(x)
        return singular_map(x, self._clamped)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return all of `v`, or what is tangent to the Stiefel manifold for lam = 0."""
        return Stiefel().tangent(x, v) if self.lam == 0.0 else v

    def _clamped(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        image = sigma.clamp(1.0 - self.lam, 1.0 + self.lam)
        return image, (image == sigma).to(sigma.dtype)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any], **options: Any) -> Tensor:
        return Stiefel()._draw(shape, made, **options)

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "fold", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(1 + \lambda f(s)) V^\top\).

        Args:
            shape: Of values.
            f: A map to [-1, 1]: "fold" (a triangle wave, of slope 1 or -1 at the boundary too),
                "sin", "tanh", "scaled_sigmoid" (these have slope 0 there), a function, or a pair
                of a function and its inverse.
            triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
        """
        f, lam = bounded_map(self, f), self.lam
        values, inverse = _Interval(f, lam), _IntervalInverse(f, lam)
        return SingularParametrization(self, shape, min(shape[-2:]), values, inverse, triv)


@dataclass(frozen=True)
class _Interval:
    f: Callable[[Tensor], Tensor]
    lam: float

    def __call__(self, s: Tensor) -> Tensor:
        return 1.0 + self.lam * self.f(s)


@dataclass(frozen=True)
class _IntervalInverse:
    f: ScalarMap
    lam: float

    def __call__(self, sigma: Tensor) -> Tensor:
        scale = self.lam if self.lam > 0.0 else 1.0
        return self.f.inverse(((sigma - 1.0) / scale).clamp(-1.0, 1.0))
