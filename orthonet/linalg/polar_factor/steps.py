r"""How the polar factor of a tall matrix is reached: three ways, each ended by what it measures.

Polynomials in the defect \(E = X^\top X / c^2 - I\), an eigendecomposition of the Gram matrix where
these would take too many products, and Newton-Schulz steps with an SVD behind them for the rest.
All work on the small side; none has state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.linalg.matrix import (
    add_identity,
    gram_defect,
    require_finite,
    rms_scale,
    symmetric_product,
)
from orthonet.linalg.polar_factor import series

__all__ = [
    "Approach",
    "Factors",
    "by_polynomials",
    "centered_below",
    "finish_by_svd",
    "gram_polar",
    "largest_norm",
    "near_pass",
    "newton_schulz",
    "polar_from_svd",
    "recentered_polar",
]

_NEAR = 0.62  # norm of E up to which its series converge well
_SMALL = 128  # sizes and batches up to which products are much cheaper than factorizations


class Factors(NamedTuple):
    """The polar factor U of W = U H, and what the way there tells about H, if anything."""

    u: Tensor  # (*batch, m, n)
    basis: (
        Tensor  # H^-1 or, with `values`, the eigenvectors of H: (*batch, n, n), or (*batch, 0, 0)
    )
    values: Tensor  # eigenvalues of H, (*batch, n), or (*batch, 0)

    @staticmethod
    def bare(u: Tensor, basis: Tensor | None = None) -> Factors:
        """U alone, or with the inverse of H."""
        batch = u.shape[:-2]
        empty = u.new_empty(*batch, 0, 0)
        return Factors(u, empty if basis is None else basis, u.new_empty(*batch, 0))


class Approach(NamedTuple):
    """What the polynomial passes found: U or nothing, and how far the start was."""

    u: Tensor | None
    inverse: Tensor | None  # of H, where asked for and worth while
    defect: float  # Frobenius norm of E of the start, the largest of the batch
    mean: Tensor | float  # mean eigenvalue of the Gram matrix of the start, (*batch, 1, 1)
    x: Tensor  # the start, scaled if it could not be squared in its precision
    scale: Tensor | None  # by which it was divided


def largest_norm(a: Tensor) -> float:
    """Largest Frobenius norm of the batch, read by the host."""
    if a.ndim == 2:
        return float(torch.linalg.vector_norm(a))
    return float(torch.linalg.vector_norm(a, dim=(-2, -1)).amax())


def polar_from_svd(w: Tensor, owner: str = "polar") -> Tensor:
    """U V^T of the singular value decomposition, for any finite input."""
    require_finite(owner, w)
    u, _, vh = torch.linalg.svd(w / rms_scale(w), full_matrices=False)
    return u @ vh


def gram_polar(w: Tensor) -> Factors:
    """Polar factor of each matrix, by the cheapest way that its Gram matrix allows."""
    if 0 in w.shape:
        return Factors.bare(w.clone())
    found = by_polynomials(w, keep_inverse=True)
    if found.u is not None:
        return Factors.bare(found.u, found.inverse)
    factors, scale = _by_eigenvectors(found.x), found.scale
    return factors if scale is None else factors._replace(values=factors.values * scale[..., 0])


def recentered_polar(
    w: Tensor, found: Approach | None = None
) -> tuple[Tensor, Tensor | float, Tensor | float | None]:
    """U, the scale c = ||W||_F / sqrt(n) (1 for zero), and what U is to be multiplied by to be W.

    The last is c, but 0 for a zero matrix, which stays; it is None where W is c U to rounding
    already. Scales are numbers for a single matrix whose scale the host has read. `found` is what
    polynomials have made of W, if they have been tried.
    """
    if 0 in w.shape:
        return w.clone(), w.new_ones(*w.shape[:-2], 1, 1), None
    found = by_polynomials(w) if found is None else found
    u = _by_eigenvectors(found.x).u if found.u is None else found.u
    mean = found.mean
    root = mean.sqrt() if isinstance(mean, Tensor) else mean**0.5
    scale = written = root if found.scale is None else found.scale
    if found.scale is not None:
        written = found.scale * (w != 0).any(-1).any(-1)[..., None, None]
    return u, scale, None if found.defect <= centered_below(w) else written


def centered_below(w: Tensor) -> float:
    """The Frobenius norm of the defect that the last pass and rounding leave at most."""
    return 24.0 * torch.finfo(w.dtype).eps * w.shape[-1] ** 0.5


def _defect(gram: Tensor) -> tuple[Tensor, Tensor]:
    """E = gram / mean - I, and the mean eigenvalue of the Gram matrix, (*batch, 1, 1)."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).unsqueeze(-1)
    return add_identity(gram.div_(mean), -1.0), mean


class _Defect(NamedTuple):
    """E times `unit`, and the mean eigenvalue of the Gram matrix.

    A single matrix on the CPU, where a number costs nothing to read, is left as it is: the mean and
    the unit are that number, which the coefficients of the polynomials take up. In a batch E is
    divided out, the mean is (*batch, 1, 1) and the unit 1.
    """

    e: Tensor
    mean: Tensor | float
    unit: float

    def norm(self, power: Tensor, degree: int = 1) -> float:
        """The largest Frobenius norm of E^degree, of which `power` is unit^degree times."""
        return largest_norm(power) / self.unit**degree

    def coefficients(self, c: series.Polynomial) -> series.Polynomial:
        """Those of the polynomial in `e`, with the factor mean^(-1/2) if that is a number."""
        if isinstance(self.mean, Tensor):
            return c
        return tuple(ck * self.mean**-0.5 / self.unit**k for k, ck in enumerate(c))

    def scaled(self, p: Tensor) -> Tensor:
        """What the coefficients could not take up."""
        return p.mul_(self.mean.rsqrt()) if isinstance(self.mean, Tensor) else p


def _read_defect(x: Tensor, gram: Tensor | None = None) -> _Defect:
    """The defect of `x`, in the form that is the cheapest for it; `gram` is overwritten."""
    gram = symmetric_product(x, x) if gram is None else gram
    if x.ndim > 2 or not x.is_cpu:
        return _Defect(*_defect(gram), 1.0)
    mean = gram.trace().item() / x.shape[-1]
    unit = mean
    if not 1e-6 < mean < 1e6:  # for its fourth power has to be in range
        gram, unit = gram.div_(mean), 1.0
    return _Defect(add_identity(gram, -unit), mean, unit)


def _start(w: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor | None, _Defect]:
    """X = W, or W / scale where W cannot be squared in this precision; the scale; its defect."""
    start = _read_defect(w, gram)
    if isinstance(start.mean, Tensor):
        low, high = map(float, torch.aminmax(start.mean))
    else:
        low = high = start.mean
    limits = torch.finfo(w.dtype)
    if limits.tiny**0.5 < low and high < limits.max**0.5:
        return w, None, start
    require_finite("polar", w)
    scale = rms_scale(w)
    x = w / scale
    return x, scale, _read_defect(x)


def near_pass(
    e: Tensor, square: Tensor | None, degree: int, c: series.Polynomial
) -> tuple[Tensor, Tensor | None]:
    """p(E) of degree 1, 2 or 4, and for degree 4 its part c_3 E^3 + c_4 E^4. Overwrites `e`."""
    if degree == 1 or square is None:
        return add_identity(e.mul_(c[1]), c[0]), None
    if degree == 2:
        return add_identity(e.mul_(c[1]).add_(square, alpha=c[2]), c[0]), None
    high = symmetric_product(square, (e * c[3]).add_(square, alpha=c[4]))
    return add_identity(e.mul_(c[1]).add_(square, alpha=c[2]).add_(high), c[0]), high


def _guess(defect: _Defect, square: Tensor) -> float:
    """The largest |e|, about, for eigenvalues that are spread: 1.65 times ||E^2||_F / ||E||_F."""
    norms = (torch.linalg.vector_norm(a, dim=(-2, -1)) for a in (square, defect.e))
    ratio = torch.div(*norms)
    return 1.65 * float(ratio if ratio.ndim == 0 else ratio.nan_to_num().amax()) / defect.unit


def _rounded_up(b: float) -> float:
    """b, at most 9 per cent larger, so that the polynomials can be remembered."""
    return min(_NEAR, 2.0 ** (math.ceil(8.0 * math.log2(b)) / 8.0))


def by_polynomials(
    w: Tensor,
    keep_inverse: bool = False,
    far: bool = True,
    gram: Tensor | None = None,
    tolerance: float | None = None,
) -> Approach:
    """Multiply W by polynomials in its defect until the error of the last one is rounding.

    `far` allows those for intervals that are only estimated. `gram` is W^T W, and overwritten.
    The error of a singular value that the last polynomial may leave is `tolerance`.

    Bounds of ||E||_2, each closer than the one before and read when it is needed: ||E||_F,
    ||E^2||_F^(1/2), and ||E^3||_F^(1/3) from the part of degree 4.
    """
    n, tolerance = w.shape[-1], series.tolerance(w.dtype) if tolerance is None else tolerance
    first, second, fourth = (series.reach(degree, tolerance) for degree in (1, 2, 4))
    # How often it is worth while to take a step from far away.
    patience = 0 if not far else 3 if n <= _SMALL or not w.is_cpu else 1
    x, scale, now = _start(w, gram)
    found = Approach(None, None, now.norm(now.e), now.mean, x, scale)
    keep_inverse = keep_inverse and scale is None and found.defect > 0.2 * n**0.5
    inverse, bound, step = None, found.defect, 0
    while step < 12 and bound < math.inf:
        e, square, done = now.e, None, False
        if bound > first:
            square = symmetric_product(e, e)
            bound = min(bound, now.norm(square, 2) ** 0.5)
        if bound <= second:
            degree, done = (1 if bound <= first else 2), True
            c, _ = series.near(degree, first if degree == 1 else second)
            p, _ = near_pass(e, square, degree, now.coefficients(c))
        else:
            guess = bound if square is None or bound <= fourth else min(bound, _guess(now, square))
            last = guess <= 1.2 * fourth
            if guess <= _NEAR:
                c, _ = series.near(4, fourth if last else _rounded_up(guess))
            elif patience > 0 and guess <= 2.4:
                patience -= 1
                c = series.wide(round(1.0 + guess, 1))
            else:
                break
            c = now.coefficients(c)
            p, high = near_pass(e, square, 4, c)
            if last and high is not None and bound < 1.0:
                # ||E^3 (c_3 + c_4 E)|| is at least this times ||E^3||
                slack = abs(c[3]) - abs(c[4]) * bound * now.unit
                norm = now.norm(high, 3)
                done = bound <= fourth or (norm / slack) ** (1 / 3) <= fourth
        x = x @ now.scaled(p)
        if keep_inverse and step < 3:
            inverse = p if inverse is None else symmetric_product(inverse, p)
        if done:
            return found._replace(u=x, inverse=inverse if step < 3 else None)
        now = _read_defect(x)
        bound, step = now.norm(now.e), step + 1
    return found


def _by_eigenvectors(x: Tensor) -> Factors:
    """From the eigenvectors of the Gram matrix, where the measured residual vouches for them.

    The Gram matrix squares the condition number, so the columns of P = X V / h are orthogonal to
    eps kappa^2 only, and polishing their residual away does not make the result the polar factor.
    Matrices whose residual is above rounding level therefore take the other way.
    """
    eigenvalues, v = torch.linalg.eigh(symmetric_product(x, x))
    p = x @ v
    h = torch.linalg.vector_norm(p, dim=-2, keepdim=True)
    u = (p / h) @ v.mT
    inner = symmetric_product(u, u)
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
    return finish_by_svd(w, x, x.mT @ x)


def finish_by_svd(w: Tensor, x: Tensor, gram: Tensor) -> Tensor:
    """Replace the matrices of the batch that have not arrived by their SVD polar factor."""
    arrived = math.sqrt(torch.finfo(w.dtype).eps)
    failed = ~(gram_defect(gram).reshape(-1) <= arrived)
    shape, w = w.shape, w.reshape(-1, *w.shape[-2:])
    x = x.reshape(w.shape).clone()
    x[failed] = polar_from_svd(w[failed])
    return newton_schulz(x, x.mT @ x, 0.5).reshape(shape)
