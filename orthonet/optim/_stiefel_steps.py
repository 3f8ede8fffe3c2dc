r"""Steps on the Stiefel manifold, for batches of tall matrices.

The tangent space at X is \(\{D : X^\top D + D^\top X = 0\}\), the projection onto it
\(P_X(V) = V - X\,\mathrm{sym}(X^\top V)\), and the retraction of a step D the polar factor of
\(X + D\), which for tangent D is the nearest orthogonal matrix and agrees with the geodesic up to
terms of third order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthonet.linalg import _polar_series as series
from orthonet.linalg import polar
from orthonet.linalg._matrix import add_identity, symmetric_product
from orthonet.linalg._polar_steps import largest_norm, near_pass

__all__ = ["newton_schulz_sign", "residual", "retract", "symmetric_part", "tangent"]

# The odd quintic of Muon: maps (0, 1] into about [0.7, 1.2] in five steps and keeps zeros.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def symmetric_part(s: Tensor) -> Tensor:
    """(S + S^T) / 2."""
    return (s + s.mT).mul_(0.5)


def tangent(x: Tensor, v: Tensor) -> Tensor:
    """P_X(V): two products of the size of X."""
    return v - x @ symmetric_part(x.mT @ v)


def retract(ys: list[Tensor]) -> list[Tensor]:
    r"""The polar factor of every matrix, certified by the defect that is measured on the way.

    For \(Y = X + D\) with tangent D, \(E = Y^\top Y - I = D^\top D\) is of second order: one
    correction \(Y + Y (p(E) - I)\) of degree 1 (two products in all) reaches rounding for
    \(\|D\|_2 \le 0.036\), of degree 2 (three) up to 0.12, of degree 4 (four) up to 0.33; longer
    steps take further passes, and what these do not reach an eigendecomposition or an SVD does.
    What earlier steps have left is in E too, so nothing accumulates. On an accelerator the host
    reads once for all batches.
    """
    if torch.compiler.is_compiling():
        return [polar(y) for y in ys]
    if all(y.is_cpu for y in ys):
        return [_retract(y) for y in ys]
    measured = [_measure(y) for y in ys]
    bounds = torch.stack([bound.float() for _, _, bound in measured]).tolist()
    return [
        _correct(y, e, square, bound)
        for y, (e, square, _), bound in zip(ys, measured, bounds, strict=True)
    ]


def _retract(y: Tensor) -> Tensor:
    """For memory where looking costs nothing: the square of E only where it is needed."""
    e = add_identity(symmetric_product(y, y), -1.0)
    bound = largest_norm(e)
    if bound <= series.reach(1, series.tolerance(y.dtype)):
        return _correct(y, e, None, bound)
    square = symmetric_product(e, e)
    return _correct(y, e, square, min(bound, largest_norm(square) ** 0.5))


def _measure(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E, its square, and a bound of the norm of E over the batch, which nobody reads here."""
    e = add_identity(y.mT @ y, -1.0)
    square = e @ e
    norms = torch.linalg.vector_norm(torch.stack([e, square]), dim=(-2, -1))
    norms = norms.reshape(2, -1).amax(-1)
    return e, square, torch.minimum(norms[0], norms[1].sqrt())


def _correct(y: Tensor, e: Tensor, square: Tensor | None, bound: float) -> Tensor:
    """Y p(E) by the polynomial that reaches rounding, or the polar factor by further passes."""
    tolerance = series.tolerance(y.dtype)
    degrees = (1,) if square is None else (1, 2, 4)
    degree = next((q for q in degrees if bound <= series.reach(q, tolerance)), 0)
    if not degree:
        return polar(y)
    # on the interval of the bound, in half powers of two: its error is mostly far below rounding
    width = 2.0 ** (math.ceil(2.0 * math.log2(max(bound, 1e-9))) / 2.0)
    c, _ = series.near(degree, min(width, series.reach(degree, tolerance)))
    p, _ = near_pass(e, square, degree, (c[0] - 1.0, *c[1:]))
    # as a correction of Y: the product is small, and so is its rounding
    if y.ndim == 2:
        return torch.addmm(y, y, p)
    return torch.baddbmm(y, y, p)


def residual(x: Tensor) -> Tensor:
    r"""\(\|X^\top X - I\|_F\) of each tall matrix, computed in float64.

    It bounds \(\max|\sigma - 1|\), since \(|\sigma - 1| \le |\sigma^2 - 1|\).
    """
    x = x.double()
    return torch.linalg.matrix_norm(add_identity(x.mT @ x, -1.0))


def newton_schulz_sign(d: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """D with its singular values brought near 1, zeros staying zero; three products a step.

    The products are of `dtype`. A pass contracts errors, so that half precision costs no more than
    its own rounding.
    """
    a, b, c = _QUINTIC
    tiny = torch.finfo(d.dtype).tiny
    x = (d / torch.linalg.matrix_norm(d, keepdim=True).clamp_min(tiny)).to(dtype)
    for _ in range(steps):
        gram = x.mT @ x
        x = x @ add_identity(gram * b + (gram @ gram) * c, a)
    return x.to(d.dtype)
