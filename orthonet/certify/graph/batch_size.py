"""The batch size may be the size of dim 0 of tensors and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from orthonet.certify.graph.program import op_name, refuse

__all__ = ["check_batch_in_shapes"]

_COUNTS = {"sym_size", "sym_numel", "mul", "floordiv", "getitem"}
_SHAPES = {
    "view",
    "reshape",
    "_unsafe_view",
    "expand",
    "repeat",
    "broadcast_to",
    "unflatten",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "slice",
    "split",
    "split_with_sizes",
    "view_copy",
    "expand_copy",
}
"""Operations that read integers as sizes; the walk looks at the batch dim of what they return."""
_FILL = {"full": 1, "new_full": 2}  # the argument that is a value
_ROWWISE = {
    *_SHAPES,
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "expand_as",
    "view_as",
    "reshape_as",
    "type_as",
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "alias",
    "lift_fresh_copy",
    "unsqueeze",
    "squeeze",
    "flatten",
    "transpose",
    "permute",
    "select",
    "cat",
    "stack",
    "chunk",
    "unbind",
    "getitem",
    "certify_mark",
    "linear",
    "matmul",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "neg",
    "abs",
    "relu",
    "tanh",
    "sigmoid",
    "exp",
    "fill_",
    "zero_",
    "copy_",
    "add_",
    "mul_",
    "masked_fill",
    "where",
    "index_select",
    "view_as_real",
    "wrap_with_autocast",
    "_assert_tensor_metadata",
}
"""What makes, of equal rows, a tensor of equal rows for every batch size, where dim 0 stays."""


def check_batch_in_shapes(nodes: list[fx.Node], moving: set[fx.Node], batch: str) -> None:
    """Refuse graphs in which the batch size is more than the size of dim 0.

    Raises:
        UncertifiableError: It is divided, compared, or used as a value; or a constant that is
            shaped like the batch goes through an operation that may tell one row from another.
    """
    sized: set[fx.Node] = set()
    for node in nodes:
        found, name = node.meta.get("val"), _name(node)
        if node.op != "call_function":
            continue
        if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if name not in _COUNTS or not _is_count(found):
                _refuse_size(node)
            continue
        places = [*enumerate(node.args), *((-1, v) for v in node.kwargs.values())]
        for place, argument in places:
            if _symbolic(argument) and (name not in _SHAPES or place == _FILL.get(name)):
                _refuse_size(node)
        if node in moving:
            continue
        if any(n in sized for n in node.all_input_nodes) or _has_batch(found, batch):
            sized.add(node)
            if name not in _ROWWISE or not _leads(found, batch):
                _refuse_size(node)


def _name(node: fx.Node) -> str:
    return op_name(node).removeprefix("orthonet::").split(".")[0]


def _refuse_size(node: fx.Node) -> None:
    refuse(
        node,
        "the batch size may be the size of dim 0 and nothing else",
        "A certificate is given for each sample on its own: a value that depends on how many there "
        "are, or on which of them it is, mixes them",
    )


def _symbolic(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
        if isinstance(argument, (tuple, list)):
            return False  # of several results
    if isinstance(argument, (tuple, list)):
        return any(map(_symbolic, argument))
    return isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)) and bool(
        argument.node.expr.free_symbols
    )


def _has_batch(found: Any, batch: str) -> bool:
    if isinstance(found, Tensor):
        return any(isinstance(n, torch.SymInt) for n in found.shape)
    return isinstance(found, (tuple, list)) and any(_has_batch(v, batch) for v in found)


def _leads(found: Any, batch: str) -> bool:
    """Whether dim 0 is the batch size, and no other dim depends on it."""
    if isinstance(found, (tuple, list)):
        return all(_leads(v, batch) for v in found)
    return (
        isinstance(found, Tensor)
        and found.ndim > 0
        and str(found.shape[0]) == batch
        and not any(isinstance(n, torch.SymInt) for n in found.shape[1:])
    )


def _is_count(number: Any) -> bool:
    """Whether it is a constant, or a positive multiple of a power of the batch size."""
    if not isinstance(number, torch.SymInt):
        return False
    expression: Any = number.node.expr
    if not expression.free_symbols:
        return True
    coefficient, rest = expression.as_coeff_Mul()
    base, power = rest.as_base_exp()
    return bool(coefficient.is_Integer and coefficient > 0 and base.is_Symbol and power.is_Integer)
