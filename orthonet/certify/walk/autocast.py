"""What `torch.autocast` makes of an exported graph: which constants it rounds.

PyTorch is asked, not copied: every operation is run once under autocast, and the casts that it
makes are watched. The weights of a certificate are then those that the operation multiplies by.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from orthonet._torch import TO_COPY, DispatchMode
from orthonet.certify.graph.program import Program, op_name, refuse
from orthonet.certify.graph.regions import CASTS, DECOMPOSED, HALF
from orthonet.certify.rules import BatchDependent

__all__ = ["round_constants"]


class _Casts(DispatchMode):
    """Notes the tensors that are cast to half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is TO_COPY and kwargs.get("dtype") in HALF:
            self.seen.append(args[0])
        return func(*args, **kwargs)


def round_constants(program: Program) -> None:
    """Replace the constants of every operation by those that it computes with under autocast.

    Also keeps the dtypes of all values in `program.dtypes`.

    Raises:
        UncertifiableError: A value is rounded inside of an operation that has one rule for all
            of it.
    """
    env: dict[fx.Node, Any] = dict(zip(program.inputs, program.samples, strict=True))
    walked = set(program.nodes)
    rounded: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> Any:
        if node in env:
            return env[node]
        found = program.constants[node]
        return found.value if isinstance(found, BatchDependent) else found

    for node in list(program.graph.nodes):
        known = node in env or node in program.constants
        if node.op != "call_function" or known or op_name(node) == "_assert_tensor_metadata":
            continue
        args, kwargs = map_arg((node.args, node.kwargs), value)
        try:
            with torch.no_grad(), program.region(node), _Casts() as casts:
                env[node] = node.target(*args, **kwargs)
        except RuntimeError as error:
            refuse(
                node,
                f"the operation must run under autocast ({str(error).splitlines()[0]})",
                "Put torch.autocast(device, enabled=False) around it in forward",
            )
        cast = {id(t) for t in casts.seen}
        if not cast or (op_name(node) in CASTS and node in program.moving):
            continue
        given = {id(value(n)): n for n in node.all_input_nodes}
        if node not in walked or DECOMPOSED in node.meta or not cast <= given.keys():
            refuse(
                node,
                "autocast must not round inside of what has one rule for the whole",
                "Put torch.autocast(device, enabled=False) around it in forward, or certify "
                "without autocast",
            )
        for place in (given[key] for key in cast if given[key] not in program.moving):
            if place not in rounded:
                low = value(place).to(program.autocast).to(value(place).dtype)
                rounded[place] = _constant(program, place, low)
                if not bool(low.isfinite().all()):
                    refuse(
                        node,
                        f"its weights must be finite in {program.autocast}",
                        "Certify under bfloat16, or scale them down",
                    )
            node.replace_input_with(place, rounded[place])
    program.dtypes = {
        n: v.dtype for n, v in env.items() if isinstance(v, Tensor) and v.is_floating_point()
    }


def _constant(program: Program, node: fx.Node, low: Tensor) -> fx.Node:
    """A new constant of the graph, the value of a node as autocast rounds it."""
    with program.graph.inserting_after(node):
        new = program.graph.call_function(torch.ops.aten.clone.default, (node,))
    new.meta = dict(node.meta)
    found = program.constants[node]
    program.constants[new] = replace(found, value=low) if isinstance(found, BatchDependent) else low
    return new
