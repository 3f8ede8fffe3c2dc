r"""How far a forward pass in floating point can be from the function that it stands for.

With u the unit roundoff, a sum of k products is computed with an error of at most
$\gamma_k |W| |x|$, entry by entry. Norm by norm along the graph: the error of an operation is its
Lipschitz constant times the errors of what it reads, plus what it rounds itself, for which the
magnitudes at the given inputs count.

N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthonet.certify._affine import _variance
from orthonet.certify._normalization_error import normalization_error
from orthonet.certify._replay import replay
from orthonet.certify._rules import Call, Operand, Rounding, Step
from orthonet.certify._sizes import absolute_convolution, absolute_matrix

if TYPE_CHECKING:
    from orthonet.certify._propagate import State, Walker

__all__ = ["forward_error", "unit_roundoffs"]

_UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24,
          torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # fmt: skip
_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself


def unit_roundoffs(dtype: torch.dtype) -> tuple[float, float] | None:
    """The roundoffs of storage and of sums: half precision accumulates in float32."""
    if dtype not in _UNITS:
        return None
    return _UNITS[dtype], min(_UNITS[dtype], 2.0**-24)


def forward_error(
    walker: Walker, inputs: Sequence[Tensor], within: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """Upper bounds (N,) of the l2 error of the outputs, anywhere within a radius of the inputs."""
    storage, sums = unit_roundoffs(dtype) or (0.0, 0.0)
    with torch.no_grad():
        values = replay(walker.program, [x.detach().cpu().double() for x in inputs])
        ball = torch.as_tensor(within, dtype=torch.float64).expand(len(inputs[0]))
        exact = _Errors(walker, values, torch.zeros_like(ball), 2.0**-53, 2.0**-53, None)
        errors = _Errors(walker, values, ball, storage, sums, exact)
        total = torch.zeros_like(ball)
        for state in walker.outputs:
            if state is not None:
                total = total + errors.of(state).square()
        return total.sqrt() * _SAFE


class _Errors:
    """The errors of all nodes for one dtype and one radius."""

    def __init__(
        self, walker: Walker, values: dict[Any, Any], ball: Tensor, storage: float, sums: float,
        exact: _Errors | None,
    ) -> None:  # fmt: skip
        self.walker, self.values, self.ball = walker, values, ball
        self.storage, self.sums, self.exact = storage, sums, exact
        self.known: dict[State, Tensor] = {}
        for state in walker.states.values():  # in order, so that nothing recurses deeply
            self.of(state)

    def relative(self, roundings: float, stages: int = 1) -> float:
        """(1 + storage)^(3 stages) (1 + gamma_k) - 1; nothing for copies."""
        if not roundings:
            return 0.0
        gamma = roundings * self.sums / max(1.0 - roundings * self.sums, 2.0**-60)
        if self.storage == self.sums:
            return gamma * _SAFE
        return (math.expm1(3 * stages * math.log1p(self.storage) + math.log1p(gamma))) * _SAFE

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
            self.known[state] = self._find(state)
        return self.known[state]

    def _find(self, state: State) -> Tensor:
        if not state.parents:  # an input: exact, but for its cast to half precision
            cast = self.storage if self.storage != self.sums else 0.0
            value = self.values[state.node]
            norm = torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1)
            return (norm + self.ball) * cast
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
        if callable(step.roundings):
            return self._compound(step, step.roundings(self.relative), state, order)
        if isinstance(step.roundings, Rounding):
            return self._compound(step, step.roundings, state, order)
        carried = torch.zeros_like(self.ball)
        own = torch.zeros_like(self.ball)
        relative = self.relative(step.roundings)
        absolute = _absolute_gain(call)
        for gain, parent in zip(step.gains, order, strict=True):
            error = self.of(parent)
            carried = carried + gain.value * error
            if relative:
                own = own + (absolute or gain.value) * (self.size(parent) + error)
        if relative:
            if absolute is None:
                self.known[state] = carried  # for the size of a node without a twin
                own = own + self.size(state) + carried
            own = own + _offset(state)
            wide = math.prod(state.shape) ** 0.5 * max(1.0, absolute or 1.0)
            own = own * relative + step.roundings * wide * 2.0**-120
        return (carried + own) * _SAFE

    def _normalized(self, state: State, parent: State) -> Tensor | None:
        """The error of a normalization by the statistics of its input."""
        error, values = self.of(parent), self.values[parent.node]
        if not isinstance(values, Tensor):
            return None
        near = error
        if self.exact is not None:
            near = near + self.exact.of(parent)
        if bool((self.ball > 0).any()):
            near = near + self.walker.bound_of(parent).value * self.ball
        return normalization_error(state.call, values, near, error, self.relative)

    def _compound(
        self, step: Step, rounding: Rounding, state: State, parents: list[State]
    ) -> Tensor:
        """The error of a map that counts its roundings itself."""
        carried, size = torch.zeros_like(self.ball), torch.zeros_like(self.ball)
        for gain, parent in zip(step.gains, parents, strict=True):
            error = self.of(parent)
            carried = carried + gain.value * error
            size = size + self.size(parent) + error
        own = (rounding.size * size + rounding.offset) * self.relative(
            rounding.count, rounding.stages
        )
        tiny = rounding.count * math.prod(state.shape) ** 0.5 * max(1.0, rounding.size) * 2.0**-120
        return (carried + own + tiny) * _SAFE


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _absolute_gain(call: Call) -> float | None:
    """The norm of the matrix of absolute values, by its row and column sums; None if unknown."""
    if call.op in ("linear", "matmul", "mm", "addmm"):
        matrices = [a for a in call.args if isinstance(a, Tensor) and a.ndim == 2]
        return absolute_matrix(matrices[-1])
    if call.op in _CONVOLUTIONS or call.op in _TRANSPOSED:
        groups = call.get(8 if call.op == "convolution" else 6, "groups", 1)
        return absolute_convolution(call.constant(1, "weight"), groups)
    return None


def _offset(state: State) -> float:
    """The norm of what is added to the linear part."""
    call = state.call
    if call.op in ("linear", *_CONVOLUTIONS, *_TRANSPOSED):
        bias = call.get(2, "bias", None)
        if bias is None:
            return 0.0
        repeats = math.prod(state.shape) / max(1, bias.numel())
        return float(bias.detach().double().norm()) * math.sqrt(repeats) * _SAFE
    if "batch_norm" in call.op:
        scale = _variance(state).cpu().rsqrt()
        if call.get(1, "weight", None) is not None:
            scale = scale * call.constant(1, "weight")
        shift = (scale * call.constant(3, "running_mean")).norm()
        if call.get(2, "bias", None) is not None:
            shift = shift + call.constant(2, "bias").norm()
        return float(shift) * math.sqrt(math.prod(state.shape[1:])) * _SAFE
    if call.op in ("add", "sub", "rsub", "addmm", "rnn_tanh_cell", "rnn_relu_cell", "lerp"):
        total = 0.0
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, Tensor) and value.ndim <= 1 + len(state.shape):
                repeats = max(1.0, math.prod(state.shape) / max(1, value.numel()))
                total += float(value.detach().double().norm()) * math.sqrt(repeats)
            elif isinstance(value, (int, float)) and not isinstance(value, Operand):
                total += abs(value) * math.sqrt(math.prod(state.shape))
        return total * _SAFE
    return 0.0
