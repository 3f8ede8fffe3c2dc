"""Complex values of a graph, written as real tensors whose last dim holds both parts.

`torch.fft`, products with complex constants, moduli, and what moves entries around become real
operations, which have rules. An operation that is not listed here stays complex and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from orthonet._torch import composite_of, overload_name
from orthonet.certify.graph.decompose import FAILURES, mark_written, traced, write_out
from orthonet.certify.ops.fourier import as_pairs, fourier, half_to_real, times

__all__ = ["STUCK", "write_pairs"]

STUCK = "orthonet_complex"
"""Of nodes that take complex values and cannot be written in reals."""

_TRANSFORMS = ("fft_", "stft", "istft")
_COPIES = {"_to_copy", "to", "clone", "contiguous"}
_aten = torch.ops.aten


def write_pairs(graph: fx.Graph, moving: Sequence[fx.Node]) -> bool:
    """Replace complex values that depend on the input by pairs of reals, as far as they are known.

    Return whether there are any.

    Args:
        graph: Changed in place.
        moving: Its nodes that depend on the input, in order.
    """
    order = list(moving)
    if not any(_is_complex(node) for node in order):
        return False
    for node in list(order):
        if _name(node).startswith(_TRANSFORMS):
            order[order.index(node) : order.index(node) + 1] = _expanded(graph, node)
    pairs: dict[fx.Node, fx.Node] = {}
    found = set(order)
    for node in order:
        reads = [n for n in node.all_input_nodes if n in found]
        if not _is_complex(node) and not any(n in pairs for n in reads):
            continue
        name = _name(node).partition(".")[0]
        if any(_is_complex(n) and n not in pairs for n in reads):
            continue
        result, write = None, _WRITERS.get(name)
        if write is not None and (not node.kwargs or name in _COPIES):  # no writer reads others
            with suppress(*FAILURES):  # arguments that its operation cannot take in reals
                result = write(_Writer(graph, node, pairs, found))
        if result is None:
            node.meta[STUCK] = True
            continue
        if _is_complex(node):
            pairs[node] = result
        else:
            node.replace_all_uses_with(result)
    for node in reversed(order):
        if not node.users:
            graph.erase_node(node)
    return True


def _expanded(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The parts of a composite transform in its place; the node itself where it has none."""
    inner = traced(node, composite_of(node.target), {})
    if inner is None:
        return [node]
    return write_out(graph, node, inner)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def _name(node: fx.Node) -> str:
    return overload_name(node.target) or ""


def _mode(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "fake_mode", None)


def _half_shape(pairs: Tensor, dim: int, scale: int, size: int) -> Tensor:
    shape = list(pairs.shape[:-1])
    shape[dim] = size
    return pairs.new_empty(shape)


def _padded_shape(pairs: Tensor, pads: Sequence[int], value: float) -> Tensor:
    shape = list(pairs.shape)
    for i in range(0, len(pads), 2):
        shape[-1 - i // 2] = shape[-1 - i // 2] + pads[i] + pads[i + 1]
    return pairs.new_empty(shape)


# Traces of these would take the size of the batch for a constant.
_SHAPES: dict[Any, Callable[..., Tensor]] = {
    fourier: lambda pairs, *rest: torch.empty_like(pairs),
    half_to_real: _half_shape,
    torch.ops.aten.constant_pad_nd.default: _padded_shape,
}


class _Writer:
    """Writes one node in reals.

    Attributes:
        node: The node.
        args: Its arguments by position.
        rank: The dims of its first tensor, as torch counts them.
    """

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        pairs: dict[fx.Node, fx.Node],
        moving: set[fx.Node],
    ) -> None:
        self.graph, self.node, self.pairs, self.moving = graph, node, pairs, moving
        self.args: list[Any] = list(node.args)
        first = node.all_input_nodes[0].meta["val"]
        self.rank = first.ndim

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in front of this one, with the value that its trace would have."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        values, options = map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = next(filter(None, map(_mode, self.node.all_input_nodes)), None)
        run: Callable[..., Any] = _SHAPES.get(target) or target
        with mode or nullcontext(), torch.no_grad():
            new.meta["val"] = run(*values, **options)
        mark_written(new, self.node)
        return new

    def pair(self, value: Any) -> Any:
        """The pairs of a complex value, of a real one with a zero, or of a number."""
        if not isinstance(value, fx.Node):
            value = complex(value)
            return self.emit(_constant_pair, value.real, value.imag, self.dtype)
        if value in self.pairs:
            return self.pairs[value]
        if _is_complex(value):
            return self.emit(_aten.view_as_real.default, value)
        return self.emit(as_pairs, value)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts."""
        return torch.float64 if self._value().dtype is torch.complex128 else torch.float32

    def _value(self) -> Tensor:
        found = [n.meta["val"] for n in (self.node, *self.node.all_input_nodes)]
        return next(v for v in found if v.is_complex())

    def front(self, dim: int, rank: int | None = None) -> int:
        """A dim counted from the front of the complex tensor."""
        return dim % (self.rank if rank is None else rank)

    def dims(self, dims: Any) -> list[int]:
        """Several dims, counted from the front; all for None or none."""
        given = [dims] if isinstance(dims, int) else list(dims or range(self.rank))
        return [self.front(d) for d in given]


_WRITERS: dict[str, Callable[[_Writer], fx.Node | None]] = {}


def _writes(*names: str) -> Callable[[Any], Any]:
    def decorate(write: Any) -> Any:
        for name in names:
            _WRITERS[name] = write
        return write

    return decorate


def _constant_pair(real: float, imaginary: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([real, imaginary], dtype=dtype)


# --- transforms ----------------------------------------------------------------------------------


@_writes("_fft_c2c")
def _c2c(w: _Writer) -> fx.Node | None:
    x, dims, scale, forward = w.args
    return w.emit(fourier, w.pair(x), w.dims(dims), scale, not forward) if dims else w.pair(x)


@_writes("_fft_r2c")
def _r2c(w: _Writer) -> fx.Node | None:
    x, dims, scale, onesided = w.args
    places = w.dims(dims)
    whole = w.emit(fourier, w.pair(x), places, scale, False)
    if not onesided:
        return whole
    count = x.meta["val"].shape[places[-1]] // 2 + 1
    return w.emit(_aten.slice.Tensor, whole, places[-1], 0, count, 1)


@_writes("_fft_c2r")
def _c2r(w: _Writer) -> fx.Node | None:
    x, dims, scale, size = w.args
    places, pair = w.dims(dims), w.pair(x)
    if len(places) > 1:
        pair = w.emit(fourier, pair, places[:-1], scale, True)
    return w.emit(half_to_real, pair, places[-1], scale, size)


# --- both parts ----------------------------------------------------------------------------------


@_writes("view_as_real")
def _as_real(w: _Writer) -> fx.Node | None:
    return w.pair(w.args[0])


@_writes("view_as_complex")
def _as_complex(w: _Writer) -> fx.Node | None:
    return w.args[0]


@_writes("complex")
def _both(w: _Writer) -> fx.Node | None:
    real, imaginary = w.args
    if real.meta["val"].shape != imaginary.meta["val"].shape:
        return None
    return w.emit(_aten.stack.default, [real, imaginary], -1)


@_writes("real")
def _real(w: _Writer) -> fx.Node | None:
    return w.emit(_aten.select.int, w.pair(w.args[0]), w.rank, 0)


@_writes("imag")
def _imaginary(w: _Writer) -> fx.Node | None:
    return w.emit(_aten.select.int, w.pair(w.args[0]), w.rank, 1)


@_writes("abs")
def _modulus(w: _Writer) -> fx.Node | None:
    return w.emit(_aten.linalg_vector_norm.default, w.pair(w.args[0]), 2, [w.rank])


@_writes("linalg_vector_norm")
def _norm(w: _Writer) -> fx.Node | None:
    x, order, dims, *keep = (*w.args, 2, None)[: max(3, len(w.args))]
    if order != 2 or any(keep):
        return None
    return w.emit(_aten.linalg_vector_norm.default, w.pair(x), 2, [*w.dims(dims), w.rank])


@_writes("_conj", "_conj_physical", "conj_physical", "conj")
def _conjugate(w: _Writer) -> fx.Node | None:
    signs = w.emit(_constant_pair, 1.0, -1.0, w.dtype)
    return w.emit(_aten.mul.Tensor, w.pair(w.args[0]), signs)


@_writes("_to_copy", "to")
def _cast(w: _Writer) -> fx.Node | None:
    """To complex from real, or to the same dtype: fewer bits would jump."""
    value = w.args[0].meta["val"]
    wanted = (
        torch.complex128 if value.dtype in (torch.float64, torch.complex128) else torch.complex64
    )
    return w.pair(w.args[0]) if w.node.meta["val"].dtype is wanted else None


@_writes("resolve_conj", "resolve_neg", "clone", "alias", "contiguous", "detach", "lift_fresh")
def _same(w: _Writer) -> fx.Node | None:
    return w.pair(w.args[0])


@_writes("sym_size")
def _size(w: _Writer) -> fx.Node | None:
    return w.emit(_aten.sym_size.int, w.pair(w.args[0]), w.front(w.args[1]))


# --- arithmetic ----------------------------------------------------------------------------------


@_writes("neg")
def _negative(w: _Writer) -> fx.Node | None:
    return w.emit(_aten.neg.default, w.pair(w.args[0]))


@_writes("add", "sub")
def _sum(w: _Writer) -> fx.Node | None:
    if len(w.args) > 2:
        return None
    a, b = (w.pair(v) for v in w.args)
    target = _aten.add.Tensor if _name(w.node).startswith("add") else _aten.sub.Tensor
    return w.emit(target, a, b)


@_writes("mul")
def _product(w: _Writer) -> fx.Node | None:
    x, c = w.args
    if x not in w.pairs:
        x, c = c, x
    if isinstance(c, fx.Node) and c in w.moving and x in w.moving:
        return None  # a product of two values of the input
    if isinstance(c, (int, float)):
        return w.emit(_aten.mul.Tensor, w.pair(x), c)
    if _is_complex(c) or isinstance(c, complex):
        return w.emit(times, w.pair(x), w.pair(c))
    return w.emit(_aten.mul.Tensor, w.pair(x), w.emit(_aten.unsqueeze.default, c, -1))


@_writes("div")
def _quotient(w: _Writer) -> fx.Node | None:
    x, c = w.args
    if x not in w.pairs or _is_complex(c) or isinstance(c, complex):
        return None
    if isinstance(c, fx.Node):
        if c in w.moving:
            return None
        c = w.emit(_aten.unsqueeze.default, c, -1)
    return w.emit(_aten.div.Tensor, w.pair(x), c)


@_writes("einsum")
def _einsum(w: _Writer) -> fx.Node | None:
    """A complex factor is a block [[a, -b], [b, a]] for each of its entries."""
    equation, tensors = str(w.args[0]).replace(" ", ""), list(w.args[1])
    left, arrow, out = equation.partition("->")
    names = left.split(",")
    free = [c for c in "PQRSTUVWXYZ" if c not in equation]
    if not arrow or "." in equation or len(tensors) != 2 or len(w.args) > 2:
        return None
    where = [i for i, t in enumerate(tensors) if t in w.pairs]
    if len(where) != 1 or tensors[1 - where[0]] in w.moving:
        return None
    x, c = where[0], 1 - where[0]
    q, p = free[:2]
    block = w.emit(_aten.view_as_real.default, tensors[c]) if _is_complex(tensors[c]) else None
    if block is None:
        names[x], out = names[x] + p, out + p
        tensors[x] = w.pair(tensors[x])
    else:
        a, b = (w.emit(_aten.select.int, block, -1, i) for i in range(2))
        minus = w.emit(_aten.neg.default, b)
        rows = [w.emit(_aten.stack.default, row, -1) for row in ([a, minus], [b, a])]
        tensors[c] = w.emit(_aten.stack.default, rows, -2)
        tensors[x] = w.pair(tensors[x])
        names[x], names[c], out = names[x] + p, names[c] + q + p, out + q
    return w.emit(_aten.einsum.default, f"{','.join(names)}->{out}", tensors)


# --- entries moved around ------------------------------------------------------------------------


@_writes("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(w: _Writer) -> fx.Node | None:
    shape = w.node.meta["val"].shape
    if any(not isinstance(size, int) for size in shape[1:]):
        return None
    if (
        _name(w.node).startswith(("squeeze", "unsqueeze"))
        and w.front(w.args[1], len(shape) if "unsqueeze" in _name(w.node) else None) == 0
    ):
        return None  # of the batch
    return w.emit(_aten.reshape.default, w.pair(w.args[0]), [-1, *shape[1:], 2])


@_writes("slice", "select", "index_select", "narrow")
def _along(w: _Writer) -> fx.Node | None:
    """The second argument is a dim."""
    x, dim, *rest = (*w.args, 0)[: max(2, len(w.args))]
    if len(w.args) == 1:
        return w.pair(x)
    return w.emit(w.node.target, w.pair(x), w.front(dim), *rest)


@_writes("index")
def _indexed(w: _Writer) -> fx.Node | None:
    return w.emit(w.node.target, w.pair(w.args[0]), *w.args[1:])


@_writes("masked_fill", "where")
def _masked(w: _Writer) -> fx.Node | None:
    """By a constant mask."""
    filled = _name(w.node).startswith("masked_fill")
    mask, x, y = (w.args[1], w.args[2], w.args[0]) if filled else w.args
    if not isinstance(mask, fx.Node) or mask in w.moving:
        return None
    mask = w.emit(_aten.unsqueeze.default, mask, -1)
    return w.emit(_aten.where.self, mask, w.pair(x), w.pair(y))


@_writes("fill")
def _filled(w: _Writer) -> fx.Node | None:
    zeros = w.emit(_aten.zeros_like.default, w.pair(w.args[0]))
    return w.emit(_aten.add.Tensor, zeros, w.pair(w.args[1]))


@_writes("expand")
def _expanded_pairs(w: _Writer) -> fx.Node | None:
    shape = w.node.meta["val"].shape
    if len(shape) != w.rank:
        return None
    return w.emit(_aten.expand.default, w.pair(w.args[0]), [-1, *shape[1:], 2])


@_writes("permute", "flip")
def _permuted(w: _Writer) -> fx.Node | None:
    dims = w.dims(w.args[1])
    kept = [w.rank] if _name(w.node).startswith("permute") else []
    return w.emit(w.node.target, w.pair(w.args[0]), [*dims, *kept])


@_writes("transpose", "swapaxes")
def _transposed(w: _Writer) -> fx.Node | None:
    a, b = w.args[1:3]
    return w.emit(_aten.transpose.int, w.pair(w.args[0]), w.front(a), w.front(b))


@_writes("movedim")
def _moved(w: _Writer) -> fx.Node | None:
    a, b = (w.dims(d) for d in w.args[1:3])
    return w.emit(_aten.movedim.intlist, w.pair(w.args[0]), a, b)


@_writes("roll")
def _rolled(w: _Writer) -> fx.Node | None:
    x, shifts, dims = (*w.args, None)[:3]
    return w.emit(_aten.roll.default, w.pair(x), shifts, w.dims(dims)) if dims else None


@_writes("constant_pad_nd", "pad")
def _padded(w: _Writer) -> fx.Node | None:
    pads, rest = w.args[1], w.args[2:]
    if _name(w.node).startswith("pad") and rest and rest[0] != "constant":
        return None
    value = rest[-1] if rest else 0
    if value not in (0, 0.0, None):
        return None
    pads = list(pads)
    while pads and not any(pads[-2:]):  # of dims that keep their size, the batch among them
        del pads[-2:]
    if len(pads) >= 2 * w.rank:
        return None
    return w.emit(_aten.constant_pad_nd.default, w.pair(w.args[0]), [0, 0, *pads], 0.0)


@_writes("cat", "stack")
def _joined(w: _Writer) -> fx.Node | None:
    tensors, dim = w.args[0], (*w.args, 0)[1]
    rank = w.node.meta["val"].ndim
    return w.emit(w.node.target, [w.pair(t) for t in tensors], w.front(dim, rank))


@_writes("sum", "mean")
def _reduced(w: _Writer) -> fx.Node | None:
    if _name(w.node).partition(".")[2] not in ("dim_IntList", "dim"):
        return None
    x, dims, *keep = w.args
    return w.emit(w.node.target, w.pair(x), w.dims(dims), *keep)


@_writes("slice_scatter", "select_scatter")
def _written(w: _Writer) -> fx.Node | None:
    x, y, dim, *rest = (*w.args, 0)[: max(3, len(w.args))]
    rank = w.node.meta["val"].ndim
    return w.emit(w.node.target, w.pair(x), w.pair(y), w.front(dim, rank), *rest)


@_writes("copy")
def _copied(w: _Writer) -> fx.Node | None:
    x, y = w.args[:2]
    same = x.meta["val"].shape == y.meta["val"].shape
    return w.pair(y) if same and _is_complex(y) else None
