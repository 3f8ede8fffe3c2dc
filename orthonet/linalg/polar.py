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
from orthonet.linalg.matrix import on_tall
from orthonet.linalg.polar_factor.bjorck import bjorck_polar
from orthonet.linalg.polar_factor.gradient import (
    differentiable_gradient,
    eigen_gradient,
    gradient,
    inverse_gradient,
)
from orthonet.linalg.polar_factor.steps import (
    Factors,
    gram_polar,
    polar_from_svd,
)

__all__ = ["bjorck", "polar", "polar_svd", "save_centered", "saved_centered"]


@on_tall
def bjorck(w: Tensor, *, beta: float = 0.5, niters: int = 12) -> Tensor:
    r"""Run exactly `niters` steps of the Björck-Bowie iteration.

    \(W \leftarrow (1 + \beta) W - \beta\, W W^\top W\). With \(\beta = 1/2\) and all singular
    values in \((0, \sqrt 3)\) it converges quadratically to the polar factor; other values of
    `beta` converge linearly. Nothing is scaled or checked; [`polar`][orthonet.linalg.polar] always
    converges.

    Args:
        w: Matrices, of spectral norm at most 1 for a safe start.
        beta: Step size, in (0, 1].
        niters: Number of steps.

    Shape:
        (*batch, m, n), kept.

    Guarantee:
        None on orthogonality. Autograd differentiates every step and stores every iterate.

    Examples:
        >>> bjorck(torch.tensor([[0.5]]), niters=1)  # 0.5 (3 - 0.25) / 2
        tensor([[0.6875]])

    References:
        Björck & Bowie, *An iterative algorithm for computing the best estimate of an orthogonal
        matrix*, SIAM J. Numer. Anal. 8 (1971), eq. 2.4 with one term.
    """
    for _ in range(niters):
        w = (1.0 + beta) * w - beta * (w @ (w.mT @ w))
    return w


@on_tall
def polar_svd(w: Tensor) -> Tensor:
    r"""Return the polar factor \(U V^\top\) from a singular value decomposition, for every input.

    For a rank-deficient matrix the null directions are completed orthonormally, so the result is
    orthogonal (for zero input: the leading columns of an orthogonal matrix) but not unique.
    Autograd is undefined at repeated singular values: to train, use
    [`polar`][orthonet.linalg.polar].

    Shape:
        (*batch, m, n), kept.

    Raises:
        ValueError: `w` has a NaN or infinite entry.

    Examples:
        >>> u = polar_svd(torch.zeros(3, 2))
        >>> (u.T @ u).allclose(torch.eye(2))
        True
    """
    return polar_from_svd(w, "polar_svd")


@on_tall
def polar(
    w: Tensor,
    *,
    beta: float | None = None,
    niters: int | None = None,
) -> Tensor:
    r"""Return the nearest semi-orthogonal matrix, to working precision, for every input.

    By default each call chooses the method from the Gram matrix. It uses a polynomial in \(E =
    W^\top W / c^2 - I\) of certified degree where a bound of \(\|E\|\) is at most 0.35 (2 to 8
    matrix products). It uses the eigendecomposition where the measured residual confirms the result
    to rounding (condition numbers up to about 12 to 40). Beyond that it takes scaled Newton-Schulz
    steps, and an SVD where they make no progress (rank-deficient, zero).

    With `beta` or `niters`, Björck steps replace the eigendecomposition. They begin where the
    polynomials do not apply, and end as soon as a bound of \(\|E\|\) shows that the polynomials do,
    after at most `niters` steps. Matrices that have not converged are finished by further steps
    while these make progress, and by an SVD otherwise.

    The gradient is implicit: with \(W = U H\) and an incoming gradient \(G\),

    \[ \nabla_W = U K + (I - U U^\top)\, G H^{-1}, \qquad H K + K H = U^\top G - G^\top U, \]

    so only `w` and one matrix of its size (the result, or the eigenvectors of H) are stored for
    backward. The gradient can be differentiated again.

    Args:
        w: Matrices of any scale and rank.
        beta: Björck step size, in (0, 1]; 0.5 if only `niters` is given.
        niters: Björck steps before the further measures; 12 if only `beta` is given.

    Shape:
        As of [`polar_svd`][orthonet.linalg.polar_svd].

    Guarantee:
        \(\max |\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in float64 for every
        finite input. The result is the polar factor for full rank, and a semi-orthogonal matrix
        with \(U^\top W\) symmetric positive semi-definite for deficient rank. Gradients are finite:
        eigenvalues of \(H\) below \(8\,\mathrm{eps}\,\|H\|\) are taken as that (exact for condition
        numbers up to about 1e6 in float32); for zero input \(H\) is taken as \(I\).

    Raises:
        ValueError: `beta` or `niters` is out of range, or `w` has a NaN or infinite entry.

    Examples:
        >>> w = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
        >>> polar(w).allclose(w.sign(), atol=1e-5)
        True

    References:
        Higham (2008), chapter 8; Chen & Chow, *A stable scaling of Newton-Schulz for improving the
        sign function computation of a Hermitian matrix*, 2014; gradient: differentiate
        \(W = U H\), e.g. Kenney & Laub, *Polar decomposition and matrix sign function condition
        estimates*, SIAM J. Sci. Stat. Comput. 12 (1991).
    """
    if beta is not None or niters is not None:
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
    return _apply(w, None, None)[0]


# The data-dependent choices are an opaque operator to the compiler, so that
# torch.compile(fullgraph=True) and torch.export see one node.
@torch.library.custom_op(
    "orthonet::polar",
    mutates_args=(),
    schema="(Tensor w, float? beta, int? niters) -> Tensor",
)
def _polar_op(w: Tensor, beta: float | None, niters: int | None) -> Tensor:
    return _polar_forward(w, beta, niters).u.contiguous()


@_polar_op.register_fake
def _(w: Tensor, beta: float | None, niters: int | None) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _polar_forward(w: Tensor, beta: float | None, niters: int | None) -> Factors:
    if beta is not None and niters is not None:
        return bjorck_polar(w, beta, niters)
    return gram_polar(w)


def _apply(w: Tensor, beta: float | None, niters: int | None) -> Any:
    function = _Polar if torch.compiler.is_compiling() else _PolarForward
    return function.apply(w, beta, niters)


class _Polar(torch.autograd.Function):
    """The polar factor of tall matrices, with its implicit gradient; see `Factors`."""

    @staticmethod
    def forward(w: Tensor, beta: float | None, niters: int | None) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return tuple(Factors.bare(_polar_op(w, beta, niters)))
        return tuple(_polar_forward(w, beta, niters))

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
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (w, *rest), grad = ctx.saved_tensors, grads[0]
        if grad is None:
            return None, None, None
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or in_transform(grad):
            u = _apply(w, None, None)[0] if ctx.of_basis else rest[0]
            return differentiable_gradient(w, u, grad), None, None
        if ctx.of_values:
            return eigen_gradient(w, rest[0], rest[1], grad), None, None
        pull_back = inverse_gradient if ctx.of_basis else gradient
        return pull_back(w, rest[0], grad), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, w: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _apply(w.movedim(in_dims[0], 0), *options), (0, 0, 0)


class _PolarForward(_Polar):
    """With forward mode, which Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None, None]:
        w, u = ctx.saved_tensors
        # The differential is its own adjoint: U K + (I - U U^T) dW H^-1, H K + K H skew.
        du = differentiable_gradient(w, u, tangent)
        return du, None, None


def save_centered(ctx: Any, scale: Tensor | float, *tensors: Tensor) -> None:
    """Keep tensors and a scale, which may be a number, for backward."""
    if isinstance(scale, Tensor):
        ctx.save_for_backward(*tensors, scale)
    else:
        ctx.save_for_backward(*tensors)
    ctx.scale = None if isinstance(scale, Tensor) else scale


def saved_centered(ctx: Any) -> tuple[tuple[Tensor, ...], Tensor | float]:
    """Return what `save_centered` has kept."""
    tensors = ctx.saved_tensors
    return (tensors[:-1], tensors[-1]) if ctx.scale is None else (tensors, ctx.scale)
