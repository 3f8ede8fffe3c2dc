"""The constant of a model between l1, l2 and l-infinity, from bounds of its entries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.certify._bound import Bound, Row, norm_text
from orthonet.certify._radius import SEPARATION
from orthonet.certify.graph.marks import mark_of
from orthonet.certify.rules import REARRANGEMENT
from orthonet.certify.walk.entries import Costs, Moves, largest_rows, outward, vector_norm_up
from orthonet.certify.walk.islands import moves as only_moves
from orthonet.certify.walk.state import State
from orthonet.certify.walk.walker import Walker
from orthonet.linalg.bounds.rounding import mul_up, sqrt_up

__all__ = ["Mixed", "mixed_bound"]

_DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}
_TEXTS = {"linf": "largest of the", "l1": "sum of the", "l2": "l2 norm of the"}
_MOST_CLASSES, _FEW_CLASSES = 4096, 16


class Mixed(NamedTuple):
    """A constant between two norms.

    Attributes:
        bound: The bound of all outputs together.
        outputs: The bound of each output alone.
        pairs: The constants of the differences of two entries of the output, or None.
        rows: The steps that the bound was made from.
    """

    bound: Bound
    outputs: tuple[Bound, ...]
    pairs: Tensor | None
    rows: tuple[Row, ...]


def mixed_bound(walker: Walker, norm: str, to: str, pairs: Tensor | None) -> Mixed:
    """Bound a model from `norm` to `to`; `pairs` are the constants of differences in l2."""
    moves, costs = Moves(walker, norm), Costs(walker, to)
    costs.matrices = moves.matrices
    found = [s for s in walker.outputs if s is not None]
    bound, way, priced = _bound(walker, moves, costs, found, walker.bound.value, to)
    if len(walker.outputs) == 1:
        each = (bound,)
    else:
        each = tuple(
            Bound(0.0, bound.norm, "exact")
            if s is None
            else _bound(walker, moves, costs, [s], walker.bound_of(s).value, to)[0]
            for s in walker.outputs
        )
    table = _pairs(moves, costs, bound.value, to, pairs) if len(walker.outputs) == 1 else None
    return Mixed(bound, each, table, _rows(walker, moves, costs, priced, bound, way))


def _bound(
    walker: Walker, moves: Moves, costs: Costs, outputs: list[State], euclidean: float, to: str
) -> tuple[Bound, str, list[State]]:
    """The least of three bounds of some outputs, and how it was obtained."""
    norm, text = moves.norm, norm_text(moves.norm, to)
    if not outputs:
        return Bound(0.0, text, "exact"), "moves", []
    forward = vector_norm_up(torch.cat([moves.values[s].reshape(-1) for s in outputs]), to)
    prices = costs.whole(outputs)
    if prices:
        backward = vector_norm_up(torch.cat([c.reshape(-1) for c in prices.values()]), _DUAL[norm])
    else:
        backward = 0.0
    entries = sum(math.prod(s.shape) for s in outputs)
    ratio = mul_up(moves.ratio, sqrt_up(entries) if to == "l1" else 1.0)
    equivalent = mul_up(ratio, euclidean)
    least = min(forward, backward, equivalent)
    way = "moves" if forward == least else "costs" if backward == least else "equivalence"
    kind = "exact" if least == 0.0 or _is_exact(walker, moves, outputs, to) else "upper"
    return Bound(least, text, kind), way, outputs


def _is_exact(walker: Walker, moves: Moves, outputs: list[State], to: str) -> bool:
    """Whether the model is one matrix whose norm has a formula."""
    (state, *more) = outputs
    inputs = walker.program.inputs
    if more or len(inputs) > 1 or state.start.node not in inputs or not moves.ends(state):
        return False
    island = moves.island(state)
    if island is None or (moves.norm != "l1" and to != "linf"):
        return False
    return island.error <= 1e-9 * float(island.matrix.abs().max())


def _pairs(
    moves: Moves, costs: Costs, whole: float, to: str, euclidean: Tensor | None
) -> Tensor | None:
    """Bounds of the moves of all differences of two entries of the output, a vector."""
    state = moves.walker.outputs[0]
    if state is None or len(state.shape) != 1 or not 2 <= state.shape[0] <= _MOST_CLASSES:
        return None
    single = moves.values[state].reshape(-1)
    table = outward(single[:, None] + single, 1).clamp(max=mul_up(SEPARATION[to], whole))
    table = table.clamp(max=mul_up(SEPARATION["l2"], moves.in_l2(state)))
    if euclidean is not None:
        table = torch.minimum(table, outward(euclidean * moves.ratio, 1))
    island = moves.island(state) if moves.ends(state) else None
    if island is not None:
        before = moves.values[state.start].reshape(-1)
        twice = 2.0 * island.error
        first = state.start.node in moves.walker.program.inputs
        for i in range(len(table)):
            rows = outward((island.matrix - island.matrix[i]).abs(), 1)
            lost = mul_up(twice, vector_norm_up(before, "l2"))
            found = outward(rows @ before, rows.shape[1], lost + 2.0**-1000)
            if first:
                found = torch.minimum(found, largest_rows(rows, twice, moves.norm))
            table[i] = torch.minimum(table[i], found)
        if moves.norm == "l1" and not first and len(table) <= _FEW_CLASSES:
            table = torch.minimum(table, _priced(costs, state, island.matrix, island.error))
    table = torch.minimum(table, table.mT)  # both are sound, and rounding may differ
    return table.fill_diagonal_(0.0)


def _priced(costs: Costs, state: State, matrix: Tensor, error: float) -> Tensor:
    """The largest cost of an entry of the input for each difference of two outputs."""
    first, second = torch.triu_indices(len(matrix), len(matrix), 1)
    rows = outward((matrix[first] - matrix[second]).abs(), 1, 2.0 * error)
    found = costs.back({state.start: rows.reshape(len(rows), *state.start.shape)})
    table = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for cost in found.values():
        largest = cost.reshape(len(cost), -1).amax(1)
        table[first, second] = torch.maximum(table[first, second], largest)
    return torch.maximum(table, table.mT)


# --- the table -----------------------------------------------------------------------------------


def _rows(
    walker: Walker, moves: Moves, costs: Costs, outputs: list[State], bound: Bound, way: str
) -> tuple[Row, ...]:
    shape = tuple(walker.program.inputs[0].meta["val"].shape[1:])
    if way == "equivalence":
        ratio = bound.value / walker.bound.value if walker.bound.value else 1.0
        text = f"l2 constant times {ratio:.6g}, by equivalence of norms"
        last = Row("(model)", "norms", shape, ratio, bound.value, text, "upper", 0.0)
        return (*walker.rows(), last)
    rows = []
    for state in moves.states:
        call, value = state.call, moves.values[state]
        step, mark = state.step, mark_of(state.node)
        silent = mark is not None and step is not None and step.method == REARRANGEMENT
        if state.node in walker.program.inputs or silent or not isinstance(value, Tensor):
            continue
        if only_moves(state) or state.call.op == "getitem":
            continue
        operands = [torch.ones(1, *x.shape, dtype=torch.float64) for x in call.operands]
        if way == "moves":
            unit, _ = moves.rise(state, operands)
            size, method = float(unit.max()) if unit.numel() else 0.0, moves.methods[state]
        else:
            images = costs.fall(state, torch.ones(1, *state.shape, dtype=torch.float64))
            size = max((float(i.max()) for i in images if i.numel()), default=0.0)
            method = "costs of the entries"
        kind = "exact" if len(operands) == 1 and moves.slopes(state) is not None else "upper"
        largest = vector_norm_up(value, "linf")
        rows.append(
            Row(call.path, call.op, call.operands[0].shape, size, largest, method, kind, 0.0)
        )
    if way == "moves" and bound.ends[1] == "linf":
        return tuple(rows)
    which = bound.ends[1] if way == "moves" else _DUAL[bound.ends[0]]
    text = f"{_TEXTS[which]} {'moves of the outputs' if way == 'moves' else 'costs of the inputs'}"
    whole = Row("(model)", "norms", shape, bound.value, bound.value, text, bound.kind, 0.0)
    return (*rows, whole)
