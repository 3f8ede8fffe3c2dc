"""Affine islands: what affine operations in a row do together, written out as a matrix.

The linear part of every operation is run in float64, on unit vectors; run a second time with the
absolute values of all constants it bounds the rounding of the first run, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from orthonet.certify._marks import mark_of
from orthonet.certify._program import BATCH
from orthonet.certify._rules import BatchDependent, Operand, canonical
from orthonet.linalg._rounding import (
    UNDERFLOW,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
    up,
)

if TYPE_CHECKING:
    from orthonet.certify._state import State

__all__ = ["Action", "Island", "action_of", "linear_part", "materialise", "moves", "roundings_of"]

_RANGE = 2.0**100  # constants beyond it are left to the product of norms
_LOW = 1 / _RANGE
_CHUNK = 64


class Action(NamedTuple):
    """How the linear part of an operation is run.

    `run(target, args, kwargs, absolute)` gets operands as float64 tensors and constants as they
    are; `terms` is how many products are added up for one entry of the output, at most.
    """

    run: Callable[[Any, list[Any], dict[str, Any], bool], Any]
    terms: Callable[[State], int]
    heavy: bool = False
    moves: bool = False
    """It only moves, copies or leaves out entries."""


_ACTIONS: dict[str, Action] = {}


def action_of(state: State) -> Action | None:
    """The action of an operation on the input, if its linear part can be run."""
    mark = mark_of(state.node)
    if mark is not None:
        return _ACTIONS["clone"] if mark[1] >= 0 else None
    if not isinstance(canonical(state.node.target), str):
        return None
    name = state.call.op
    action = _ACTIONS.get(name)
    if action is None or state.call.kwargs.get("out") is not None:
        return None
    if name == "getitem" and (not state.parents or state.parents[0].source is None):
        return None  # a part of what another operation returned
    operands = len(state.call.operands)
    if name in _ONE_OPERAND and operands != 1:
        return None
    if name in ("div", "linear", "batch_norm") and not _moves_first(state):
        return None
    if name in ("addmm", "baddbmm") and isinstance(state.call.args[0], Operand):
        return None
    return action


def moves(state: State) -> bool:
    """Whether an operation only moves, copies or leaves out entries."""
    action = action_of(state)
    return action is not None and action.moves


def _moves_first(state: State) -> bool:
    return bool(state.parents) and state.node.args[0] is state.parents[0].node


class Constant(NamedTuple):
    """A tensor that does not depend on the input, among the arguments of an operation."""

    value: Tensor


def _f64(value: Any, absolute: bool) -> Any:
    """A constant in float64, an operand as it is."""
    if isinstance(value, Constant):
        value = value.value.detach().to("cpu", torch.float64)
        return value.abs() if absolute else value
    return abs(value) if absolute and isinstance(value, (int, float)) else value


def _register(*names: str, terms: Any = None, heavy: bool = False, moves: bool = False) -> Any:
    def decorate(run: Any) -> Any:
        for name in names:
            _ACTIONS[name] = Action(run, terms or (lambda state: 0), heavy, moves)
        return run

    return decorate


def _wide(state: State) -> int:
    """More than the entries that one sum of this operation has."""
    return math.prod(state.parents[0].shape) + 16


@_register("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute",
           "transpose", "movedim", "t", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
           "native_channel_shuffle", "flip", "roll", "slice", "select", "narrow", "split",
           "split_with_sizes", "chunk", "unbind", "tensor_split", "getitem", "expand", "repeat",
           "tile", "broadcast_to", "alias", "diagonal", "mT", "ravel", moves=True)  # fmt: skip
def _move(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    return target(*args, **kwargs)


@_register("clone", "contiguous", "detach", "to", "type_as", "float", "double", "dropout",
           "positive", "native_dropout", moves=True)  # fmt: skip
def _same(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    return args[0]


@_register("gather", "index_select", "index", "tril", "triu", "unfold", "im2col", moves=True)
def _pick(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    plain = [v.value if isinstance(v, Constant) else v for v in args]
    if canonical(target) == "index":
        plain[1] = [v.value if isinstance(v, Constant) else v for v in args[1]]
    return target(*plain, **kwargs)


@_register("where", "masked_fill", moves=True)
def _choose(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    mask, a, b = args if canonical(target) == "where" else (args[1], args[2], args[0])
    a, b = (v if isinstance(v, Tensor) else torch.zeros((), dtype=torch.float64) for v in (a, b))
    return torch.where(mask.value, a, b)


@_register("sum", "mean", "cumsum", terms=_wide)
def _reduce(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    return target(*args, **{k: v for k, v in kwargs.items() if k != "dtype"})


@_register(*(f"{kind}avg_pool{d}d" for kind in ("", "adaptive_", "_adaptive_") for d in (1, 2, 3)),
           terms=_wide, heavy=True)  # fmt: skip
@_register("col2im", terms=_wide)
def _pool(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    return target(*args, **kwargs)


@_register("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
           "replication_pad1d", "replication_pad2d", "replication_pad3d", moves=True)  # fmt: skip
def _pad(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    name = canonical(target)
    if name == "pad":
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        return torch.nn.functional.pad(args[0], list(args[1]), mode=mode)
    if name == "constant_pad_nd":
        return torch.nn.functional.pad(args[0], list(args[1]))
    return target(*args, **kwargs)


@_register("cat", "stack", moves=True)
def _join(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    parts = [part if isinstance(part, Tensor) else _zeros(part) for part in args[0]]
    return target(parts, *args[1:], **kwargs)


def _zeros(constant: Constant) -> Tensor:
    return torch.zeros_like(constant.value, dtype=torch.float64, device="cpu")


@_register("add", "sub", "rsub", terms=lambda state: 2)
def _add(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    name = canonical(target)
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    first, second = (_zeros(v) if isinstance(v, Constant) else v for v in args[:2])
    first, second = (v if isinstance(v, Tensor) else 0.0 for v in (first, second))
    if name == "rsub":
        first, second = second, first
    if absolute:
        return first + abs(alpha) * second
    return first - alpha * second if name != "add" else first + alpha * second


@_register("neg")
def _neg(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    return args[0] if absolute else -args[0]


@_register("mul", "div", terms=lambda state: 3)
def _scale(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    a, b = (_f64(v, absolute) for v in args[:2])
    return a * b if canonical(target) == "mul" else a / b


@_register("linear", "matmul", "mm", "bmm", "mv", heavy=True, terms=_wide)
def _linear(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    a, b = (_f64(v, absolute) for v in args[:2])
    return a @ (b.mT if canonical(target) == "linear" else b)


@_register("addmm", "baddbmm", heavy=True, terms=_wide)
def _addmm(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    a, b = (_f64(v, absolute) for v in args[1:3])
    return _f64(kwargs.get("alpha", 1.0), absolute) * (a @ b)


@_register("einsum", "tensordot", heavy=True, terms=_wide)
def _contraction(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    if canonical(target) == "tensordot":
        return target(*(_f64(v, absolute) for v in args[:2]), *args[2:], **kwargs)
    return target(args[0], [_f64(v, absolute) for v in args[1]])


@_register(*(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)), "convolution",
           heavy=True, terms=_wide)  # fmt: skip
def _convolution(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    args = [args[0], _f64(args[1], absolute), None, *args[3:]]
    return target(*args, **{k: v for k, v in kwargs.items() if k != "bias"})


@_register("batch_norm", "_native_batch_norm_legit_no_training", terms=lambda state: 12)
def _batch_norm(target: Any, args: list[Any], kwargs: dict[str, Any], absolute: bool) -> Any:
    eps = args[7] if canonical(target) == "batch_norm" else args[6]
    scale = (_f64(args[4], False) + eps).rsqrt()
    if args[1] is not None:
        scale = scale * _f64(args[1], absolute)
    result = args[0] * scale.reshape(-1, *[1] * (args[0].ndim - 2))
    return result if canonical(target) == "batch_norm" else (result,)


_ONE_OPERAND = set(_ACTIONS) - {"add", "sub", "rsub", "cat", "stack", "where", "masked_fill"}


class Island(NamedTuple):
    """A matrix of an affine function, and a bound of the Frobenius norm of its error."""

    matrix: Tensor  # (out, in), float64
    error: float


def linear_part(states: list[State], source: State, x: Tensor, absolute: bool = False) -> Any:
    """The linear part of an island at a batch x of its source, in float64."""
    env: dict[fx.Node, Any] = {source.node: x}
    for state in states:
        node = state.node

        def value(n: fx.Node, of: State = state) -> Any:
            if n in env:
                return env[n]
            found = of.constants[n]
            if isinstance(found, BatchDependent):
                if found.rows:
                    return Constant(found.value[:1].expand(len(x), *found.value.shape[1:]))
                if isinstance(found.value, int) and found.value == BATCH:
                    return len(x)
                raise ValueError("a constant that depends on the batch size")
            return Constant(found) if isinstance(found, Tensor) else found

        args, kwargs = map_arg((list(node.args), dict(node.kwargs)), value)
        action = action_of(state)
        env[node] = action.run(node.target, list(args), dict(kwargs), absolute)  # type: ignore[union-attr]
    return env[states[-1].node]


def roundings_of(states: list[State]) -> int:
    """How many roundings an entry of the matrix of an island sees, at most."""
    return sum(action_of(s).terms(s) for s in states) + 4  # type: ignore[union-attr]


def materialise(state: State) -> Island | None:
    """The matrix of an island, or None if its constants are too large or too small for float64.

    With K roundings on the way, |fl(A) - A| <= gamma_K |A|_1 entry by entry, where |A|_1 is the
    same product with absolute values; underflow moves an entry by less than K times the product
    of what the operations can amplify times 2^-1022.
    """
    source, states = state.start, state.island
    spread = _amplification(states)
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
    if all(action_of(s).moves for s in states):  # type: ignore[union-attr]
        relative = lost = 0.0
    return Island(matrix, add_up(mul_up(relative, size), lost))


def _amplification(states: list[State]) -> float | None:
    """A bound of what all operations together can make of a number, or None beyond the range."""
    spread = 1.0
    for state in states:
        wide = max(math.prod(state.shape), *(math.prod(p.shape) for p in state.parents))
        factors = [wide + 2.0]
        if not action_of(state).moves:  # type: ignore[union-attr]
            op = state.call.op
            for value in _values((state.call.args, *state.call.kwargs.values())):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number and not (isinstance(value, Tensor) and value.numel()):
                    continue
                size = torch.as_tensor(value).detach().double().abs()
                if not float(size.max()) < _RANGE or (op == "div" and not float(size.min()) > _LOW):
                    return None
                factors.append(max(1.0, float(size.max())))
            if op == "div":
                factors.append(_RANGE)
            elif "batch_norm" in op:
                if not float(_variance(state).min()) > _LOW**2:
                    return None
                factors.append(_RANGE)
        spread = mul_up(spread, *factors)
    return spread if spread < 2.0**900 else None


def _values(argument: Any) -> list[Any]:
    """Every value among arguments and lists of them; of equal rows the first."""
    if isinstance(argument, (tuple, list)):
        return [v for part in argument for v in _values(part)]
    if isinstance(argument, BatchDependent) and argument.rows:
        return [argument.value[:1]]
    return [argument]


def _variance(state: State) -> Tensor:
    args = state.call.args
    return args[4].detach().double() + (args[7] if state.call.op == "batch_norm" else args[6])


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
            (row,) = torch.autograd.grad(
                image, x, unit.reshape(image.shape), allow_unused=True, materialize_grads=True
            )
        rows.append(row.reshape(len(unit), -1))
    return torch.cat(rows).contiguous()
