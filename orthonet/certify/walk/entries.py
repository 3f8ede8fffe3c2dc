r"""Bounds entry by entry, along the graph: Lipschitz constants in l1, l-infinity and mixed norms.

Forwards, `Moves` bounds how far each entry of each node moves when the input moves by 1 in the norm
p. Backwards, `Costs` bounds what a move of each entry of each node does to the output in the norm
q. An affine operation acts by the moduli of its matrix, several in a row by those of their product.
Where an operation has no rule for entries, its l2 constant takes the place of one, because
$\|x\|_\infty \le \|x\|_2 \le \|x\|_1$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.certify.graph.marks import mark_of
from orthonet.certify.norms import limits
from orthonet.certify.ops.entries import Entries
from orthonet.certify.rules import REARRANGEMENT, function_rule, record_of
from orthonet.certify.walk.islands import (
    action_of,
    amplification_of,
    linear_action,
    materialize,
)
from orthonet.certify.walk.state import Island, State
from orthonet.certify.walk.walker import Walker
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
)

__all__ = ["Costs", "Moves", "largest_rows", "outward", "vector_norm_up"]

_SQUARED = ("conv1d", "conv2d", "conv3d", "convolution", "linear")


def outward(values: Tensor, count: float, lost: float = 0.0) -> Tensor:
    """Not less than what the values stand for, after `count` roundings of non-negative terms."""
    raised = values * (1.0 + 2.0 * gamma(int(count) + 8)) + lost
    return raised.nan_to_num(nan=math.inf, posinf=math.inf)


def vector_norm_up(values: Tensor, norm: str) -> float:
    """Not less than the norm of a vector of non-negative numbers."""
    flat = values.detach().double().reshape(-1)
    if norm == "linf":
        return float(flat.max()) if flat.numel() else 0.0
    if norm == "l1":
        return float(outward(flat.sum(), flat.numel()))
    scale = power_of_two_scale(flat)
    if not scale or not math.isfinite(scale):
        return float(scale)
    root = torch.linalg.vector_norm(flat / scale)
    return mul_up(float(outward(root, flat.numel(), 2.0**-500)), scale)


def largest_rows(matrix: Tensor, error: float, norm: str) -> Tensor:
    """Not less than the norms of the rows of a matrix that is known up to `error`: their dual ones.

    A row bounds how far its entry moves where the vector moves by 1 in `norm`.
    """
    if norm == "linf":
        return outward(matrix.abs().sum(1), matrix.shape[1], error * sqrt_up(matrix.shape[1]))
    if norm == "l1":
        return outward(matrix.abs().amax(1), 0, error)
    scale = power_of_two_scale(matrix) or 1.0
    rows = torch.linalg.vector_norm(matrix / scale, dim=1)
    return outward(outward(rows, matrix.shape[1], 2.0**-500) * scale, 0, error)


class _Graph:
    """What both directions share: the order of the nodes, islands and their rules."""

    def __init__(self, walker: Walker) -> None:
        self.walker = walker
        self.states = list(walker.states.values())
        self.used: dict[State, list[State]] = {state: [] for state in self.states}
        for state in self.states:
            for parent in dict.fromkeys(state.parents):
                self.used[parent].append(state)
        self.outputs = set(walker.program.outputs)
        self.matrices: dict[State, Island | None] = {}

    def ends(self, state: State) -> bool:
        """Whether an affine island with a matrix of weights ends in a node."""
        if state.source is None or not any(a and a.heavy for a in map(action_of, state.island)):
            return False
        inside = [user.source is state.source for user in self.used[state]]
        return state.node in self.outputs or not all(inside) or not inside

    def island(self, state: State) -> Island | None:
        """The matrix of an island, where it is small enough."""
        if state not in self.matrices:
            sizes = math.prod(state.start.shape), math.prod(state.shape)
            small = min(sizes) <= limits().side and math.prod(sizes) <= limits().entries
            known = self.walker.matrices.get(state)
            self.matrices[state] = known or (materialize(state) if small else None)
        return self.matrices[state]

    def record(self, state: State) -> Any:
        """The record of the operation of a node, if nobody has registered another rule for it."""
        mark = mark_of(state.node)
        if mark is not None and mark[1] >= 0:
            return None
        if mark is not None:
            target = self.walker.program.calls[mark[0]].target
        else:
            target = state.node.target
        found = record_of(target)
        return found if found is not None and function_rule(target) == found.step else None

    def gains(self, state: State) -> tuple[float, ...]:
        """The l2 constants of a node over its operands."""
        return tuple(gain.value for gain in self.walker.step_of(state).gains)

    def slopes(self, state: State) -> Tensor | None:
        """The largest slope of each entry of a function of single entries."""
        record = self.record(state)
        operands = state.call.operands
        if record is None or record.slopes is None or len(operands) != 1:
            return None
        if operands[0].shape != state.shape:
            return None
        record.check(state.call)
        found = record.slopes(state.call, math.prod(state.shape))
        if found is None or found.basis is not None or found.groups is not None:
            return None
        return found.largest.reshape(1, *state.shape)

    def entries(self, state: State) -> Entries | None:
        """The rule of a node for single entries."""
        record = self.record(state)
        if record is None or record.entries is None:
            return None
        record.check(state.call)
        return record.entries

    def lost(self, state: State) -> tuple[float, float] | None:
        """Roundings of one entry of an affine operation, and what underflow may take from it."""
        spread = amplification_of([state])
        if spread is None:
            return None
        sizes = [math.prod(state.shape), *(math.prod(p.shape) for p in state.parents)]
        count = 2.0 * sum(sizes) + 64.0
        moves = (action := action_of(state)) is not None and action.moves
        return count, 0.0 if moves else mul_up(count, spread, UNDERFLOW)


def is_part(state: State) -> bool:
    """Whether a node takes one of several outputs of another one."""
    return state.call.op == "getitem" and isinstance(
        state.parents[0].node.meta.get("val"), (tuple, list)
    )


def operand_states(state: State) -> list[State]:
    """The nodes of the operands, in their order."""
    return [operand._state for operand in state.call.operands]


class Moves(_Graph):
    """How far every entry moves at most where the input moves by 1 in the norm `norm`.

    Attributes:
        values: The bounds of each node, (1, *shape); a tuple for several outputs.
        methods: How the bounds of a node were obtained.
    """

    def __init__(self, walker: Walker, norm: str) -> None:
        super().__init__(walker)
        self.norm = norm
        entries = sum(math.prod(n.meta["val"].shape[1:]) for n in walker.program.inputs)
        self.ratio = sqrt_up(entries) if norm == "linf" and entries else 1.0
        """How much longer a move may be in l2 than in the norm."""
        self.values: dict[State, Any] = {}
        self.methods: dict[State, str] = {}
        for state in self.states:
            self.values[state], self.methods[state] = self._bound(state)

    def in_l2(self, state: State) -> float:
        """How far a node moves in l2, where that is known."""
        if state.node in self.walker.program.inputs:
            return self.ratio
        return math.inf if state.bound is None else mul_up(self.ratio, state.bound.value)

    def _bound(self, state: State) -> tuple[Any, str]:
        if state.node in self.walker.program.inputs:
            return torch.ones(1, *state.shape, dtype=torch.float64), "input"
        value, method = self.rise(state, [self.values[p] for p in operand_states(state)])
        if isinstance(value, tuple):
            return value, method
        if self.ends(state):
            better, how = self._rows(state)
            if better is not None:
                least = torch.minimum(value, better.reshape(value.shape))
                method = how if bool((least < value).any()) else method
                value = least
        whole = self.in_l2(state)
        if bool((value > whole).all()):
            method = "l2 constant, by equivalence"
        return value.clamp(max=whole), method

    def rise(self, state: State, moves: Sequence[Any]) -> tuple[Any, str]:
        """The moves of a node from those of its operands."""
        if is_part(state):
            return moves[0][state.node.args[1]], REARRANGEMENT
        mark = mark_of(state.node)
        if mark is not None and mark[1] >= 0:
            return moves[0], REARRANGEMENT
        action = action_of(state)
        lost = None if action is None else self.lost(state)
        if action is not None and lost is not None:
            env = {p.node: m for p, m in zip(operand_states(state), moves, strict=True)}
            image = _run(state, env)
            if image is not None:
                method = REARRANGEMENT if action.moves else "moduli of the matrix"
                return _each(image, lambda t: outward(t, *lost)), method
        slopes = self.slopes(state)
        if slopes is not None:
            return outward(moves[0] * slopes, 1), "largest slope"
        rule = self.entries(state)
        value = state.node.meta.get("val")
        if rule is not None:
            found = rule.rise(state.call, self.gains(state), moves)
            count = found.numel() + sum(m.numel() for m in moves) + 64
            found = outward(found, count)
            return (found,) if isinstance(value, (tuple, list)) else found, "entry by entry"
        gains = self.gains(state)
        lengths = [mul_up(g, vector_norm_up(m, "l2")) for g, m in zip(gains, moves, strict=True)]
        length = float(outward(torch.tensor(lengths, dtype=torch.float64).sum(), len(lengths)))
        found = torch.full((1, *state.shape), length, dtype=torch.float64)
        if isinstance(value, (tuple, list)):
            return tuple(
                torch.full((1, *v.shape[1:]), length, dtype=torch.float64) for v in value
            ), "l2 constant, by equivalence"
        return found, "l2 constant, by equivalence"

    def _rows(self, state: State) -> tuple[Tensor | None, str]:
        """The moves by the rows of the matrix of an island, and how they were bounded."""
        source = state.start
        first = source.node in self.walker.program.inputs
        before, reach = self.values[source], self.in_l2(source)
        island = self.island(state)
        text = f"matrix {math.prod(state.shape)}x{math.prod(source.shape)}"
        if island is None:
            rows = None if len(state.island) != 1 else self._squared(state)
            if rows is None or not math.isfinite(reach):
                return None, ""
            return outward(rows * reach, 1), "l2 norms of the rows"
        matrix, error = island
        count = matrix.shape[1]
        found = outward(
            matrix.abs() @ before.reshape(-1),
            count,
            mul_up(error, vector_norm_up(before, "l2")) + mul_up(count, UNDERFLOW),
        )
        if math.isfinite(reach):
            rows = largest_rows(matrix, error, "l2")
            found = torch.minimum(found, outward(rows * reach, 1))
        if first:
            found = torch.minimum(found, largest_rows(matrix, error, self.norm))
        return found, f"{len(state.island)} affine operations, {text}"

    def _squared(self, state: State) -> Tensor | None:
        """The l2 norms of the rows of one convolution or matrix: it acts by squares of weights."""
        spread = self.lost(state)
        if state.call.op not in _SQUARED or spread is None:
            return None
        ones = {state.parents[0].node: torch.ones(1, *state.parents[0].shape).double()}
        scale = power_of_two_scale(torch.as_tensor(state.call.fixed("weight"))) or 1.0
        image = _run(state, ones, lambda t: (t.double() / scale).square())
        if image is None:
            return None
        return outward(outward(image, *spread).sqrt() * scale, 4, scale * 2.0**-500)


class Costs(_Graph):
    """What the move of an entry of a node can do to the output, at most, in the norm `norm`."""

    def __init__(self, walker: Walker, norm: str) -> None:
        super().__init__(walker)
        self.norm = norm

    def whole(self, outputs: Sequence[State]) -> dict[State, Tensor]:
        """The costs of the entries of the inputs for these outputs together, (1, *shape)."""
        seeds: dict[State, Any] = {}
        distinct = len(set(outputs)) == len(outputs)
        for state in outputs:
            island = self.island(state) if self.ends(state) and distinct else None
            if island is not None and len(outputs) == 1:
                columns = largest_rows(island.matrix.mT, island.error, _DUAL[self.norm])
                self._add(seeds, state.start, columns.reshape(1, *state.start.shape))
            else:
                self._add(seeds, state, torch.ones(1, *state.shape, dtype=torch.float64))
        return self.back(seeds)

    def back(self, seeds: Mapping[State, Any]) -> dict[State, Tensor]:
        """The costs of the entries of the inputs, from those of the entries of some nodes."""
        costs, found = dict(seeds), {}
        for state in reversed(self.states):
            cost = costs.pop(state, None)
            if cost is None:
                continue
            if state.node in self.walker.program.inputs:
                found[state] = cost
                continue
            island = self.island(state) if self.ends(state) else None
            if island is not None:
                matrix, error = island
                flat = cost.reshape(len(cost), -1)
                lost = error * flat.sum(1, keepdim=True) + matrix.shape[0] * UNDERFLOW
                image = outward(outward(flat @ matrix.abs(), matrix.shape[0]) + lost, 4)
                self._add(costs, state.start, image.reshape(len(cost), *state.start.shape))
                continue
            if is_part(state):
                parts = costs.setdefault(state.parents[0], {})
                self._add(parts, state.node.args[1], cost)
                continue
            for parent, image in zip(operand_states(state), self.fall(state, cost), strict=True):
                self._add(costs, parent, image)
        return found

    @staticmethod
    def _add(costs: dict[Any, Any], key: Any, value: Tensor) -> None:
        costs[key] = outward(costs[key] + value, 1) if key in costs else value

    def fall(self, state: State, cost: Any) -> Sequence[Tensor]:
        """The costs of the entries of the operands of a node, from those of its own entries."""
        mark = mark_of(state.node)
        if mark is not None and mark[1] >= 0:
            return [cost]
        action = action_of(state)
        lost = None if action is None else self.lost(state)
        if action is not None and lost is not None:
            images = _adjoint(state, operand_states(state), cost)
            if images is not None:
                return [outward(image, *lost) for image in images]
        slopes = self.slopes(state)
        if slopes is not None:
            return [outward(cost * slopes, 1)]
        rule = self.entries(state)
        whole = cost if isinstance(cost, Tensor) else cost.get(0)
        if rule is not None and rule.fall is not None and whole is not None:
            images = rule.fall(state.call, self.gains(state), whole)
            count = whole.numel() + sum(image.numel() for image in images) + 64
            return [outward(image, count) for image in images]
        parts = [cost] if isinstance(cost, Tensor) else list(cost.values())
        flat = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
        length = outward(torch.linalg.vector_norm(flat, dim=1), flat.shape[1], 2.0**-500)
        return [
            outward(length * gain, 1).reshape(-1, *[1] * len(x.shape)).expand(-1, *x.shape)
            for gain, x in zip(self.gains(state), state.call.operands, strict=True)
        ]


_DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def _each(image: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, image)) if isinstance(image, (tuple, list)) else function(image)


def _run(
    state: State, env: dict[Any, Any], constants: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """The moduli of an affine operation at some moves; None where a constant is not known."""
    size = len(next(iter(env.values())))
    try:
        with torch.no_grad():
            return linear_action(state, env, size, True, constants=constants)
    except ValueError:
        return None


def _adjoint(state: State, parents: Sequence[State], cost: Any) -> list[Tensor] | None:
    """The adjoint of the moduli of an affine operation at some costs."""
    parts = {None: cost} if isinstance(cost, Tensor) else cost
    size = len(next(iter(parts.values())))
    distinct = list(dict.fromkeys(parents))
    inputs = [
        torch.zeros(size, *p.shape, dtype=torch.float64, requires_grad=True) for p in distinct
    ]
    env = {p.node: x for p, x in zip(distinct, inputs, strict=True)}
    try:
        with torch.enable_grad():
            image = linear_action(state, env, size, True)
            chosen = [image if key is None else image[key] for key in parts]
            moved = [(t, c) for t, c in zip(chosen, parts.values(), strict=True) if t.requires_grad]
            if not moved:
                return [torch.zeros(size, *p.shape, dtype=torch.float64) for p in parents]
            found = torch.autograd.grad(
                [t for t, _ in moved],
                inputs,
                [c.expand_as(t) for t, c in moved],
                allow_unused=True,
                materialize_grads=True,
            )
    except ValueError:
        return None
    known = dict(zip(distinct, found, strict=True))
    seen: set[State] = set()
    images = []
    for parent in parents:  # one that is an operand twice has all of its cost in the first place
        images.append(torch.zeros_like(known[parent]) if parent in seen else known[parent])
        seen.add(parent)
    return images
