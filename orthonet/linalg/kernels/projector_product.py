r"""A matrix times paraunitary factors, as one node of the autograd graph.

Inside, everything is transposed: a matrix polynomial is held as rows of channels, so that each
factor \(P + (I - P) z\), \(P = V V^\top\), multiplies from the right, and all products have long
contiguous left operands. Two ways are taken:

- Along a dimension that has a single tap so far, two factors or more are first multiplied with each
  other. A pair is, with \(X = P_1 P_2\) and \(S = P_1 + P_2\), the polynomial
  \(X + (S - 2 X) z + (I - S + X) z^2\). The polynomials of all such dimensions are made as one
  batch, and each multiplies the rows by one wide product.
- All other factors are applied one by one, through their basis, by two products of half the width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthonet._torch import is_traced, tracing

__all__ = ["chain", "multiplications", "multiply_projectors"]


def multiply_projectors(
    start: Tensor,
    left: Tensor,
    right: Tensor | None,
    axes: tuple[int, ...],
    *,
    channels_first: bool = False,
) -> Tensor:
    r"""Multiply a kernel by \(P_f + (I - P_f) z_d\), \(P_f = L_f R_f^\top\), one after another.

    Args:
        start: Kernel (b, n, c, *taps); its channels c are multiplied. With `channels_first`,
            (b, c, n, *taps).
        left: L, (b, f, c, r).
        right: R, likewise, or None if it is L.
        axes: Which tap dimension each factor lengthens, from 0.
        channels_first: See `start`.

    Returns:
        The product in the layout of `start`, contiguous.
    """
    if is_traced() or tracing():
        return _as_chain(start, left, left if right is None else right, axes, channels_first)
    return _Product.apply(start, left, right, axes, channels_first)


def chain(kernel: Tensor, left: Tensor, right: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The product as ordinary differentiable operations on (*batch, c, *taps, n).

    `axes` are dimensions of `kernel` here.
    """
    channel = right.ndim - 3
    for a, b, axis in zip(left.unbind(channel), right.unbind(channel), axes, strict=True):
        flat = kernel.flatten(channel + 1)
        inside = a @ (b.mT @ flat)
        shape = kernel.shape
        three = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
        now, later = inside.reshape(three), (flat - inside).reshape(three)
        none = torch.zeros_like(now[:, :1])
        grown = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
        kernel = (torch.cat([now, none], 1) + torch.cat([none, later], 1)).view(grown)
    return kernel


def _as_chain(
    start: Tensor, left: Tensor, right: Tensor, axes: tuple[int, ...], channels_first: bool
) -> Tensor:
    columns = 2 if channels_first else 1
    product = chain(start.movedim(columns, -1), left, right, tuple(2 + d for d in axes))
    return product.movedim(-1, columns).contiguous()


class _Single(NamedTuple):
    """One factor, where (before, size, behind) are the sizes around the taps that it lengthens."""

    factor: int
    before: int
    size: int
    behind: int


class _Wide(NamedTuple):
    """The polynomial of several factors, one of those of `count` factors each."""

    count: int
    slot: int


class _Plan(NamedTuple):
    steps: tuple[_Single | _Wide, ...]
    families: dict[int, tuple[int, ...]]  # count: the first factors of the polynomials of so many
    sizes: tuple[int, ...]  # of the result in memory, between batch and channels
    order: tuple[int, ...]  # which dimension each of them is: a tap dimension, or -1 for the rows


@functools.lru_cache(maxsize=512)
def _plan(taps: tuple[int, ...], n: int, c: int, axes: tuple[int, ...]) -> _Plan:
    """What to do in which order; rows (taps, n, channels) at first."""
    sizes = dict(enumerate(taps)) | {-1: n}
    order, first = [*range(len(taps)), -1], 0
    steps: list[_Single | _Wide] = []
    families: dict[int, tuple[int, ...]] = {}
    for axis, run in groupby(axes):
        count = len(list(run))
        # A polynomial costs products of c x c matrices, which few rows are not worth.
        if sizes[axis] == 1 and count > 1 and 2 * n >= c:
            steps.append(_Wide(count, len(families.get(count, ()))))
            families[count] = (*families.get(count, ()), first)
            order.remove(axis)
            order.append(axis)
            sizes[axis] += count
        else:
            place = order.index(axis)
            before = math.prod(sizes[d] for d in order[:place])
            behind = math.prod(sizes[d] for d in order[place + 1 :])
            for factor in range(first, first + count):
                steps.append(_Single(factor, before, sizes[axis], behind))
                sizes[axis] += 1
        first += count
    return _Plan(tuple(steps), families, tuple(sizes[d] for d in order), tuple(order))


def multiplications(taps: tuple[int, ...], n: int, c: int, rank: int, axes: tuple[int, ...]) -> int:
    """How many `multiply_projectors` does, forward, for one kernel of n rows and c channels."""
    plan = _plan(taps, n, c, axes)
    rows, total = n * math.prod(taps), 0
    for step in plan.steps:
        if isinstance(step, _Single):
            total += 2 * rows * c * rank
            rows += rows // step.size
            continue
        pairs, odd = divmod(step.count, 2)
        total += 2 * pairs * c * c * rank + pairs * c**3  # the projectors, and P_1 P_2 of each pair
        total += sum(3 * (2 * i + 1) * c**3 for i in range(1, pairs))  # pairs with each other
        total += 2 * odd * step.count * c * c * rank + rows * c * c * (step.count + 1)
        rows *= step.count + 1
    return total


def _to_rows(order: Sequence[int], channels_first: bool) -> tuple[int, ...]:
    """The permutation from the layout of the caller to (b, *order, c)."""
    columns, channels = (2, 1) if channels_first else (1, 2)
    return (0, *(columns if d < 0 else 3 + d for d in order), channels)


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def _taken(bases: Tensor, firsts: tuple[int, ...], count: int) -> Tensor:
    """The bases of the polynomials that begin with `firsts`, (b * len(firsts), count, c, r)."""
    if len(firsts) * count < bases.shape[1]:
        bases = torch.cat([bases[:, first : first + count] for first in firsts], 1)
    return bases.reshape(-1, count, *bases.shape[2:])


class _Product(torch.autograd.Function):
    """Kept for backward are the rows before each step, and what the polynomials are made of."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        left: Tensor,
        right: Tensor | None,
        axes: tuple[int, ...],
        channels_first: bool,
    ) -> Tensor:
        taps, batch = start.shape[3:], start.shape[0]
        n, c = start.shape[1:3][::-1] if channels_first else start.shape[1:3]
        plan = _plan(tuple(taps), n, c, axes)
        ctx.axes, ctx.channels_first, ctx.plan = axes, channels_first, plan
        other = left if right is None else right
        saved: list[Tensor] = []
        polynomials = {}
        for count, firsts in plan.families.items():
            made, kept = _polynomial(_taken(left, firsts, count), _taken(other, firsts, count))
            polynomials[count] = made.view(batch, len(firsts), c, -1)
            saved += [*kept, polynomials[count]]
        x = start.permute(_to_rows((*range(len(taps)), -1), channels_first)).contiguous()
        x = x.view(batch, -1, c)
        for step in plan.steps:
            saved.append(x)
            if isinstance(step, _Wide):
                x = torch.bmm(x, polynomials[step.count][:, step.slot]).view(batch, -1, c)
            else:
                x, inner = _delay(x, left[:, step.factor], other[:, step.factor], step)
                saved.append(inner)
        ctx.save_for_backward(start, left, right, *saved)
        x = x.view(batch, *plan.sizes, c).permute(_inverse(_to_rows(plan.order, channels_first)))
        return x.contiguous() if axes else x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, left, right, *saved = ctx.saved_tensors
        axes, channels_first, plan = ctx.axes, ctx.channels_first, ctx.plan
        other = left if right is None else right
        if torch.is_grad_enabled():  # differentiated again
            again = _as_chain(start, left, other, axes, channels_first)
            result: list[Tensor | None] = [None] * 5
            places = [i for i in range(3) if ctx.needs_input_grad[i]]
            found = torch.autograd.grad(
                again,
                [(start, left, other)[i] for i in places],
                grad,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for i, g in zip(places, found, strict=True):
                result[i] = g
            return tuple(result)
        batch, c, saved = grad.shape[0], left.shape[-2], list(saved)
        grad = grad.permute(_to_rows(plan.order, channels_first)).contiguous().view(batch, -1, c)
        polynomials, parts = {}, {}
        for count in plan.families:
            parts[count] = [saved.pop(0) for _ in range(_kept(count))]
            polynomials[count] = saved.pop(0)
        pulled = {count: torch.empty_like(p) for count, p in polynomials.items()}
        pieces: dict[int, tuple[Tensor, Tensor]] = {}  # by their first factors
        for step in reversed(plan.steps):
            if isinstance(step, _Wide):
                x, polynomial = saved.pop(), polynomials[step.count][:, step.slot]
                wide = grad.view(batch, -1, polynomial.shape[-1])
                torch.bmm(x.mT, wide, out=pulled[step.count][:, step.slot])
                grad = torch.bmm(wide, polynomial.mT)
            else:
                inner, x, f = saved.pop(), saved.pop(), step.factor
                grad, *both = _delay_back(grad, x, inner, left[:, f], other[:, f], step)
                pieces[f] = (both[0].unsqueeze(1), both[1].unsqueeze(1))
        for count, firsts in plan.families.items():
            ends = (_taken(left, firsts, count), _taken(other, firsts, count))
            both = _polynomial_back(pulled[count], parts[count], *ends)
            shape = (batch, len(firsts), *both[0].shape[1:])
            if len(firsts) * count == len(axes):
                pieces[0] = (both[0].view(left.shape), both[1].view(left.shape))
                continue
            for slot, first in enumerate(firsts):
                pieces[first] = (both[0].view(shape)[:, slot], both[1].view(shape)[:, slot])
        to_left, to_right = (_joined([pieces[f][i] for f in sorted(pieces)], left) for i in (0, 1))
        if right is None:
            to_left, to_right = to_left.add_(to_right), None
        taps = (*start.shape[3:], start.shape[2 if channels_first else 1])
        back = _inverse(_to_rows((*range(len(taps) - 1), -1), channels_first))
        grad = grad.view(batch, *taps, c).permute(back)
        return grad, to_left, to_right, None, None


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """The gradients of all factors from those of some in a row."""
    if not pieces:
        return torch.zeros_like(like)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _delay(x: Tensor, left: Tensor, right: Tensor, step: _Single) -> tuple[Tensor, Tensor]:
    """Rows times one factor, and their coordinates X R."""
    batch, _, c = x.shape
    inner = torch.bmm(x, right)
    three = (batch * step.before, step.size, step.behind * c)
    now = torch.bmm(inner, left.mT).view(three)
    grown = x.new_empty(three[0], step.size + 1, three[2])
    grown[:, :1] = now[:, :1]
    torch.sub(x.view(three), now, out=grown[:, 1:])
    if step.size > 1:
        grown[:, 1:-1] += now[:, 1:]
    return grown.view(batch, -1, c), inner


def _delay_back(
    grad: Tensor, x: Tensor, inner: Tensor, left: Tensor, right: Tensor, step: _Single
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the rows, of L and of R."""
    taps = grad.view(-1, step.size + 1, step.behind * x.shape[-1])
    first = (taps[:, :-1] - taps[:, 1:]).view(x.shape)
    coordinates = torch.bmm(first, left)
    back = torch.bmm(coordinates, right.mT)
    back.view(-1, step.size, taps.shape[-1]).add_(taps[:, 1:])
    return back, torch.bmm(first.mT, inner), torch.bmm(x.mT, coordinates)


def _kept(count: int) -> int:
    """How many tensors `_polynomial` keeps for `count` factors."""
    return 1 if count == 2 else 1 + count // 2 + count % 2 * 2


def _polynomial(left: Tensor, right: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The product of the factors of each batch entry, (B, f, c, r), as (B, c, f + 1, c)."""
    batch, count, c, _ = left.shape
    pairs = count // 2
    ends = (left[:, : 2 * pairs].flatten(0, 1), right[:, : 2 * pairs].flatten(0, 1))
    p = torch.bmm(ends[1], ends[0].mT).view(-1, 2, c, c)  # transposed, as the rows are
    x, s = torch.bmm(p[:, 0], p[:, 1]), p[:, 0] + p[:, 1]
    pair = x.new_empty(x.shape[0], c, 3, c)
    pair[:, :, 0] = x
    torch.sub(s, x, alpha=2.0, out=pair[:, :, 1])
    last = torch.sub(x, s, out=pair[:, :, 2])
    last.diagonal(dim1=1, dim2=2).add_(1.0)
    if count == 2:
        return pair, [p]
    pair = pair.view(batch, pairs, c, 3, c).transpose(2, 3).contiguous()
    product, kept = pair[:, 0], [p, pair]
    for i in range(1, pairs):
        kept.append(product)
        product = _times(product, pair[:, i])
    if count % 2:
        rows = product.reshape(batch, -1, c)
        product, inner = _delay(rows, left[:, -1], right[:, -1], _Single(0, 1, count, c))
        kept += [rows, inner]
    return product.view(batch, count + 1, c, c).transpose(1, 2).contiguous(), kept


def _polynomial_back(
    grad: Tensor, kept: list[Tensor], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of L and R, (B, f, c, r), from that of the polynomial."""
    batch, count, c, _ = left.shape
    p, pairs, single = kept[0], count // 2, []
    if count == 2:
        first, second, third = grad.view(-1, c, 3, c).unbind(2)
    else:
        taps = grad.view(batch, c, count + 1, c).transpose(1, 2).contiguous()
        if count % 2:
            flat, step = taps.view(batch, -1, c), _Single(0, 1, count, c)
            flat, *single = _delay_back(flat, kept[-2], kept[-1], left[:, -1], right[:, -1], step)
            taps = flat.view(batch, count, c, c)
        factors = kept[1]
        pulled = torch.empty_like(factors)
        for i in reversed(range(1, pairs)):
            taps, pulled[:, i] = _times_back(taps, kept[1 + i], factors[:, i])
        pulled[:, 0] = taps
        first, second, third = pulled.flatten(0, 1).unbind(1)
    to_x = torch.sub(first, second, alpha=2.0).add_(third)
    to_s = second - third
    to_p = torch.empty_like(p)
    to_p[:, 0] = torch.baddbmm(to_s, to_x, p[:, 1].mT)
    to_p[:, 1] = torch.baddbmm(to_s, p[:, 0].mT, to_x)
    to_p, shape = to_p.flatten(0, 1), (batch, 2 * pairs, *left.shape[2:])
    to_left = torch.bmm(to_p.mT, right[:, : 2 * pairs].flatten(0, 1)).view(shape)
    to_right = torch.bmm(to_p, left[:, : 2 * pairs].flatten(0, 1)).view(shape)
    if not single:
        return to_left, to_right
    to_left = torch.cat([to_left, single[0].unsqueeze(1)], 1)
    return to_left, torch.cat([to_right, single[1].unsqueeze(1)], 1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrix polynomials, (B, taps, c, c) each."""
    batch, size, c, _ = a.shape
    rows, more = a.reshape(batch, -1, c), b.shape[1] - 1
    out = a.new_zeros(batch, size + more, c, c)
    for t in range(more + 1):
        out[:, t : t + size].add_(torch.bmm(rows, b[:, t]).view(a.shape))
    return out


def _times_back(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors of `_times`."""
    batch, size, c, _ = a.shape
    rows = a.reshape(batch, -1, c)
    to_a, to_b = torch.zeros_like(rows), torch.empty_like(b)
    for t in range(b.shape[1]):
        window = grad[:, t : t + size].reshape(rows.shape)
        to_a.baddbmm_(window, b[:, t].mT)
        to_b[:, t] = torch.bmm(rows.mT, window)
    return to_a.view(a.shape), to_b
