r"""Subspaces: the Grassmann manifold, in the form of orthonormal bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg import polar
from orthonet.linalg.spectral_map import eigen_map
from orthonet.manifolds._curved.sphere import arc_ratio
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._stiefel import Stiefel
from orthonet.manifolds.trivialization import FrameTrivialization, Triv

__all__ = ["Gr", "Grassmannian"]


@dataclass(frozen=True)
class Grassmannian(Stiefel):
    r"""The k-dimensional subspaces of \(\mathbb{R}^n\), each given by an orthonormal basis X.

    Two bases X and X R of one subspace are the same point: a function of it must not depend on R.
    Tangent vectors are the horizontal ones, \(X^\top v = 0\); the metric is
    \(\operatorname{tr} u^\top v\).

    Examples:
        >>> x, flipped = torch.eye(3)[:, :2], torch.eye(3)[:, [1, 0]]
        >>> Grassmannian().equal(x, flipped)
        True
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """Return k (n - k), with k the smaller side."""
        n, k = max(shape[-2:]), min(shape[-2:])
        return k * (n - k)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return \((I - x x^\top) v\)."""
        if x.shape[-2] < x.shape[-1]:
            return self.tangent(x.mT, v.mT).mT
        return v - x @ (x.mH @ v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the horizontal part of the gradient."""
        return self.tangent(x, grad)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the shortest horizontal vector at `x` that leads to the subspace of `y`.

        First \(y^\top x = P H\) aligns the bases. The eigenvalues of H are the cosines of the
        angles \(\theta\), and \((I - x x^\top) y P\,g(H)\) is the vector, with
        \(g(\cos\theta) = \theta / \sin\theta\).

        References:
            Bendokat, Zimmermann & Absil, *A Grassmann manifold handbook*, Adv. Comput. Math. 50
            (2024), algorithm 5.3.
        """
        if x.shape[-2] < x.shape[-1]:
            return self.log(x.mT, y.mT).mT
        aligned = y @ polar(y.mT @ x)  # the basis of span(y) nearest to x
        return self.tangent(x, aligned - x) @ eigen_map(x.mT @ aligned, _angle_over_sine)

    def angles(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the principal angles of the subspaces, descending; small ones are accurate too."""
        return torch.linalg.svdvals(self.log(x, y))[..., : min(x.shape[-2:])]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Root of the sum of the squared principal angles."""
        _checks.require(
            x.shape[-2:] == y.shape[-2:],
            self,
            "both points must have the same shape",
            "Subspaces of different dimensions have no distance here",
            x=x,
            y=y,
        )
        return self.norm(x, self.log(x, y))

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the Frobenius inner product (of horizontal vectors)."""
        return (u.conj() * v).real.sum((-2, -1)) if u.is_complex() else (u * v).sum((-2, -1))

    def parametrization(
        self,
        shape: Sequence[int],
        *,
        triv: Triv = "exponential",
        dtype: torch.dtype | None = None,
    ) -> Parametrization:
        """Return a trivialization with horizontal tangent vectors, of k (n - k) coordinates."""
        return FrameTrivialization(self, shape, triv, rotate=False, dtype=dtype)

    def equal(self, x: Tensor, y: Tensor, atol: float = 1e-6) -> bool:
        """Return whether two bases span the same subspace."""
        return bool((self.distance(x, y) <= atol).all())


def _angle_over_sine(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return angle over sine of angles up to a right one, by their cosine, and its slope."""
    cosine = cosine.clamp(0.0, 1.0)
    small = cosine > 0.999
    s = torch.where(small, 0.5 * (1.0 - cosine), torch.zeros_like(cosine))
    c = torch.where(small, torch.zeros_like(cosine), cosine)
    ratio = torch.where(small, arc_ratio(s, 1.0 - s), torch.acos(c) / torch.sqrt(1.0 - c * c))
    series = -1.0 / 3.0 - s * (8.0 / 15.0) - s * s * (24.0 / 35.0) - s**3 * (256.0 / 315.0)
    return ratio, torch.where(small, series, (c * ratio - 1.0) / (1.0 - c * c))


Gr = Grassmannian
