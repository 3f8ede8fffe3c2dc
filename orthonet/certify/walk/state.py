"""What is known of the nodes of the graph of a model, and the walk that finds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx

from orthonet.certify._bound import Bound, Row
from orthonet.certify.graph.program import Program
from orthonet.certify.rules import Call, Step

__all__ = ["Island", "State", "Walk"]


@dataclass(eq=False)
class State:
    """What is known of one node of the graph."""

    node: fx.Node
    call: Call
    shape: tuple[int, ...]
    constants: dict[fx.Node, Any]
    parents: list[State] = field(default_factory=list)
    source: State | None = None
    """The node that this one is an affine function of; None for the node itself."""
    island: list[State] = field(default_factory=list)
    step: Step | None = None
    bound: Bound | None = None
    row: Row | None = None
    seconds: float = 0.0  # what the rule of its module took
    used: list[State] = field(default_factory=list)
    """The nodes whose bounds the bound was made from."""
    interval: tuple[float, float] | None = None  # of its entries, see `ops.registry`

    @property
    def start(self) -> State:
        """Where the island that the node ends begins: the node itself where it is in none."""
        return self.source or self


class Island(NamedTuple):
    """A matrix of an affine function, and a bound of the Frobenius norm of its error."""

    matrix: Tensor  # (out, in), float64
    error: float


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
