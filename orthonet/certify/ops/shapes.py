"""Operations that only move, copy, cut or leave out entries, by positions that are constants."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.ops.registry import (
    EVERYTHING,
    NOTHING,
    ONE,
    Interval,
    Linear,
    Values,
    amplification,
    as_input,
    interval_of,
    op,
    place,
    zeros,
)
from orthonet.certify.rules import (
    COPY,
    REARRANGEMENT,
    Call,
    Operand,
    Step,
    exact,
    record_of,
)
from orthonet.certify.walk.forms import Form, aligned, unchanged

__all__: list[str] = []


def _with_zero(call: Call) -> Interval:
    low, high = interval_of(call.operands[0])
    return min(low, 0.0), max(high, 0.0)


def _run(a: Values, absolute: bool) -> Any:
    return a.run()


def _first(a: Values, absolute: bool) -> Any:
    return a.args[0]


_AS_IT_IS = Linear(_first, moves=True, when=lambda call: isinstance(call.args[0], Operand))
_MOVED = Linear(_run, moves=True)


# --- the same entries in another shape -----------------------------------------------------------


def _reshaped(a: Values, absolute: bool) -> Any:
    """Of a view: an island holds its values in other strides than the model does."""
    size = a["shape"] if "shape" in a else a["size"]
    return a["self"].reshape(size)


def _rearrange(call: Call) -> Step:
    # That the batch stays where it is and whole is checked for every operation by its shapes.
    if not isinstance(call.args[0], Operand):
        call.refuse("the tensor to rearrange must be the first argument", "Rewrite the call")
    others = (NOTHING,) * (len(call.operands) - 1)  # only their shape or dtype
    return Step((ONE, *others), REARRANGEMENT, roundings=COPY)


def _factor(draw: random.Random, size: int) -> int:
    return draw.choice([d for d in range(1, size + 1) if size % d == 0])


def _reshape_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    size = math.prod(shape)
    first = _factor(draw, size)
    rest = (first, size // first)
    kind = draw.randrange(4)
    if kind == 0:
        return lambda x, y: x.reshape(x.shape[0], *rest)
    if kind == 1:
        return lambda x, y: x.flatten(1)
    if kind == 2:
        return lambda x, y: x.contiguous().view(x.shape[0], *rest, 1).squeeze(-1)
    return lambda x, y: x.flatten(1).unflatten(1, rest).unsqueeze(1).squeeze(1)


op(
    "reshape.default",
    "view.default",
    "_unsafe_view.default",
    reads=("shape", "size"),
    linear=Linear(_reshaped, moves=True),
    interval=as_input,
    samples=_reshape_samples,
)(_rearrange)
op(
    "flatten.using_ints",
    "ravel.default",
    "unflatten.int",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "unsqueeze.default",
    "view_copy.default",
    reads=("start_dim", "end_dim", "dim", "sizes", "size"),
    linear=_MOVED,
    interval=as_input,
)(_rearrange)


@op("view.dtype", reads=("dtype",))
def _bits(call: Call) -> Step:
    call.refuse("the bits of a tensor must not be read as another dtype", "Use x.to(dtype)")


def _permute_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    order = [1 + i for i in range(len(shape))]
    draw.shuffle(order)
    a, b = place(draw, shape), place(draw, shape)
    return draw.choice(
        [
            lambda x, y: x.permute(0, *order),
            lambda x, y: x.transpose(a, b),
            lambda x, y: x.movedim(a, b),
        ]
    )


op(
    "permute.default",
    "transpose.int",
    "movedim.int",
    "movedim.intlist",
    "t.default",
    "mT.default",
    "swapaxes.default",
    "swapdims.default",
    "moveaxis.int",
    "moveaxis.intlist",
    "mT.a",
    "permute_copy.default",
    "transpose_copy.int",
    reads=("dims", "dim0", "dim1", "source", "destination", "axis0", "axis1"),
    linear=_MOVED,
    interval=as_input,
    samples=_permute_samples,
)(_rearrange)


def _pixels_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3:
        return None
    channels, height, width = shape
    if channels % 4 == 0 and draw.random() < 0.5:
        return lambda x, y: F.pixel_shuffle(x, 2)
    if height % 2 == 0 and width % 2 == 0:
        return lambda x, y: F.pixel_unshuffle(x, 2)
    groups = _factor(draw, channels)
    # by hand, as most networks write it
    return lambda x, y: (
        x.view(x.shape[0], groups, channels // groups, height, width)
        .transpose(1, 2)
        .contiguous()
        .view(x.shape[0], channels, height, width)
    )


op(
    "pixel_shuffle.default",
    "pixel_unshuffle.default",
    "channel_shuffle.default",
    "native_channel_shuffle.default",
    reads=("upscale_factor", "downscale_factor", "groups"),
    linear=_MOVED,
    interval=as_input,
    samples=_pixels_samples,
)(_rearrange)

_COPIES = (
    "memory_format",
    "non_blocking",
    "copy",
    "dtype",
    "device",
    "other",
    "layout",
    "pin_memory",
)
# That no cast rounds is checked for every node by its dtype.
op(
    "contiguous.default",
    "clone.default",
    "detach.default",
    "alias.default",
    "lift_fresh.default",
    "lift_fresh_copy.default",
    "positive.default",
    "to.dtype",
    "to.device",
    "to.other",
    "to.dtype_layout",
    "to.prim_Device",
    "to.prim_dtype",
    "to.prim_other",
    "_to_copy.default",
    "type_as.default",
    "detach_copy.default",
    "alias_copy.default",
    free=_COPIES,
    linear=_AS_IT_IS,
    kernel=unchanged,
    interval=as_input,
    samples=lambda draw, shape: lambda x, y: x.clone().contiguous(),
)(_rearrange)


def _like(a: Values, absolute: bool) -> Any:
    return a["self"].reshape(
        a["other"].shape if isinstance(a["other"], Tensor) else a["other"].value.shape
    )


op(
    "view_as.default",
    "reshape_as.default",
    reads=("other",),
    linear=Linear(_like, moves=True),
    interval=as_input,
)(_rearrange)


@op(
    "dropout.default",
    "alpha_dropout.default",
    "feature_alpha_dropout.default",
    "feature_dropout.default",
    "native_dropout.default",
    reads=("train",),
    free=("p",),
    linear=Linear(
        lambda a, absolute: (a.args[0], None) if "native" in str(a.target) else a.args[0],
        moves=True,
    ),
    kernel=unchanged,
    interval=as_input,
    samples=lambda draw, shape: lambda x, y: F.dropout(x, 0.5, training=False),
)
def _dropout(call: Call) -> Step:
    if call["train"] is not False:
        call.refuse(
            "dropout must be switched off",
            "Pass training=self.training and call model.eval()",
        )
    return Step((ONE,), REARRANGEMENT, roundings=COPY)


# --- parts of a tensor ---------------------------------------------------------------------------


def _selection(call: Call, *names: str) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    for name in names:
        call.feature_dims(call[name])
    return exact(1.0, "selection or order", COPY)


def _over(draw: random.Random, size: int) -> int:
    """A position in a dim of this size, now and then beyond its ends."""
    return draw.randrange(-size - 4, size + 5)


def _slice_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    size = shape[dim]
    cuts = []
    for _ in range(draw.choice([1, 2, 2, 3])):
        step = draw.choice([1, 1, 1, 2])
        begin, end = draw.choice([None, _over(draw, size)]), draw.choice([None, _over(draw, size)])
        cuts.append(slice(begin, end, step))
    before = (slice(None),) * (dim + 1)
    kept = [cut for cut in cuts if len(range(*cut.indices(size)))] or [slice(None)]
    f = draw.choice([torch.relu, torch.abs, torch.tanh])
    if len(kept) > 1:
        return lambda x, y: torch.cat([f(x[(*before, cut)]) for cut in kept], dim + 1)
    return lambda x, y: x[(*before, kept[0])]


@op(
    "slice.Tensor",
    "slice_copy.Tensor",
    reads=("dim", "start", "end", "step"),
    linear=_MOVED,
    interval=as_input,
    cuts=True,
    samples=_slice_samples,
)
def _slice(call: Call) -> Step:
    return _selection(call, "dim")


def _select_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = place(draw, shape)
    size = shape[dim - 1 if dim > 0 else dim]
    index = draw.randrange(-size, size)
    if draw.random() < 0.4 and index >= 0:
        return lambda x, y: x.narrow(dim, index, size - index)
    return (lambda x, y: x.select(dim, index)) if len(shape) > 1 else None


@op(
    "select.int",
    "narrow.default",
    "select_copy.int",
    reads=("dim", "index", "start", "length"),
    linear=_MOVED,
    interval=as_input,
    cuts=True,
    samples=_select_samples,
)
def _select(call: Call) -> Step:
    return _selection(call, "dim")


def _split_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = 1 + draw.randrange(len(shape))
    size = shape[dim - 1]
    places = tuple(_over(draw, size) for _ in range(draw.choice([1, 2, 2, 3])))
    parts = draw.randrange(1, size + 1)
    f = draw.choice([torch.relu, torch.abs, lambda t: -2 * t])

    def together(cut: Any) -> Any:
        return lambda x, y: torch.cat([f(part) for part in cut(x)][::-1], dim)

    return together(
        draw.choice(
            [
                lambda x: torch.tensor_split(x, places, dim),
                lambda x: x.chunk(parts, dim),
                lambda x: x.split(parts, dim),
                lambda x: torch.tensor_split(x, parts, dim),
                lambda x: [part.unsqueeze(dim) for part in x.unbind(dim)],
            ]
        )
    )


@op(
    "split.Tensor",
    "split.sizes",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
    "unbind.int",
    "unsafe_split.Tensor",
    "unsafe_chunk.default",
    "split_with_sizes_copy.default",
    "unbind_copy.int",
    "split_copy.Tensor",
    reads=("split_size", "split_sizes", "chunks", "sections", "indices", "dim"),
    linear=_MOVED,
    interval=as_input,
    cuts=True,
    samples=_split_samples,
)
def _split(call: Call) -> Step:
    call.feature_dims(call["dim"])
    # Pieces of tensor_split may overlap; each alone is a selection.
    return exact(1.0, "each part of the input", COPY)


def _getitem_form(state: Any, forms: list[Form]) -> Form | None:
    """The first part of a batch norm; other tuples are left to matrices."""
    return forms[0] if "batch_norm" in state.parents[0].call.op else None


def _is_bounded_part(call: Call) -> bool:
    """Whether it is a piece of a tensor that was cut, or the first result of an operation."""
    state = call.operand._state
    record = None if state is None else record_of(state.node.target)
    return record is None or record.cuts or call["b"] == 0


@op(
    "getitem",
    linear=Linear(_run, moves=True, when=_is_bounded_part),
    kernel=_getitem_form,
    reads=("b",),
    interval=lambda call: as_input(call) if _is_bounded_part(call) else EVERYTHING,
)
def _part(call: Call) -> Step:
    if not _is_bounded_part(call):
        call.refuse("only the first result of this operation has a bound", "Use that one alone")
    return Step((ONE,), REARRANGEMENT, roundings=0.0)


@op(
    "diagonal.default",
    "diagonal_copy.default",
    reads=("offset", "dim1", "dim2"),
    linear=_MOVED,
    interval=as_input,
    samples=lambda draw, shape: (
        (lambda x, y, k=draw.randrange(-1, 2): x.diagonal(k, 1, 2))
        if min(shape[:2]) > 1 and len(shape) > 1
        else None
    ),
)
def _diagonal(call: Call) -> Step:
    return _selection(call, "dim1", "dim2")


def _dims_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim, shift = place(draw, shape), draw.randrange(-3, 9)
    return draw.choice([lambda x, y: x.flip(dim), lambda x, y: x.roll(shift, dim)])


@op(
    "flip.default",
    "roll.default",
    reads=("dims", "shifts"),
    linear=_MOVED,
    interval=as_input,
    samples=_dims_samples,
)
def _flip(call: Call) -> Step:
    dims = call["dims"]
    if call.op == "roll" and not dims:
        call.feature_dims(None)  # the flattened tensor, batch included
    call.feature_dims(dims)
    return exact(1.0, "selection or order", COPY)


@op(
    "tril.default",
    "triu.default",
    reads=("diagonal",),
    linear=_MOVED,
    interval=_with_zero,
    samples=lambda draw, shape: (
        (lambda x, y, k=draw.randrange(-1, 2), f=draw.choice([torch.tril, torch.triu]): f(x, k))
        if len(shape) > 1
        else None
    ),
)
def _triangle(call: Call) -> Step:
    if len(call.operand.shape) < 2:
        call.refuse("dim 0 must stay the batch", "Take the triangle of feature dims")
    return exact(1.0, "selection", COPY)


# --- repetition ----------------------------------------------------------------------------------


def _repeat_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    times = [draw.choice([1, 1, 2]) for _ in shape]
    dim, count = place(draw, shape), draw.choice([1, 2])
    return draw.choice(
        [
            lambda x, y: x.repeat(1, *times),
            lambda x, y: x.unsqueeze(1).expand(-1, 2, *[-1] * len(shape)),
            lambda x, y: x.repeat_interleave(count, dim),
        ]
    )


@op(
    "expand.default",
    "repeat.default",
    "tile.default",
    "broadcast_to.default",
    "expand_copy.default",
    reads=("size", "repeats", "dims"),
    free=("implicit",),
    linear=_MOVED,
    interval=as_input,
    samples=_repeat_samples,
)
def _repeat(call: Call) -> Step:
    return exact(amplification(call), "repetition", COPY)


@op("expand_as.default", reads=("other",), interval=as_input)
def _expand_as(call: Call) -> Step:
    if not isinstance(call["self"], Operand):
        call.refuse("the tensor to repeat must be the first argument", "Rewrite the call")
    gain = Bound(amplification(call, call["self"]), kind="exact")
    return Step((gain, *(NOTHING,) * (len(call.operands) - 1)), "repetition", roundings=COPY)


@op(
    "repeat_interleave.self_int",
    reads=("repeats", "dim", "output_size"),
    interval=as_input,
)
def _interleave(call: Call) -> Step:
    if not isinstance(call["repeats"], int):
        call.refuse(
            "the number of repetitions must be a constant", "Use torch.repeat_interleave(x, n, dim)"
        )
    call.feature_dims(call["dim"])
    return exact(amplification(call), "repetition", COPY)


# --- joining -------------------------------------------------------------------------------------


def _join_linear(a: Values, absolute: bool) -> Any:
    parts = [zeros(part) for part in a["tensors"]]
    batch = max(len(part) for part in parts)
    parts = [p if len(p) == batch else p[:1].expand(batch, *p.shape[1:]) for p in parts]
    return a.target(parts, a["dim"])


def _join_form(state: Any, forms: list[Form]) -> Form | None:
    call = state.call
    parts = call["tensors"]
    if call["dim"] % (len(state.shape) + 1) != 1 or not all(isinstance(p, Operand) for p in parts):
        return None
    lookup = dict(zip(state.parents, forms, strict=True))
    both = aligned([lookup[p._state] for p in parts])
    if both is None:
        return None
    return replace(
        both[0],
        kernel=torch.cat([f.kernel for f in both]),
        majorant=torch.cat([f.majorant for f in both]),
        roundings=max(f.roundings for f in both),
    )


def _join_range(call: Call) -> Interval:
    found = [interval_of(x) for x in call.operands]
    if len(found) < len(call["tensors"]):
        return EVERYTHING
    return min(low for low, _ in found), max(high for _, high in found)


def _join_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = place(draw, shape)
    scale = draw.choice([1.0, -0.5, 3.0])
    return draw.choice(
        [
            lambda x, y: torch.cat([x, scale * y], dim),
            lambda x, y: torch.stack((x, scale * x), dim),
            lambda x, y: torch.cat([y, x, x.relu()], dim),
        ]
    )


@op(
    "cat.default",
    "stack.default",
    "concat.default",
    "concatenate.default",
    reads=("dim",),
    linear=Linear(_join_linear, moves=True, when=lambda call: True),
    kernel=_join_form,
    interval=_join_range,
    samples=_join_samples,
)
def _cat(call: Call) -> Step:
    dim = call["dim"]
    if not isinstance(call["tensors"], (tuple, list)) or not isinstance(dim, int):
        call.refuse("the tensors must be given as a list or tuple", "Write torch.cat([x, y], 1)")
    if dim % (len(call.output_shape) + 1) == 0:
        call.feature_dims(0)
    return Step((ONE,) * len(call.operands), "root of the sum of squares", "hypot", COPY)
