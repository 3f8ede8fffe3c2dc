r"""Entries in an interval, vectors and matrices in a ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.spectral_map import singular_map
from orthonet.manifolds._base import Manifold, check_radius
from orthonet.manifolds._factorized import SingularParametrization
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import MappedParametrization
from orthonet.manifolds.scalar import Scalar, absolute, bounded_map, fold, positive_map
from orthonet.manifolds.trivialization import Triv

__all__ = ["Bounded", "Nonnegative", "NormBall", "SpectralBall"]


@dataclass(frozen=True)
class Nonnegative(Manifold):
    r"""Tensors with entries \(\ge 0\). Every entry is a point of its own.

    Examples:
        >>> Nonnegative().project(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    event_ndim = 0

    def dimension(self, shape: Sequence[int]) -> int:
        """Return 1 for each entry, all of which are batch dimensions."""
        return 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "no entry may be negative", (-x).clamp_min(0.0)

    def project(self, x: Tensor) -> Tensor:
        """Set negative entries to 0."""
        return x.clamp_min(0.0)

    def parametrization(self, shape: Sequence[int], *, f: Scalar | None = None) -> Parametrization:
        """Return the absolute value (of slope 1 at 0), or another map, entry by entry.

        Args:
            shape: Of values.
            f: None for the absolute value, which reaches 0; or a map to the positive numbers:
                "softplus", "exp", a function, or a pair of a function and its inverse.
        """
        if f is None:
            return MappedParametrization(self, shape, absolute, absolute)
        f = positive_map(self, f)
        return MappedParametrization(self, shape, f, f.inverse)


@dataclass(frozen=True)
class Bounded(Manifold):
    """Tensors with entries in [low, high].

    Samples are uniform.

    Attributes:
        low: Smallest value.
        high: Largest value.

    Examples:
        >>> Bounded(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float = -1.0
    high: float = 1.0
    event_ndim = 0

    def __post_init__(self) -> None:
        _checks.require(
            all(
                isinstance(end, (int, float)) and math.isfinite(end)
                for end in (self.low, self.high)
            )
            and self.low < self.high,
            self,
            "low must be less than high, both finite",
            "Nonnegative() has no upper end",
            low=self.low,
            high=self.high,
        )

    def dimension(self, shape: Sequence[int]) -> int:
        """Return 1 for each entry, all of which are batch dimensions."""
        return 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        reason = f"all entries must be in [{self.low:g}, {self.high:g}]"
        outside = torch.maximum(x - self.high, self.low - x).clamp_min(0.0)
        yield reason, outside / max(abs(self.low), abs(self.high))

    def project(self, x: Tensor) -> Tensor:
        """Clamp the entries to the interval."""
        return x.clamp(self.low, self.high)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(shape, **made)

    def parametrization(self, shape: Sequence[int], *, f: Scalar = "fold") -> Parametrization:
        """Return a map of the reals onto [-1, 1], scaled to the interval, entry by entry.

        Args:
            shape: Of values.
            f: "fold" (a triangle wave, of slope 1 or -1 at the ends too), "sin", "tanh",
                "scaled_sigmoid", a function, or a pair of a function and its inverse.
        """
        values = _Scaled(
            bounded_map(self, f), (self.high + self.low) / 2, (self.high - self.low) / 2
        )
        return MappedParametrization(self, shape, values, values.inverse)


@dataclass(frozen=True)
class _Scaled:
    f: Callable[[Tensor], Tensor]
    middle: float
    half: float

    def __call__(self, s: Tensor) -> Tensor:
        return self.middle + self.half * self.f(s / self.half)

    def inverse(self, x: Tensor) -> Tensor:
        inner = ((x - self.middle) / self.half).clamp(-1.0, 1.0)
        return self.f.inverse(inner) * self.half


@dataclass(frozen=True)
class NormBall(Manifold):
    """Vectors along the last dimension of Euclidean norm at most `radius`.

    Attributes:
        radius: Positive.

    Examples:
        >>> NormBall(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: float = 1.0
    event_ndim = 1

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n."""
        return shape[-1]

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        norm = torch.linalg.vector_norm(x, dim=-1) / self.radius
        yield f"the norm must be at most {self.radius:g}", (norm - 1.0).clamp_min(0.0)

    def project(self, x: Tensor) -> Tensor:
        """Scale longer vectors down to the radius."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (self.radius / norm.clamp_min(self.radius))

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        """Return the identity inside; beyond the radius, the norm is folded back.

        Unlike the projection, it has a radial slope (1 or -1) everywhere but at its corners, so
        that no vector gets stuck on the boundary.
        """
        return MappedParametrization(self, shape, _Folded(self.radius), _same)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Folded:
    radius: float

    def __call__(self, c: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(c, dim=-1, keepdim=True)
        beyond = norm > self.radius
        safe = torch.where(beyond, norm, torch.full_like(norm, self.radius))
        folded = fold(safe / self.radius) * (self.radius / safe)
        return torch.where(beyond, c * folded, c)


@dataclass(frozen=True)
class SpectralBall(Manifold):
    """Matrices of spectral norm at most `radius`: linear maps with that Lipschitz constant.

    Attributes:
        radius: Positive.

    Examples:
        >>> SpectralBall(1.0).project(torch.diag(torch.tensor([3.0, 0.5]))).diagonal()
        tensor([1.0000, 0.5000])
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n k."""
        return shape[-2] * shape[-1]

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        sigma = torch.linalg.svdvals(x) / self.radius
        yield f"the spectral norm must be at most {self.radius:g}", (sigma - 1.0).clamp_min(0.0)

    def project(self, x: Tensor) -> Tensor:
        """Cut larger singular values down to the radius."""
        return singular_map(x, self._cut)

    def _cut(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma.clamp_max(self.radius), (sigma <= self.radius).to(sigma.dtype)

    def parametrization(
        self, shape: Sequence[int], *, f: Scalar = "fold", triv: Triv = "exponential"
    ) -> Parametrization:
        r"""Return \(U \operatorname{diag}(r f(s)) V^\top\), with n k coordinates.

        Args:
            shape: Of values.
            f: A map to [-1, 1]: "fold", "sin", "tanh", "scaled_sigmoid", a function, or a pair of
                a function and its inverse.
            triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
        """
        values = _Scaled(bounded_map(self, f), 0.0, self.radius)
        return SingularParametrization(self, shape, min(shape[-2:]), values, values.inverse, triv)
