r"""Hurwitz matrices: those of stable linear differential equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.matrix import high
from orthonet.linalg.packing import pack_skew, unpack_skew
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._low_rank import Init, filled
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds.maps import MappedParametrization
from orthonet.manifolds.scalar import Scalar, positive_map

__all__ = ["Hurwitz", "lyapunov"]


def lyapunov(a: Tensor) -> Tensor:
    r"""Return the P with \(A^\top P + P A = -I\), positive definite where A is stable.

    With \(U = (A - pI)^{-1} (A + pI)\), P is the sum of \((U^\top)^k R\,U^k\) over k, where
    \(R = 2p\,(A - pI)^{-\top} (A - pI)^{-1}\). Each round doubles the number of terms. All terms
    are semidefinite, so that nothing cancels.

    References:
        Smith, *Matrix equation XA + BX = C*, SIAM J. Appl. Math. 16 (1968).
    """
    n = max(a.shape[-1], 1)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    # near the geometric mean of the moduli of the eigenvalues
    shift = (torch.linalg.slogdet(a).logabsdet / n).exp()[..., None, None]
    inverse = torch.linalg.inv_ex(a - shift * identity)[0]
    u = inverse @ (a + shift * identity)
    p = 2.0 * shift * inverse.mT @ inverse
    for _ in range(64):
        p = p + u.mT @ p @ u
        u = u @ u
        # a product that is not finite belongs to a matrix that is not stable
        if not bool((torch.linalg.matrix_norm(u) > torch.finfo(u.dtype).eps).any()):
            break
    return 0.5 * (p + p.mT)


@dataclass(frozen=True)
class Hurwitz(Manifold):
    r"""n x n matrices whose eigenvalues have real parts below \(-\alpha\): an open set.

    Samples are \((I + VV^\top)(K - K^\top - \tfrac12(I + WW^\top)) - \alpha I\) with entries of
    variance 1 / n.

    Solutions of \(\dot x = A x\) decay at least as fast as \(e^{-\alpha t}\).

    Attributes:
        alpha: The rate of decay, at least 0.

    Examples:
        >>> x = Hurwitz(0.5).project(torch.eye(2))
        >>> bool((torch.linalg.eigvals(x).real < -0.5).all())
        True

    References:
        Gillis & Sharma, *On computing the distance to stability for matrices using linear
        dissipative Hamiltonian systems*, Automatica 85 (2017).
    """

    alpha: float = 0.0

    def __post_init__(self) -> None:
        _checks.in_range(self, 0.0, float("inf"), alpha=self.alpha)

    square = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n²."""
        return shape[-1] ** 2

    def _abscissa(self, x: Tensor) -> Tensor:
        r"""Return the largest real part of an eigenvalue, plus \(\alpha\)."""
        return torch.linalg.eigvals(x).real.amax(-1) + self.alpha

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        if x.shape[-1]:
            size = torch.linalg.matrix_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
            reason = f"every eigenvalue must have a real part below {-self.alpha:g} (relatively)"
            yield reason, self._abscissa(x).clamp_min(0.0) / size

    def project(self, x: Tensor) -> Tensor:
        r"""Subtract the multiple of the identity that makes `x` stable, where it is not.

        Then the largest real part is \(-\alpha - \|x\|_F / 100\). This is a near matrix, not the
        nearest one, which would lie on the boundary.
        """
        return self.shifted(x, 1e-2)

    def shifted(self, x: Tensor, margin: float) -> Tensor:
        """Project to the distance `margin` from the boundary, in units of the norm."""
        if x.is_meta or not x.numel():
            return x.clone()
        work = high(x).detach()
        size = torch.linalg.matrix_norm(work)
        least = margin * torch.where(size > 0, size, 1.0)
        excess = self._abscissa(work)
        # an eigenvalue next to the axis may be rounding's
        inside = excess < -torch.finfo(x.dtype).eps * size
        shift = torch.where(inside, 0.0, excess + least).to(x.dtype)[..., None, None]
        return x - shift * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def _draw(
        self, shape: tuple[int, ...], made: dict[str, Any], init_: Init | None = None
    ) -> Tensor:
        scale = max(shape[-1], 1) ** -0.5
        v, w, k = (filled(shape, made, init_, scale) for _ in range(3))
        identity = torch.eye(shape[-1], dtype=v.dtype, device=v.device)
        x = (identity + v @ v.mT) @ (k - k.mT - 0.5 * (identity + w @ w.mT))
        return x - self.alpha * identity

    def parametrization(self, shape: Sequence[int], *, f: Scalar = "softplus") -> Parametrization:
        r"""Return \(A = L L^\top (S - \tfrac12 I) - \alpha I\), each A once, in n² coordinates.

        L is lower triangular with a positive diagonal, S skew-symmetric. \((L L^\top)^{-1}\)
        solves the Lyapunov equation of \(A + \alpha I\) with the right-hand side \(-I\).

        Args:
            shape: Of values.
            f: A map to the positive numbers, for the diagonal of L: "softplus", "exp", "absolute",
                a function, or a pair of a function and its inverse.
        """
        size = self.check_shape(shape)[-1]
        maps = _Lyapunov(size, self, positive_map(self, f))
        return MappedParametrization(self, shape, maps.value, maps.coordinates, size * size)


@dataclass(frozen=True)
class _Lyapunov:
    """The two directions of the parametrization."""

    n: int
    space: Hurwitz
    f: Callable[[Tensor], Tensor]

    def value(self, c: Tensor) -> Tensor:
        n = self.n
        diagonal, below, skew = c.split([n, n * (n - 1) // 2, n * (n - 1) // 2], -1)
        lower = unpack_skew(below, n).tril(-1) + torch.diag_embed(self.f(diagonal))
        half = torch.eye(n, dtype=c.dtype, device=c.device)
        return lower @ (lower.mT @ (unpack_skew(skew, n) - 0.5 * half)) - self.space.alpha * half

    def coordinates(self, x: Tensor) -> Tensor:
        # what rounding took off the space: the farther in, the better the equation is posed
        a = self.space.shifted(high(x), torch.finfo(x.dtype).eps ** 0.5)
        a = a + self.space.alpha * torch.eye(self.n, dtype=a.dtype, device=a.device)
        p = lyapunov(a)
        lower = _inverse_factor(p)
        skew = p @ a
        diagonal = self.f.inverse(lower.diagonal(dim1=-2, dim2=-1))
        parts = [diagonal, pack_skew(lower.tril(-1)), pack_skew(0.5 * (skew - skew.mT))]
        return torch.cat(parts, -1).to(x.dtype)


def _inverse_factor(p: Tensor) -> Tensor:
    r"""Return the lower triangular L with a positive diagonal and \(L L^\top = P^{-1}\)."""
    upper = torch.linalg.cholesky(p.flip(-2, -1)).flip(-2, -1)  # P = R R^T, R upper
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).expand_as(p)
    return torch.linalg.solve_triangular(upper.mT, identity, upper=False)
