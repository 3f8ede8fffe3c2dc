r"""Gradient of the polar factor: a Lyapunov equation on the small side, solved the cheapest way.

For \(W = U H\) and an incoming gradient G,
\(\nabla_W = U K + (I - U U^\top) G H^{-1}\) with \(H K + K H = U^\top G - G^\top U\).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet.linalg._matrix import add_identity
from orthonet.linalg._polar_steps import contraction

__all__ = ["centred_gradient", "differentiable_gradient", "eigen_gradient", "gradient"]

_NEAR = 0.3  # beyond it, the series takes as many products as an eigendecomposition


def _square(w: Tensor) -> bool:
    return w.shape[-2] == w.shape[-1]


def _parts(w: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H, the right-hand side U^T G - G^T U, and what of G is normal to the range of U."""
    h, s = u.mT @ w, u.mT @ grad
    normal = grad[..., :0, :] if _square(w) else grad - u @ s
    return 0.5 * (h + h.mT), s - s.mT, normal


def gradient(w: Tensor, u: Tensor, grad: Tensor) -> Tensor:
    """From W and U: by a series where H is near a multiple of I, by `eigh` otherwise."""
    h, c, normal = _parts(w, u, grad)
    k, z = _solve_near_identity(h, c, normal) or _solve(h, c, normal)
    return u @ k if _square(w) else z + u @ k


def eigen_gradient(w: Tensor, v: Tensor, values: Tensor, grad: Tensor) -> Tensor:
    """From W and the eigenvectors and eigenvalues of H, all in the basis of these vectors."""
    h = values[..., None, :]
    p, g = (w @ v) / h, grad @ v  # p = U V
    s = p.mT @ g
    k = (s - s.mT) / (h + h.mT)
    inner = p @ k if _square(w) else (g - p @ s) / h + p @ k
    return inner @ v.mT


def centred_gradient(u: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    r"""From U alone where \(H = c I\): \((G - U\,\mathrm{sym}(U^\top G)) / c\)."""
    s = u.mT @ grad
    if _square(u):
        return u @ ((s - s.mT) * (0.5 / scale))
    return (grad - u @ (0.5 * (s + s.mT))) / scale


def differentiable_gradient(w: Tensor, u: Tensor, grad: Tensor) -> Tensor:
    """From W and U, built of operations that autograd and `torch.func` see through."""
    h, c, normal = _parts(w, u, grad)
    k, z = _PolarAdjoint.apply(h, c, normal)  # type: ignore[misc]
    return u @ k if _square(w) else z + u @ k


def _solve_near_identity(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `_solve` for skew-symmetric c, by K = c/2 - (F K + K F)/2 with F = H / mean - I.

    The iteration contracts by the norm of F, of which a bound is measured, and stops where that
    bounds the remainder by rounding. None where it would take long.
    """
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    tiny = torch.finfo(h.dtype).tiny
    if h.numel() == 0 or not bool((mean > tiny).all()):
        return None
    f = add_identity(h / mean, -1.0)
    rate, _ = contraction(f, _NEAR)
    if not rate <= _NEAR:
        return None
    k = term = c / (2.0 * mean)
    limit = torch.finfo(h.dtype).eps * torch.linalg.matrix_norm(k)
    while bool((torch.linalg.matrix_norm(term) * (rate / (1.0 - rate)) > limit).any()):
        product = f @ term
        term = -0.5 * (product - product.mT)
        k = k + term
    if y.numel() == 0:
        return k, y
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(add_identity(f, 1.0)))
    return k, y @ (inverse / mean)


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
    def forward(h: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_solve_op if torch.compiler.is_compiling() else _solve)(h, c, y)

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
