r"""Maps from skew-symmetric matrices to rotations: the exponential and the Cayley map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg._matrix import add_identity, compute_dtype, is_traced
from orthonet.linalg._polar_steps import recentred_polar
from orthonet.linalg.polar import AtCentre

__all__ = ["cayley", "matrix_exponential", "rotate_base", "skew"]


def skew(a: Tensor) -> Tensor:
    r"""Skew part \((A - A^\top) / 2\) of square matrices (*batch, n, n)."""
    _require_square("skew", a)
    return 0.5 * (a - a.mT)


def cayley(a: Tensor) -> Tensor:
    r"""Cayley map \((I - A)^{-1} (I + A)\) of square matrices.

    For skew-symmetric \(A\) the result is a rotation without eigenvalue -1; its inverse is
    \(A = (Q - I)(Q + I)^{-1}\).

    Shape:
        `a`: (*batch, n, n). Output: the same.
    """
    _require_square("cayley", a)
    work = a.to(compute_dtype(a.dtype))
    identity = torch.eye(a.shape[-1], dtype=work.dtype, device=a.device)
    return torch.linalg.solve(identity - work, identity + work).to(a.dtype)


def matrix_exponential(a: Tensor, *, degree: int = 12) -> Tensor:
    r"""Matrix exponential by scaling and squaring of the Taylor polynomial of given `degree`.

    \(e^A = \bigl(T_d(A / 2^s)\bigr)^{2^s}\), with \(s\) the least integer for which the first
    neglected term of the scaled series is below the unit roundoff. The polynomial is evaluated
    with about \(2 \sqrt d\) products (Paterson & Stockmeyer). Under `torch.compile` and in
    `torch.func` transforms, where \(s\) may not depend on the data, PyTorch's own
    `torch.linalg.matrix_exp` computes the same function. Only A is kept for backward, which walks
    the same way again.

    Args:
        a: Square matrices of any norm.
        degree: Degree of the polynomial, at least 1: a higher one needs fewer squarings.

    Shape:
        `a`: (*batch, n, n). Output: the same.

    Guarantee:
        Relative error of a few units roundoff times \(\max(1, \|A\|)\) for skew-symmetric input.

    References:
        Al-Mohy & Higham, *A new scaling and squaring algorithm for the matrix exponential*, SIAM J.
        Matrix Anal. Appl. 31 (2009); Paterson & Stockmeyer, SIAM J. Comput. 2 (1973).
    """
    _require_square("matrix_exponential", a)
    _checks.positive_int("matrix_exponential", degree=degree)
    work = a.to(compute_dtype(a.dtype))
    if is_traced():
        return torch.linalg.matrix_exp(work).to(a.dtype)
    norm = float(work.detach().abs().sum(-2).amax()) if work.numel() else 0.0
    _checks.require(
        math.isfinite(norm),
        "matrix_exponential",
        "the matrix must be finite",
        "Lower the learning rate or clip gradients; the weight holds NaN or Inf",
        norm=norm,
    )
    unit = torch.finfo(work.dtype).eps / 2
    reach = (unit * math.factorial(degree + 1)) ** (1.0 / (degree + 1))
    squarings = max(0, math.ceil(math.log2(norm / reach))) if norm > 0 else 0
    return _Recomputed.apply(work, degree, squarings).to(a.dtype)  # type: ignore[union-attr]


def _scale_and_square(a: Tensor, degree: int, squarings: int) -> Tensor:
    result = _taylor(a * 2.0**-squarings, degree)
    for _ in range(squarings):
        result = result @ result
    return result


class _Recomputed(torch.autograd.Function):
    """Scaling and squaring that keeps its input only, and walks the way again in backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, degree: int, squarings: int) -> Tensor:
        ctx.save_for_backward(a)
        ctx.way = degree, squarings
        return _scale_and_square(a, degree, squarings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (a,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = a if again else a.detach().requires_grad_()
            result = _scale_and_square(x, *ctx.way)
            (grad,) = torch.autograd.grad(result, x, grad, create_graph=again)
        return grad, None, None


def _taylor(a: Tensor, degree: int) -> Tensor:
    """Taylor polynomial of the exponential, grouped in powers of a^block."""
    block = max(1, math.isqrt(degree))
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(a.shape)
    powers = [identity, a]
    while len(powers) <= block:
        powers.append(powers[-1] @ a)
    result: Tensor | None = None
    for start in range(degree // block * block, -1, -block):
        factors = [1.0 / math.factorial(k) for k in range(start, min(start + block, degree + 1))]
        group = powers[len(factors) - 1] * factors[-1]
        for power, factor in zip(powers, factors[:-1], strict=False):
            group = torch.add(group, power, alpha=factor)
        if result is None:
            result = group
        elif a.ndim == 2:
            result = torch.addmm(group, result, powers[block])
        else:
            result = group + result @ powers[block]
    return identity if result is None else result


def rotate_base(w: Tensor, base: Tensor, *, degree: int = 12) -> Tensor:
    r"""Rotate a semi-orthogonal base by the exponential of a skew matrix built from `w`.

    \[ Q = e^{A} B, \qquad A = W B^\top - B W^\top \in \mathfrak{so}(m), \]

    for tall matrices (wide ones by transposition). With \(B = I\) (or its leading columns) this is
    \(e^{W - W^\top}\), where a tall \(W\) is padded by zero columns and the result cropped. With
    \(W = B\) it is \(B\) itself, and the differential there reaches the whole tangent space. When
    m >= 3 n the exponential is taken of a 3n x 3n matrix instead, since \(A\) has rank at most 2n:
    \(e^{X Y^\top} B = B + X \varphi_1(Y^\top X)\, Y^\top B\) with \(X = [W, -B]\), \(Y = [B, W]\).

    Args:
        w: Coordinates, of any norm.
        base: Semi-orthogonal matrices of the same shape.
        degree: Degree of the Taylor polynomial, see `matrix_exponential`.

    Shape:
        `w`, `base`: (*batch, m, n). Output: the same.

    Guarantee:
        One polar step follows, so \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\)
        (float64), for norms of \(A\) up to about 100.

    References:
        Lezcano-Casado, *Trivializations for gradient-based optimization on manifolds*, NeurIPS
        2019; Celledoni & Iserles, *Approximating the exponential from a Lie algebra to a Lie
        group*, Math. Comp. 69 (2000), for the low-rank form.
    """
    _checks.require(
        w.shape == base.shape,
        "rotate_base",
        "w and base must have one shape",
        "Pass a base like w",
        w=w,
        base=base,
    )
    if w.shape[-2] < w.shape[-1]:
        return rotate_base(w.mT, base.mT, degree=degree).mT
    dtype = compute_dtype(w.dtype)
    x, b = w.to(dtype), base.to(dtype)
    m, n = w.shape[-2:]
    if m < 3 * n:
        product = x @ b.mT
        rotated = matrix_exponential(product - product.mT, degree=degree) @ b
    else:
        left, right = torch.cat([x, -b], -1), torch.cat([b, x], -1)
        top = torch.cat([right.mT @ left, right.mT @ b], -1)
        block = torch.cat([top, top.new_zeros(*top.shape[:-2], n, 3 * n)], -2)
        rotated = b + left @ matrix_exponential(block, degree=degree)[..., : 2 * n, 2 * n :]
    return _polished(rotated).to(w.dtype)


def _polished(u: Tensor) -> Tensor:
    """Remove truncation and rounding: the polar factor, whose gradient takes two products here."""
    if is_traced():
        for _ in range(2):
            u = u @ add_identity(u.mT @ u * -0.5, 1.5)
        return u
    result, scale, _ = recentred_polar(u.detach())
    return AtCentre.apply(u, result, scale)  # type: ignore[return-value]


def _require_square(name: str, a: Tensor) -> None:
    _checks.floating(name, a=a)
    _checks.require(
        a.ndim >= 2 and a.shape[-1] == a.shape[-2],
        name,
        "the matrix must be square",
        "Pass (*batch, n, n)",
        shape=tuple(a.shape),
    )
