"""geoopt's two models of hyperbolic space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks, manifolds
from orthonet.compat.geoopt._manifolds import Manifold, ManifoldTensor, located, sizes_of

__all__ = ["Lorentz", "PoincareBall", "PoincareBallExact"]


@dataclass(frozen=True)
class StraightBall(manifolds.PoincareBall):
    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        return self.project(x + v)


class _Hyperbolic(Manifold):
    """What the two models share: maps from and to the origin, learning of the curvature refused."""

    def __init__(self, space: manifolds.Manifold, learnable: bool) -> None:
        _checks.require(
            not learnable,
            self,
            "the curvature is a fixed number",
            "Scale distances by a parameter of your own",
            learnable=learnable,
        )
        super().__init__(space)

    def _zero(self, x: Tensor) -> Tensor:
        return self.projx(torch.zeros_like(x))

    def dist0(self, x: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the distance from the origin."""
        return self.dist(self._zero(x), x, keepdim=keepdim)

    def expmap0(self, u: Tensor) -> Tensor:
        """Follow the geodesic from the origin."""
        return self.expmap(self._zero(u), u)

    def logmap0(self, x: Tensor) -> Tensor:
        """Return the tangent vector at the origin that leads to `x`."""
        return self.logmap(self._zero(x), x)

    def transp0(self, y: Tensor, u: Tensor) -> Tensor:
        """Carry `u` from the origin to `y`."""
        return self.transp(self._zero(y), y, u)

    def transp0back(self, x: Tensor, u: Tensor) -> Tensor:
        """Carry `u` from `x` to the origin."""
        return self.transp(x, self._zero(x), u)

    def random_normal(
        self, *size: Any, mean: Any = 0.0, std: Any = 1.0, dtype: Any = None, device: Any = None
    ) -> ManifoldTensor:
        """Follow the geodesic of a Gaussian vector of length about `std` from the origin."""
        shape = self.space.check_shape(sizes_of(size))
        u = torch.randn(shape, dtype=dtype, device=device) * std / shape[-1] ** 0.5 + mean
        u = self.proju(self._zero(u), u)
        return located(self.expmap0(u), self)


class PoincareBall(_Hyperbolic):
    """The ball of radius 1 / sqrt(c), of curvature -c."""

    name = "Poincare ball"

    def __init__(self, c: float = 1.0, learnable: bool = False) -> None:
        super().__init__(self._space(float(c) ** -0.5), learnable)
        self.c = c

    def _space(self, radius: float) -> manifolds.PoincareBall:
        return StraightBall(radius)

    @property
    def k(self) -> float:
        """The curvature."""
        return -self.c

    def lambda_x(self, x: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the conformal factor."""
        factor = 2.0 / (1.0 - self.c * (x * x).sum(-1, keepdim=True))
        return factor if keepdim else factor[..., 0]

    def mobius_add(self, x: Tensor, y: Tensor) -> Tensor:
        """Translate y by x."""
        ball: Any = self.space
        return self.projx(ball.add(x, y))

    def mobius_sub(self, x: Tensor, y: Tensor) -> Tensor:
        """Translate -y by x."""
        return self.mobius_add(x, -y)

    def mobius_scalar_mul(self, r: Any, x: Tensor) -> Tensor:
        """Move x along its geodesic from the origin, r times as far."""
        return self.expmap0(r * self.logmap0(x))

    def mobius_matvec(self, m: Tensor, x: Tensor) -> Tensor:
        """Apply the matrix m in the tangent space of the origin."""
        u = (m @ self.logmap0(x)[..., None])[..., 0]
        return self.expmap0(u)


class PoincareBallExact(PoincareBall):
    """The retraction is the exponential."""

    def _space(self, radius: float) -> manifolds.PoincareBall:
        return manifolds.PoincareBall(radius)


class Lorentz(_Hyperbolic):
    """The hyperboloid -x0² + sum xi² = -k, of curvature -1 / k."""

    name = "Lorentz"

    def __init__(self, k: float = 1.0, learnable: bool = False) -> None:
        super().__init__(manifolds.Hyperbolic(float(k) ** 0.5), learnable)
        self.k = k

    def norm(self, u: Tensor, *rest: Tensor, keepdim: bool = False) -> Tensor:
        """Return the length of the tangent vector `u`; geoopt leaves the point out here."""
        return super().norm(u, rest[0] if rest else u, keepdim=keepdim)
