"""The part of an exported graph that leads to the output, and how its nodes are called."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from orthonet import _checks
from orthonet._torch import operation_name
from orthonet.certify.graph.marks import ROOT, LeafCall, mark_of
from orthonet.certify.graph.regions import REGION_OFF, autocast_region
from orthonet.errors import UncertifiableError

__all__ = ["BATCH", "Program", "called", "op_name", "path_of", "refuse", "source_of"]

BATCH = 3
"""The batch size of the probe; constants are also computed for one less."""
_PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass
class Program:
    """The part of an exported graph that leads to the output.

    Attributes:
        nodes: Its nodes in order, without those inside of a call that has a rule.
        inputs: The nodes of the inputs.
        outputs: The nodes of the outputs.
        constants: The value of every node that does not depend on the input.
        calls: The calls with rules, by the number in their marks.
        entries: The nodes that go into each call.
        batch: The name of the free batch size.
        graph: All of it, also what lies inside of the calls.
        samples: The batch that the model was traced with.
        moving: The nodes of the graph whose values depend on the input.
        autocast: The dtype of autocast, None where it is off.
        dtypes: The dtypes of the floating values that were found under autocast.
        needed: All nodes that lead to the output, also those that do not depend on the input.
        stored: The parameters, buffers and lifted constants of the graph, by their names.
        given: The batch that the user gave.
        structure: Compares the graph with those of other ways to call the model.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    constants: dict[fx.Node, Any]
    calls: list[LeafCall]
    entries: dict[int, dict[int, fx.Node]] = field(default_factory=dict)
    batch: str = ""
    graph: fx.Graph = field(default_factory=fx.Graph)
    samples: tuple[Tensor, ...] = ()
    moving: set[fx.Node] = field(default_factory=set)
    autocast: torch.dtype | None = None
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    needed: list[fx.Node] = field(default_factory=list)
    stored: dict[str, Tensor] = field(default_factory=dict)
    structure: Callable[[], None] = lambda: None
    given: tuple[Tensor, ...] = ()

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """The dtype of the value of a node, of the first of several values."""
        value = node.meta.get("val")
        while isinstance(value, (tuple, list)):
            value = value[0]
        found = self.dtypes.get(node)
        return found or (value.dtype if isinstance(value, Tensor) else self.samples[0].dtype)

    def autocast_at(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of autocast where a node is run."""
        return None if node.meta.get(REGION_OFF) else self.autocast

    def region(self, node: fx.Node) -> contextlib.AbstractContextManager[Any]:
        """Autocast as it is where a node is run."""
        return autocast_region(self.samples[0].device, self.autocast_at(node))

    def parents(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that this one is computed from: for a part of a call, those of the call."""
        mark = mark_of(node)
        if mark is not None and mark[1] < 0:
            return list(self.entries.get(mark[0], {}).values())
        return list(node.all_input_nodes)


def path_of(node: fx.Node) -> str:
    """The module that a node was traced in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = stack[-1][0] if stack else ""
    return name.split("@")[0] or ROOT


def source_of(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, `file:line: code`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', str(node.stack_trace or ""))
    for file, line, code in reversed(frames):
        if not file.startswith(_PACKAGES):
            return f"{Path(file).name}:{line}: {code.strip()}"
    return ""


def called(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls."""
    return cast(Callable[..., Any], node.target)


def op_name(node: fx.Node) -> str:
    """The name of the operation of a node, without its overload."""
    name = operation_name(node.target)
    if name is None:
        return getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten::")


def refuse(node: fx.Node, requirement: str, advice: str) -> None:
    """Raise an `UncertifiableError` that names the operation, the module and the line."""
    details = {"operation": op_name(node), "path": path_of(node)}
    if source_of(node):
        details["source"] = source_of(node)
    _checks.fail("certify", requirement, advice, UncertifiableError, **details)
