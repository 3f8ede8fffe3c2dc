"""One record for each operation and overload: everything that `certify` knows of it.

A record names the overloads that it covers and the arguments that it reads. Any other argument
must keep the default of the schema, and any other overload is refused: an argument that nobody
reads cannot change a certified map.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthonet._torch import operation_name
from orthonet.certify._bound import Bound
from orthonet.certify.ops.entries import Entries
from orthonet.certify.rules import (
    RECORDS,
    BatchDependent,
    Call,
    Operand,
    Step,
    as_step,
    is_default,
    parameters,
    record_of,
)
from orthonet.linalg.bounds.rounding import div_up, sqrt_up

__all__ = [
    "EVERYTHING",
    "Interval",
    "as_input",
    "interval_of",
    "NOTHING",
    "ONE",
    "SMOOTH",
    "Constant",
    "Linear",
    "Op",
    "Sampler",
    "Values",
    "added",
    "amplification",
    "aten_name",
    "constant",
    "each",
    "each_repeated",
    "f64",
    "first_moves",
    "number",
    "op",
    "place",
    "plain",
    "wide",
    "zeros",
]

NOTHING = Bound(0.0, kind="exact")
ONE = Bound(1.0, kind="exact")
SMOOTH = 64.0
"""Roundings that an elementary function of a math library is taken to need, a few ulp in truth."""

Sampler = Callable[[random.Random, tuple[int, ...]], "Callable[[Tensor, Tensor], Any] | None"]
"""Draws arguments: given the shape of one sample, a function of a batch and of a second batch of
the same shape that runs the operation; None where the shape does not suit it."""
Interval = tuple[float, float]
"""The least and the largest entry of a tensor."""
EVERYTHING: Interval = (-math.inf, math.inf)


class Values(dict[str, Any]):
    """The arguments of an operation by name while the linear part of an island is run.

    Operands are tensors of one dtype, float64 if none is given; other tensors are wrapped as
    `Constant`.
    """

    def __init__(self, target: Any, args: list[Any], kwargs: dict[str, Any], named: Any) -> None:
        super().__init__(named)
        self.target, self.args, self.kwargs = target, args, kwargs

    def run(self) -> Any:
        """The operation itself, on the arguments as they were given."""
        return self.target(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Linear:
    """How the linear part of an operation is run.

    Attributes:
        run: Maps the values of the arguments to the linear part of the result; with `absolute`,
            every constant is replaced by its absolute value.
        terms: How many products are added up for one entry of the output, at most.
        heavy: It has a matrix of weights.
        moves: It only moves, copies or leaves out entries.
        when: Whether the operation is affine for the operands of a call.
        scales: The constants that an entry is multiplied by, 1 / what it is divided by included.
        forward: What `terms` is where the operation is run itself, and not its adjoint; None for
            the same.
    """

    run: Callable[[Values, bool], Any]
    terms: Callable[[Any], int] = field(default=lambda state: 0)
    heavy: bool = False
    moves: bool = False
    when: Callable[[Call], bool] = field(default=lambda call: len(call.operands) == 1)
    scales: Callable[[Call], list[Any]] | None = None
    forward: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Op:
    """What is known of an operation.

    Attributes:
        overloads: The overloads, as "topk.default", or Python functions.
        gain: The rule: the Lipschitz constant over each operand, with the rounding of the map.
        reads: The arguments besides the first that the record takes into account.
        free: The arguments that cannot change the map in exact arithmetic.
        only: Refuses values of arguments that make another map, for which no rule holds.
        linear: The affine action, for islands that are written out as a matrix.
        kernel: What the operation makes of an island that is one convolution.
        slopes: The interval of slopes of each entry of a vector, for bounds of perceptrons.
        absolute: A bound of the norm of the modulus of its matrix, for the rounding of a forward.
        offset: The norm of what is added to the linear part.
        stages: How often half precision stores a sum; None for once.
        error: The rounding of a map whose constant does not bound it, at given inputs; called with
            the call, the inputs, how far they may be off, their error, and the function gamma.
        interval: The least and the largest entry of the output.
        entries: How far single entries move, for bounds in l1 and l-infinity; an affine operation
            or one with slopes needs none.
        windows: For the largest entries of windows, the places of the entries of each window among
            those of a channel, (outputs, taps); a place may be there twice.
        cuts: It returns pieces of its input.
        samples: Draws random arguments.
    """

    overloads: tuple[Any, ...]
    gain: Callable[[Call], Any]
    reads: frozenset[str]
    free: frozenset[str] = frozenset()
    only: Callable[[Call], None] | None = None
    linear: Linear | None = None
    kernel: Callable[[Any, list[Any]], Any] | None = None
    slopes: Callable[[Call, int], Any] | None = None
    absolute: Callable[[Call], float] | None = None
    offset: Callable[[Call], float] | None = None
    stages: Callable[[Call], int] | None = None
    error: Callable[..., Tensor | None] | None = None
    interval: Callable[[Call], Interval] | None = None
    windows: Callable[[Call], Tensor] | None = None
    entries: Entries | None = None
    cuts: bool = False
    samples: Sampler | None = None

    def step(self, call: Call) -> Step:
        """The gains of a call, refused where an argument is not read."""
        self.check(call)
        return as_step(self.gain(call), call)

    def check(self, call: Call) -> None:
        """Refuse arguments that make another map, or that nobody reads: those keep defaults."""
        if self.only is not None:
            self.only(call)
        first = next(iter(parameters(call.target)))
        for name, value in call.arguments.items():
            if name == first or name in self.reads or name in self.free:
                continue
            if not is_default(call.target, name, value):
                call.refuse(
                    f"argument {name!r} must have its default, for no rule reads it",
                    "Leave it out, or register a rule for the module around it",
                )


def op(*overloads: Any, reads: tuple[str, ...] = (), **fields: Any) -> Callable[[Any], Any]:
    """Make the decorated rule the `gain` of a record of these overloads."""

    def decorate(gain: Any) -> Any:
        free = frozenset(fields.pop("free", ()))
        record = Op(overloads, gain, frozenset(reads), free, **fields)
        for name in overloads:
            RECORDS[name] = record
        return gain

    return decorate


def aten_name(target: Any) -> str:
    """The name of an operation of ATen without its overload; nothing for other functions."""
    return (operation_name(target) or "").removeprefix("aten::")


# --- what rules share ----------------------------------------------------------------------------


def amplification(call: Call, operand: Operand | None = None) -> float:
    """What the repetition of entries by broadcasting alone does to the norm of an operand."""
    if operand is None:
        (operand,) = call.operands if len(call.operands) == 1 else (call.operand,)
    inside, outside = math.prod(operand.shape), math.prod(call.output_shape)
    return 1.0 if outside <= inside else sqrt_up(div_up(outside, inside))


def each_repeated(call: Call) -> tuple[Bound, ...]:
    """What the repetition of entries alone does to the norm of each operand."""
    return tuple(Bound(amplification(call, x), kind="exact") for x in call.operands)


def each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each spatial dim."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


# --- the least and the largest entry of a node, where they are known for every input --------------


def interval_of(operand: Operand) -> Interval:
    """Return an interval that holds every entry of a tensor, for every input."""
    if operand._state is None:
        return EVERYTHING
    stack = [operand._state]
    while stack:
        state = stack[-1]
        record = record_of(state.node.target) if state.parents else None
        unknown = [p for p in state.parents if p.interval is None]
        if state.interval is not None:
            stack.pop()
        elif record is None or record.interval is None:
            state.interval = EVERYTHING
        elif unknown:
            stack += unknown
        else:
            state.interval = record.interval(state.call)
    return operand._state.interval


def as_input(call: Call) -> Interval:
    """That of the first operand, for an operation whose outputs are some of its inputs."""
    return interval_of(call.operands[0])


# --- random arguments ----------------------------------------------------------------------------


def number(draw: random.Random) -> float:
    """A scale, sometimes an extreme one."""
    return draw.choice([1.0, -1.0, 0.5, -2.25, 3.0, 0.1, 1e-9, 1e9, draw.uniform(-2, 2)])


def constant(draw: random.Random, *shape: int) -> Tensor:
    """A constant of a graph."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def place(draw: random.Random, shape: tuple[int, ...]) -> int:
    """A feature dim of a batch of samples of this shape, also counted from the end."""
    dim = draw.randrange(len(shape))
    return draw.choice([dim + 1, dim - len(shape)])


# --- constants of islands ------------------------------------------------------------------------


class Constant(NamedTuple):
    """A tensor that does not depend on the input, and the dtype that it is used in."""

    value: Tensor
    dtype: torch.dtype = torch.float64


def f64(value: Any, absolute: bool) -> Any:
    """A constant in the dtype of the run, or its absolute value; an operand as it is."""
    if isinstance(value, Constant):
        value, dtype = value.value.detach(), value.dtype
        value = value.to_dense() if value.layout is not torch.strided else value
        value = value.to("cpu", dtype)
        return value.abs() if absolute else value
    return abs(value) if absolute and isinstance(value, (int, float)) else value


def zeros(value: Any) -> Any:
    """The linear part of a term: an operand as it is, zeros for a constant."""
    if isinstance(value, Constant):
        return torch.zeros(value.value.shape, dtype=value.dtype)
    return value if isinstance(value, Tensor) else torch.zeros((), dtype=torch.float64)


def plain(value: Any) -> Any:
    """The argument with constants unwrapped: masks and indices."""
    if isinstance(value, Constant):
        return value.value.cpu()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value


def wide(state: Any) -> int:
    """More than the entries that one sum of an operation has."""
    return math.prod(state.parents[0].shape) + 16


def first_moves(call: Call) -> bool:
    """Whether the first argument is the only operand."""
    return len(call.operands) == 1 and bool(call.args) and isinstance(call.args[0], Operand)


def added(call: Call) -> float:
    """The norm of the constants that are added, repeated as often as they are."""
    total = 0.0
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, BatchDependent) and value.rows:
            value = value.value[:1]
        if isinstance(value, Tensor) and value.ndim <= 1 + len(call.output_shape):
            repeats = max(1.0, math.prod(call.output_shape) / max(1, value.numel()))
            total += float(value.detach().double().norm()) * math.sqrt(repeats)
        elif isinstance(value, (int, float)):
            total += abs(value) * math.sqrt(math.prod(call.output_shape))
    return total * (1.0 + 2.0**-40)
