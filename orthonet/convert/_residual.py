"""Rewrite the sums in the code of `forward`, in place, so that they keep the constant 1."""

from __future__ import annotations

import importlib
import linecache
import operator
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from orthonet import _checks
from orthonet.convert._sums import ConvexSum, PrescaledSum
from orthonet.convert._traced import FX_ERRORS, SUMS, activations, is_own_code, trace_own

__all__ = ["GAIN", "RewrittenForward", "rewrite_sums"]

GAIN = "gain"
"""What the report calls a parameter that multiplies an activation, now of magnitude at most 1."""
_PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_SUM_MODULES: dict[str, type[ConvexSum | PrescaledSum]] = {
    "convex": ConvexSum,
    "prescaled": PrescaledSum,
}
_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


class RewrittenForward:
    """Mixin before the class of a module whose `forward` was rewritten.

    The class keeps its name, its other methods and `isinstance`; a pickle holds the class and the
    code of `forward`.
    """

    forward_in_train: Any
    forward_in_eval: Any
    _base: type[nn.Module]
    _sources: tuple[str, ...]
    _names: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        names = {
            key: (value.__name__,) if isinstance(value, types.ModuleType) else value
            for key, value in self._names.items()
            if not key.startswith("__")
        }
        return _blank, (self._base, self._sources, names), self.__dict__


def _blank(base: type[nn.Module], sources: tuple[str, ...], names: dict[str, Any]) -> nn.Module:
    """What pickle and deepcopy fill with the state of a module of a rewritten class."""
    names = {
        key: importlib.import_module(value[0]) if isinstance(value, tuple) else value
        for key, value in names.items()
    }
    kind = _rewritten_class(base, sources, names)
    return kind.__new__(kind)


def _rewritten_class(
    base: type[nn.Module], sources: tuple[str, ...], names: dict[str, Any]
) -> type[nn.Module]:
    """The subclass of `base` with this forward, or with these in train and eval mode."""
    key = (base, sources)
    if key not in _CLASSES:
        compiled = [_compile(source, dict(names), base) for source in sources]
        train, evaluate = compiled[0], compiled[-1]
        forward = train
        if len(compiled) == 2:

            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return (train if self.training else evaluate)(self, *args, **kwargs)

        body = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "forward": forward,
            "forward_in_train": train,
            "forward_in_eval": evaluate,
            "_base": base,
            "_sources": sources,
            "_names": names,
        }
        _CLASSES[key] = type(base.__name__, (RewrittenForward, base), body)
    return _CLASSES[key]


def _compile(source: str, names: dict[str, Any], base: type) -> Any:
    """The function `forward`, with lines that a traceback shows."""
    file = f"<forward of {base.__qualname__}, rewritten {len(_CLASSES)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    return names["forward"]


def rewrite_sums(model: nn.Module, residual: str, kept: Any) -> Iterator[tuple[str, str, str, str]]:
    """Rewrite `model` in place; yield (name, operation, what it is now, remark).

    Args:
        model: A model that nobody else holds.
        residual: "convex" or "prescaled".
        kept: Whether the module of this name and class is left alone.
    """
    found = [
        (n, m)
        for n, m in model.named_modules()
        if is_own_code(m) and not isinstance(m, RewrittenForward) and not kept(n, m)
    ]
    for name, module in found:
        try:
            graphs = _both_modes(module)
        except FX_ERRORS as error:
            if next(module.children(), None) is None:
                continue  # one with parameters of its own is listed as skipped
            _checks.fail(
                "orthogonalize",
                f"residual={residual!r} needs a forward that torch.fx can read, and that of "
                f"'{name or '<root>'}' has code that depends on values or shapes "
                f"({type(error).__name__})",
                "Pass rules={'" + name + "': False} if it has no sums, or put ConvexResidual "
                "around its branches by hand",
                module=type(module).__name__,
            )
        yield from _rewrite(name, module, graphs, residual)


def _both_modes(module: nn.Module) -> list[fx.Graph]:
    """The graphs in train and eval mode, once where they are alike."""
    mode, graphs = module.training, []
    for training in (True, False):
        module.training = training
        try:
            graphs.append(trace_own(module))
        finally:
            module.training = mode
    return graphs if _text(graphs[0]) != _text(graphs[1]) else graphs[:1]


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _rewrite(
    name: str, module: nn.Module, graphs: list[fx.Graph], residual: str
) -> Iterator[tuple[str, str, str, str]]:
    rows: dict[str, tuple[str, str, str, str]] = {}
    for graph in graphs:
        count = 0
        for node in list(graph.nodes):
            what = _operation(node)
            if what == "sum" and _is_of_two(name, node, residual):
                count += 1
                key = _free_name(module, "residual", count)
                _replace_sum(graph, node, module, key, residual)
                full = f"{name}.{key}".lstrip(".")
                kind = _SUM_MODULES[residual].__name__
                rows[full] = (full, _name(node), kind, "the sum keeps the constant of its operands")
            elif what == "product" and _bound_gain(graph, node):
                rows[f"{name} {node.name}"] = (
                    name,
                    _name(node),
                    GAIN,
                    "a parameter divided by its largest magnitude",
                )
        graph.lint()
    if not rows:
        return
    if isinstance(module, fx.GraphModule):
        module.graph = graphs[-1]
    else:
        codes = [graph.python_code("self") for graph in graphs]
        names = {key: value for code in codes for key, value in code.globals.items()}
        sources = tuple(dict.fromkeys(code.src for code in codes))
        module.__class__ = _rewritten_class(type(module), sources, names)
    yield from rows.values()


def _operation(node: fx.Node) -> str | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in SUMS:
        return "sum"
    return "product" if node.target in _PRODUCTS else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def _is_of_two(name: str, node: fx.Node, residual: str) -> bool:
    """Whether it is a sum of two activations; refuses one with keywords."""
    live = activations(node.graph)
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    if sum(a in live for a in operands) < 2:
        return False
    _checks.require(
        not node.kwargs,
        "orthogonalize",
        f"residual={residual!r} rewrites sums of two operands without keywords, and the forward of "
        f"'{name or '<root>'}' has one with {' and '.join(f'{key}=' for key in node.kwargs)}",
        "Write it as a + b, with factors as products of their own, or leave the module alone by "
        "rules={'" + name + "': False}",
        sum=node.format_node(),
    )
    return len(node.args) == 2


def _free_name(module: nn.Module, stem: str, count: int) -> str:
    """`residual`, `residual2`, ..., or another name where the module has that already."""
    known = module._modules.get(key := stem if count == 1 else f"{stem}{count}")
    while hasattr(module, key) and not isinstance(known, ConvexSum | PrescaledSum):
        key, known = f"{key}_sum", module._modules.get(f"{key}_sum")
    return key


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        now = stack.pop()
        if now not in seen:
            seen.add(now)
            stack += now.all_input_nodes
    return seen


def _replace_sum(
    graph: fx.Graph, node: fx.Node, module: nn.Module, key: str, residual: str
) -> None:
    first, second = node.args
    above = {a: _ancestors(a) for a in (first, second)}  # type: ignore[arg-type]
    # the branch is the operand with more calls of its own
    longer = len(above[first] - above[second]) >= len(above[second] - above[first])
    branch, skip = (first, second) if longer else (second, first)
    if key not in module._modules:
        tensor = next(module.parameters(), None)
        like = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
        module.add_module(key, _SUM_MODULES[residual](**like).train(module.training))
    if residual == "prescaled":
        own = above[branch] - above[skip]
        branch = _scale_inputs(graph, branch, own, f"{key}.before")
    with graph.inserting_after(node):
        call = graph.call_module(key, (branch, skip))
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _scale_inputs(graph: fx.Graph, branch: Any, own: set[fx.Node], path: str) -> Any:
    """Multiply by the gain what enters the branch; returns the branch's output."""
    live = activations(graph)
    edges = [
        (inside, outside)
        for inside in [n for n in graph.nodes if n in own]
        for outside in inside.all_input_nodes
        if outside in live and outside not in own
    ]
    if not edges:  # the branch is an input itself
        with graph.inserting_after(branch):
            return graph.call_module(path, (branch,))
    scaled: dict[fx.Node, fx.Node] = {}
    for inside, outside in edges:
        if outside not in scaled:
            with graph.inserting_after(outside):
                scaled[outside] = graph.call_module(path, (outside,))
        inside.replace_input_with(outside, scaled[outside])
    return branch


def _bound_gain(graph: fx.Graph, node: fx.Node) -> bool:
    """Divide a parameter that multiplies an activation by its largest magnitude."""
    live = activations(graph)
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    gains = [a for a in operands if a not in live and _reads_parameter(a)]
    if len(operands) != 2 or len(gains) != 1:
        return False
    with graph.inserting_before(node):
        size = graph.call_method("max", (graph.call_method("abs", (gains[0],)),))
        size = graph.call_method("clamp_min", (size, 1e-30))
        node.replace_input_with(gains[0], graph.call_function(operator.truediv, (gains[0], size)))
    return True


def _reads_parameter(node: fx.Node) -> bool:
    return any(a.op == "get_attr" for a in _ancestors(node))
