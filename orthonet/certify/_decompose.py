"""Operations without a rule, rewritten in those that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from orthonet.certify._rules import function_rule

__all__ = ["decompose"]

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


def decompose(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Replace every one of `nodes` whose operation has no rule by PyTorch's decomposition.

    Nodes that do not depend on the input stay as they are: they are computed, not bounded. What
    has no decomposition stays, too, and will be refused where it is reached.
    """
    table: dict[Any, Any] = {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            continue
        if function_rule(target) is not None:
            continue
        table = table or torch._decomp.core_aten_decompositions()  # type: ignore[assignment]
        inner = _trace(node, table.get(target) or _composite(target))
        if inner is None:
            continue
        places = [n for n in node.all_input_nodes]
        with graph.inserting_before(node):
            mapping = dict(
                zip((n for n in inner.graph.nodes if n.op == "placeholder"), places, strict=True)
            )
            before = set(graph.nodes)
            result: Any = graph.graph_copy(inner.graph, mapping)
        added = [n for n in graph.nodes if n not in before]
        for new in added:
            new.meta.setdefault("val", None)
            for key in ("nn_module_stack", "stack_trace"):
                if key in node.meta:
                    new.meta[key] = node.meta[key]
        _replace(node, result)
        todo += added


def _composite(target: torch._ops.OpOverload) -> Callable[..., Any] | None:
    kind = torch._C.DispatchKey.CompositeImplicitAutograd
    return target.decompose if target.has_kernel_for_dispatch_key(kind) else None


def _trace(node: fx.Node, function: Callable[..., Any] | None) -> fx.GraphModule | None:
    if function is None:
        return None
    inputs = node.all_input_nodes
    values = [n.meta.get("val") for n in inputs]
    if any(v is None for v in values):
        return None
    modes = [v.fake_mode for v in values if isinstance(v, Tensor) and hasattr(v, "fake_mode")]

    def call(*found: Any) -> Any:
        env = dict(zip(inputs, found, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        return function(*args, **kwargs)

    try:
        with modes[0], torch.no_grad():
            return make_fx(call)(*values)
    except _FAILURES:
        return None


def _replace(node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:  # a tuple: its users are getitem
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            user.graph.erase_node(user)
    node.graph.erase_node(node)
