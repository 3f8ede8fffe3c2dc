r"""How the polar factor of a tall matrix is reached: three ways, each ended by what it measures.

A polynomial in the defect \(E = W^\top W / c^2 - I\) where that is small, an eigendecomposition of
the Gram matrix up to moderate condition numbers, and Newton-Schulz steps with an SVD behind them
for the rest. All work on the small side; none has state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.linalg._matrix import add_identity, gram_defect, require_finite, rms_scale

__all__ = [
    "Factors",
    "bjorck_polar",
    "contraction",
    "gram_polar",
    "polar_from_svd",
    "recentred_polar",
]

# (1 + e)^(-1/2) = sum of these times e^k
_TAYLOR = (1.0, -1 / 2, 3 / 8, -5 / 16, 35 / 128, -63 / 256, 231 / 1024)
_NEAR = 0.35  # beyond it, two passes and a general gradient cost as much as an eigendecomposition
_NEAR_START = 0.6  # the same where the gradient is that of a centred matrix


class Factors(NamedTuple):
    """The polar factor U of W = U H and, where they were computed, what diagonalizes H."""

    u: Tensor  # (*batch, m, n)
    vectors: Tensor  # (*batch, n, n), or (*batch, 0, 0)
    values: Tensor  # (*batch, n), or (*batch, 0)

    @staticmethod
    def bare(u: Tensor) -> Factors:
        """U alone."""
        batch = u.shape[:-2]
        return Factors(u, u.new_empty(*batch, 0, 0), u.new_empty(*batch, 0))


def _largest_norm(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a).amax())


def polar_from_svd(w: Tensor, owner: str = "polar") -> Tensor:
    """U V^T of the singular value decomposition, for any finite input."""
    require_finite(owner, w)
    u, _, vh = torch.linalg.svd(w / rms_scale(w), full_matrices=False)
    return u @ vh


def gram_polar(w: Tensor) -> Factors:
    """Polar factor of each matrix, by the cheapest way that its Gram matrix allows."""
    if 0 in w.shape:
        return Factors.bare(w.clone())
    x, gram, mean, scale = _normal_equations(w)
    u, _ = _near(x, gram, mean, _NEAR)
    if u is not None:
        return Factors.bare(u)
    factors = _by_eigenvectors(x, gram)
    return factors if scale is None else factors._replace(values=factors.values * scale[..., 0])


def recentred_polar(w: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Polar factor U, the scale c = ||W||_F / sqrt(n), and whether W is c U to rounding already.

    The scale is None where it cannot be squared in this precision (zero, huge, tiny).
    """
    if 0 in w.shape:
        return w.clone(), None, False
    x, gram, mean, scale = _normal_equations(w)
    u, defect = _near(x, gram, mean, _NEAR_START)
    centred = defect <= 16.0 * torch.finfo(w.dtype).eps * w.shape[-1] ** 0.5
    u = _by_eigenvectors(x, gram).u if u is None else u
    return u, mean.sqrt() if scale is None else None, centred


def _normal_equations(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return x = w / scale, its Gram matrix, the mean eigenvalue of that, and the scale if any."""
    gram = w.mT @ w
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    limits = torch.finfo(w.dtype)
    if bool(((mean > limits.tiny**0.5) & (mean < limits.max**0.5)).all()):
        return w, gram, mean, None
    require_finite("polar", w)
    scale = rms_scale(w)
    x = w / scale
    return x, x.mT @ x, torch.ones_like(scale), scale


def contraction(e: Tensor, enough: float) -> tuple[float, Tensor | None]:
    """An upper bound of the spectral norms of symmetric `e`, and e @ e where that was needed.

    The Frobenius norm if that is at most `enough`, else that of the square, which is closer.
    """
    bound = _largest_norm(e)
    if not bound > enough or bound > e.shape[-1] ** 0.25:  # then the other one exceeds 1 too
        return bound, None
    square = e @ e
    return min(bound, _largest_norm(square) ** 0.5), square


def _coefficients(degree: int, b: float) -> tuple[list[float], float]:
    """Economized series of (1 + e)^(-1/2) on |e| <= b, and a bound of its relative error.

    The first term left out is replaced by its best approximation of lower degree (Chebyshev),
    which divides the error of the Taylor polynomial by 2^degree.
    """
    c = list(_TAYLOR[: degree + 1])
    first, second = abs(_TAYLOR[degree + 1]), abs(_TAYLOR[min(degree + 2, 6)])
    if degree == 1:
        c[0] += _TAYLOR[2] * b**2 / 2
    elif degree == 2:
        c[1] += _TAYLOR[3] * b**2 * 3 / 4
    else:
        c[1] -= _TAYLOR[5] * b**4 * 5 / 16
        c[3] += _TAYLOR[5] * b**2 * 5 / 4
    rest = second * b ** (degree + 2) / (1.0 - b)
    return c, (first * (b / 2) ** (degree + 1) * 2.0 + rest) * math.sqrt(1.0 + b)


def _near(x: Tensor, gram: Tensor, mean: Tensor, limit: float) -> tuple[Tensor | None, float]:
    """Return x times a polynomial in E = gram / mean - I, and the measured bound of the norm of E.

    No result where that bound is above `limit`.
    """
    tolerance = 2.0 * torch.finfo(x.dtype).eps
    e, scale = add_identity(gram / mean, -1.0), mean.rsqrt()
    reach = math.sqrt(tolerance)  # below it, the linear polynomial will do
    start = math.nan
    while True:
        bound, square = contraction(e, 2.0 * reach)
        start = bound if math.isnan(start) else start
        if not bound <= limit:
            return None, start
        degree = next((q for q in (1, 2) if _coefficients(q, bound)[1] <= tolerance), 4)
        c, error = _coefficients(degree, bound)
        if degree == 1 or square is None:
            poly = add_identity(e * c[1], c[0])
        elif degree == 2:
            poly = add_identity((e * c[1]).add_(square, alpha=c[2]), c[0])
        else:
            inner = add_identity((e * c[3]).add_(square, alpha=c[4]), c[2])
            poly = add_identity((e * c[1]).add_(square @ inner), c[0])
        x = x @ (poly * scale)
        if error <= tolerance:
            return x, start
        e, scale = add_identity(x.mT @ x, -1.0), torch.ones_like(scale)


def _by_eigenvectors(x: Tensor, gram: Tensor) -> Factors:
    """From the eigenvectors of the Gram matrix, where the measured residual vouches for them.

    The Gram matrix squares the condition number, so the columns of P = X V / h are orthogonal to
    eps kappa^2 only, and polishing their residual away does not make the result the polar factor.
    Matrices whose residual is above rounding level therefore take the other way.
    """
    eigenvalues, v = torch.linalg.eigh(gram)
    p = x @ v
    h = torch.linalg.vector_norm(p, dim=-2, keepdim=True)
    u = (p / h) @ v.mT
    inner = u.mT @ u
    allowed = 64.0 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5
    failed = ~(gram_defect(inner) <= allowed)
    u = newton_schulz(u, inner, 0.5)
    if not bool(failed.any()):
        return Factors(u, v, h[..., 0, :])
    u[failed] = _scaled_newton_schulz(x[failed], eigenvalues[failed])
    return Factors.bare(u)


def newton_schulz(x: Tensor, gram: Tensor, beta: float) -> Tensor:
    """One step x ((1 + beta) I - beta gram)."""
    return x @ add_identity(gram * -beta, 1.0 + beta)


def _scaled_newton_schulz(x: Tensor, eigenvalues: Tensor) -> Tensor:
    """Newton-Schulz steps for matrices with these eigenvalues of the Gram matrix.

    Each step is the cubic that is best on the interval [low, 1] known to hold the singular
    values: scaling by alpha^2 = 3 / (1 + low + low^2) before it (Chen & Chow, 2014) makes small
    ones grow 2.6-fold instead of 1.5-fold.
    """
    eps, n = torch.finfo(x.dtype).eps, x.shape[-1]
    w, top = x, eigenvalues[..., -1:, None] * (1.0 + 8.0 * n * eps)
    x = torch.where(top > 0, x / top.sqrt(), x)
    low = float((eigenvalues[..., :1, None] / top).nan_to_num().amin().clamp_min(0.0)) ** 0.5
    low = max(0.9 * low, 4.0 * eps**0.5)
    previous = math.inf
    for _ in range(60):
        gram = x.mT @ x
        defect = float(gram_defect(gram).amax())
        if defect <= math.sqrt(eps):
            return newton_schulz(x, gram, 0.5)
        if low > 0.99 and defect > 0.75 * previous and defect > 0.5:
            break
        previous = defect
        alpha = math.sqrt(3.0 / (1.0 + low + low * low))
        x = newton_schulz(alpha * x, alpha * alpha * gram, 0.5)
        low = 0.5 * alpha * low * (3.0 - (alpha * low) ** 2)
    return _finish_by_svd(w, x, x.mT @ x)


def bjorck_polar(w: Tensor, beta: float, niters: int) -> Tensor:
    """`niters` Björck steps at most, then plain steps while they make progress, then an SVD."""
    if 0 in w.shape:
        return w.clone()
    arrived = math.sqrt(torch.finfo(w.dtype).eps)  # one more quadratic step reaches eps
    x = w / rms_scale(w)
    gram = x.mT @ x
    # sigma_max^2 <= the smaller of two norms of the Gram matrix; the iteration keeps signs (and
    # contracts) below (1 + beta) / beta, so scale down only what might lie above.
    row_sum = gram.abs().sum(-1).amax(-1)
    bound = torch.minimum(row_sum, torch.linalg.matrix_norm(gram))[..., None, None]
    shrink = (0.95 * (1.0 + beta) / beta / bound).clamp(max=1.0)
    x, gram = x * shrink.sqrt(), gram * shrink
    defect = previous = math.inf
    for step in range(niters + 40):
        defect = float(gram_defect(gram).amax())
        if defect <= arrived:
            return newton_schulz(x, gram, 0.5)
        late = step >= niters
        if not defect < math.inf or (late and defect > 0.75 * previous and defect > 0.5):
            break
        previous = defect
        x = newton_schulz(x, gram, 0.5 if late else beta)
        gram = x.mT @ x
    return _finish_by_svd(w, x, gram)


def _finish_by_svd(w: Tensor, x: Tensor, gram: Tensor) -> Tensor:
    """Replace the matrices of the batch that have not arrived by their SVD polar factor."""
    arrived = math.sqrt(torch.finfo(w.dtype).eps)
    failed = ~(gram_defect(gram).reshape(-1) <= arrived)
    shape, w = w.shape, w.reshape(-1, *w.shape[-2:])
    x = x.reshape(w.shape).clone()
    x[failed] = polar_from_svd(w[failed])
    return newton_schulz(x, x.mT @ x, 0.5).reshape(shape)
