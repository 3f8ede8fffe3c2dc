"""What `torch.fx` reads in the forward of one module: its own code, every sub-module a leaf."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["FX_ERRORS", "SUMS", "activations", "is_own_code", "trace_own"]

FX_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What code that torch.fx cannot follow raises."""

SUMS: tuple[Any, ...] = (
    operator.add,
    operator.iadd,
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    "add",
    "add_",
)
_ATTRIBUTES = ("shape", "ndim", "device", "dtype")
_METHODS = ("size", "dim", "numel", "stride", "new_empty", "new_zeros")


class _OwnCode(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def is_own_code(module: nn.Module) -> bool:
    """Return whether `forward` is somebody's code, neither torch's nor this library's."""
    first = type(module).__module__
    return isinstance(module, fx.GraphModule) or not first.startswith(("torch.nn.", "orthonet."))


def trace_own(module: nn.Module, method: str = "forward") -> fx.Graph:
    """The graph of the module's own code in its present mode; raises one of `FX_ERRORS`."""
    tracer = _OwnCode()
    tracer.traced_func_name = method
    return tracer.trace(module)


def activations(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on an input, without the sizes and dtypes read off them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            found.add(node)
        elif node.op == "call_function" and node.target is getattr:
            if node.args[1] not in _ATTRIBUTES and node.args[0] in found:
                found.add(node)
        elif node.op == "call_method" and node.target in _METHODS:
            continue
        elif node.op != "get_attr" and found.intersection(node.all_input_nodes):
            found.add(node)
    return found
