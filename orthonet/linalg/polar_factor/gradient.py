r"""Gradient of the polar factor: a Lyapunov equation on the small side, solved the cheapest way.

For \(W = U H\) and an incoming gradient G,
\(\nabla_W = U K + (I - U U^\top) G H^{-1}\) with \(H K + K H = U^\top G - G^\top U\).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthonet.linalg.matrix import add_identity, cholesky, minus_transpose, symmetric_product

__all__ = [
    "centered_gradient",
    "differentiable_gradient",
    "eigen_gradient",
    "gradient",
    "inverse_gradient",
]

# Relative spread of the eigenvalues of H above which an inverse saves more products than it costs.
_SPREAD_LARGE, _SPREAD_SMALL, _SPREAD_GIVEN, _SMALL = 0.12, 0.35, 0.08, 128
_SPREAD_SERIES = 0.05  # below it, a plain series takes hardly more products than their best choice
_SPREAD_PRODUCTS = 1.0  # above it, where condition numbers are above 30 or so, `eigh` is as cheap
_ITERATIONS = 24  # of conjugate gradients, before an eigendecomposition is cheaper


def _square(w: Tensor) -> bool:
    return w.shape[-2] == w.shape[-1]


def _parts(w: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H, the right-hand side U^T G - G^T U, and what of G is normal to the range of U."""
    h, s = u.mT @ w, u.mT @ grad
    normal = grad[..., :0, :] if _square(w) else grad - u @ s
    return 0.5 * (h + h.mT), s - s.mT, normal


def gradient(w: Tensor, u: Tensor, grad: Tensor, inverse: Tensor | None = None) -> Tensor:
    """From W and U: by conjugate gradients where H is well conditioned, by `eigh` otherwise."""
    s = u.mT @ grad
    normal = grad[..., :0, :] if _square(w) else grad - u @ s
    found = _solve_by_products(symmetric_product(u, w), minus_transpose(s), normal, inverse)
    k, z = found or _solve(*_parts(w, u, grad))
    return u @ k if _square(w) else z.add_(u @ k)


def inverse_gradient(w: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """From W and the inverse of H."""
    return gradient(w, w @ inverse, grad, inverse)


def eigen_gradient(w: Tensor, v: Tensor, values: Tensor, grad: Tensor) -> Tensor:
    """From W and the eigenvectors and eigenvalues of H, all in the basis of these vectors."""
    h = values[..., None, :]
    p, g = (w @ v) / h, grad @ v  # p = U V
    s = p.mT @ g
    k = (s - s.mT) / (h + h.mT)
    inner = p @ k if _square(w) else (g - p @ s) / h + p @ k
    return inner @ v.mT


def centered_gradient(u: Tensor, scale: Tensor | float, grad: Tensor) -> Tensor:
    r"""From U alone where \(H = c I\): \((G - U\,\mathrm{sym}(U^\top G)) / c\)."""
    if not _square(u):
        s = u.mT @ grad
        s = s + s.mT
        if u.ndim == 2 and isinstance(scale, float):
            return torch.addmm(grad, u, s, beta=1.0 / scale, alpha=-0.5 / scale)
        return (grad - u @ s.mul_(0.5)).div_(scale)
    # U U^T G = G then, which spares the difference of S and its transpose
    inner = grad.mT @ u
    if u.ndim == 2 and isinstance(scale, float):
        return torch.addmm(grad, u, inner, beta=0.5 / scale, alpha=-0.5 / scale)
    if u.ndim < 4:
        product = torch.baddbmm if u.ndim == 3 else torch.addmm
        return product(grad, u, inner, beta=0.5, alpha=-0.5).div_(scale)
    return (grad - u @ inner).div_(2.0 * scale)


def differentiable_gradient(w: Tensor, u: Tensor, grad: Tensor) -> Tensor:
    """From W and U, built of operations that autograd and `torch.func` see through."""
    h, c, normal = _parts(w, u, grad)
    k, z = _adjoint(h, c, normal)
    return u @ k if _square(w) else z + u @ k


def _solve_by_products(
    h: Tensor, c: Tensor, y: Tensor, inverse: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    r"""As `_solve` for skew-symmetric c; None where H is not clearly positive definite.

    A spread spectrum is drawn together first: with \(Z = H^{-1}\), the equation
    \(H_1 K + K H_1 = C_1\), \(H_1 = (\mu H + Z / \mu) / 2\), \(C_1 = (\mu C + Z C Z / \mu) / 2\)
    has the same solution, and the eigenvalues of \(H_1\) are at least 1 (Newton steps for the
    sign of a block triangular matrix, Roberts 1980).
    """
    n = h.shape[-1]
    if h.numel() == 0 or not h.is_cpu:
        return None
    allowed = _SPREAD_LARGE if n > _SMALL else _SPREAD_SMALL
    allowed = allowed if inverse is None else _SPREAD_GIVEN
    for step in range(3):
        spread = _spread(h)
        if spread <= allowed:
            break
        if spread > _SPREAD_PRODUCTS:
            return None
        z = inverse if step == 0 and inverse is not None else _inverse(h)
        if z is None or step == 2:
            return None
        inverse = z if inverse is None else inverse
        norms = torch.linalg.vector_norm(h, dim=(-2, -1)), torch.linalg.vector_norm(z, dim=(-2, -1))
        mu = 0.5 * (norms[1] / norms[0]).sqrt()[..., None, None]
        c = (z @ c @ z).mul_(0.25 / mu).add_(c * mu)
        h = (h * mu).add_(z.mul(0.25 / mu))
    k = _series(h, c) if spread <= _SPREAD_SERIES else _conjugate_gradients(h, c)
    if k is None or y.numel() == 0:
        return None if k is None else (k, y)
    inverse = _inverse(h) if inverse is None else inverse
    return None if inverse is None else (k, y @ inverse)


def _spread(h: Tensor) -> float:
    """Standard deviation of the eigenvalues over their mean, the largest of the batch."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    norm = torch.linalg.vector_norm(h, dim=(-2, -1))
    squares = (norm / mean).square() / h.shape[-1] - 1.0
    worst = float(squares.amax() if h.ndim > 2 else squares)
    return math.sqrt(max(worst, 0.0)) if math.isfinite(worst) else math.inf


def _inverse(h: Tensor) -> Tensor | None:
    lower, info = cholesky(h)
    return None if bool(info.any()) else torch.cholesky_inverse(lower)


def _series(h: Tensor, c: Tensor) -> Tensor | None:
    """K with H K + K H = C for skew-symmetric C, by K = C/2 - (F K + K F)/2, F = H / mean - I."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    f = add_identity(h * (-0.5 / mean), 0.5)
    term = c * (0.5 / mean)
    k, limit = (
        term.clone(),
        4.0 * torch.finfo(h.dtype).eps * torch.linalg.vector_norm(term, dim=(-2, -1)),
    )
    for _ in range(_ITERATIONS):
        term = minus_transpose(f @ term)
        k.add_(term)
        small = torch.linalg.vector_norm(term, dim=(-2, -1)) <= limit
        if bool(small if h.ndim == 2 else small.all()):
            return k
    return None


# The scalars of the iteration below: numbers for one matrix, which spares small operations, and
# tensors (*batch, 1, 1) for several.


def _inner(a: Tensor, b: Tensor) -> Any:
    if a.ndim == 2:
        return float(torch.dot(a.view(-1), b.view(-1)))
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))[..., None, None]


def _quotient(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return a / torch.where(b == 0, torch.ones_like(b), b)
    return a / b if b else 0.0


def _add(k: Tensor, d: Tensor, factor: Any) -> Tensor:
    """K += factor * d."""
    return k.addcmul_(d, factor) if isinstance(factor, Tensor) else k.add_(d, alpha=factor)


def _conjugate_gradients(h: Tensor, c: Tensor) -> Tensor | None:
    """K with H K + K H = C for skew-symmetric C, one product a step; None where it takes long."""
    r, d, k = c.clone(), c.clone(), torch.zeros_like(c)
    norm = _inner(r, r)
    limit = norm * (4.0 * torch.finfo(h.dtype).eps) ** 2
    for _ in range(_ITERATIONS):
        q = minus_transpose(h @ d)
        alpha = _quotient(norm, _inner(d, q))
        _add(k, d, alpha)
        _add(r, q, -alpha)
        norm, previous = _inner(r, r), norm
        small = norm <= limit
        if small.all() if isinstance(small, Tensor) else small:
            return k
        d = _add(r.clone(), d, _quotient(norm, previous))
    return None


def _solve(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, v = torch.linalg.eigh(h)
    largest = eigenvalues.abs().amax(-1, keepdim=True)
    floor = 8.0 * torch.finfo(h.dtype).eps * largest
    positive = torch.where(largest > 0, eigenvalues.clamp_min(0.0), torch.ones_like(eigenvalues))
    positive = torch.maximum(positive, floor)
    k = v @ ((v.mT @ c @ v) / (positive[..., :, None] + positive[..., None, :])) @ v.mT
    z = ((y @ v) / positive[..., None, :]) @ v.mT
    return k, z


# The eigendecomposition is an opaque operator to the compiler, so that
# torch.compile(fullgraph=True) and torch.export see one node.
@torch.library.custom_op("orthonet::polar_adjoint", mutates_args=())
def _solve_op(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    k, z = _solve(h, c, y)
    return k.contiguous(), z.contiguous()


@_solve_op.register_fake
def _(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    layout = torch.contiguous_format
    return torch.empty_like(c, memory_format=layout), torch.empty_like(y, memory_format=layout)


class _PolarAdjoint(torch.autograd.Function):
    """K and Z with H K + K H = C and Z H = Y, for H symmetric positive semi-definite."""

    @staticmethod
    def forward(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (_solve_op if torch.compiler.is_compiling() else _solve)(h, c, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, k, z = ctx.saved_tensors
        # H is symmetric, so both solution operators are their own adjoints.
        grad_c, grad_y = _adjoint(h, grad_k, grad_z)
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
        return _adjoint(*tensors), (0, 0)


class _PolarAdjointForward(_PolarAdjoint):
    """With forward mode, which Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, dh: Tensor, dc: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        h, k, z = ctx.saved_tensors
        return _adjoint(h, dc - dh @ k - k @ dh, dy - z @ dh)


def _adjoint(h: Tensor, c: Tensor, y: Tensor) -> Any:
    function = _PolarAdjoint if torch.compiler.is_compiling() else _PolarAdjointForward
    return function.apply(h, c, y)
