r"""Hyperbolic space in the Lorentz (hyperboloid) model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet.manifolds._base import root
from orthonet.manifolds._curved.sphere import Curved, arc_ratio
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import MappedParametrization

__all__ = ["Hyperbolic"]


def _lorentz(u: Tensor, v: Tensor) -> Tensor:
    """Return minus the product of the first entries plus that of the others."""
    return (u[..., 1:] * v[..., 1:]).sum(-1) - u[..., 0] * v[..., 0]


def _cosh_sinhc(s: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return \(\cosh\sqrt s\) and \(\sinh\sqrt s / \sqrt s\), smooth at 0."""
    small = s < 1e-3
    root = torch.where(small, torch.ones_like(s), s).sqrt()
    near = torch.where(small, s, torch.zeros_like(s))
    cosh = 1.0 + near / 2.0 * (1.0 + near / 12.0 * (1.0 + near / 30.0 * (1.0 + near / 56.0)))
    sinhc = 1.0 + near / 6.0 * (1.0 + near / 20.0 * (1.0 + near / 42.0 * (1.0 + near / 72.0)))
    return torch.where(small, cosh, root.cosh()), torch.where(small, sinhc, root.sinh() / root)


@dataclass(frozen=True)
class Hyperbolic(Curved):
    r"""Vectors \(x \in \mathbb{R}^{n+1}\) with \(-x_0^2 + \sum_i x_i^2 = -r^2\), \(x_0 > 0\).

    Samples are the exponential at the origin of Gaussian tangent vectors of variance r².

    The metric is the Lorentz product, positive definite on tangent vectors; the curvature is
    \(-1/r^2\).

    Attributes:
        radius: r, positive.

    Examples:
        >>> Hyperbolic().project(torch.tensor([0.0, 3.0, 4.0])).square()
        tensor([26.,  9., 16.])

    References:
        Nickel & Kiela, *Learning continuous hierarchies in the Lorentz model of hyperbolic
        geometry*, ICML 2018.
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n for vectors of n + 1 entries."""
        return shape[-1] - 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        expected = self.project(x)[..., 0]
        reason = "the first entry must be the root of r² plus the squares of the others"
        yield reason, (x[..., 0] - expected).abs() / expected

    def project(self, x: Tensor) -> Tensor:
        r"""Return the point above the last n entries: \(x_0 = \sqrt{r^2 + \sum x_i^2}\)."""
        return self._lift(x[..., 1:])

    def _lift(self, c: Tensor) -> Tensor:
        radius = c.new_full((*c.shape[:-1], 1), self.radius)
        first = torch.linalg.vector_norm(torch.cat([radius, c], -1), dim=-1, keepdim=True)
        return torch.cat([first, c], -1)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the Lorentz-orthogonal projection onto the tangent space."""
        return v + x * (_lorentz(x, v) / self.radius**2)[..., None]

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the Lorentz product."""
        return _lorentz(u, v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the Riemannian gradient: the first entry changes sign, then the projection."""
        return self.tangent(x, torch.cat([-grad[..., :1], grad[..., 1:]], -1))

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic from `x` in direction `v`, at time 1."""
        s = _lorentz(v, v).clamp_min(0.0)[..., None] / self.radius**2
        cosh, sinhc = _cosh_sinhc(s)
        return self.project(x * cosh + v * sinhc)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at `x` with exp(x, v) = y."""
        s = -self._chord(x, y)[..., None]
        return self.tangent(x, y - x) * arc_ratio(s, 1.0 - s)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(2 r \operatorname{arsinh}(\|x - y\|_L / 2 r)\), accurate for near points."""
        return 2.0 * self.radius * torch.asinh(root(self._chord(x, y)))

    def _chord(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(\|x - y\|_L^2 / 4 r^2\)."""
        return _lorentz(x - y, x - y).clamp_min(0.0) / (4.0 * self.radius**2)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the exponential."""
        return self.exp(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport `v` in parallel along the geodesic."""
        factor = _lorentz(y, v) / (self.radius**2 - _lorentz(x, y))
        return v + factor[..., None] * (x + y)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        v = torch.randn(shape, **made) * self.radius
        v = torch.cat([torch.zeros_like(v[..., :1]), v[..., 1:]], -1)
        return self.exp(self._lift(torch.zeros_like(v[..., 1:])), v)

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        """Return the chart of the last n entries, which covers the space."""
        n = self.check_shape(shape)[-1] - 1
        return MappedParametrization(self, shape, self._lift, _tail, n)


def _tail(x: Tensor) -> Tensor:
    return x[..., 1:]
