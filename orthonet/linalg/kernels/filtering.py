r"""Paraunitary factors applied to a signal instead of to a kernel, with their own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet._torch import is_traced

__all__ = ["filter_signal"]


def filter_signal(
    signal: Tensor,
    bases: Tensor,
    axes: tuple[int, ...],
    steps: tuple[int, ...],
    weights: Tensor | None = None,
) -> Tensor:
    r"""Correlate a signal with paraunitary factors, the last one first.

    Each factor \(Q + (I - Q) z_d\) maps x to \(x_{i + s} + Q (x_i - x_{i + s})\), where both are
    inside, and so shortens its axis by the step s.

    Args:
        signal: Channels first, (g, c, *rest).
        bases: Orthonormal columns V, (g, f, c, r); \(Q = V \mathrm{diag}(w) V^\top\).
        axes: Which axis of `signal` each factor shortens.
        steps: By how much.
        weights: w, (g, f, r); default ones.

    Returns:
        (g, c, *shorter).
    """
    left = bases if weights is None else bases * weights.unsqueeze(-2)
    signal = signal.contiguous()
    if is_traced():
        return _filter(signal, left, bases, axes, steps)
    return _Filter.apply(signal, left, bases, axes, steps)


def _filter(
    x: Tensor, left: Tensor, right: Tensor, axes: tuple[int, ...], steps: tuple[int, ...]
) -> Tensor:
    """The map as ordinary differentiable operations."""
    for index in reversed(range(len(axes))):
        axis, step = axes[index], steps[index]
        size = x.shape[axis] - step
        first, last = x.narrow(axis, 0, size), x.narrow(axis, step, size)
        inside = left[:, index] @ (right[:, index].mT @ (first - last).flatten(2))
        x = last + inside.view(last.shape)
    return x


class _Filter(torch.autograd.Function):
    """`_filter` as one node; kept are the differences of each factor and their coordinates."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        axes: tuple[int, ...],
        steps: tuple[int, ...],
    ) -> Tensor:
        saved = []
        result = x
        for index in reversed(range(len(axes))):
            axis, step = axes[index], steps[index]
            size = result.shape[axis] - step
            first, last = result.narrow(axis, 0, size), result.narrow(axis, step, size)
            difference = (first - last).flatten(2)
            coordinates = right[:, index].mT @ difference
            saved += [difference, coordinates]
            result = (left[:, index] @ coordinates).view(last.shape).add_(last)
        ctx.save_for_backward(x, left, right, *saved)
        ctx.axes, ctx.steps = axes, steps
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, *saved = ctx.saved_tensors
        axes, steps = ctx.axes, ctx.steps
        if torch.is_grad_enabled():  # differentiated again
            again = _filter(x, left, right, axes, steps)
            result: list[Tensor | None] = [None] * 5
            places = [i for i in range(3) if ctx.needs_input_grad[i]]
            inputs = [(x, left, right)[i] for i in places]
            found = torch.autograd.grad(again, inputs, grad, create_graph=True)
            for i, g in zip(places, found, strict=True):
                result[i] = g
            return tuple(result)
        to_left, to_right = torch.empty_like(left), torch.empty_like(right)
        for index in range(len(axes)):
            axis, step = axes[index], steps[index]
            place = 2 * (len(axes) - 1 - index)
            difference, coordinates = saved[place], saved[place + 1]
            flat = grad.flatten(2)
            back = left[:, index].mT @ flat
            to_left[:, index] = flat @ coordinates.mT
            to_right[:, index] = difference @ back.mT
            inside = (right[:, index] @ back).view(grad.shape)
            sizes = list(grad.shape)
            sizes[axis] += step
            longer = grad.new_empty(sizes)
            longer.narrow(axis, 0, step).zero_()
            torch.sub(grad, inside, out=longer.narrow(axis, step, grad.shape[axis]))
            longer.narrow(axis, 0, grad.shape[axis]).add_(inside)
            grad = longer
        return grad, to_left, to_right, None, None
