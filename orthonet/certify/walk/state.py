"""What is known of one node of the graph of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from orthonet.certify._bound import Bound, Row
from orthonet.certify.rules import Call, Step

__all__ = ["State"]


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
    interval: tuple[float, float] | None = None  # of its entries, see `ops.intervals`

    @property
    def start(self) -> State:
        """Where the island that the node ends begins: the node itself where it is in none."""
        return self.source or self
