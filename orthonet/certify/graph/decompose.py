"""Operations without a rule, rewritten in those that have one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from orthonet._torch import composite_of, core_decompositions, is_overload, overload_name
from orthonet.certify.graph.cells import WRITTEN, product_of
from orthonet.certify.graph.regions import DECOMPOSED, REGION_OFF
from orthonet.certify.rules import function_rule

__all__ = [
    "FAILURES",
    "decompose",
    "inline_regions",
    "mark_written",
    "skip_whole_slices",
    "traced",
    "write_out",
]

_REGION = "wrap_with_autocast"  # by name: PyTorch 2.6 loads the operation only when it is used

_END = 2**62  # torch writes the largest integer for an open end
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What operations raise for arguments that they cannot take."""


def decompose(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Replace every one of `nodes` whose operation has no rule by PyTorch's decomposition.

    Nodes that do not depend on the input stay as they are: they are computed, not bounded. What
    has no decomposition into operations with rules stays, too, and is refused by its own name.
    """
    for node in nodes:
        _write_choice(graph, node)
        _write_einsum(graph, node, set(nodes))
    table: dict[Any, Any] = {}
    for node in nodes:
        target: Any = node.target
        if not is_overload(target) or target.namespace != "aten":
            continue
        if function_rule(target) is not None:
            continue
        if not table:
            every = core_decompositions()
            table = {op: f for op, f in every.items() if function_rule(op) is None}
        function = WRITTEN.get(target) or table.get(target) or composite_of(target)
        inner = traced(node, function, table)
        if inner is None or not _covered(inner):
            continue
        write_out(graph, node, inner)


def write_out(graph: fx.Graph, node: fx.Node, inner: fx.GraphModule) -> list[fx.Node]:
    """Put the nodes of a graph of the same function in the place of a node, and return them."""
    places = (n for n in inner.graph.nodes if n.op == "placeholder")
    before = set(graph.nodes)
    with graph.inserting_before(node):
        mapping = dict(zip(places, node.all_input_nodes, strict=True))
        result: Any = graph.graph_copy(inner.graph, mapping)
    added = [n for n in graph.nodes if n not in before]
    for new in added:
        mark_written(new, node)
    _replace(node, result)
    return added


def mark_written(new: fx.Node, node: fx.Node) -> None:
    """Note that a node was written for another one: it stands in the same line and region."""
    new.meta.setdefault("val", None)
    new.meta[DECOMPOSED] = True
    for key in ("nn_module_stack", "stack_trace", REGION_OFF):
        if key in node.meta:
            new.meta[key] = node.meta[key]


def inline_regions(module: fx.GraphModule, autocast: torch.dtype | None = None) -> None:
    """Put the operations of regions in which autocast is off, or to `autocast`, in their place."""
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != _REGION:
            continue
        _, dtype, enabled, _, body, *operands = node.args
        if enabled and (autocast is None or dtype != autocast):
            continue
        inner: Any = module.get_submodule(str(body.target))
        inline_regions(inner, autocast)
        formal = (n for n in inner.graph.nodes if n.op == "placeholder")
        mapping = dict(zip(formal, operands, strict=True))
        before = set(graph.nodes)
        with graph.inserting_before(node):
            result: Any = graph.graph_copy(inner.graph, mapping)
        for new in graph.nodes:
            if new not in before:
                new.meta.setdefault(REGION_OFF, not enabled)
        _replace(node, result)


def skip_whole_slices(graph: fx.Graph) -> None:
    """Take out slices of everything, `x[:]`, so that equal tensors are one node."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.slice.Tensor:
            continue
        source, _, begin, end, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])
        if not begin and (end is None or (isinstance(end, int) and end >= _END)) and step == 1:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


_SIDES = {"gt": 1, "ge": 1, "lt": -1, "le": -1}


def _write_choice(graph: fx.Graph, node: fx.Node) -> None:
    """Write a choice between multiples of x by the sign of x as a leaky rectifier.

    It is continuous, which its mask alone does not tell.
    """
    name, args = _name(node), node.args
    if not name.startswith("where.") or not isinstance(args[0], fx.Node):
        return
    mask, (above, below) = args[0], args[1:3]
    side = _SIDES.get(_name(mask).removesuffix(".Scalar"))
    if side is None or mask.args[1] != 0 or not isinstance(mask.args[0], fx.Node):
        return
    x = mask.args[0]
    slopes = [_multiple(value, x) for value in (above, below)[::side]]
    right, left = slopes  # of x > 0 and of x < 0
    if right is None or left is None:
        return
    aten = torch.ops.aten
    with graph.inserting_before(node):
        if right:
            if (left / right) * right != left:
                return
            result = graph.call_function(aten.leaky_relu.default, (x, left / right))
            factor = right
        else:
            result = graph.call_function(aten.neg.default, (x,))
            result = graph.call_function(aten.relu.default, (result,))
            factor = -left
        if factor != 1.0:
            result = graph.call_function(aten.mul.Tensor, (result, factor))
    new: fx.Node | Any = result
    while new is not x and isinstance(new, fx.Node):
        new.meta.update(node.meta)
        new.meta[DECOMPOSED] = True
        new = new.args[0]
    node.replace_all_uses_with(result)


def _write_einsum(graph: fx.Graph, node: fx.Node, moving: set[fx.Node]) -> None:
    """Write an einsum of two values of the input as a product of batches of matrices."""
    if node.target is not torch.ops.aten.einsum.default:
        return
    equation, tensors, *rest = node.args
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or rest or node.kwargs:
        return
    if not all(isinstance(t, fx.Node) and t in moving for t in tensors):
        return
    product = product_of(str(equation))
    if product is None:
        return
    inner = traced(node, lambda _, both: product(*both), {}, whole=True)
    if inner is not None:
        write_out(graph, node, inner)


def _name(node: Any) -> str:
    """The operation and overload of a node of ATen, else nothing."""
    return overload_name(getattr(node, "target", None)) or ""


def _multiple(value: Any, x: fx.Node) -> float | None:
    """The number that x is multiplied by to give this value, None if it is no multiple."""
    if value is x:
        return 1.0
    if isinstance(value, (int, float)):
        return 0.0 if value == 0 else None
    name = _name(value)
    if name in ("zeros_like.default",):
        return 0.0
    if name == "neg.default" and value.args[0] is x:
        return -1.0
    if name in ("mul.Tensor", "mul.Scalar"):
        pair = value.args[:2]
        other = [a for a in pair if a is not x]
        if len(other) == 1 and isinstance(other[0], (int, float)):
            return float(other[0])
    return None


def _covered(module: fx.GraphModule) -> bool:
    """Whether every operation of a decomposition has a rule."""
    calls = [n.target for n in module.graph.nodes if n.op == "call_function"]
    return all(target is operator.getitem or function_rule(target) is not None for target in calls)


def traced(
    node: fx.Node,
    function: Callable[..., Any] | None,
    table: dict[Any, Any],
    whole: bool = False,
) -> fx.GraphModule | None:
    """The graph of a function of the arguments of a node; None where it cannot be traced.

    With `whole`, composite operations stay in one piece.
    """
    if function is None:
        return None
    inputs = node.all_input_nodes
    values = [n.meta.get("val") for n in inputs]
    if any(v is None for v in values):
        return None
    modes = [getattr(v, "fake_mode", None) for v in values if isinstance(v, Tensor)]

    def call(*found: Any) -> Any:
        env = dict(zip(inputs, found, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
        return function(*args, **kwargs)

    try:
        with modes[0] or nullcontext(), torch.no_grad():
            return make_fx(call, decomposition_table=table, pre_dispatch=whole)(*values)
    except FAILURES:
        return None


def _replace(node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:  # a tuple: its users are getitem
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            user.graph.erase_node(user)
    node.graph.erase_node(node)
