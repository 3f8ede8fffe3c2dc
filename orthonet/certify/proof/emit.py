"""The nodes of the file for each operation of a graph that the checker knows.

An emitter gets the writer and the state of a node, and returns the index of the node of the file
that stands for it, or None if the checker has no such operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthonet.certify.graph.program import called
from orthonet.certify.ops import registry
from orthonet.certify.proof.norms import square_gain
from orthonet.certify.rules import BatchDependent, Operand
from orthonet.certify.walk.pieces import sorted_pair
from orthonet.linalg.bounds.rounding import up

if TYPE_CHECKING:
    from orthonet.certify.proof.nodes import Nodes
    from orthonet.certify.walk.state import State

__all__ = ["EMITTERS", "constant_of", "dim_of", "each", "emits", "padding_of", "single"]

Emitter = Callable[["Nodes", "State"], "int | None"]
EMITTERS: dict[str, Emitter] = {}


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register an emitter for operations and modules of these names."""

    def decorate(emitter: Emitter) -> Emitter:
        for name in names:
            EMITTERS[name] = emitter
        return emitter

    return decorate


def each(value: Any, dims: int) -> list[int]:
    """An integer for each dim, as torch takes one or several."""
    return list(registry.each(value, dims))


def dim_of(dim: int, state: State) -> int | None:
    """A dim of the operand as a dim of its samples; None for the batch."""
    rank = len(state.call.operands[0].shape) + 1
    return dim % rank - 1 if dim % rank else None


def single(state: State) -> bool:
    """Whether the only operand is the first argument."""
    args = state.call.args
    return len(state.call.operands) == 1 and bool(args) and isinstance(args[0], Operand)


def constant_of(value: Any, rank: int) -> Tensor | None:
    """A constant that is the same for every sample, without its batch dim, or None."""
    if isinstance(value, BatchDependent):
        if not value.rows:
            return None
        value = value.value[:1]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if value.ndim == rank + 1:
        if value.shape[0] != 1:
            return None
        value = value[0]
    return value if value.ndim <= rank else None


def _same_shape(constant: Tensor, shape: Sequence[int]) -> bool:
    return torch.broadcast_shapes(constant.shape, shape) == tuple(shape)


# --- moves ---------------------------------------------------------------------------------------


@emits(
    "reshape",
    "view",
    "flatten",
    "ravel",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
)
def _reshape(writer: Nodes, state: State) -> int | None:
    return writer.reshape(writer.index(state.parents[0]), state.shape)


@emits(
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh_copy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "positive",
    "pos",
    "float",
    "double",
    "to",
    "type_as",
)
def _same(writer: Nodes, state: State) -> int | None:
    return writer.index(state.parents[0])


@emits("permute", "transpose", "movedim", "t", "mT")
def _permute(writer: Nodes, state: State) -> int | None:
    rank = len(state.call.operand.shape) + 1
    order = torch.empty(tuple(range(1, rank + 1)), device="meta")
    fill = tuple(order if isinstance(a, Operand) else a for a in state.call.args)
    try:
        moved = called(state.node)(*fill, **state.call.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    dims = [n - 2 for n in moved.shape]  # sizes name the dims
    return writer.node("permute", state, dims=dims[1:], gain=1.0) if dims[0] < 0 else None


@emits("flip")
def _flip(writer: Nodes, state: State) -> int | None:
    dims = state.call.get(1, "dims", ())
    found = [dim_of(d, state) for d in ((dims,) if isinstance(dims, int) else dims)]
    place = writer.index(state.parents[0])
    for dim in found:
        if dim is None:
            return None
        place = writer.add("flip", [place], state, dim=dim, gain=1.0)
    return place


@emits("roll")
def _roll(writer: Nodes, state: State) -> int | None:
    shifts, dims = (state.call.get(i, n, ()) for i, n in ((1, "shifts"), (2, "dims")))
    shifts, dims = (((v,) if isinstance(v, int) else tuple(v)) for v in (shifts, dims))
    place = writer.index(state.parents[0])
    if len(shifts) != len(dims) or not dims:
        return None
    for shift, dim in zip(shifts, (dim_of(d, state) for d in dims), strict=True):
        if dim is None:
            return None
        size = state.shape[dim]
        place = writer.add("roll", [place], state, dim=dim, shift=shift % size, gain=1.0)
    return place


@emits("slice", "narrow")
def _slice(writer: Nodes, state: State) -> int | None:
    call = state.call
    dim, size = dim_of(call.get(1, "dim", 0), state), 0
    if dim is None:
        return None
    size = call.operand.shape[dim]
    start = call.get(2, "start", 0) or 0
    if call.op == "narrow":
        start, stop, step = start % size, start % size + call.get(3, "length", 0), 1
    else:
        stop = call.get(3, "end", None)
        start, stop, step = slice(start, stop, call.get(4, "step", 1)).indices(size)
    return writer.part(state, writer.index(state.parents[0]), dim, start, stop, step)


@emits("select")
def _select(writer: Nodes, state: State) -> int | None:
    dim = dim_of(state.call.get(1, "dim", 0), state)
    if dim is None:
        return None
    at = state.call.get(2, "index", 0) % state.call.operand.shape[dim]
    part = writer.part(state, writer.index(state.parents[0]), dim, at, at + 1)
    return None if part is None else writer.reshape(part, state.shape)


@emits("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def _split(writer: Nodes, state: State) -> int | None:
    """The part that the state, one of those of a split, takes."""
    whole = state.parents[0]
    call = whole.call
    dim = dim_of(call.get(1 if call.op == "unbind" else 2, "dim", 0), whole)
    place = state.node.args[1]
    if dim is None or not isinstance(place, int):
        return None
    values = whole.node.meta["val"]
    sizes = [1 if call.op == "unbind" else int(v.shape[dim + 1]) for v in values]
    if sum(sizes) != call.operand.shape[dim]:
        return None
    begin = sum(sizes[:place])
    part = writer.part(state, writer.index(whole.parents[0]), dim, begin, begin + sizes[place])
    if call.op != "unbind" or part is None:
        return part
    return writer.reshape(part, state.shape)


@emits("pad", "constant_pad_nd")
def _pad(writer: Nodes, state: State) -> int | None:
    amounts = padding_of(state)
    if amounts is None:
        return None
    mode = state.call.get(2, "mode", "constant") if state.call.op == "pad" else "constant"
    names = {"constant": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    value = state.call.get(3 if state.call.op == "pad" else 2, "value", None)
    options = {"value": float(value or 0.0).hex()} if mode == "constant" else {}
    gain = writer.gain(state) if mode != "constant" else 1.0
    return writer.node("pad", state, amounts=amounts, mode=names[mode], gain=gain, **options)


def padding_of(state: State) -> list[list[int]] | None:
    """What is put before and behind each dim of a sample, if nothing is taken away."""
    given = list(state.call.get(1, "pad", ()))
    rank = len(state.call.operand.shape)
    pads = [[given[i], given[i + 1]] for i in range(0, len(given), 2)][::-1]
    if len(pads) > rank or any(not isinstance(n, int) or n < 0 for n in given):
        return None
    return [[0, 0]] * (rank - len(pads)) + pads


def _sorted_halves(writer: Nodes, parts: list[State], dim: int) -> tuple[State, bool] | None:
    """The tensor whose halves along a dim are sorted in pairs, and if the larger come first."""
    if len(parts) != 2:
        return None
    down = parts[0].call.op == "maximum"
    pair = sorted_pair(*(parts if down else parts[::-1]))
    found = [] if pair is None else [writer.walker.pieces.of(s) for s in pair]
    known = [c for c in found if c is not None and c.whole is not None and c.dim == dim]
    if len(known) != 2 or known[0].whole is not known[1].whole:
        return None
    whole = known[0].whole
    size = whole.shape[dim - 1]
    both = [c.parts for c in known]
    halves = [{(0, size // 2): 1.0}, {(size // 2, size): 1.0}]
    return (whole, down) if size % 2 == 0 and all(h in both for h in halves) else None


@emits("cat", "stack")
def _join(writer: Nodes, state: State) -> int | None:
    parts = state.call.args[0]
    if not all(isinstance(p, Operand) for p in parts):
        return None
    dim = state.call.get(1, "dim", 0) % (len(state.shape) + 1) - 1
    if dim < 0:
        return None
    found = _sorted_halves(writer, [p._state for p in parts], dim + 1)
    if found is not None and found[0].shape == state.shape:
        entries = {"dim": dim, "size": 2, "halves": True, "descending": found[1], "gain": 1.0}
        return writer.add("sort", [writer.index(found[0])], state, **entries)
    places = [writer.index(p._state) for p in parts]
    if state.call.op == "stack":
        shape = list(state.shape)
        shape[dim] = 1
        places = [writer.reshape(p, shape) for p in places]
    return writer.add("concatenate", places, state, dim=dim)


@emits("pixel_unshuffle", "pixel_shuffle")
def _pixels(writer: Nodes, state: State) -> int | None:
    r, inside = state.call.get(1, "factor", 1), state.call.operand.shape
    if len(inside) != 3:
        return None
    (c, h, w), place = inside, writer.index(state.parents[0])
    if state.call.op == "pixel_unshuffle":
        steps = ((c, h // r, r, w // r, r), [0, 2, 4, 1, 3])
    else:
        steps = ((c // r**2, r, r, h, w), [0, 3, 1, 4, 2])
    place = writer.reshape(place, steps[0])
    moved = [steps[0][d] for d in steps[1]]
    place = writer.add("permute", [place], state, dims=steps[1], gain=1.0, shape_of=moved)
    return writer.reshape(place, state.shape)


# --- sums and factors ----------------------------------------------------------------------------


@emits("add", "sub", "rsub")
def _add(writer: Nodes, state: State) -> int | None:
    call = state.call
    alpha = call.get(2, "alpha", 1)
    if len(call.args) < 2 or not isinstance(alpha, (int, float)):
        return None
    signs = {"add": (1.0, float(alpha)), "sub": (1.0, -float(alpha))}.get(call.op)
    signs = signs or (-float(alpha), 1.0)
    terms = list(zip(call.args[:2], signs, strict=True))
    moving = [(x, f) for x, f in terms if isinstance(x, Operand)]
    if any(x.shape != state.shape for x, _ in moving):
        return None
    if len(moving) == 2:
        places = [writer.index(x._state) for x, _ in moving]
        return writer.add("add", places, state, factors=[f.hex() for _, f in moving])
    ((operand, factor),) = moving
    ((other, sign),) = [(x, f) for x, f in terms if not isinstance(x, Operand)]
    offset = constant_of(other, len(state.shape))
    if offset is None or not _same_shape(offset, state.shape):
        return None
    place = writer.scale(writer.index(operand._state), factor, state)
    offset = offset if sign == 1.0 else offset.double() * sign
    return writer.add(
        "shift", [place], state, offset=writer.constant(offset, state, "offset"), gain=1.0
    )


@emits("neg")
def _neg(writer: Nodes, state: State) -> int | None:
    return writer.scale(writer.index(state.parents[0]), -1.0, state)


@emits("mul", "div")
def _times(writer: Nodes, state: State) -> int | None:
    call = state.call
    args = call.args[:2]
    if call.op == "mul" and len(args) == 2 and not isinstance(args[0], Operand):
        args = args[::-1]
    if len(call.operands) != 1 or len(args) != 2 or call.kwargs.get("rounding_mode") is not None:
        return None
    if not isinstance(args[0], Operand) or args[0].shape != state.shape:
        return None
    place = writer.index(state.parents[0])
    if call.op == "mul" and isinstance(args[1], (int, float)):
        return writer.scale(place, float(args[1]), state)
    factors = constant_of(args[1], len(state.shape))
    if factors is None or not _same_shape(factors, state.shape):
        return None
    sizes = factors.double().abs()
    largest = float(sizes.max()) if call.op == "mul" else up(1.0 / float(sizes.min()))
    return writer.add(
        "diagonal",
        [place],
        state,
        factors=writer.constant(factors, state, "factors"),
        divide=call.op == "div",
        gain=largest,
    )


@emits("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(writer: Nodes, state: State) -> int | None:
    call = state.call
    weight, bias, mean, variance = (call.get(i, "", None) for i in (1, 2, 3, 4))
    eps = call.get(7 if call.op == "batch_norm" else 6, "eps", None)
    if not single(state) or not isinstance(mean, Tensor) or not isinstance(eps, float):
        return None
    names = {"weight": weight, "bias": bias, "mean": mean, "variance": variance}
    entries = {
        n: writer.constant(v, state, _STATS.get(n, n)) for n, v in names.items() if v is not None
    }
    scale = 1.0 if weight is None else weight.double().abs()
    square = float((scale**2 / (variance.double() + eps)).max())
    gain = square_gain(square)
    return writer.node("batch_norm", state, eps=eps.hex(), gain=gain, **entries)


_STATS = {"mean": "running_mean", "variance": "running_var"}


@emits("sum", "mean")
def _reduce(writer: Nodes, state: State) -> int | None:
    dims = state.call.get(1, "dim", None)
    if not isinstance(dims, (int, tuple)) or dims == ():
        return None
    places = [dim_of(d, state) for d in each(dims, 1)]
    if any(d is None for d in places):
        return None
    found = sorted(d for d in places if d is not None)
    count = math.prod(state.call.operand.shape[d] for d in found)
    total = state.call.op == "sum"
    gain = square_gain(count if total else 1.0 / count)
    inside = state.call.operand.shape
    left = [n for d, n in enumerate(inside) if d not in found]
    place = writer.node("mean", state, dims=found, sum=total, gain=gain, shape_of=left)
    return writer.reshape(place, state.shape)
