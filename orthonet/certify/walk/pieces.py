"""Matrices of constants: what becomes of a tensor that is split and put together again.

Along one dim of a tensor r, disjoint pieces p_1, ..., p_k are cut out and processed apart. If the
change of each result is at most sum_j c_ij |dp_j|, then results that lie side by side change by at
most ||C||_2 |dr|: not by the root of the sum of the squares of their own constants, each of which
assumes that all of the change is in its piece.

The larger and the smaller of two values change together by no more than the two values do.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.rules import Operand, parameters, record_of
from orthonet.certify.walk.state import State, Walk
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import add_up, hypot_up, mul_up

__all__ = ["Pieces", "sorted_pair"]


class _Combination(NamedTuple):
    """|dv| <= sum over intervals of coefficients times the change of a piece of `whole`."""

    whole: Any
    dim: int
    parts: dict[tuple[int, int], float]


class Pieces:
    """The combinations of pieces that the nodes of one walk are."""

    def __init__(self, walker: Walk) -> None:
        self.walker = walker
        self.known: dict[State, _Combination | None] = {}

    def refined(self, state: State) -> Bound | None:
        """A bound of a node of several operands by the pieces that these are made of."""
        step = self.walker.step_of(state)
        if step.combine == "hypot":
            return self._joint(state.parents, _gains(state, step))
        found = self.of(state)
        if found is None:
            return None
        return Bound(hypot_up(*found.parts.values())) * self._bound(found.whole)

    def _bound(self, whole: Any) -> Bound:
        return Bound(1.0) if whole is None else self.walker.bound_of(whole)

    def side_by_side(self, states: list[State]) -> Bound | None:
        """A bound of all `states` together."""
        return self._joint(states, dict.fromkeys(states, 1.0))

    def _joint(self, states: list[State], gains: dict[State, float] | None) -> Bound | None:
        if gains is None:
            return None
        states, gains = _without_sorts(states, gains)
        rows = _compatible([self.of(s) for s in states])
        if rows is None:
            return None
        columns = sorted({part for row in rows for part in row.parts})
        matrix = torch.tensor(
            [
                [mul_up(gains[s], row.parts.get(c, 0.0)) for c in columns]
                for s, row in zip(states, rows, strict=True)
            ],
            dtype=torch.float64,
        )
        if not bool(matrix.isfinite().all()):
            return None
        whole = rows[0].whole
        return Bound(spectral_norm_bound(matrix)) * self._bound(whole)

    def of(self, state: State) -> _Combination | None:
        """A node as a combination of the pieces of an earlier one, if it is one."""
        if state not in self.known:
            self.known[state] = None
            self.known[state] = self._find(state)
        return self.known[state]

    def _find(self, state: State) -> _Combination | None:
        piece = _piece(state)
        if piece is not None:
            return piece
        inputs = self.walker.program.inputs
        if not state.parents:  # an input of the model: one of several is a piece of all of them
            place = inputs.index(state.node)
            return _Combination(None, 0, {(place, place + 1): 1.0}) if len(inputs) > 1 else None
        rows = _compatible([self.of(p) for p in state.parents])
        if rows is None:
            return None
        step = self.walker.step_of(state)
        gains = _gains(state, step)
        if gains is None or (step.combine == "hypot" and len(rows) > 1):
            return None
        parts: dict[tuple[int, int], float] = {}
        for parent, row in zip(state.parents, rows, strict=True):
            for part, value in row.parts.items():
                parts[part] = add_up(parts.get(part, 0.0), mul_up(gains[parent], value))
        return _Combination(rows[0].whole, rows[0].dim, parts)


def sorted_pair(high: State, low: State) -> tuple[State, State] | None:
    """The two values, of one shape, of which these are the larger and the smaller one."""
    pairs = [_operand_states(s) for s in (high, low)]
    if [high.call.op, low.call.op] != ["maximum", "minimum"] or None in pairs:
        return None
    (first, *more), same = pairs[0] or [high], set(pairs[0] or ()) == set(pairs[1] or ())
    if len(more) != 1 or more[0] is first or not same or len(pairs[1] or ()) != 2:
        return None
    return (first, more[0]) if first.shape == more[0].shape == high.shape else None


def _without_sorts(
    states: list[State], gains: dict[State, float]
) -> tuple[list[State], dict[State, float]]:
    """The values themselves in place of the larger and the smaller one of each two."""
    for high, low in permutations(states, 2):
        pair = sorted_pair(high, low)
        if pair is not None and not gains.keys() & set(pair):
            gain = max(gains[high], gains[low])
            rest = {s: g for s, g in gains.items() if s not in (high, low)}
            gains = {**rest, **dict.fromkeys(pair, gain)}
            kept = [s for s in states if s not in (high, low)]
            return _without_sorts([*kept, *pair], gains)
    return states, gains


def _gains(state: State, step: Any) -> dict[State, float] | None:
    """One gain for each parent; those of a parent that is used twice add up."""
    operands = state.call.operands
    order = _operand_states(state)
    if order is None or len(order) != len(operands):
        return None
    gains: dict[State, float] = {}
    for parent, gain in zip(order, step.gains, strict=True):
        if step.combine == "hypot" and parent in gains:
            gains[parent] = hypot_up(gains[parent], gain.value)
        else:
            gains[parent] = add_up(gains.get(parent, 0.0), gain.value)
    return gains


def _operand_states(state: State) -> list[State] | None:
    """The parents in the order of the operands."""
    found: list[State] = []

    def visit(value: Any) -> None:
        if isinstance(value, Operand):
            found.append(value._state)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    visit((*state.call.args, *state.call.kwargs.values()))
    return found


def _compatible(found: list[_Combination | None]) -> list[_Combination] | None:
    """The rows, if all are of the same tensor, in pieces that are equal or disjoint."""
    rows = [row for row in found if row is not None]
    if len(rows) != len(found) or len({(row.whole, row.dim) for row in rows}) != 1:
        return None
    parts = sorted({part for row in rows for part in row.parts})
    return rows if all(a[1] <= b[0] for a, b in pairwise(parts)) else None


def _piece(state: State) -> _Combination | None:
    """A slice, a selected entry, or a part of a split, as a piece of the tensor it is cut from."""
    place: Any = None
    cut = state
    if state.call.op == "getitem" and state.parents:
        place, cut = state.node.args[1], state.parents[0]
    record = record_of(cut.node.target)
    if (
        record is None
        or not record.cuts
        or len(cut.parents) != 1
        or (cut is state) != (place is None)
    ):
        return None
    whole = cut.parents[0]
    dim = cut.call["dim"] % (len(whole.shape) + 1)
    found = _range(cut, dim, whole.shape[dim - 1], place) if dim else None
    return None if found is None else _Combination(whole, dim, {found: 1.0})


def _range(state: State, dim: int, size: int, place: Any) -> tuple[int, int] | None:
    """Where a piece begins and ends: the operation itself is run on the numbers of the entries."""
    shape = [1] * (len(state.parents[0].shape) + 1)
    shape[dim] = size
    numbers = torch.arange(size).reshape(shape)
    listed = [state.call.arguments[name] for name in parameters(state.call.target)][1:]
    if not all(map(_is_plain, listed)):
        return None
    result: Any = state.call.target(numbers, *listed)
    if place is not None:
        result = result[place]
    if not isinstance(result, Tensor):  # a split itself, before a part is taken
        return None
    entries = result.flatten().tolist()
    begin = entries[0] if entries else 0
    end = begin + len(entries)
    return (begin, end) if entries == list(range(begin, end)) else None


def _is_plain(value: Any) -> bool:
    """Whether an argument is numbers alone."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int)
