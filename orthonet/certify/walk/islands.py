"""Affine islands: what affine operations in a row do together, written out as a matrix.

The linear part of every operation is run in float64, on unit vectors; run a second time with the
absolute values of all constants it bounds the rounding of the first run, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from orthonet.certify.graph.marks import mark_of
from orthonet.certify.graph.program import BATCH
from orthonet.certify.ops.registry import Constant, Linear, Values
from orthonet.certify.rules import BatchDependent, bind, record_of
from orthonet.certify.walk.state import Island, State
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
    up,
)

__all__ = [
    "action_of",
    "amplification_of",
    "linear_action",
    "linear_part",
    "materialize",
    "moves",
    "roundings_of",
]

_RANGE = 2.0**100  # constants beyond it are left to the product of norms
_CHUNK = 64


def action_of(state: State) -> Linear | None:
    """The action of an operation on the input, if its linear part can be run."""
    mark = mark_of(state.node)
    if mark is not None:
        return _MARK if mark[1] >= 0 else None
    record = record_of(state.node.target)
    if record is None or record.linear is None:
        return None
    if record.overloads == ("getitem",) and (not state.parents or state.parents[0].source is None):
        return None  # a part of what another operation returned
    if not record.linear.when(state.call):
        return None
    record.check(state.call)  # an island reads no more arguments than the rule does
    return record.linear


def _action_inside(state: State) -> Linear:
    """The action of a node of an island: one is made of nothing else."""
    return cast(Linear, action_of(state))


_MARK = Linear(lambda a, absolute: a.args[0], moves=True)


def moves(state: State) -> bool:
    """Whether an operation only moves, copies or leaves out entries."""
    action = action_of(state)
    return action is not None and action.moves


def linear_part(states: list[State], source: State, x: Tensor, absolute: bool = False) -> Any:
    """The linear part of an island at a batch x of its source, in float64."""
    env: dict[fx.Node, Any] = {source.node: x}
    for state in states:
        env[state.node] = linear_action(state, env, len(x), absolute)
    return env[states[-1].node]


def linear_action(
    state: State,
    env: Mapping[fx.Node, Any],
    size: int,
    absolute: bool = False,
    dtype: torch.dtype = torch.float64,
    constants: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """The linear part of one operation at batches of its operands, `size` samples each.

    `dtype` is that of the operands. Floating-point constants are replaced by what `constants`
    makes of them.

    Raises:
        ValueError: A constant among the arguments depends on the batch size.
    """
    node = state.node

    def value(n: fx.Node) -> Any:
        if n in env:
            return env[n]
        found = state.constants[n]
        if isinstance(found, BatchDependent):
            if found.rows:
                return Constant(found.value[:1].expand(size, *found.value.shape[1:]), dtype)
            if isinstance(found.value, int) and found.value == BATCH:
                return size
            raise ValueError("a constant that depends on the batch size")
        if not isinstance(found, Tensor):
            return found
        if constants is not None and found.is_floating_point():
            found = constants(found.detach().cpu())
        return Constant(found, dtype)

    args, kwargs = map_arg((list(node.args), dict(node.kwargs)), value)
    action = _action_inside(state)
    named = bind(node.target, args, kwargs) if record_of(node.target) else {}
    values = Values(node.target, list(args), dict(kwargs), named)
    return action.run(values, absolute)


def roundings_of(states: list[State]) -> int:
    """How many roundings an entry of the matrix of an island sees, at most."""
    return sum(_action_inside(s).terms(s) for s in states) + 4


def materialize(state: State) -> Island | None:
    """The matrix of an island, or None if its constants are too large or too small for float64.

    With K roundings on the way, |fl(A) - A| <= gamma_K |A|_1 entry by entry, where |A|_1 is the
    same product with absolute values; underflow moves an entry by less than K times the product
    of what the operations can amplify times 2^-1022.
    """
    source, states = state.start, state.island
    spread = amplification_of(states)
    if spread is None:
        return None
    inside, outside = math.prod(source.shape), math.prod(state.shape)
    try:
        matrix, majorant = (
            _by_columns(states, source, absolute)
            if inside <= outside
            else _by_rows(states, source, outside, absolute)
            for absolute in (False, True)
        )
    except ValueError:
        return None
    if not bool(majorant.isfinite().all()):
        return None
    count = roundings_of(states)
    scale = power_of_two_scale(majorant)
    size = mul_up(sqrt_up(squared_norm_up(majorant / scale)), scale) if scale else 0.0
    relative = mul_up(gamma(count), up(1.0 + 2.0 * gamma(count)))
    lost = mul_up(count, spread, sqrt_up(matrix.numel()), UNDERFLOW)
    if all(map(moves, states)):
        relative = lost = 0.0
    return Island(matrix, add_up(mul_up(relative, size), lost))


def amplification_of(states: list[State]) -> float | None:
    """A bound of what all operations together can make of a number, or None beyond the range."""
    spread = 1.0
    for state in states:
        large = max(math.prod(state.shape), *(math.prod(p.shape) for p in state.parents))
        factors = [large + 2.0]
        action = action_of(state)
        if action is None or not action.moves:
            scales = action.scales(state.call) if action is not None and action.scales else []
            for value in _values((state.call.args, *state.call.kwargs.values(), *scales)):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number and not (isinstance(value, Tensor) and value.numel()):
                    continue
                size = torch.as_tensor(value).detach()
                size = size.to_dense() if size.layout is not torch.strided else size
                largest = float(size.double().abs().max())
                if not largest < _RANGE:
                    return None
                factors.append(max(1.0, largest))
        spread = mul_up(spread, *factors)
    return spread if spread < 2.0**900 else None


def _values(argument: Any) -> list[Any]:
    """Every value among arguments and lists of them; of equal rows the first."""
    if isinstance(argument, (tuple, list)):
        return [v for part in argument for v in _values(part)]
    if isinstance(argument, BatchDependent) and argument.rows:
        return [argument.value[:1]]
    return [argument]


def _by_columns(states: list[State], source: State, absolute: bool) -> Tensor:
    size = math.prod(source.shape)
    columns = []
    with torch.no_grad():
        for first in range(0, size, _CHUNK):
            unit = torch.eye(size, dtype=torch.float64)[first : first + _CHUNK]
            image = linear_part(states, source, unit.reshape(-1, *source.shape), absolute)
            columns.append(image.reshape(len(unit), -1))
    return torch.cat(columns).mT.contiguous()


def _by_rows(states: list[State], source: State, size: int, absolute: bool) -> Tensor:
    """Adjoint: the same products and sums, in another order."""
    rows = []
    for first in range(0, size, _CHUNK):
        unit = torch.eye(size, dtype=torch.float64)[first : first + _CHUNK]
        x = torch.zeros(len(unit), *source.shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            image = linear_part(states, source, x, absolute)
            if not image.requires_grad:  # constants alone
                return torch.zeros(size, math.prod(source.shape), dtype=torch.float64)
            (row,) = torch.autograd.grad(
                image, x, unit.reshape(image.shape), allow_unused=True, materialize_grads=True
            )
        rows.append(row.reshape(len(unit), -1))
    return torch.cat(rows).contiguous()
