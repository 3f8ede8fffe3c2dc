r"""Subspaces: the Grassmann manifold, in the form of orthonormal bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    def dimension(self, shape: Sequence[int]) -> int:
        """K (n - k), with k the smaller side."""
        n, k = max(shape[-2:]), min(shape[-2:])
        return k * (n - k)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        r"""\((I - x x^\top) v\)."""
        if x.shape[-2] < x.shape[-1]:
            return self.tangent(x.mT, v.mT).mT
        return v - x @ (x.mH @ v)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The horizontal part of the gradient."""
        return self.tangent(x, grad)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        r"""The shortest horizontal vector at `x` whose exponential spans the subspace of `y`.

        First \(y^\top x = P H\) aligns the bases, then
        \((I - x x^\top) y P = U \Sigma W^\top\) gives \(U \operatorname{atan2}(\Sigma, C) W^\top\).

        References:
            Bendokat, Zimmermann & Absil, *A Grassmann manifold handbook*, Adv. Comput. Math. 50
            (2024), algorithm 5.3.
        """
        if x.shape[-2] < x.shape[-1]:
            return self.log(x.mT, y.mT).mT
        q, _, rh = torch.linalg.svd(y.mH @ x)
        aligned = y @ (q @ rh)  # the basis of span(y) nearest to x
        u, sine, wh = torch.linalg.svd(aligned - x @ (x.mH @ aligned), full_matrices=False)
        cosine = torch.linalg.vector_norm(x.mH @ aligned @ wh.mH, dim=-2)
        return (u * torch.atan2(sine, cosine)[..., None, :]) @ wh

    def angles(self, x: Tensor, y: Tensor) -> Tensor:
        """Principal angles between the subspaces, descending; accurate for small ones too."""
        return torch.linalg.svdvals(self.log(x, y))[..., : min(x.shape[-2:])]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Root of the sum of the squared principal angles."""
        return self.angles(x, y).square().sum(-1).sqrt()

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Frobenius inner product (of horizontal vectors)."""
        return (u.conj() * v).real.sum((-2, -1)) if u.is_complex() else (u * v).sum((-2, -1))

    def parametrization(
        self,
        shape: Sequence[int],
        *,
        triv: Triv = "exponential",
        dtype: torch.dtype | None = None,
    ) -> Parametrization:
        """Dynamic trivialization with horizontal tangent vectors, of k (n - k) coordinates."""
        return FrameTrivialization(self, shape, triv, rotate=False, dtype=dtype)

    def equal(self, x: Tensor, y: Tensor, atol: float = 1e-6) -> bool:
        """Whether two bases span the same subspace."""
        return bool((self.distance(x, y) <= atol).all())


Gr = Grassmannian
