"""Which entries a sort compares: steps of disjoint pairs, of which the larger one comes first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, fx

from orthonet import functional, layers
from orthonet.certify.graph.marks import mark_of
from orthonet.certify.graph.program import Program
from orthonet.certify.walk.state import State

__all__ = ["Step", "steps_of", "two_of"]

_EXTREMES = {"maximum": 0, "max": 0, "fmax": 0, "minimum": 1, "min": 1, "fmin": 1}
"""The operations on two values, and which one of (larger, smaller) they return."""
_MOST = 8  # entries of a group: larger ones take seconds a sample, and gained nothing


class Step(NamedTuple):
    """The flat places of pairs: `first` gets the larger entries, `second` the smaller ones."""

    first: Tensor
    second: Tensor


def steps_of(program: Program, state: State) -> list[Step] | None:
    """The steps of a sort of small groups along a dim; None for any other operation."""
    if len(state.parents) != 1:
        return None
    call, mark = state.call, mark_of(state.node)
    if mark is None:
        if call.op != "sort":
            return None
        (dim,), shape = call.feature_dims(call["dim"]), state.parents[0].shape
        return _steps(shape, dim, shape[dim], False, call.flag("descending"))
    target = program.calls[mark[0]].target if mark[1] < 0 else None
    if target is functional.max_min:
        (dim,) = call.feature_dims(call["dim"])
        return _steps(state.shape, dim, 2, True, True)
    if target is functional.group_sort:
        (dim,) = call.feature_dims(call["dim"])
        return _steps(state.shape, dim, call["group_size"], False, False)
    if type(target) is layers.FullSort:
        (dim,) = call.feature_dims(target.dim)
        return _steps(state.shape, dim, state.shape[dim], False, False)
    return None


def two_of(state: State) -> tuple[State, State, int, bool] | None:
    """The two values of which this is the larger (0) or the smaller one (1).

    And whether another node reads the same two, so that what is known of both is worth keeping.
    """
    place = _EXTREMES.get(state.call.op)
    operands = [x._state for x in state.call.operands]
    if place is None or len(operands) != 2 or any(s.shape != state.shape for s in operands):
        return None
    a, b = sorted(operands, key=lambda s: s.node.name)
    read: set[fx.Node] = {a.node, b.node}
    shared = any(n is not state.node and {*n.all_input_nodes} == read for n in a.node.users)
    return a, b, place, shared


def _steps(
    shape: tuple[int, ...], dim: int, size: int, halves: bool, down: bool
) -> list[Step] | None:
    """The steps of all groups of `size` entries along a dim, side by side or spread over it."""
    if size > _MOST:
        return None
    numbers = torch.arange(math.prod(shape)).reshape(shape).movedim(dim, 0)
    groups = numbers.reshape((size, -1) if halves else (shape[dim] // size, size, -1))
    groups = groups if halves else groups.movedim(1, 0).reshape(size, -1)
    if down:
        groups = groups.flip(0)
    return [
        Step(groups[[j for _, j in pairs]].flatten(), groups[[i for i, _ in pairs]].flatten())
        for pairs in _network(size)
    ]


def _network(size: int) -> list[list[tuple[int, int]]]:
    """The pairs i < j of each step of Batcher's odd-even merge sort (Knuth, volume 3, 5.2.2)."""
    found: list[list[tuple[int, int]]] = []
    p = 1
    while p < size:
        k = p
        while k:
            found.append(
                [
                    (i, i + k)
                    for start in range(k % p, size - k, 2 * k)
                    for i in range(start, min(start + k, size - k))
                    if i // (2 * p) == (i + k) // (2 * p)
                ]
            )
            k //= 2
        p *= 2
    return found
