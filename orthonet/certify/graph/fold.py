"""Constants of an exported graph: what does not depend on the input is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from orthonet.certify.graph.marks import Marked, mark_of
from orthonet.certify.graph.program import BATCH, Program, called, op_name, refuse
from orthonet.certify.rules import BatchDependent

__all__ = ["check_masks", "fill", "fold", "moving"]

_SHAPE_ONLY = {
    "sym_size",
    "sym_numel",
    "sym_stride",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "_assert_tensor_metadata",
}


_SIZES = (BATCH, BATCH - 1, 131)
_SHAPED_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
"""Of the second argument only shape and dtype are read."""


def moving(nodes: Any, inputs: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on the input, not only on its shape."""
    found = set(inputs)
    for node in nodes:
        if any(n in found for n in _read(node, node.all_input_nodes)):
            found.add(node)
    return found


def _read(node: fx.Node, parents: list[fx.Node]) -> list[fx.Node]:
    """Those of the parents whose values the operation reads, not only their shapes."""
    name = op_name(node)
    if name in _SHAPE_ONLY:
        return [parent for parent in parents if parent is not node.args[0]]
    return [cast(fx.Node, node.args[0])] if name in _SHAPED_LIKE else parents


def fold(program: Program) -> None:
    """Compute every needed node that does not depend on the input.

    What depends on the batch size is computed at three of them, the last one large and prime.
    """
    found = set(program.inputs)
    constants, sized = program.constants, {}
    for node in program.nodes:
        if node.op in ("placeholder", "get_attr"):  # a graph of its own is no value
            continue
        parents = program.parents(node)
        if any(p in found for p in _read(node, parents)):
            found.add(node)
            continue
        shape_only = op_name(node) in _SHAPE_ONLY
        if node.op == "call_function" and not shape_only and _is_random(node):
            refuse(
                node,
                "the model must be a function of its input alone",
                "Remove the random numbers, or draw them once into a buffer",
            )
        varies = any(p in sized or p in found for p in parents)
        places = range(len(_SIZES) if varies else 1)
        values = [_evaluate(node, program, place, sized) for place in places]
        constants[node] = values[0]
        if not all(_same(values[0], value) for value in values[1:]):
            sized[node] = values
            constants[node] = BatchDependent(values[0], _equal_rows(values))
    program.nodes = [n for n in program.nodes if n in found]


def check_masks(node: fx.Node, constants: dict[fx.Node, Any]) -> None:
    """Refuse infinite constants anywhere but in the mask of attention."""
    if op_name(node) == "scaled_dot_product_attention":
        return
    for parent in node.all_input_nodes:
        value = constants.get(parent)
        value = value.value if isinstance(value, BatchDependent) else value
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isinf().any()):
            refuse(
                node,
                "a mask with -inf must be the attn_mask of F.scaled_dot_product_attention",
                "Pass it there, or to an attention layer of torch.nn",
            )


def _equal_rows(values: list[Any]) -> bool:
    """Whether these are tensors of one row, repeated for each sample."""
    return all(
        isinstance(value, Tensor)
        and value.ndim > 0
        and len(value) == size
        and value.shape[1:] == values[0].shape[1:]
        and _same(value, values[0][:1].expand_as(value))
        for value, size in zip(values, _SIZES, strict=True)
    )


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and not (
        op_name(node) == "dropout" and not node.args[2]
    )


def _evaluate(node: fx.Node, program: Program, place: int, sized: dict[fx.Node, list[Any]]) -> Any:
    """The value of a node at one of the batch sizes."""

    def value(n: fx.Node) -> Any:
        if n in sized:
            return sized[n][place]
        if n in program.constants:
            return program.constants[n]
        fake = n.meta["val"]  # only its shape will be read
        shape = [_SIZES[place] if str(s) == program.batch else int(s) for s in fake.shape]
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)

    mark = mark_of(node)
    if mark is not None and mark[1] < 0:
        return _evaluate_call(node, *mark, program, value)
    args, kwargs = map_arg((node.args, node.kwargs), value)
    with torch.no_grad(), program.region(node):
        return called(node)(*args, **kwargs)


def _evaluate_call(
    node: fx.Node, number: int, place: int, program: Program, value: Callable[[fx.Node], Any]
) -> Any:
    call = program.calls[number]
    values = {k: value(n) for k, n in program.entries.get(number, {}).items()}
    target = call.target
    args, kwargs = fill(call.args, values), {k: fill(v, values) for k, v in call.kwargs.items()}
    with torch.no_grad(), program.region(node):
        result = target(*args, **kwargs)
    tensors: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            for v in value:
                visit(v)

    visit(result)
    return tensors[-place - 1]


def fill(value: Any, values: dict[int, Any]) -> Any:
    """The arguments of a call with values in place of the marks."""
    if isinstance(value, Marked):
        return values.get(value.place)  # None for one that the call does not read
    if isinstance(value, (tuple, list)):
        return tuple(fill(v, values) for v in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        equal = a.shape == b.shape and a.dtype == b.dtype
        return equal and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b
