"""Chains of affine maps and activations inside any graph, for the bounds of perceptrons."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from orthonet.certify._bound import Bound
from orthonet.certify.graph.marks import mark_of
from orthonet.certify.mlp.chain import Affine
from orthonet.certify.mlp.perceptron import MLPBound, mlp_bound
from orthonet.certify.mlp.slopes import Activation
from orthonet.certify.norms import limits
from orthonet.certify.ops.activations import activation_of
from orthonet.certify.rules import record_of
from orthonet.certify.walk.islands import action_of
from orthonet.certify.walk.state import State, Walk
from orthonet.errors import UncertifiableError

# By these names: an export in another thread changes those in the package.


__all__ = ["Perceptron", "perceptron_of"]

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


def perceptron_of(walker: Walk, end: State) -> Perceptron | None:
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


def _is_end(walker: Walk, state: State) -> bool:
    """Whether an affine map ends here whose result goes elsewhere than into the next layers."""
    if state.source is None or not any(a and a.heavy for a in map(action_of, state.island)):
        return False
    users = [s for s in walker.states.values() if state in s.parents]
    onward = (u.source is not None or _activation(walker, u) is not None for u in users)
    return state.node in walker.program.outputs or not users or not all(onward)


def _activation(walker: Walk, state: State) -> Activation | None:
    """The slopes of a node, if it acts entry by entry, or is an activation of ours on a vector."""
    if len(state.parents) != 1 or state.source is not None:
        return None
    shape, parent = state.shape, state.parents[0]
    if shape != parent.shape or not isinstance(state.node.meta.get("val"), Tensor):
        return None
    width, mark = math.prod(shape), mark_of(state.node)
    if mark is not None:
        target = walker.program.calls[mark[0]].target
        if mark[1] >= 0 or len(shape) != 1:
            return None
        if isinstance(target, nn.Module):
            return activation_of(target, width)
    else:
        target = state.node.target
    record = record_of(target)
    if record is None or record.slopes is None:
        return None
    record.check(state.call)
    return record.slopes(state.call, width)
