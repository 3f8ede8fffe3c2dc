"""The walk of a graph, as those that bound several of its nodes together see it."""

from __future__ import annotations

from typing import Protocol

from torch import fx

from orthonet.certify._bound import Bound
from orthonet.certify.graph.program import Program
from orthonet.certify.rules import Step
from orthonet.certify.walk.islands import Island
from orthonet.certify.walk.state import State

__all__ = ["Walk"]


class Walk(Protocol):
    """What is known so far, and what can be asked for.

    Attributes:
        program: The graph.
        states: What is known of each node.
    """

    program: Program
    states: dict[fx.Node, State]

    def step_of(self, state: State) -> Step:
        """The gains of a node over its operands."""
        ...

    def bound_of(self, state: State) -> Bound:
        """The smallest bound of a node that is found, from the input of the model to it."""
        ...

    def matrix_of(self, state: State) -> Island | None:
        """The affine island that a node ends, as a matrix; None if it is too large."""
        ...
