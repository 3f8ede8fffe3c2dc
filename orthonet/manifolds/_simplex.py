r"""Probability vectors, stochastic matrices, and doubly stochastic ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.sinkhorn import sinkhorn
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._curved.sphere import Sphere
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import MappedParametrization
from orthonet.manifolds.scalar import absolute

__all__ = ["DoublyStochastic", "FisherRaoSimplex", "Simplex"]


def _exponential(shape: tuple[int, ...], *, generator: Any, **made: Any) -> Tensor:
    return torch.empty(shape, **made).exponential_(generator=generator)


@dataclass(frozen=True)
class Simplex(Manifold):
    r"""Vectors along the last dimension with entries \(\ge 0\) that sum to 1.

    Samples are uniform.

    A matrix of them is row-stochastic.

    Examples:
        >>> Simplex().project(torch.tensor([1.0, 0.0, 1.0]))
        tensor([0.5000, 0.0000, 0.5000])
    """

    event_ndim = 1

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        return None if shape[-1] >= 1 else "the vectors must have at least one entry"

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n - 1."""
        return shape[-1] - 1

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "no entry may be negative", (-x).clamp_min(0.0).amax(-1)
        yield "the entries must sum to 1", (x.sum(-1) - 1.0).abs()

    def project(self, x: Tensor) -> Tensor:
        r"""Return the nearest point, \(\max(x - \tau, 0)\) with the \(\tau\) that makes the sum 1.

        References:
            Duchi, Shalev-Shwartz, Singer & Chandra, *Efficient projections onto the l1-ball*, ICML
            2008.
        """
        ordered = x.sort(-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        thresholds = (ordered.cumsum(-1) - 1.0) / count
        last = (ordered > thresholds).sum(-1, keepdim=True).clamp_min(1) - 1
        result = (x - thresholds.gather(-1, last)).clamp_min(0.0)
        return result / result.sum(-1, keepdim=True)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return `v` less its mean (in the interior)."""
        return v - v.mean(-1, keepdim=True)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        x = _exponential(shape, **made)
        return x / x.sum(-1, keepdim=True)

    def parametrization(self, shape: Sequence[int], *, f: str = "absolute") -> Parametrization:
        r"""Return \(|s| / \sum |s|\), which reaches the boundary, or the softmax, which does not.

        Args:
            shape: Of values.
            f: "absolute" or "softmax".
        """
        _checks.one_of(self, ("absolute", "softmax"), f=f)
        if f == "softmax":
            return MappedParametrization(self, shape, _softmax, _logarithm)
        return MappedParametrization(self, shape, _normalized, absolute)


@dataclass(frozen=True)
class FisherRaoSimplex(Simplex):
    r"""Positive vectors that sum to 1, with the Fisher-Rao metric \(\sum_i u_i v_i / x_i\).

    \(x \mapsto 2 \sqrt x\) is an isometry onto a part of the sphere of radius 2, which gives all
    formulas; a geodesic that would leave the simplex is reflected at its boundary. `project`
    keeps every entry above the rounding unit, since the metric is infinite at zero.

    Examples:
        >>> x, y = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
        >>> round(FisherRaoSimplex().distance(x, y).item(), 4)
        1.8546

    References:
        Amari & Nagaoka, *Methods of information geometry*, 2000; Åström, Petra, Schmitzer &
        Schnörr, *Image labeling by assignment*, J. Math. Imaging Vis. 58 (2017).
    """

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point of the simplex, moved inside where an entry would be zero."""
        return self._inside(super().project(x))

    @staticmethod
    def _inside(x: Tensor) -> Tensor:
        x = x.clamp_min(torch.finfo(x.dtype).eps)
        return x / x.sum(-1, keepdim=True)

    def _up(self, x: Tensor) -> Tensor:
        return 2.0 * x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the Fisher information of the two directions."""
        return (u * v / x.clamp_min(torch.finfo(x.dtype).tiny)).sum(-1)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return `v` less its sum times `x`: orthogonal for the metric."""
        return v - x * v.sum(-1, keepdim=True)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the natural gradient, `x` times the gradient less its mean under `x`."""
        return self.tangent(x, x * grad)

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the geodesic from `x` in direction `v`, at time 1."""
        s = self._up(x)
        y = Sphere(2.0).exp(s, 2.0 * v / s)
        return self._inside(0.25 * y * y)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at `x` with exp(x, v) = y."""
        s = self._up(x)
        return self.tangent(x, 0.5 * s * Sphere(2.0).log(s, self._up(y)))

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return \(2 \arccos \sum_i \sqrt{x_i y_i}\), accurate for near points."""
        return Sphere(2.0).distance(self._up(x), self._up(y))

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow the exponential."""
        return self.exp(x, v)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport `v` in parallel along the geodesic."""
        s, t = self._up(x), self._up(y)
        return 0.5 * t * Sphere(2.0).transport(s, t, 2.0 * v / s)


def _softmax(s: Tensor) -> Tensor:
    return s.softmax(-1)


def _logarithm(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()


def _normalized(s: Tensor) -> Tensor:
    size = absolute(s)
    total = size.sum(-1, keepdim=True)
    even = torch.full_like(s, 1.0 / s.shape[-1])
    return torch.where(
        total > 0, size / torch.where(total > 0, total, torch.ones_like(total)), even
    )


@dataclass(frozen=True)
class DoublyStochastic(Manifold):
    r"""n x n matrices with entries \(\ge 0\), rows and columns of which sum to 1.

    Samples are matrices of exponential variables, scaled to the sums.

    The interior is what the parametrization reaches; permutation matrices are its limits.

    Examples:
        >>> x = DoublyStochastic().project(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        >>> x.sum(0).allclose(torch.ones(2), atol=1e-5)
        True
    """

    square = True

    def _shape_problem(self, shape: Sequence[int]) -> str | None:
        empty = None if shape[-1] else "the matrix must not be empty"
        return super()._shape_problem(shape) or empty

    def dimension(self, shape: Sequence[int]) -> int:
        """Return (n - 1)²."""
        return (shape[-1] - 1) ** 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "no entry may be negative", (-x).clamp_min(0.0).amax((-2, -1))
        yield "all rows must sum to 1", (x.sum(-1) - 1.0).abs().amax(-1)
        yield "all columns must sum to 1", (x.sum(-2) - 1.0).abs().amax(-1)

    def project(self, x: Tensor) -> Tensor:
        """Scale rows and columns until they sum to 1; entries <= 0 are taken as 0.001 / n.

        This is the nearest point in relative entropy to that matrix, not in the Frobenius norm.
        """
        return sinkhorn(torch.where(x > 0, x, 1e-3 / x.shape[-1]).log())

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return `v` less its row and column means: all sums zero."""
        rows, columns = v.mean(-1, keepdim=True), v.mean(-2, keepdim=True)
        return v - rows - columns + v.mean((-2, -1), keepdim=True)

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        return sinkhorn(_exponential(shape, **made).clamp_min(1e-6).log())

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        r"""Return the Sinkhorn scaling of \(e^s\); the coordinates are n² logarithms."""
        return MappedParametrization(self, shape, sinkhorn, _logarithm)
