r"""Nearest semi-orthogonal matrix (polar factor) and the Björck iteration that leads to it.

For \(W = U H\) with \(U^\top U = I\) and \(H = (W^\top W)^{1/2}\), the factor \(U\) is the
semi-orthogonal matrix nearest to \(W\) in every unitarily invariant norm (Higham, *Functions of
Matrices*, 2008, theorem 8.4). Wide matrices are treated through their transpose, so every product
works on the small side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import in_transform
from orthonet.linalg._matrix import on_tall
from orthonet.linalg._polar_bjorck import bjorck_polar
from orthonet.linalg._polar_early import polynomials_with_early
from orthonet.linalg._polar_gradient import (
    centred_gradient,
    differentiable_gradient,
    eigen_gradient,
    gradient,
    inverse_gradient,
)
from orthonet.linalg._polar_steps import (
    Factors,
    Measured,
    centred_below,
    finish,
    gram_polar,
    polar_from_svd,
    recentred_polar,
)

Decision = tuple[Measured, float]

__all__ = ["bjorck", "polar", "polar_svd"]


@on_tall
def bjorck(w: Tensor, *, beta: float = 0.5, niters: int = 12) -> Tensor:
    r"""Run exactly `niters` steps of the Björck-Bowie iteration.

    \(W \leftarrow (1 + \beta) W - \beta\, W W^\top W\). With \(\beta = 1/2\) and all singular
    values in \((0, \sqrt 3)\) it converges quadratically to the polar factor; other values of
    `beta` converge linearly. Nothing is scaled or checked: see [`polar`][orthonet.linalg.polar]
    for a function that always arrives.

    Args:
        w: Matrices, of spectral norm at most 1 for a safe start.
        beta: Step size, in (0, 1].
        niters: Number of steps.

    Shape:
        `w`: (*batch, m, n). Output: the same.

    Guarantee:
        None on orthogonality. Autograd differentiates every step (and keeps every iterate).

    References:
        Björck & Bowie, *An iterative algorithm for computing the best estimate of an orthogonal
        matrix*, SIAM J. Numer. Anal. 8 (1971), eq. 2.4 with one term.
    """
    for _ in range(niters):
        w = (1.0 + beta) * w - beta * (w @ (w.mT @ w))
    return w


@on_tall
def polar_svd(w: Tensor) -> Tensor:
    r"""Polar factor from a singular value decomposition, \(U V^\top\); defined for every input.

    For a rank-deficient matrix the null directions are completed orthonormally, so the result is
    orthogonal (for zero input: the leading columns of an orthogonal matrix) but not unique.
    Autograd through it is undefined at repeated singular values: use
    [`polar`][orthonet.linalg.polar] to train.

    Shape:
        `w`: (*batch, m, n). Output: the same.

    Raises:
        ValueError: `w` has a NaN or infinite entry.
    """
    return polar_from_svd(w, "polar_svd")


@on_tall
def polar(
    w: Tensor,
    *,
    beta: float | None = None,
    niters: int | None = None,
    early_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Nearest semi-orthogonal matrix, to working precision, whatever the input.

    By default the way there is chosen from the Gram matrix, per call: a polynomial in
    \(E = W^\top W / c^2 - I\) of certified degree where a bound of \(\|E\|\) is at most 0.35 (2 to
    8 matrix products), its eigendecomposition where the measured residual confirms that to
    rounding (condition numbers up to about 12 to 40), and beyond that scaled Newton-Schulz steps,
    which end in an SVD where they make no progress (rank-deficient, zero).

    With `beta` or `niters`, Björck steps take the place of the eigendecomposition: they begin where
    the polynomials do not reach, and end, after `niters` of them at most, as soon as a bound of
    \(\|E\|\) shows that these reach. Matrices that are not there then are finished by further steps
    while these make progress, and by an SVD otherwise.

    The gradient is implicit: with \(W = U H\) and an incoming gradient \(G\),

    \[ \nabla_W = U K + (I - U U^\top)\, G H^{-1}, \qquad H K + K H = U^\top G - G^\top U, \]

    so that nothing but `w` and one matrix of its size (the result, or the eigenvectors of H) is
    kept for backward. It can be differentiated again.

    Args:
        w: Matrices of any scale and rank.
        beta: Björck step size, in (0, 1]; 0.5 if only `niters` is given.
        niters: Björck steps before the further measures; 12 if only `beta` is given.
        early_dtype: `torch.bfloat16` or `torch.float16`: the products are in this dtype while W is
            far from orthogonal (an estimated \(\|E\|\) above 0.62), and in that of the
            computation afterwards. The result is as orthogonal as without it, and the gradient
            formula the same, but the rounding of the early products turns it away from the polar
            factor, by a few times their unit of rounding (0.4 per cent) and the condition number.

    Shape:
        `w`: (*batch, m, n). Output: the same.

    Guarantee:
        \(\max |\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in float64 for every
        finite input. The result is the polar factor for full rank, and a semi-orthogonal matrix
        with \(U^\top W\) symmetric positive semi-definite for deficient rank. Gradients are finite:
        eigenvalues of \(H\) below \(8\,\mathrm{eps}\,\|H\|\) are taken as that (exact for condition
        numbers up to about 1e6 in float32); for zero input \(H\) is taken as \(I\).

    Raises:
        ValueError: `beta` or `niters` is out of range, they and `early_dtype` are both given, or
            `w` has a NaN or infinite entry.

    References:
        Higham (2008), chapter 8; Chen & Chow, *A stable scaling of Newton-Schulz for improving the
        sign function computation of a Hermitian matrix*, 2014; gradient: differentiate
        \(W = U H\), e.g. Kenney & Laub, *Polar decomposition and matrix sign function condition
        estimates*, SIAM J. Sci. Stat. Comput. 12 (1991).
    """
    if early_dtype is not None:
        _checks.one_of("polar", (None, torch.bfloat16, torch.float16), early_dtype=early_dtype)
    if beta is not None or niters is not None:
        _checks.require(
            early_dtype is None,
            "polar",
            "early_dtype goes with the way that is chosen by itself",
            "Leave out beta and niters, or early_dtype",
            early_dtype=early_dtype,
        )
        beta, niters = 0.5 if beta is None else beta, 12 if niters is None else niters
        _checks.require(
            0.0 < beta <= 1.0,
            "polar",
            "beta must be in (0, 1]",
            "Use 0.5 unless you compare",
            beta=beta,
        )
        _checks.non_negative_int("polar", niters=niters)
        return _apply(w, float(beta), int(niters))[0]
    return _apply(w, None, None, early_dtype)[0]


def recentre_(
    w: Tensor, decision: Decision | None = None, early: torch.dtype | None = None
) -> tuple[Tensor, Tensor | float]:
    r"""Polar factor U of `w`, and `w` itself overwritten by \(c\,U\), \(c = \|w\|_F / \sqrt n\).

    The point on the manifold and the norm of `w` stay; \(H = c I\) afterwards, so the gradient at
    the new `w` is \((G - U\,\mathrm{sym}(U^\top G)) / c\) exactly (`AtCentre`), and the next call
    starts near its end if `w` has moved little since. Nothing is written where `w` is centred to
    rounding already, or is zero.

    Args:
        w: A leaf of float32 or float64, (*batch, m, n).
        decision: What `measure` of `w` (transposed, if wide) gave, and its bound as the number
            that the host has read: nothing else is read then, unless the bound is large.
        early: See `early_dtype` of `polar`.

    Shape:
        Output: U like `w`, and c, (*batch, 1, 1) or a number if the host has read it; 1 for zero.

    Guarantee:
        As for [`polar`][orthonet.linalg.polar].

    Raises:
        ValueError: `w` has a NaN or infinite entry.
    """
    x = w.detach()
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    if torch.compiler.is_compiling():
        u, scale = _recentre_op(x, early)
    elif x.ndim == 3 and len(x) == 1 and decision is None:  # a single one takes fewer calls
        u, scale = _recentre(x[0], None, early)
        u = u[None]
    else:
        u, scale = _recentre(x, decision, early)
    return (u if x.shape == w.shape and w.shape[-2] >= w.shape[-1] else u.mT), scale


def _recentre(
    x: Tensor, decision: Decision | None, early: torch.dtype | None
) -> tuple[Tensor, Tensor | float]:
    found = None if decision is None else finish(x, *decision)
    if decision is not None and found is not None:
        u, scale = found
        written = None if decision[1] <= centred_below(x) else scale
    else:
        start = None if early is None or 0 in x.shape else polynomials_with_early(x, early)
        u, scale, written = recentred_polar(x, start)
    if written is not None:
        torch.mul(u, written, out=x)
    return u, scale


@torch.library.custom_op("orthonet::recentre_", mutates_args=("x",))
def _recentre_op(x: Tensor, early: torch.dtype | None) -> tuple[Tensor, Tensor]:
    u, scale = _recentre(x, None, early)
    if isinstance(scale, Tensor):
        return u.contiguous(), scale.clone()
    return u.contiguous(), u.new_full((1, 1), scale)


@_recentre_op.register_fake
def _(x: Tensor, early: torch.dtype | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-2], 1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(shape)


# The data-dependent choices are an opaque operator to the compiler, so that
# torch.compile(fullgraph=True) and torch.export see one node.
@torch.library.custom_op(
    "orthonet::polar",
    mutates_args=(),
    schema="(Tensor w, float? beta, int? niters, ScalarType? early=None) -> Tensor",
)
def _polar_op(
    w: Tensor, beta: float | None, niters: int | None, early: torch.dtype | None = None
) -> Tensor:
    return _polar_forward(w, beta, niters, early).u.contiguous()


@_polar_op.register_fake
def _(
    w: Tensor, beta: float | None, niters: int | None, early: torch.dtype | None = None
) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _polar_forward(
    w: Tensor, beta: float | None, niters: int | None, early: torch.dtype | None
) -> Factors:
    if beta is not None and niters is not None:
        return bjorck_polar(w, beta, niters)
    if early is not None and 0 not in w.shape:
        u = polynomials_with_early(w, early).u
        if u is not None:
            return Factors.bare(u)
    return gram_polar(w)


def _apply(
    w: Tensor, beta: float | None, niters: int | None, early: torch.dtype | None = None
) -> Any:
    function = _Polar if torch.compiler.is_compiling() else _PolarForward
    return function.apply(w, beta, niters, early)


class _Polar(torch.autograd.Function):
    """The polar factor of tall matrices, with its implicit gradient; see `Factors`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        w: Tensor, beta: float | None, niters: int | None, early: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return tuple(Factors.bare(_polar_op(w, beta, niters, early)))
        return tuple(_polar_forward(w, beta, niters, early))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, basis, values = output
        ctx.mark_non_differentiable(basis, values)
        ctx.set_materialize_grads(False)
        ctx.of_values, ctx.of_basis = values.numel() > 0, basis.numel() > 0
        kept = [basis, values][: ctx.of_basis + ctx.of_values]
        ctx.save_for_backward(inputs[0], *(kept or [u]))
        ctx.save_for_forward(inputs[0], u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (w, *rest), grad = ctx.saved_tensors, grads[0]
        if grad is None:
            return None, None, None, None
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or in_transform(grad):
            u = _apply(w, None, None)[0] if ctx.of_basis else rest[0]
            return differentiable_gradient(w, u, grad), None, None, None
        if ctx.of_values:
            return eigen_gradient(w, rest[0], rest[1], grad), None, None, None
        pull_back = inverse_gradient if ctx.of_basis else gradient
        return pull_back(w, rest[0], grad), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, w: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _apply(w.movedim(in_dims[0], 0), *options), (0, 0, 0)


class _PolarForward(_Polar):
    """With forward mode, which Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        w, u = ctx.saved_tensors
        # The differential is its own adjoint: U K + (I - U U^T) dW H^-1, H K + K H skew.
        du = differentiable_gradient(w, u, tangent)
        return du, None, None


def save_centred(ctx: Any, scale: Tensor | float, *tensors: Tensor) -> None:
    """Keep tensors and a scale, which may be a number, for backward."""
    if isinstance(scale, Tensor):
        ctx.save_for_backward(*tensors, scale)
    else:
        ctx.save_for_backward(*tensors)
    ctx.scale = None if isinstance(scale, Tensor) else scale


def saved_centred(ctx: Any) -> tuple[tuple[Tensor, ...], Tensor | float]:
    """What `save_centred` has kept."""
    tensors = ctx.saved_tensors
    return (tensors[:-1], tensors[-1]) if ctx.scale is None else (tensors, ctx.scale)


class AtCentre(torch.autograd.Function):
    r"""U as a function of W = c U; its gradient is \((G - U\,\mathrm{sym}(U^\top G)) / c\)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, scale: Tensor | float) -> Tensor:
        save_centred(ctx, scale, w, u)
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (w, u), scale = saved_centred(ctx)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            u = polar(w)
            again = differentiable_gradient
            if w.shape[-2] >= w.shape[-1]:
                return again(w, u, grad), None, None
            return again(w.mT, u.mT, grad.mT).mT, None, None
        if w.shape[-2] >= w.shape[-1]:
            return centred_gradient(u, scale, grad), None, None
        return centred_gradient(u.mT, scale, grad.mT).mT, None, None
