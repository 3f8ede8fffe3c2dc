"""The least and the largest entry of a node, where that is known for every input."""

from __future__ import annotations

import math

from orthonet.certify.rules import Call, Operand, record_of

__all__ = ["EVERYTHING", "Interval", "interval_of", "as_input"]

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


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
