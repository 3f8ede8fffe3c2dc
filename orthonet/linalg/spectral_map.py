r"""Functions of singular values and of eigenvalues, with a gradient that repeated ones do not harm.

Differentiating through a decomposition divides by differences of values. The differential of the
result does not: by the theorem of Daleckii and Krein it holds divided differences of the function,
whose limit at equal values is the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthonet._torch import is_traced
from orthonet.linalg.matrix import high

__all__ = ["Values", "eigen_map", "singular_map"]

# Values, largest (singular) or smallest (eigen) first, to their images and the derivatives there.
Values = Callable[[Tensor], tuple[Tensor, Tensor]]


def singular_map(x: Tensor, f: Values) -> Tensor:
    r"""\(U \operatorname{diag}(f(\sigma)) V^\top\) of matrices.

    The matrices are decomposed in float64 where the device has it. Second derivatives exist where
    the values differ.

    Args:
        x: Matrices.
        f: The function and its derivative, with f(0) = 0.

    Shape:
        `x`: (*batch, n, k). Output: the same.

    References:
        Noferini, *A formula for the Fréchet derivative of a generalized matrix function*, SIAM J.
        Matrix Anal. Appl. 38 (2017), theorem 3.10.
    """
    return _apply(x, f, True)[0]


def eigen_map(x: Tensor, f: Values) -> Tensor:
    r"""\(Q \operatorname{diag}(f(\lambda)) Q^\top\) of the symmetric part; see `singular_map`.

    Args:
        x: Matrices.
        f: The function and its derivative.

    Shape:
        `x`: (*batch, n, n). Output: the same.

    References:
        Higham, *Functions of Matrices* (2008), theorem 3.11.
    """
    return _apply(x, f, False)[0]


def _divided(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Divided differences of f, the mean derivative where two values agree to rounding."""
    gap = values[..., :, None] - values[..., None, :]
    size = values.abs().amax(-1, keepdim=True)[..., None]
    equal = gap.abs() <= 8.0 * torch.finfo(values.dtype).eps * size
    mean = 0.5 * (slope[..., :, None] + slope[..., None, :])
    rise = f[..., :, None] - f[..., None, :]
    return torch.where(equal, mean, rise / torch.where(equal, 1.0, gap))


def _eigen(x: Tensor, f: Values) -> tuple[Tensor, ...]:
    """Eigenvectors and eigenvalues of the symmetric part, images and slopes."""
    values, q = torch.linalg.eigh(high(0.5 * (x + x.mH)))
    return q, values, *f(values)


def _eigen_differential(d: Tensor, *parts: Tensor) -> Tensor:
    """The differential at the matrix of these parts, which is its own adjoint."""
    q, values, image, slope = parts
    g = d.to(q.dtype)
    inner = _divided(values, image, slope) * (q.mH @ (0.5 * (g + g.mH)) @ q)
    return (q @ inner @ q.mH).to(d.dtype)


def _singular(x: Tensor, f: Values) -> tuple[Tensor, ...]:
    """Singular vectors and values, images and slopes."""
    u, sigma, vh = torch.linalg.svd(high(x), full_matrices=False)
    return u, vh.mH, sigma, *f(sigma)


def _singular_differential(d: Tensor, *parts: Tensor) -> Tensor:
    """The differential at the matrix of these parts, which is its own adjoint."""
    u, v, sigma, image, slope = parts
    g = d.to(u.dtype)
    gv = g @ v
    inner = u.mH @ gv
    even, odd = 0.5 * (inner + inner.mH), 0.5 * (inner - inner.mH)
    tiny = torch.finfo(sigma.dtype).tiny
    total = sigma[..., :, None] + sigma[..., None, :]
    images = image[..., :, None] + image[..., None, :]
    mean = 0.5 * (slope[..., :, None] + slope[..., None, :])
    ratio = torch.where(total > tiny, images / total.clamp_min(tiny), mean)
    core = _divided(sigma, image, slope) * even + ratio * odd
    secant = torch.where(sigma > tiny, image / sigma.clamp_min(tiny), slope)[..., None, :]
    # What leads out of the column space or the row space; one of the two is zero.
    left = (gv - u @ inner) * secant
    ug = u.mH @ g
    right = (u * secant) @ (ug - ug @ v @ v.mH)
    return ((u @ core + left) @ v.mH + right).to(d.dtype)


class _SpectralMap(torch.autograd.Function):
    """A spectral function; its second derivatives are those of the decomposition."""

    @staticmethod
    def forward(x: Tensor, f: Values, singular: bool) -> tuple[Tensor, ...]:
        parts = (_singular if singular else _eigen)(x, f)
        left, image, right = parts[0], parts[-2], parts[1] if singular else parts[0]
        return ((left * image[..., None, :]) @ right.mH).to(x.dtype), *parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.f, ctx.singular = inputs
        parts = output[1:]
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parts)
        ctx.save_for_forward(x, *parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad, (x, *parts) = grads[0], ctx.saved_tensors
        if grad is None:
            return None, None, None
        differential = _singular_differential if ctx.singular else _eigen_differential
        if torch.is_grad_enabled() or is_traced(grad):
            parts = (_singular if ctx.singular else _eigen)(x, ctx.f)
        return differential(grad, *parts), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        result = _apply(x.movedim(in_dims[0], 0), *options)
        return result, (0,) * len(result)


class _SpectralMapForward(_SpectralMap):
    """With forward mode, which Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        _, *parts = ctx.saved_tensors
        differential = _singular_differential if ctx.singular else _eigen_differential
        return differential(tangent, *parts), *(None for _ in parts)


def _apply(x: Tensor, f: Values, singular: bool) -> Any:
    function = _SpectralMap if torch.compiler.is_compiling() else _SpectralMapForward
    return function.apply(x, f, singular)
