r"""Maps from skew-symmetric matrices to rotations: the exponential and the Cayley map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import in_forward_mode, is_traced
from orthonet.linalg.matrix import add_identity, compute_dtype
from orthonet.linalg.polar import polar, save_centered, saved_centered
from orthonet.linalg.polar_factor.gradient import centered_gradient
from orthonet.linalg.polar_factor.steps import recentered_polar

__all__ = ["cayley", "matrix_exponential", "rotate_base", "skew"]


def skew(a: Tensor) -> Tensor:
    r"""Return the skew part \((A - A^\top) / 2\) of square matrices (*batch, n, n).

    Examples:
        >>> skew(torch.tensor([[5.0, 2.0], [0.0, 5.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    _require_square("skew", a)
    return 0.5 * (a - a.mT)


def cayley(a: Tensor) -> Tensor:
    r"""Return the Cayley map \((I - A)^{-1} (I + A)\) of square matrices.

    For skew-symmetric \(A\) the result is a rotation without eigenvalue -1. The inverse map is \(A
    = (Q - I)(Q + I)^{-1}\).

    Shape:
        `a`: (*batch, n, n). Output: the same.

    Examples:
        >>> cayley(torch.tensor([[0.0, -2.0], [2.0, 0.0]])).round(decimals=4)
        tensor([[-0.6000, -0.8000],
                [ 0.8000, -0.6000]])
    """
    _require_square("cayley", a)
    work = a.to(compute_dtype(a.dtype))
    identity = torch.eye(a.shape[-1], dtype=work.dtype, device=a.device)
    return torch.linalg.solve(identity - work, identity + work).to(a.dtype)


def matrix_exponential(a: Tensor, *, degree: int = 12) -> Tensor:
    r"""Return the matrix exponential by scaling and squaring a Taylor polynomial of given `degree`.

    \(e^A = \bigl(T_d(A / 2^s)\bigr)^{2^s}\), with \(s\) the least integer for which the first
    neglected term of the scaled series is below the unit roundoff, bounded by the norms of the
    powers of A that are computed anyway. The polynomial is evaluated with about \(2 \sqrt d\)
    products (Paterson & Stockmeyer). Under `torch.compile` and in `torch.func` transforms, where
    \(s\) may not depend on the data, `torch.linalg.matrix_exp` computes the same function. Only A
    is stored for backward, which repeats the computation.

    Args:
        a: Square matrices of any norm.
        degree: Degree of the polynomial, at least 1; a higher degree needs fewer squarings.

    Shape:
        `a`: (*batch, n, n). Output: the same.

    Guarantee:
        Relative error of a few units roundoff times \(\max(1, \|A\|)\) for skew-symmetric input.

    Examples:
        >>> half_turn = matrix_exponential(torch.tensor([[0.0, -torch.pi], [torch.pi, 0.0]]))
        >>> half_turn.allclose(-torch.eye(2), atol=1e-5)
        True

    References:
        Al-Mohy & Higham, *A new scaling and squaring algorithm for the matrix exponential*, SIAM J.
        Matrix Anal. Appl. 31 (2009); Paterson & Stockmeyer, SIAM J. Comput. 2 (1973).
    """
    _require_square("matrix_exponential", a)
    _checks.positive_int("matrix_exponential", degree=degree)
    work = a.to(compute_dtype(a.dtype))
    if is_traced(work) or in_forward_mode():
        return torch.linalg.matrix_exp(work).to(a.dtype)
    return _Recomputed.apply(_exponential, work, degree).to(a.dtype)


def _exponential(a: Tensor, degree: int, normal: bool = False) -> Tensor:
    """Scaling, Taylor polynomial and squaring; `normal` says that A is skew-symmetric."""
    norm = float(a.detach().abs().sum(-2).amax()) if a.numel() else 0.0
    _checks.require(
        math.isfinite(norm),
        "matrix_exponential",
        "the matrix must be finite",
        "Lower the learning rate or clip gradients; the weight holds NaN or Inf, and "
        "[n for n, p in model.named_parameters() if not p.isfinite().all()] names it",
        norm=norm,
    )
    before = max(0, math.ceil(math.log2(norm)) - 8) if norm > 0 else 0
    if before:  # or its powers might overflow
        a, norm = a * 2.0**-before, norm * 2.0**-before
    powers = [a]
    while len(powers) < math.isqrt(degree):
        powers.append(powers[-1] @ a)
    unit = torch.finfo(a.dtype).eps / 2
    reach = (unit * math.factorial(degree + 1)) ** (1.0 / (degree + 1))
    bound = _bound(powers, norm, normal)
    squarings = max(0, math.ceil(math.log2(bound / reach))) if bound > 0 else 0
    if squarings:
        powers = [p * 2.0 ** (-squarings * k) for k, p in enumerate(powers, 1)]
    result = _taylor(powers, degree)
    for _ in range(squarings + before):
        result = result @ result
    return result


def _bound(powers: list[Tensor], norm: float, normal: bool) -> float:
    r"""A number b with \(\|A^k\| \le b^k\) for all k that the truncated series neglects.

    The norm of A; that of a power, to the root, where A is normal; the larger of those of two
    consecutive powers in general (Al-Mohy & Higham, theorem 4.2).
    """
    roots = [norm]
    for k, power in enumerate(powers[1:], 2):
        size = float(torch.linalg.vector_norm(power.detach(), dim=(-2, -1)).amax())
        if not normal and k == len(powers) == 2:
            roots.append((size * norm) ** (1 / 3))
        roots.append(size ** (1 / k))
    if normal:
        return min(roots)
    return min(norm, max(roots[1:3])) if len(roots) > 2 else norm


class _Recomputed(torch.autograd.Function):
    """A function of one tensor that keeps this only, and is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], a: Tensor, *constants: Any) -> Tensor:
        ctx.save_for_backward(a)
        ctx.function, ctx.constants = function, constants
        return function(a, *constants)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = a if again else a.detach().requires_grad_()
            result = ctx.function(x, *ctx.constants)
            (grad,) = torch.autograd.grad(result, x, grad, create_graph=again)
        return None, grad, *(None,) * len(ctx.constants)


def _taylor(powers: list[Tensor], degree: int) -> Tensor:
    """Taylor polynomial of the exponential, grouped in powers of the last of `powers`."""
    block, constant = len(powers), 0.0
    result: Tensor | None = None
    for start in range(degree // block * block, -1, -block):
        factors = [1.0 / math.factorial(k) for k in range(start, min(start + block, degree + 1))]
        if len(factors) == 1 and result is None and not constant:
            constant = factors[0]  # the highest group is a multiple of the identity
            continue
        first = factors[1] if block > 1 else 0.0
        group = add_identity(powers[0] * first, factors[0])
        for power, factor in zip(powers[1:], factors[2:], strict=False):
            group = torch.add(group, power, alpha=factor)
        if result is None:
            result = torch.add(group, powers[-1], alpha=constant) if constant else group
        elif group.ndim == 2:
            result = torch.addmm(group, result, powers[-1])
        else:
            result = group + result @ powers[-1]
    return powers[0] if result is None else result


def rotate_base(w: Tensor, base: Tensor, *, degree: int = 12) -> Tensor:
    r"""Rotate a semi-orthogonal base by the exponential of a skew matrix built from `w`.

    \[ Q = e^{A} B, \qquad A = W B^\top - B W^\top \in \mathfrak{so}(m), \]

    for tall matrices (wide ones by transposition). With \(B = I\) (or its leading columns) this is
    \(e^{W - W^\top}\), where a tall \(W\) is padded by zero columns and the result is cropped. With
    \(W = B\) the result is \(B\) itself, and the differential there reaches the whole tangent
    space. When m >= 3 n, the exponential of a 3n x 3n matrix is computed instead, because \(A\) has
    rank at most 2n: \(e^{X Y^\top} B = B + X \varphi_1(Y^\top X)\, Y^\top B\) with \(X = [W, -B]\),
    \(Y = [B, W]\).

    Args:
        w: Coordinates, of any norm.
        base: Semi-orthogonal matrices of the same shape.
        degree: Degree of the Taylor polynomial, see `matrix_exponential`.

    Shape:
        `w`, `base`: (*batch, m, n). Output: the same.

    Guarantee:
        One polar step follows, so \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\)
        (float64), for norms of \(A\) up to about 100.

    Examples:
        >>> q = rotate_base(torch.randn(3, 3), torch.eye(3))
        >>> (q.T @ q).allclose(torch.eye(3), atol=1e-5)
        True

    References:
        Lezcano-Casado, *Trivializations for gradient-based optimization on manifolds*, NeurIPS
        2019; Celledoni & Iserles, *Approximating the exponential from a Lie algebra to a Lie
        group*, Math. Comp. 69 (2000), for the low-rank form.
    """
    _checks.matrices("rotate_base", w=w, base=base)
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
    if is_traced(x, b) or in_forward_mode():
        u = _rotated(x, b, degree, matrix_exponential)
        for _ in range(2):
            u = u @ add_identity(u.mT @ u * -0.5, 1.5)
        return u.to(w.dtype)
    return _RotatedBase.apply(x, b, degree).to(w.dtype)


def _rotated(
    x: Tensor, b: Tensor, degree: int, exponential: Callable[..., Tensor] | None = None
) -> Tensor:
    """The rotated base up to truncation and rounding."""
    n = x.shape[-1]
    if x.shape[-2] < 3 * n:
        product = x @ b.mT
        a = product - product.mT
        if exponential is None:
            return _exponential(a, degree, normal=True) @ b
        return exponential(a, degree=degree) @ b
    left, right = torch.cat([x, -b], -1), torch.cat([b, x], -1)
    top = torch.cat([right.mT @ left, right.mT @ b], -1)
    block = torch.cat([top, top.new_zeros(*top.shape[:-2], n, 3 * n)], -2)
    series = (exponential or _exponential)(block, degree=degree)[..., : 2 * n, 2 * n :]
    return b + left @ series


class _RotatedBase(torch.autograd.Function):
    """The polar factor of `_rotated`, which keeps W, B and itself, and walks the way again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, degree: int) -> Tensor:
        result, scale, _ = recentered_polar(_rotated(x, b, degree))
        save_centered(ctx, scale, x, b, result)
        ctx.degree = degree
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, b, result), scale = saved_centered(ctx)
        wanted = [i for i in range(2) if ctx.needs_input_grad[i]]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x, b]
            if not again:
                inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
            rotated = _rotated(inputs[0], inputs[1], ctx.degree)
            if again:  # differentiated again
                rotated = polar(rotated)
            else:
                grad = centered_gradient(result, scale, grad)
            found = torch.autograd.grad(
                rotated, [inputs[i] for i in wanted], grad, create_graph=again
            )
        grads: list[Tensor | None] = [None, None]
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return grads[0], grads[1], None


def _require_square(name: str, a: Tensor) -> None:
    _checks.floating(name, a=a)
    _checks.require(
        a.ndim >= 2 and a.shape[-1] == a.shape[-2],
        name,
        "the matrix must be square",
        "Pass (*batch, n, n)",
        shape=tuple(a.shape),
    )
