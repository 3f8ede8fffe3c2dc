"""How far operations move single entries: what bounds in l1 and l-infinity are made of.

A bound of the move of each entry of the operands becomes one of each entry of the output (`rise`);
the cost of a move of each entry of the output becomes one of the operands (`fall`). Affine
operations need no record of it: their absolute action and its adjoint say both. Functions of
single entries have their slopes. What is here serves the other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet.certify.rules import Call, parameters

__all__ = [
    "ENTRYWISE",
    "LARGEST",
    "MEAN",
    "ORDERED",
    "PAIRS",
    "RUNNING",
    "SOFTMAX",
    "Entries",
    "group_entries",
    "lengths",
    "window_entries",
]

Gains = tuple[float, ...]
_TINY = 2.0**-500
"""What the root of a sum of squares may lose by underflow, but for the root of their number."""


@dataclass(frozen=True)
class Entries:
    r"""The moves of the entries of an operation, without the rounding of their computation.

    All tensors have a batch of several bounds as their first dim. For all inputs,
    $|f(x) - f(x')| \le \text{rise}(|x - x'|)$ entry by entry, monotone and homogeneous, and
    $\langle c, |f(x) - f(x')| \rangle \le \langle \text{fall}(c), |x - x'| \rangle$.

    Attributes:
        rise: (call, gains of the operands, moves of the operands) -> moves of the output.
        fall: (call, gains of the operands, costs of the output) -> costs of the operands.
    """

    rise: Callable[[Call, Gains, Sequence[Tensor]], Tensor]
    fall: Callable[[Call, Gains, Tensor], Sequence[Tensor]] | None = None


def _spread(call: Call, moves: Sequence[Tensor]) -> list[Tensor]:
    """The moves of the operands, repeated as broadcasting repeats the operands."""
    return [m.expand(len(m), *call.output_shape) for m in moves]


def _gathered(call: Call, costs: Tensor, gains: Sequence[float]) -> list[Tensor]:
    """The costs of what broadcasting repeats add up."""
    return [
        (costs * gain).sum_to_size(len(costs), *x.shape)
        for gain, x in zip(gains, call.operands, strict=True)
    ]


# --- functions of single entries -----------------------------------------------------------------


def _added(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
    spread = _spread(call, moves)
    return sum((g * m for g, m in zip(gains[1:], spread[1:], strict=True)), gains[0] * spread[0])


ENTRYWISE = Entries(_added, lambda call, gains, costs: _gathered(call, costs, gains))
"""Every entry of the output moves by its gains times the entries of the operands at its place."""


def _largest(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
    return torch.stack(_spread(call, moves)).amax(0)


LARGEST = Entries(
    _largest, lambda call, gains, costs: _gathered(call, costs, [1.0] * len(call.operands))
)
"""Every entry moves by no more than the entry of the operands at its place that moves most."""


def _hypot(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
    first, *rest = _spread(call, moves)
    return torch.hypot(first, rest[0]) + _TINY if rest else first


def _pair_fall(call: Call, gains: Gains, costs: Tensor) -> list[Tensor]:
    return _gathered(call, costs, [1.0] * len(call.operands))


PAIRS = Entries(_hypot, _pair_fall)
"""Every entry is the length of the vector of the entries of the operands at its place."""

MEAN = Entries(
    lambda call, gains, moves: _hypot(
        call, gains, [g * m for g, m in zip(gains, moves, strict=True)]
    ),
    lambda call, gains, costs: _gathered(call, costs, gains),
)
"""The same with a factor."""


# --- along dims ----------------------------------------------------------------------------------


def _dims(call: Call) -> tuple[int, ...]:
    """The dims that an operation acts along, counted with the batch."""
    return tuple(d + 1 for d in call.feature_dims(call.given("dim")))


def _kept(call: Call, costs: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The costs with every dim of the operand, as `keepdim` leaves them."""
    shape = [1 if i + 1 in dims else n for i, n in enumerate(call.operands[0].shape)]
    whole = torch.Size(shape).numel() * len(costs)
    return costs.reshape(len(costs), *shape) if costs.numel() == whole else costs


def _output(call: Call, values: Tensor) -> Tensor:
    """One value for each group as the output holds it: without the dim, or repeated along it."""
    shape = (len(values), *call.output_shape)
    if values.numel() == torch.Size(shape).numel():
        return values.reshape(shape)
    return values.expand(shape)


def _ordered(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
    return _output(call, moves[0].amax(_dims(call), keepdim=True))


def _ordered_fall(call: Call, gains: Gains, costs: Tensor) -> list[Tensor]:
    """Sorting moves no sum of moduli, so that the largest cost of the group is enough."""
    dims = _dims(call)
    top = _kept(call, costs, dims).amax(dims, keepdim=True)
    return [top.expand(len(costs), *call.operands[0].shape)]


ORDERED = Entries(_ordered, _ordered_fall)
"""Order statistics of groups along dims: each moves by no more than any entry of its group."""

RUNNING = Entries(
    lambda call, gains, moves: moves[0].cummax(_dims(call)[0]).values,
    lambda call, gains, costs: [costs.flip(d := _dims(call)[0]).cumsum(d).flip(d)],
)
"""The largest or least of all entries so far."""


def lengths(order: Callable[[Call], float], scaled: bool = False) -> Entries:
    """Norms of an order >= 1 along dims; with `scaled`, times the gain of the operation."""

    def rise(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
        (v,), p = moves, order(call)
        v = gains[0] * v if scaled else v
        if p == torch.inf:
            return _ordered(call, gains, moves)
        if p < 2.0:  # no norm of a larger order is larger
            return _output(call, v.sum(_dims(call), keepdim=True))
        root = torch.linalg.vector_norm(v, 2, _dims(call), keepdim=True)
        return _output(call, root + _TINY * v[0].numel() ** 0.5)

    def fall(call: Call, gains: Gains, costs: Tensor) -> list[Tensor]:
        kept = _kept(call, costs * gains[0] if scaled else costs, _dims(call))
        return [kept.expand(len(costs), *call.operands[0].shape)]

    return Entries(rise, fall)


def _softmax_rise(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
    top = _ordered(call, gains, moves)
    if call.op == "softmax" or not gains[0]:
        return gains[0] * top
    return moves[0] + top


def _softmax_fall(call: Call, gains: Gains, costs: Tensor) -> list[Tensor]:
    if call.op == "softmax" or not gains[0]:
        return [gains[0] * _ordered_fall(call, gains, costs)[0]]
    return [costs + costs.sum(_dims(call), keepdim=True)]


SOFTMAX = Entries(_softmax_rise, _softmax_fall)
"""The Jacobian diag(s) - s s^T is symmetric, with rows of moduli that add up to 2 s (1 - s), at
most the l2 constant 1/2. An entry of its logarithm moves with itself and against a weighted mean.
"""


# --- windows and groups --------------------------------------------------------------------------


def window_entries(places: Callable[[Call], Tensor] | None = None, lost: float = 0.0) -> Entries:
    """Norms or largest entries of windows: an entry moves by that of the moves in its window.

    `places` are the `windows` of the record; without them there is no `fall`. Roots of squares
    that underflow lose at most `lost` times the root of their number.
    """

    def rise(call: Call, gains: Gains, moves: Sequence[Tensor]) -> Tensor:
        (v,) = moves
        names = list(parameters(call.target))[1:]
        image = call.target(v, *(call.arguments[n] for n in names if n in call.arguments))
        image = image[0] if isinstance(image, tuple) else image
        return image + lost * v[0].numel() ** 0.5 if lost else image

    def fall(call: Call, gains: Gains, costs: Tensor) -> list[Tensor]:
        inside = places(call)  # type: ignore[misc]
        shape = call.operands[0].shape
        dims = int(call.op[8])
        entries = torch.Size(shape[len(shape) - dims :]).numel()
        ordered = inside.sort(1).values  # an entry that stands for padding is there twice
        twice = torch.cat([ordered[:, :1] < 0, ordered[:, 1:] == ordered[:, :-1]], 1)
        flat = costs.reshape(len(costs) * _channels(shape, dims), len(inside))
        values = flat[:, :, None].expand(-1, -1, inside.shape[1]).masked_fill(twice, 0.0)
        total = flat.new_zeros(len(flat), entries)
        total.index_add_(1, ordered.reshape(-1), values.reshape(len(flat), -1))
        return [total.reshape(len(costs), *shape)]

    return Entries(rise, None if places is None else fall)


def _channels(shape: Sequence[int], dims: int) -> int:
    return torch.Size(tuple(shape)[: len(shape) - dims]).numel()


def group_entries(group: Callable[[Any, Tensor], Tensor]) -> Entries:
    """Groups of channels that are sorted or reflected: `group` gives one value to all of each."""
    return Entries(
        lambda call, gains, moves: group(call, moves[0]),
        lambda call, gains, costs: [group(call, costs)],
    )
