r"""Products of paraunitary factors \(V V^\top + (I - V V^\top) z\), with their own backward.

The kernel of an orthogonal convolution is made of such factors. A chain of them is one node of the
autograd graph, and each factor costs two products with its basis; no projector is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg._matrix import is_traced

__all__ = ["apply_projectors"]


def apply_projectors(
    kernel: Tensor,
    bases: Tensor,
    *,
    taps: int,
    dim: int | Sequence[int],
    weights: Tensor | None = None,
) -> Tensor:
    r"""Multiply a kernel on the left by the paraunitary factors \(P + (I - P) z_d\).

    \(P = V V^\top\), or \(P = V \mathrm{diag}(w) V^\top\) with `weights` w of zeros and ones. One
    factor per matrix of `bases`, the first one applied first, lengthens the tap dimension `dim` by
    one. For orthonormal columns V each factor is orthogonal on every torus, whatever the rank of P,
    so the product of `kernel` with all of them has the singular values of `kernel`.

    Args:
        kernel: Matrix polynomial with the channels first and any columns last.
        bases: Orthonormal columns, one matrix per factor.
        taps: Number of tap dimensions, between channels and columns.
        dim: Which of them grows, from 0; one for all factors, or one for each.
        weights: Which columns of a basis belong to the projector; default all of them.

    Shape:
        `kernel`: `(*batch, c, *k, n)`, `bases`: `(*batch, f, c, r)`, `weights`: `(*batch, f, r)`.
        Output: `kernel` with each `k[d]` larger by the number of factors along d.

    References:
        Li, Haque, Anil, Lucas, Grosse & Jacobsen, *Preventing gradient attenuation in Lipschitz
        constrained convolutional networks*, NeurIPS 2019 (BCOP); the factors go back to Xiao,
        Bahri, Sohl-Dickstein, Schoenholz & Pennington, ICML 2018 (delta-orthogonal) and to
        paraunitary filter banks (Vaidyanathan, *Multirate Systems and Filter Banks*, 1993,
        chapter 14).
    """
    channel = kernel.ndim - taps - 2
    count = bases.shape[-3]
    dims = (dim,) * count if isinstance(dim, int) else tuple(dim)
    _checks.require(
        len(dims) == count and all(0 <= d < taps for d in dims),
        "apply_projectors",
        "dim must name one of the tap dimensions for every factor",
        "Pass an integer, or one integer per factor",
        dim=dim,
        taps=taps,
        bases=bases,
    )
    axes = tuple(channel + 1 + d for d in dims)
    left = bases if weights is None else bases * weights.unsqueeze(-2)
    kernel = kernel.contiguous()
    if is_traced():
        return _chain(kernel, left, bases, axes)
    return _Chain.apply(kernel, left, bases, axes)  # type: ignore[return-value]


def _chain(kernel: Tensor, left: Tensor, right: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The product as ordinary differentiable operations."""
    channel = right.ndim - 3
    for a, b, axis in zip(left.unbind(channel), right.unbind(channel), axes, strict=True):
        flat = kernel.flatten(channel + 1)
        inside = a @ (b.mT @ flat)
        three, shape = _around(kernel.shape, axis)
        now, later = inside.reshape(three), (flat - inside).reshape(three)
        none = torch.zeros_like(now[:, :1])
        kernel = (torch.cat([now, none], 1) + torch.cat([none, later], 1)).view(shape)
    return kernel


def _around(shape: torch.Size, axis: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """`shape` as (everything before, the taps that grow, everything behind), and when grown."""
    three = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    return three, (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])


class _Chain(torch.autograd.Function):
    """`_chain` as one node; kept for backward are the partial products and their coordinates."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, kernel: Tensor, left: Tensor, right: Tensor, axes: tuple[int, ...]
    ) -> Tensor:
        channel = right.ndim - 3
        partial, inner = [], []
        result = kernel
        for a, b, axis in zip(left.unbind(channel), right.unbind(channel), axes, strict=True):
            partial.append(result)
            flat = result.flatten(channel + 1)
            inner.append(b.mT @ flat)
            inside = a @ inner[-1]
            three, shape = _around(result.shape, axis)
            grown = inside.new_empty(three[0], three[1] + 1, three[2])
            now = inside.view(three)
            grown[:, :1] = now[:, :1]
            torch.sub(flat.view(three), now, out=grown[:, 1:])
            grown[:, 1:-1] += now[:, 1:]
            result = grown.view(shape)
        ctx.save_for_backward(kernel, left, right, *partial[1:], *inner)
        ctx.axes = axes
        return result if axes else kernel.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kernel, left, right, *saved = ctx.saved_tensors
        axes = ctx.axes
        if not axes:
            return grad, torch.zeros_like(left), torch.zeros_like(right), None
        if torch.is_grad_enabled():  # differentiated again
            again = _chain(kernel, left, right, axes)
            return *torch.autograd.grad(again, (kernel, left, right), grad, create_graph=True), None
        partial, inner = [kernel, *saved[: len(axes) - 1]], saved[len(axes) - 1 :]
        channel = right.ndim - 3
        to_left, to_right = torch.empty_like(left), torch.empty_like(right)
        for i in reversed(range(len(axes))):
            before, index = partial[i], (slice(None),) * channel + (i,)
            three, _ = _around(before.shape, axes[i])
            taps = grad.contiguous().view(three[0], three[1] + 1, three[2])
            flat = before.flatten(channel + 1)
            first = (taps[:, :-1] - taps[:, 1:]).reshape(flat.shape)
            coordinates = left[index].mT @ first
            to_left[index] = first @ inner[i].mT
            to_right[index] = flat @ coordinates.mT
            grad = right[index] @ coordinates
            grad = grad.view(three).add_(taps[:, 1:]).view(before.shape)
        return grad, to_left, to_right, None
