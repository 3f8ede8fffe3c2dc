r"""Nearest semi-orthogonal matrix (polar factor) and the Björck iteration that leads to it.

For \(W = U H\) with \(U^\top U = I\) and \(H = (W^\top W)^{1/2}\), the factor \(U\) is the
semi-orthogonal matrix nearest to \(W\) in every unitarily invariant norm (Higham, *Functions of
Matrices*, 2008, theorem 8.4). Wide matrices are treated through their transpose, so every product
works on the small side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg._matrix import add_identity, gram_defect, on_tall, rms_scale

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
    _require_finite("polar_svd", w)
    u, _, vh = torch.linalg.svd(w / rms_scale(w), full_matrices=False)
    return u @ vh


@on_tall
def polar(w: Tensor, *, beta: float = 0.5, niters: int = 12) -> Tensor:
    r"""Nearest semi-orthogonal matrix, to working precision, whatever the input.

    `niters` Björck steps at most, ended early once the measured \(\|U^\top U - I\|_F\) is small
    enough for one last step to reach working precision. Matrices that have not arrived then
    (ill-conditioned, rank-deficient, zero) are finished by further steps while these make progress,
    and by an SVD otherwise. The gradient is implicit: with \(W = U H\) and an incoming gradient
    \(G\),

    \[ \nabla_W = U K + (I - U U^\top)\, G H^{-1}, \qquad H K + K H = U^\top G - G^\top U, \]

    so that nothing but `w` and the result is kept for backward. It can be differentiated again.

    Args:
        w: Matrices of any scale and rank.
        beta: Björck step size, in (0, 1].
        niters: Björck steps before the further measures.

    Shape:
        `w`: (*batch, m, n). Output: the same.

    Guarantee:
        \(\max |\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in float64 for every
        finite input. The result is the polar factor for full rank, and a semi-orthogonal matrix
        with \(U^\top W\) symmetric positive semi-definite for deficient rank. Gradients are finite:
        eigenvalues of \(H\) below \(8\,\mathrm{eps}\,\|H\|\) are taken as that (exact for condition
        numbers up to about 1e6 in float32); for zero input \(H\) is taken as \(I\).

    Raises:
        ValueError: `beta` or `niters` is out of range, or `w` has a NaN or infinite entry.

    References:
        Higham (2008), chapter 8; gradient: differentiate \(W = U H\), e.g. Kenney & Laub, *Polar
        decomposition and matrix sign function condition estimates*, SIAM J. Sci. Stat. Comput. 12
        (1991).
    """
    _checks.require(
        0.0 < beta <= 1.0,
        "polar",
        "beta must be in (0, 1]",
        "Use 0.5 unless you compare",
        beta=beta,
    )
    _checks.non_negative_int("polar", niters=niters)
    return _Polar.apply(w, float(beta), int(niters))  # type: ignore[no-any-return]


def _require_finite(name: str, w: Tensor) -> None:
    _checks.require(
        bool(torch.isfinite(w).all()),
        name,
        "w must be finite",
        "Lower the learning rate or clip gradients; the weight holds NaN or Inf",
        shape=tuple(w.shape),
    )


def _step(x: Tensor, gram: Tensor, beta: float) -> Tensor:
    return x @ add_identity(gram * -beta, 1.0 + beta)


def _polar_forward(w: Tensor, beta: float, niters: int) -> Tensor:
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
            return _step(x, gram, 0.5)
        late = step >= niters
        if not defect < math.inf or (late and defect > 0.75 * previous and defect > 0.5):
            break
        previous = defect
        x = _step(x, gram, 0.5 if late else beta)
        gram = x.mT @ x
    return _finish_by_svd(w, x, gram, arrived)


def _finish_by_svd(w: Tensor, x: Tensor, gram: Tensor, arrived: float) -> Tensor:
    """Replace the matrices of the batch that have not arrived by their SVD polar factor."""
    failed = ~(gram_defect(gram).reshape(-1) <= arrived)
    shape, w = w.shape, w.reshape(-1, *w.shape[-2:])
    x = x.reshape(w.shape).clone()
    x[failed] = polar_svd(w[failed])
    return _step(x, x.mT @ x, 0.5).reshape(shape)


def _polar_adjoint(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, v = torch.linalg.eigh(h)
    largest = eigenvalues.abs().amax(-1, keepdim=True)
    floor = 8.0 * torch.finfo(h.dtype).eps * largest
    positive = torch.where(largest > 0, eigenvalues.clamp_min(0.0), torch.ones_like(eigenvalues))
    positive = torch.maximum(positive, floor)
    k = v @ ((v.mT @ c @ v) / (positive[..., :, None] + positive[..., None, :])) @ v.mT
    z = ((y @ v) / positive[..., None, :]) @ v.mT
    return k, z


# The loop and the eigendecomposition are opaque operators to the compiler, so that
# torch.compile(fullgraph=True) and torch.export see one node and no data-dependent branch.
@torch.library.custom_op("orthonet::polar", mutates_args=())
def _polar_op(w: Tensor, beta: float, niters: int) -> Tensor:
    return _polar_forward(w, beta, niters).contiguous()


@_polar_op.register_fake
def _(w: Tensor, beta: float, niters: int) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.custom_op("orthonet::polar_adjoint", mutates_args=())
def _polar_adjoint_op(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    k, z = _polar_adjoint(h, c, y)
    return k.contiguous(), z.contiguous()


@_polar_adjoint_op.register_fake
def _(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    layout = torch.contiguous_format
    return torch.empty_like(c, memory_format=layout), torch.empty_like(y, memory_format=layout)


class _Polar(torch.autograd.Function):
    """The polar factor of tall matrices, with its implicit gradient."""

    @staticmethod
    def forward(w: Tensor, beta: float, niters: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        compiling = torch.compiler.is_compiling()
        return (_polar_op if compiling else _polar_forward)(w, beta, niters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        w, u = ctx.saved_tensors
        h, s = u.mT @ w, u.mT @ grad
        h = 0.5 * (h + h.mT)
        square = w.shape[-2] == w.shape[-1]
        normal = grad[..., :0, :] if square else grad - u @ s
        k, z = _PolarAdjoint.apply(h, s - s.mT, normal)
        return (u @ k if square else z + u @ k), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, w: Tensor, beta: float, niters: int) -> tuple[Tensor, int]:
        return _Polar.apply(w.movedim(in_dims[0], 0), beta, niters), 0  # type: ignore[return-value]


class _PolarAdjoint(torch.autograd.Function):
    """K and Z with H K + K H = C and Z H = Y, for H symmetric positive semi-definite."""

    @staticmethod
    def forward(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        compiling = torch.compiler.is_compiling()
        return (_polar_adjoint_op if compiling else _polar_adjoint)(h, c, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, k, z = ctx.saved_tensors
        # H is symmetric, so both solution operators are their own adjoints.
        grad_c, grad_y = _PolarAdjoint.apply(h, grad_k, grad_z)
        grad_h = -(grad_c @ k.mT + k.mT @ grad_c) - z.mT @ grad_y
        return grad_h, grad_c, grad_y

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, h: Tensor, c: Tensor, y: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = [
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
            for t, d in zip((h, c, y), in_dims, strict=True)
        ]
        return _PolarAdjoint.apply(*tensors), (0, 0)  # type: ignore[return-value]
