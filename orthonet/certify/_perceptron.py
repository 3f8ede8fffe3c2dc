"""Chains of affine maps and activations inside any graph, for the bounds of perceptrons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import layers
from orthonet.certify._affine import action_of
from orthonet.certify._bound import Bound
from orthonet.certify._chain import Affine
from orthonet.certify._marks import mark_of
from orthonet.certify._mlp import MLPBound, mlp_bound
from orthonet.certify._norms import limits
from orthonet.certify._rules import Call, canonical
from orthonet.certify._slopes import Activation, activation_of
from orthonet.errors import UncertifiableError

# By these names: an export in another thread changes those in the package.
from orthonet.functional import group_sort, householder, max_min

if TYPE_CHECKING:
    from orthonet.certify._propagate import Walker
    from orthonet.certify._state import State

__all__ = ["Perceptron", "perceptron_of"]

# The classes that have the slopes of an operation.
_CLASSES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "silu": nn.SiLU, "gelu": nn.GELU,
    "selu": nn.SELU, "log_sigmoid": nn.LogSigmoid,
}  # fmt: skip
_BOTH_SIGNS = {"abs", "mish", "elu", "softplus", "sin", "cos", "erf", "asinh", "leaky_relu",
               "prelu"}  # fmt: skip
"""Operations on entries whose slopes are within plus and minus the constant of their rule."""
_RISING = {"atan", "hardtanh", "softshrink"}
"""Those whose slopes are within zero and that constant."""
_SIDE = {"fast": 0, "default": 256, "tight": 1024}


class Perceptron(NamedTuple):
    """A chain that ends in a node: where it starts, how many affine maps it has, its bound."""

    start: State
    count: int
    bound: MLPBound

    def whole(self, end: State, before: Bound, unit: Bound) -> Any:
        """The bound from the input on, the node that it starts from, and a row of the table."""
        gain = self.bound.constant
        text = f"{self.bound.method}, {self.count} affine maps"
        row = (end.call.path, "layers", self.start.shape, gain, text)
        return (gain if before is unit else before * gain), [self.start], row


def perceptron_of(walker: Walker, end: State) -> Perceptron | None:
    """The longest chain of at least two affine maps that ends in this node, if it may be tried."""
    side = _SIDE[limits().name]
    if not _is_end(walker, end) or math.prod(end.shape) > side:
        return None
    maps: list[Affine | Activation] = []
    slopes: list[Activation] = []  # since the last affine map
    start, current, count = end, end, 0
    while current.source is not None or (count and current.parents):
        if current.source is not None:
            sizes = math.prod(current.shape), math.prod(current.source.shape)
            island = walker.matrix_of(current) if max(sizes) <= side else None
            if island is None:
                break
            maps += [*slopes, Affine(island.matrix, None, island.error)]
            current, count, slopes = current.source, count + 1, []
            start = current
        activation = _activation(walker, current)
        if activation is None:
            break
        slopes.append(activation)
        current = current.parents[0]
    if count < 2:
        return None
    try:
        found = mlp_bound(maps[::-1], effort=limits().name)
    except UncertifiableError:
        return None
    return Perceptron(start, count, found)


def _is_end(walker: Walker, state: State) -> bool:
    """Whether an affine map ends here whose result goes elsewhere than into the next layers."""
    if state.source is None or not any(a and a.heavy for a in map(action_of, state.island)):
        return False
    users = [s for s in walker.states.values() if state in s.parents]
    onward = (u.source is not None or _activation(walker, u) is not None for u in users)
    return state.node in walker.program.outputs or not users or not all(onward)


def _activation(walker: Walker, state: State) -> Activation | None:
    """The slopes of a node, if it acts entry by entry, or is an activation of ours on a vector."""
    if len(state.parents) != 1 or state.source is not None:
        return None
    shape, parent = state.shape, state.parents[0]
    if shape != parent.shape or not isinstance(state.node.meta.get("val"), Tensor):
        return None
    width, mark, op = math.prod(shape), mark_of(state.node), state.call.op
    if mark is not None:
        target = walker.program.calls[mark[0]].target
        if mark[1] >= 0 or len(shape) != 1:
            return None
        module = target if isinstance(target, nn.Module) else _module(target, state.call)
        return None if module is None else activation_of(module, width)
    if not isinstance(canonical(state.node.target), str):
        return None
    if op in _CLASSES:
        return activation_of(_CLASSES[op](), width)
    least = _least(state, op)
    if least is None:
        return None
    largest = walker.step_of(state).gains[0].value
    low, high = (torch.full((width,), v, dtype=torch.float64) for v in (least * largest, largest))
    return Activation(torch.relu, low, high)  # the function is not read, only its slopes are


def _module(target: Any, call: Call) -> nn.Module | None:
    """The module of a function of ours."""
    if target is max_min:
        return layers.MaxMin(call.get(1, "dim", 1))
    if target is group_sort:
        return layers.GroupSort(call.get(1, "group_size", 2), call.get(2, "dim", 1))
    if target is householder:
        theta = call.constant(1, "theta")
        module = layers.HouseholderActivation(2 * len(theta), call.get(2, "dim", 1))
        module = module.double().requires_grad_(False)
        module.theta.copy_(theta)
        return module
    return None


def _least(state: State, op: str) -> float | None:
    """The smallest slope in units of the largest modulus, or None for another operation."""
    if op == "softplus" or op == "elu":
        plain = all(isinstance(v, (int, float)) and v > 0 for v in state.call.args[1:])
        return 0.0 if op == "elu" and plain else -1.0
    if op == "leaky_relu":
        slope = state.call.get(1, "negative_slope", 0.01)
        return 0.0 if isinstance(slope, (int, float)) and slope >= 0 else -1.0
    return 0.0 if op in _RISING else -1.0 if op in _BOTH_SIGNS else None
