"""What the code of `forward` does besides calling modules, read by `torch.fx`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from orthonet.convert._traced import FX_ERRORS, SUMS, activations

__all__ = ["forward_notes"]

_PRODUCTS: tuple[Any, ...] = (
    operator.mul,
    operator.imul,
    operator.matmul,
    torch.mul,
    torch.matmul,
    torch.bmm,
    "mul",
    "mul_",
    "matmul",
    "bmm",
    F.scaled_dot_product_attention,
)
_FUNCTIONS: tuple[Any, ...] = (
    F.relu,
    torch.relu,
    F.gelu,
    F.silu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.layer_norm,
    F.batch_norm,
    F.linear,
    F.conv2d,
    "relu",
    "relu_",
    "softmax",
    F.softmax,
)


class _Tracer(fx.Tracer):
    """Modules of torch and of this library are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("orthonet.") or super().is_leaf_module(
            m, module_qualified_name
        )


def forward_notes(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(module, operation, remark) for what no exchange of modules reaches."""
    if not list(model.children()):
        return
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except FX_ERRORS as error:
        reason = f"torch.fx cannot read it ({type(error).__name__})"
        yield "", "forward", f"{reason}: sums and functional calls in it are not listed here"
        return
    live = activations(graph)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        where = next(reversed(node.meta.get("nn_module_stack", {"": ("",)}).values()))[0]
        inputs = sum(isinstance(a, fx.Node) and a in live for a in node.args)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if node.target in SUMS and inputs > 1:
            yield (
                str(where),
                name,
                "a sum in forward adds constants; residual='convex' makes it a convex combination",
            )
        elif node.target in _PRODUCTS and inputs > 1:
            yield str(where), name, "a product of activations has no Lipschitz constant"
        elif node.target in _FUNCTIONS:
            yield str(where), name, "called as a function, so it stays"
