"""Circular padding whose backward is as cheap as its forward, and symmetric padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet._torch import is_traced

__all__ = ["circular_pad", "symmetric_pad"]


def _checked_pads(owner: str, input: Tensor, pad: Sequence[int]) -> tuple[int, ...]:
    _checks.tensor(owner, input=input)
    good = isinstance(pad, (tuple, list, torch.Size)) and all(isinstance(p, int) for p in pad)
    pads = tuple(pad) if good else (-1,)
    dims = len(pads) // 2
    sizes = input.shape[input.ndim - dims :]
    _checks.require(
        len(pads) == 2 * dims <= 2 * input.ndim
        and all(
            0 <= p <= n
            for n, low, high in zip(reversed(sizes), pads[::2], pads[1::2], strict=True)
            for p in (low, high)
        ),
        owner,
        "pad must hold two integers from 0 to the size for each of the last dims",
        "Pass (before, behind) of the last dim first, or enlarge the input",
        pad=pad,
        input_size=tuple(input.shape),
    )
    return pads


def symmetric_pad(input: Tensor, pad: Sequence[int]) -> Tensor:
    r"""Mirror the last dimensions at their edges, the edge values included: `d c b a | a b c d`.

    It is the `"symmetric"` mode of `numpy.pad`, which `torch.nn.functional.pad` lacks; its
    `"reflect"` leaves the edge values out.

    Args:
        input: As of [`circular_pad`][orthonet.functional.circular_pad].
        pad: As there.

    Shape:
        As there.

    Guarantee:
        The norm is exactly \(\sqrt 2\) for every dimension that is padded, where its size is at
        least the sum of both paddings: no value is repeated more than once then.

    Raises:
        ValueError: As there.

    Examples:
        >>> symmetric_pad(torch.tensor([[0.0, 1.0, 2.0]]), (2, 1))
        tensor([[1., 0., 0., 1., 2., 2.]])
    """
    pads = _checked_pads("symmetric_pad", input, pad)
    for i, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        if low or high:
            dim = input.ndim - 1 - i
            n = input.shape[dim]
            places = torch.arange(-low, n + high, device=input.device)
            inside = torch.where(places < 0, -1 - places, places)
            input = input.index_select(dim, torch.where(inside < n, inside, 2 * n - 1 - inside))
    return input


def circular_pad(input: Tensor, pad: Sequence[int]) -> Tensor:
    r"""Wrap the last dimensions around: `F.pad(input, pad, mode="circular")`, but faster.

    Args:
        input: Any tensor, batched or not.
        pad: Values to repeat before and behind the last dimension, then before and behind the one
            in front of it, and so on, as for `torch.nn.functional.pad`; from 0 to the size.

    Shape:
        `input`: `(*, *sizes)`. Output: the same with the padded sizes.

    Guarantee:
        The values of `F.pad` bit for bit; twice differentiable. Its norm is above 1 (a value that
        is repeated m times counts \(\sqrt m\)); only together with a convolution on the torus is
        the map orthogonal.

    Raises:
        ValueError: `pad` has odd length, or an entry is negative or larger than the size.

    Examples:
        >>> circular_pad(torch.tensor([[0.0, 1.0, 2.0]]), (1, 2))
        tensor([[2., 0., 1., 2., 0., 1.]])
    """
    pads = _checked_pads("circular_pad", input, pad)
    if not any(pads):
        return input
    if is_traced():
        return (
            F.pad(input, pads, mode="circular")
            if 2 * input.ndim > len(pads)
            else _wrap(input, pads)
        )
    return _CircularPad.apply(input, pads)


def _spans(shape: torch.Size, pads: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Return (dim, before, size, behind) of every padded dim, last first."""
    spans = []
    for i, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = len(shape) - 1 - i
        spans.append((dim, low, shape[dim], high))
    return spans


def _wrap(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    spans = _spans(x.shape, pads)
    sizes = list(x.shape)
    for dim, low, size, high in spans:
        sizes[dim] = low + size + high
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    last = channels_last and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=form)
    inside = out
    for dim, low, size, _ in spans:
        inside = inside.narrow(dim, low, size)
    inside.copy_(x)
    # from the last dim to the first; what lies before is not filled yet, what lies behind is
    for i, (dim, low, size, high) in enumerate(spans):
        rows = out
        for other, before, count, _ in spans[i + 1 :]:
            rows = rows.narrow(other, before, count)
        if low:
            rows.narrow(dim, 0, low).copy_(rows.narrow(dim, size, low))
        if high:
            rows.narrow(dim, low + size, high).copy_(rows.narrow(dim, low, high))
    return out


def _unwrap(y: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Return the adjoint of `_wrap`: what was repeated is added up."""
    spans = [(d, a, n - a - b, b) for d, a, n, b in _spans(y.shape, pads)]
    for dim, low, size, high in reversed(spans):
        inside = y.narrow(dim, low, size)
        if low or high:
            total = inside.clone(memory_format=torch.preserve_format)
            if low:
                total.narrow(dim, size - low, low).add_(y.narrow(dim, 0, low))
            if high:
                total.narrow(dim, 0, high).add_(y.narrow(dim, low + size, high))
            inside = total
        y = inside
    return y


class _CircularPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pads: tuple[int, ...]) -> Tensor:
        ctx.pads = pads
        return _wrap(x, pads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _CircularUnpad.apply(grad, ctx.pads), None


class _CircularUnpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pads: tuple[int, ...]) -> Tensor:
        ctx.pads = pads
        return _unwrap(y, pads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _CircularPad.apply(grad, ctx.pads), None
