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
from torch.autograd.function import once_differentiable

__all__ = ["Values", "eigen_map", "singular_map"]

# Values, largest (singular) or smallest (eigen) first, to their images and the derivatives there.
Values = Callable[[Tensor], tuple[Tensor, Tensor]]


def singular_map(x: Tensor, f: Values) -> Tensor:
    r"""\(U \operatorname{diag}(f(\sigma)) V^\top\) of matrices, differentiable once.

    The matrices are decomposed in float64 where the device has it.

    Args:
        x: Matrices.
        f: The function and its derivative, with f(0) = 0.

    Shape:
        `x`: (*batch, n, k). Output: the same.

    References:
        Noferini, *A formula for the Fréchet derivative of a generalized matrix function*, SIAM J.
        Matrix Anal. Appl. 38 (2017), theorem 3.10.
    """
    return _SingularMap.apply(x, f)  # type: ignore[return-value]


def eigen_map(x: Tensor, f: Values) -> Tensor:
    r"""\(Q \operatorname{diag}(f(\lambda)) Q^\top\) of the symmetric part; differentiable once.

    Args:
        x: Matrices.
        f: The function and its derivative.

    Shape:
        `x`: (*batch, n, n). Output: the same.

    References:
        Higham, *Functions of Matrices* (2008), theorem 3.11.
    """
    return _EigenMap.apply(x, f)  # type: ignore[return-value]


def _divided(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Divided differences of f, the mean derivative where two values agree to rounding."""
    gap = values[..., :, None] - values[..., None, :]
    size = values.abs().amax(-1, keepdim=True)[..., None]
    equal = gap.abs() <= 8.0 * torch.finfo(values.dtype).eps * size
    mean = 0.5 * (slope[..., :, None] + slope[..., None, :])
    rise = f[..., :, None] - f[..., None, :]
    return torch.where(equal, mean, rise / torch.where(equal, 1.0, gap))


def _high(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.to(torch.promote_types(x.dtype, torch.float64))


class _EigenMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Values) -> Tensor:
        values, q = torch.linalg.eigh(_high(0.5 * (x + x.mH)))
        image, slope = f(values)
        ctx.save_for_backward(values, q, image, slope)
        return ((q * image[..., None, :]) @ q.mH).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, q, image, slope = ctx.saved_tensors
        g = grad.to(q.dtype)
        inner = _divided(values, image, slope) * (q.mH @ (0.5 * (g + g.mH)) @ q)
        return (q @ inner @ q.mH).to(grad.dtype), None


class _SingularMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Values) -> Tensor:
        u, sigma, vh = torch.linalg.svd(_high(x), full_matrices=False)
        image, slope = f(sigma)
        ctx.save_for_backward(u, sigma, vh, image, slope)
        return ((u * image[..., None, :]) @ vh).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        u, sigma, vh, image, slope = ctx.saved_tensors
        g = grad.to(u.dtype)
        gv = g @ vh.mH
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
        left = ((gv - u @ inner) * secant) @ vh
        ug = u.mH @ g
        right = (u * secant) @ (ug - ug @ vh.mH @ vh)
        return (u @ core @ vh + left + right).to(grad.dtype), None
