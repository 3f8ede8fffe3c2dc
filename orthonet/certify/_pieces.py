"""Matrices of constants: what becomes of a tensor that is split and put together again.

Along one dim of a tensor r, disjoint pieces p_1, ..., p_k are cut out and processed apart. If the
change of each result is at most sum_j c_ij |dp_j|, then results that lie side by side change by at
most ||C||_2 |dr|: not by the root of the sum of the squares of their own constants, each of which
assumes that all of the change is in its piece.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from orthonet.certify._bound import Bound
from orthonet.certify._rules import Operand
from orthonet.linalg._rounding import add_up, hypot_up, mul_up
from orthonet.linalg.enclosure import spectral_norm_bound

if TYPE_CHECKING:
    from orthonet.certify._propagate import Walker
    from orthonet.certify._state import State

__all__ = ["Pieces"]


class _Combination(NamedTuple):
    """|dv| <= sum over intervals of coefficients times the change of a piece of `whole`."""

    whole: Any
    dim: int
    parts: dict[tuple[int, int], float]


class Pieces:
    """The combinations of pieces that the nodes of one walk are."""

    def __init__(self, walker: Walker) -> None:
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
        rows = [self.of(s) for s in states]
        if gains is None or not _compatible(rows):
            return None
        columns = sorted({part for row in rows for part in row.parts})  # type: ignore[union-attr]
        matrix = torch.tensor(
            [
                [mul_up(gains[s], row.parts.get(c, 0.0)) for c in columns]  # type: ignore[union-attr]
                for s, row in zip(states, rows, strict=True)
            ],
            dtype=torch.float64,
        )
        if not bool(matrix.isfinite().all()):
            return None
        whole = rows[0].whole  # type: ignore[union-attr]
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
        rows = [self.of(p) for p in state.parents]
        if not _compatible(rows):
            return None
        step = self.walker.step_of(state)
        gains = _gains(state, step)
        if gains is None or (step.combine == "hypot" and len(rows) > 1):
            return None
        parts: dict[tuple[int, int], float] = {}
        for parent, row in zip(state.parents, rows, strict=True):
            for part, value in row.parts.items():  # type: ignore[union-attr]
                parts[part] = add_up(parts.get(part, 0.0), mul_up(gains[parent], value))
        return _Combination(rows[0].whole, rows[0].dim, parts)  # type: ignore[union-attr]


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


def _compatible(rows: list[_Combination | None]) -> bool:
    """Whether all rows are of the same tensor, in pieces that are equal or disjoint."""
    if not rows or any(row is None for row in rows):
        return False
    if len({(row.whole, row.dim) for row in rows}) != 1:  # type: ignore[union-attr]
        return False
    parts = sorted({part for row in rows for part in row.parts})  # type: ignore[union-attr]
    return all(a[1] <= b[0] for a, b in pairwise(parts))


def _piece(state: State) -> _Combination | None:
    """A slice, a selected entry, or a part of a split, as a piece of the tensor it is cut from."""
    call, node = state.call, state.node
    if call.op == "getitem" and state.parents:
        split = state.parents[0]
        place: Any = node.args[1]
        if split.call.op not in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"):
            return None
        sizes = split.node.meta["val"]
        default = 0
        dim = split.call.get(1 if split.call.op == "unbind" else 2, "dim", default)
        if not split.parents or not isinstance(dim, int):
            return None
        whole = split.parents[0]
        dim %= len(whole.shape) + 1
        lengths = [1 if split.call.op == "unbind" else int(t.shape[dim]) for t in sizes]
        begin = sum(lengths[:place])
        return _Combination(whole, dim, {(begin, begin + lengths[place]): 1.0})
    if call.op not in ("slice", "select") or len(state.parents) != 1:
        return None
    whole = state.parents[0]
    dim = call.get(1, "dim", 0) % (len(whole.shape) + 1)
    size = whole.shape[dim - 1] if dim else 0
    if call.op == "select":
        begin = call.get(2, "index", 0) % max(size, 1)
        return _Combination(whole, dim, {(begin, begin + 1): 1.0}) if dim else None
    begin, end, stride = (call.get(i, name, None) for i, name in _SLICE)
    begin, end = begin or 0, size if end is None else end
    if not dim or stride not in (None, 1):
        return None
    if begin < 0 or end < 0:
        begin, end = begin % size if begin < 0 else begin, end % size if end < 0 else end
    return _Combination(whole, dim, {(min(begin, size), min(end, size)): 1.0})


_SLICE = ((2, "start"), (3, "end"), (4, "step"))
