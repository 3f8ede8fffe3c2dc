r"""Hyperbolic space in the Poincaré ball model, and the isometries to the hyperboloid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet.manifolds._base import root
from orthonet.manifolds._curved.hyperbolic import Hyperbolic
from orthonet.manifolds._curved.sphere import Curved
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import MappedParametrization

__all__ = ["PoincareBall"]


@dataclass(frozen=True)
class PoincareBall(Curved):
    r"""Vectors of norm below `radius`, with the metric \(\lambda_x^2 \langle u, v\rangle\).

    \(\lambda_x = 2 / (1 - \|x\|^2 / r^2)\); the curvature is \(-1/r^2\), as that of
    `Hyperbolic(radius)`, to which `to_hyperboloid` is an isometry. Points next to the boundary lose
    digits here that they keep there: `project` keeps \(\|x\| \le r (1 - 16\,\mathrm{eps})\).

    Attributes:
        radius: The radius, positive. In the notation of curvature -c it is \(1/\sqrt c\).

    Examples:
        >>> ball = PoincareBall()
        >>> round(ball.distance(torch.zeros(2), torch.tensor([0.5, 0.0])).item(), 4)  # 2 artanh 0.5
        1.0986

    References:
        Ganea, Bécigneul & Hofmann, *Hyperbolic neural networks*, NeurIPS 2018; Ungar, *A gyrovector
        space approach to hyperbolic geometry*, 2009.
    """

    @property
    def hyperboloid(self) -> Hyperbolic:
        """The same space in the Lorentz model."""
        return Hyperbolic(self.radius)

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n."""
        return shape[-1]

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        norm = torch.linalg.vector_norm(x, dim=-1)
        yield f"the norm must be below {self.radius:g}", torch.where(norm < self.radius, 0.0, norm)

    def project(self, x: Tensor) -> Tensor:
        """Move vectors outside along their ray to just inside of the boundary."""
        largest = self.radius * (1.0 - 16.0 * torch.finfo(x.dtype).eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.where(norm > largest, x * (largest / torch.where(norm > 0, norm, 1.0)), x)

    def _gap(self, x: Tensor) -> Tensor:
        r"""Return \(1 - \|x\|^2 / r^2 = 2 / \lambda_x\), with the last dimension kept."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.radius
        return ((1.0 - norm) * (1.0 + norm)).clamp_min(torch.finfo(x.dtype).eps)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        r"""Return \(\lambda_x^2 \langle u, v\rangle\)."""
        return super().inner(x, u, v) * (2.0 / self._gap(x)[..., 0]).square()

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        r"""Return \(G / \lambda_x^2\)."""
        return grad * (0.5 * self._gap(x)).square()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the Möbius sum \(x \oplus y\), y under the translation that takes 0 to x."""
        c = 1.0 / self.radius**2
        xy = c * (x * y).sum(-1, keepdim=True)
        xx, yy = (c * (t * t).sum(-1, keepdim=True) for t in (x, y))
        bottom = (1.0 + 2.0 * xy + xx * yy).clamp_min(torch.finfo(x.dtype).tiny)
        return ((1.0 + 2.0 * xy + yy) * x + (1.0 - xx) * y) / bottom

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \(x \oplus r \tanh(\lambda_x \|v\| / 2r)\,v / \|v\|\)."""
        gap = self._gap(x)
        length = root((v * v).sum(-1, keepdim=True)) / (self.radius * gap)
        return self.project(self.add(x, self.project(v / gap * _tanh_ratio(length))))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at `x` with exp(x, v) = y."""
        w = self.project(self.add(-x, y))
        length = root((w * w).sum(-1, keepdim=True)) / self.radius
        return self._gap(x) * w * _artanh_ratio(length)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(2 r \operatorname{arsinh}\big(\|x - y\| / (r \sqrt{(1 - x^2)(1 - y^2)})\big)\).

        Here \(x^2\) stands for \(\|x\|^2 / r^2\).
        """
        square = ((x - y) * (x - y)).sum(-1) / self.radius**2
        return 2.0 * self.radius * torch.asinh(root(square / (self._gap(x) * self._gap(y))[..., 0]))

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the exponential."""
        return self.exp(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        r"""Transport `v` in parallel along the geodesic.

        That is \(\mathrm{gyr}[y, -x] v\,\lambda_x / \lambda_y\).
        """
        c = 1.0 / self.radius**2
        a, b = y, -x
        av, bv, ab = (c * (p * q).sum(-1, keepdim=True) for p, q in ((a, v), (b, v), (a, b)))
        aa, bb = (c * (t * t).sum(-1, keepdim=True) for t in (a, b))
        left = -av * bb + bv + 2.0 * ab * bv
        right = -bv * aa - av
        bottom = (1.0 + 2.0 * ab + aa * bb).clamp_min(torch.finfo(v.dtype).tiny)
        return (v + 2.0 * (left * a + right * b) / bottom) * (self._gap(y) / self._gap(x))

    def to_hyperboloid(self, x: Tensor) -> Tensor:
        r"""Return the point \((r (1 + x^2),\, 2 x) / (1 - x^2)\) of `hyperboloid`, an isometry.

        Shape:
            `x`: `(*batch, n)`. Output: `(*batch, n + 1)`.
        """
        return self.hyperboloid.project(
            torch.cat([torch.zeros_like(x[..., :1]), self._tail(x)], -1)
        )

    def from_hyperboloid(self, x: Tensor) -> Tensor:
        r"""Return the inverse of `to_hyperboloid`, \(r\,(x_1, ..., x_n) / (r + x_0)\).

        Shape:
            `x`: `(*batch, n + 1)`. Output: `(*batch, n)`.
        """
        return self.project(self.radius * x[..., 1:] / (self.radius + x[..., :1]))

    def _tail(self, x: Tensor) -> Tensor:
        return 2.0 * x / self._gap(x)

    def _point(self, tail: Tensor) -> Tensor:
        square = (tail * tail).sum(-1, keepdim=True) / self.radius**2
        return self.project(tail / (1.0 + (1.0 + square).sqrt()))

    def sample(self, shape: Sequence[int], **options: Any) -> Tensor:
        """Return the exponential at 0 of a Gaussian tangent vector of variance r²."""
        return self.project(super().sample(shape, **options))  # the dtype may round outward

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        v = 0.5 * self.radius * torch.randn(shape, **made)
        return self.exp(torch.zeros_like(v), v)

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        """Return the chart of the last n entries on the hyperboloid, which covers the space."""
        n = self.check_shape(shape)[-1]
        return MappedParametrization(self, shape, self._point, self._tail, n)


def _tanh_ratio(t: Tensor) -> Tensor:
    """Return tanh(t) / t, smooth at 0, for t >= 0."""
    small = t < 0.03
    near, far = torch.where(small, t * t, 0.0), torch.where(small, 1.0, t)
    series = 1.0 - near / 3.0 * (
        1.0 - near * (2.0 / 5.0) * (1.0 - near * (17.0 / 42.0) * (1.0 - near * (62.0 / 153.0)))
    )
    return torch.where(small, series, far.tanh() / far)


def _artanh_ratio(t: Tensor) -> Tensor:
    """Return artanh(t) / t, smooth at 0, for 0 <= t < 1."""
    small = t < 0.03
    near, far = torch.where(small, t * t, 0.0), torch.where(small, 0.5, t)
    series = torch.full_like(near, 1.0 / 13.0)
    for k in (11, 9, 7, 5, 3, 1):
        series = 1.0 / k + near * series
    return torch.where(small, series, far.atanh() / far)
