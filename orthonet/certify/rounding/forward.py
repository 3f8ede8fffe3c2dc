r"""How far a forward pass in floating point can be from the function that it stands for.

With u the unit roundoff, a sum of k products is computed with an error of at most
$\gamma_k |W| |x|$, entry by entry. Norm by norm along the graph: the error of an operation is its
Lipschitz constant times the errors of what it reads, plus what it rounds itself, for which the
magnitudes at the given inputs count. Each operation has the unit roundoff of its own dtype; what
it reads in a wider one is rounded first.

N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthonet.certify.graph.replay import replay
from orthonet.certify.rules import Rounding, Step, record_of

if TYPE_CHECKING:
    from orthonet.certify.walk.state import State
    from orthonet.certify.walk.walker import Walker

__all__ = ["Errors", "forward_error", "unit_roundoffs"]

_UNITS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself


_TINY = {torch.float16: 2.0**-22}  # what an entry loses by underflow, four times; else 2^-120
_LARGEST = {torch.float16: 65504.0}


def unit_roundoffs(dtype: torch.dtype) -> tuple[float, float] | None:
    """The roundoffs of storage and of sums: half precision accumulates in float32."""
    if dtype not in _UNITS:
        return None
    return _UNITS[dtype], min(_UNITS[dtype], 2.0**-24)


def forward_error(
    walker: Walker, inputs: Sequence[Tensor], within: Tensor | float, dtype: torch.dtype | None
) -> Tensor:
    """Upper bounds (N,) of the l2 error of the outputs, anywhere within a radius of the inputs.

    All operations are run in `dtype`; for None in those that they were certified in.
    """
    if not len(inputs[0]):
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        values = replay(walker.program, [x.detach().cpu().double() for x in inputs])
        ball = torch.as_tensor(within, dtype=torch.float64).expand(len(inputs[0]))
        exact = Errors(walker, values, torch.zeros_like(ball), torch.float64, None)
        errors = Errors(walker, values, ball, dtype, exact)
        total = torch.zeros_like(ball)
        for state in walker.outputs:
            if state is not None:
                total = total + errors.of(state).square()
        return total.sqrt() * _SAFE


class Errors:
    """The errors of all nodes for one dtype, or for their own, and one radius."""

    def __init__(
        self,
        walker: Walker,
        values: dict[Any, Any],
        ball: Tensor,
        dtype: torch.dtype | None,
        exact: Errors | None,
    ) -> None:
        self.walker, self.values, self.ball, self.dtype = walker, values, ball, dtype
        self.exact = exact
        self.known: dict[State, Tensor] = {}
        for state in walker.states.values():  # in order, so that nothing recurses deeply
            self.of(state)

    def dtype_of(self, state: State) -> torch.dtype:
        """The dtype that an operation stores its output in."""
        return self.dtype or self.walker.program.dtype_of(state.node)

    def gamma(self, state: State) -> Callable[..., float]:
        """The function of a number of roundings that bounds the relative error of an entry.

        (1 + storage)^(3 stages) (1 + gamma_k) - 1; nothing for copies.
        """
        storage, sums = unit_roundoffs(self.dtype_of(state)) or (0.0, 0.0)

        def relative(roundings: float, stages: int = 1) -> float:
            gamma = _sums(roundings, self.dtype_of(state))
            if storage == sums or not roundings:
                return gamma
            return math.expm1(3 * stages * math.log1p(storage) + math.log1p(gamma)) * _SAFE

        return relative

    def tiny(self, state: State, roundings: float) -> float:
        """What underflow takes from an entry."""
        dtype = self.dtype_of(state)
        return max(roundings * 2.0**-120, _TINY.get(dtype, 0.0) if roundings else 0.0)

    def read(self, parent: State, state: State) -> tuple[Tensor, Tensor]:
        """The error and the size of an operand as an operation reads it: in its own dtype."""
        error, size = self.of(parent), self.size(parent)
        mine, other = self.dtype_of(state), self.dtype_of(parent)
        if _UNITS[mine] > _UNITS[other]:
            lost = (size + error) * _UNITS[mine]
            error = (error + lost + math.prod(parent.shape) ** 0.5 * self.tiny(state, 1.0)) * _SAFE
        return error, size

    def size(self, state: State) -> Tensor:
        """The norm of a node anywhere in the ball, in exact arithmetic."""
        value = self.values[state.node]
        if isinstance(value, (tuple, list)):
            value = torch.cat(
                [v.reshape(len(v), -1) for v in value if v.is_floating_point() and v.numel()], 1
            )
        norm = torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1) * _SAFE
        missing = self.exact.of(state) if self.exact is not None else self.known.get(state, 0.0)
        if bool((self.ball > 0).any()):
            norm = norm + self.walker.bound_of(state).value * self.ball
        return norm + missing

    def of(self, state: State) -> Tensor:
        """The error of a node."""
        if state not in self.known:
            found = self._find(state)
            largest = _LARGEST.get(self.dtype_of(state))
            if largest is not None and isinstance(self.values[state.node], Tensor):
                self.known[state] = found  # for the size of a node without a twin
                found = torch.where(self.size(state) + found < largest, found, math.inf)
            self.known[state] = found
        return self.known[state]

    def _find(self, state: State) -> Tensor:
        if not state.parents:  # an input: exact, but for its cast to half precision
            return self._input(state)
        step, call = self.walker.step_of(state), state.call
        if step.roundings is None and len(state.parents) == 1:
            normalized = self._normalized(state, state.parents[0])
            if normalized is not None:
                return normalized
        if step.roundings is None:
            call.refuse(
                "the rounding of this operation is not known",
                "Evaluate the model in float64 and leave the rounding out, or return a Step with "
                "roundings from its rule",
            )
        order = [operand._state for operand in call.operands]
        relative = self.gamma(state)
        if callable(step.roundings):
            return self._compound(step, step.roundings(relative), state, order)
        if isinstance(step.roundings, Rounding):
            return self._compound(step, step.roundings, state, order)
        carried = torch.zeros_like(self.ball)
        own = torch.zeros_like(self.ball)
        record = record_of(call.target)
        absolute = record.absolute(call) if record is not None and record.absolute else None
        stages = record.stages(call) if record is not None and record.stages else 1
        offset = record.offset(call) if record is not None and record.offset else 0.0
        once = absolute is not None and self.dtype is None and stages == 1
        share = (
            _sums(step.roundings, self.dtype_of(state))
            if once
            else relative(step.roundings, stages)
        )
        for gain, parent in zip(step.gains, order, strict=True):
            error, size = self.read(parent, state)
            carried = carried + _times(gain.value, error)
            if share:
                own = own + _times(absolute or gain.value, size + error)
        if share:
            if absolute is None:
                self.known[state] = carried  # for the size of a node without a twin
                own = own + self.size(state) + carried
            own = own + offset
            wide = math.prod(state.shape) ** 0.5 * max(1.0, absolute or 1.0)
            own = own * share + wide * self.tiny(state, step.roundings)
            if once and _UNITS[self.dtype_of(state)] > 2.0**-24:  # operands are rounded already
                self.known[state] = own = own + carried
                own = own + ((1.0 + _UNITS[self.dtype_of(state)]) ** 2 - 1.0) * (
                    self.size(state) + own + offset
                )
                carried = torch.zeros_like(own)
        return (carried + own) * _SAFE

    def _input(self, state: State) -> Tensor:
        """The rounding of an input to the dtype that the whole model is run in."""
        storage, sums = unit_roundoffs(self.dtype_of(state)) or (0.0, 0.0)
        value = self.values[state.node]
        norm = torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1)
        if storage == sums:
            return torch.zeros_like(norm)
        return (norm + self.ball) * storage + math.prod(state.shape) ** 0.5 * self.tiny(state, 1.0)

    def _normalized(self, state: State, parent: State) -> Tensor | None:
        """The error of a normalization by the statistics of its input."""
        values = self.values[parent.node]
        if not isinstance(values, Tensor):
            return None
        error, _ = self.read(parent, state)
        near = error
        if self.exact is not None:
            near = near + self.exact.of(parent)
        if bool((self.ball > 0).any()):
            near = near + self.walker.bound_of(parent).value * self.ball
        record = record_of(state.call.target)
        if record is None or record.error is None:
            return None
        found = record.error(state.call, values, near, error, self.gamma(state))
        if found is None:
            return None
        return found + math.prod(state.shape) ** 0.5 * self.tiny(state, 1.0)

    def _compound(
        self, step: Step, rounding: Rounding, state: State, parents: list[State]
    ) -> Tensor:
        """The error of a map that counts its roundings itself."""
        carried, size = torch.zeros_like(self.ball), torch.zeros_like(self.ball)
        for gain, parent in zip(step.gains, parents, strict=True):
            error, large = self.read(parent, state)
            carried = carried + _times(gain.value, error)
            size = size + large + error
        own = (_times(rounding.size, size) + rounding.offset) * self.gamma(state)(
            rounding.count, rounding.stages
        )
        wide = math.prod(state.shape) ** 0.5 * max(1.0, rounding.size)
        return (carried + own + wide * self.tiny(state, rounding.count)) * _SAFE


def _sums(roundings: float, dtype: torch.dtype) -> float:
    """Gamma of a number of roundings of sums."""
    unit = (unit_roundoffs(dtype) or (0.0, 0.0))[1]
    return roundings * unit / max(1.0 - roundings * unit, 2.0**-60) * _SAFE


def _times(gain: float, error: Tensor) -> Tensor:
    """The product, of an infinite error and no gain 0."""
    return gain * error if gain else torch.zeros_like(error)
