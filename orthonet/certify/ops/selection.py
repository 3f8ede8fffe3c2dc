"""Choices by constants: indices, masks, and entries that are written into a tensor."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify._rules import (
    COPY,
    BatchDependent,
    Call,
    Operand,
    Step,
    exact,
    scalar_rounding,
)
from orthonet.certify.ops.intervals import EVERYTHING, Interval, interval_of
from orthonet.certify.ops.registry import (
    ONE,
    Constant,
    Linear,
    Values,
    amplification,
    constant,
    each_repeated,
    op,
    plain,
    zeros,
)
from orthonet.linalg._rounding import mul_up, sqrt_up

__all__: list[str] = []

_NOTHING = Bound(0.0, kind="exact")


def _same_range(call: Call) -> Interval:
    return interval_of(call.operands[0])


# --- indices -------------------------------------------------------------------------------------


def _listed(a: Values, absolute: bool) -> Any:
    return a.target(*(plain(v) for v in a.args), **{k: plain(v) for k, v in a.kwargs.items()})


def _index_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    size = shape[dim]
    index = torch.tensor([draw.randrange(-size, size) for _ in range(draw.randrange(1, 6))])
    if draw.random() < 0.5:
        return lambda x, y: torch.index_select(x, dim + 1, index % size)
    return lambda x, y: x[(*(slice(None),) * (dim + 1), index)]


@op("index.Tensor", "index_select.default", reads=("indices", "dim", "index"),
    linear=Linear(_listed, moves=True), interval=_same_range, samples=_index_samples)  # fmt: skip
def _index(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    if call.op == "index_select":
        places = {call.feature_dims(call["dim"])[0]: call["index"]}
    else:
        listed = enumerate(call["indices"])
        places = {dim - 1: index for dim, index in listed if index is not None}
    ((where, index),) = places.items() if len(places) == 1 else ((-1, None),)
    if where < 0 or not isinstance(index, Tensor) or index.ndim > 1 or index.dtype != torch.int64:
        call.refuse(
            "an index must be one constant list of integers along a feature dimension",
            "Use slices, or torch.index_select with a constant index",
        )
    counts = (index.flatten() % max(1, call.operand.shape[where])).bincount(minlength=1)
    return exact(sqrt_up(int(counts.max())), "selection, repeated at most so often", COPY)


def _one_row(call: Call, name: str) -> Tensor:
    """A constant index that is the same for every sample, without the batch dim."""
    index: Any = call[name]
    if isinstance(index, BatchDependent) and index.rows:
        index = index.value[:1]
    if not isinstance(index, Tensor) or len(index) != 1:
        call.refuse(
            "an index must be constant, and the same for every sample",
            "Use torch.index_select with a constant index, or index.expand(len(x), ...)",
        )
    return index[0].cpu()


def _counted(call: Call, where: int, index: Tensor, size: int) -> int:
    """How often the most repeated entry is read or written."""
    index = index.movedim(where, 0)
    seen = torch.zeros(size, *index.shape[1:], dtype=torch.float64)
    seen.scatter_add_(0, index, torch.ones((), dtype=torch.float64).expand(index.shape))
    return int(seen.max()) if seen.numel() else 0


def _gather_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    index = (constant(draw, *shape).abs() * 1e6).long() % shape[dim]
    return lambda x, y: torch.gather(x, dim + 1, index.expand(x.shape[0], *shape))


@op("gather.default", reads=("dim", "index"), free=("sparse_grad",),
    linear=Linear(_listed, moves=True), interval=_same_range, samples=_gather_samples)  # fmt: skip
def _gather(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    (where,) = call.feature_dims(call["dim"])
    most = _counted(call, where, _one_row(call, "index"), call.operand.shape[where])
    return exact(sqrt_up(most), "selection, repeated at most so often", COPY)


# --- writing into a tensor -----------------------------------------------------------------------


def _written(a: Values, absolute: bool) -> Any:
    """The linear part of a tensor in which entries are replaced."""
    filled = {k: zeros(v) if k in ("self", "src") else plain(v) for k, v in a.items()}
    filled["src"] = filled["src"].to(torch.float64)
    filled["self"] = filled["self"].to(torch.float64)
    batch = max(len(filled[k]) for k in ("self", "src") if filled[k].ndim)
    if len(filled["self"]) != batch:
        filled["self"] = filled["self"][:1].expand(batch, *filled["self"].shape[1:])
    if len(filled["src"]) != batch:
        filled["src"] = filled["src"][:1].expand(batch, *filled["src"].shape[1:])
    return a.target(**filled)


def _write_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    index = draw.randrange(-shape[dim], shape[dim])
    before = (slice(None),) * (dim + 1)
    scale = draw.choice([0.0, -2.0])

    def put(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[(*before, index)] = scale * y[(*before, index)] if scale else 0.0
        return x

    def cut(x: Tensor, y: Tensor) -> Tensor:
        x = 1.0 * x
        x[(*before, slice(1, None))] = y[(*before, slice(1, None))].relu()
        return x

    return draw.choice([put, cut]) if shape[dim] > 1 else put


@op("slice_scatter.default", "select_scatter.default",
    reads=("src", "dim", "start", "end", "step", "index"),
    linear=Linear(_written, moves=True, when=lambda call: True),
    samples=_write_samples)  # fmt: skip
def _write(call: Call) -> Step:
    call.feature_dims(call["dim"])
    return Step((ONE,) * len(call.operands), "entries of one or the other", "hypot", COPY)


def _copied(a: Values, absolute: bool) -> Any:
    """The second argument in the shape of the first."""
    shape = a["self"].value.shape if isinstance(a["self"], Constant) else a["self"].shape
    return zeros(a["src"]).to(torch.float64).expand(shape)


@op("copy.default", reads=("src",), free=("non_blocking",),
    linear=Linear(_copied, moves=True, when=lambda call: True))  # fmt: skip
def _copy(call: Call) -> Step:
    """The second argument in the shape of the first."""
    gains = [_NOTHING] if isinstance(call["self"], Operand) else []
    if isinstance(call["src"], Operand):
        gains.append(Bound(amplification(call, call["src"]), kind="exact"))
    return Step(tuple(gains), "copy", roundings=scalar_rounding(call, call["src"]))


def _scatter_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    size = shape[dim]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(draw.randrange(999)))
    index = order.reshape(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()
    scale = draw.choice([1.0, -2.0])
    repeated = torch.tensor([draw.randrange(size) for _ in range(size)])
    return draw.choice([
        lambda x, y: x.scatter(dim + 1, index.expand(x.shape[0], *shape), y),
        lambda x, y: x.scatter(dim + 1, index[:1].expand(x.shape[0], *index[:1].shape), 3.0),
        lambda x, y: x.scatter_add(dim + 1, index.expand(x.shape[0], *shape), y),
        lambda x, y: x.index_add(dim + 1, repeated, y, alpha=scale),
    ])  # fmt: skip


@op("scatter.src", "scatter.value", reads=("dim", "index", "src", "value"),
    samples=_scatter_samples)  # fmt: skip
def _scatter(call: Call) -> Step:
    (where,) = call.feature_dims(call["dim"])
    index, size = _one_row(call, "index"), call.output_shape[where]
    if "src" in call.arguments and _counted(call, where, index, size) > 1:
        call.refuse("no entry may be written twice", "The order of writing is not defined")
    rounding = scalar_rounding(call, call.given("value"))
    return Step((ONE,) * len(call.operands), "entries of one or the other", "hypot", rounding)


@op("scatter_add.default", reads=("dim", "index", "src"))
def _scatter_add(call: Call) -> Step:
    (where,) = call.feature_dims(call["dim"])
    most = _counted(call, where, _one_row(call, "index"), call.output_shape[where])
    return _sum_into(call, "src", most, 1.0)


@op("index_add.default", reads=("dim", "index", "source", "alpha"))
def _index_add(call: Call) -> Step:
    (where,) = call.feature_dims(call["dim"])
    index = call["index"]
    if not isinstance(index, Tensor):
        call.refuse("an index must be a constant of the model", "Store it in a buffer")
    most = int((index.cpu() % call.output_shape[where]).bincount(minlength=1).max())
    return _sum_into(call, "source", most, abs(call.number("alpha")))


def _sum_into(call: Call, name: str, most: int, alpha: float) -> Step:
    """A sum of a tensor and of entries that are added to it, `most` at most to one."""
    gains = []
    if isinstance(call["self"], Operand):
        gains.append(ONE)
    if isinstance(call[name], Operand):
        gains.append(Bound(mul_up(alpha, sqrt_up(most)), kind="exact"))
    return Step(tuple(gains), "sum of norms")


# --- choices by a constant mask ------------------------------------------------------------------


def _choose_linear(a: Values, absolute: bool) -> Any:
    if "mask" in a:
        mask, first, second = a["mask"], a["value"], a["self"]
    else:
        mask, first, second = a["condition"], a["self"], a["other"]
    first, second = (zeros(v) if not isinstance(v, Tensor) else v for v in (first, second))
    return torch.where(plain(mask), first, second)


def _either_range(call: Call) -> Interval:
    found = [interval_of(x) for x in call.operands]
    for value in call.arguments.values():
        if isinstance(value, Tensor) and value.dtype.is_floating_point and value.numel():
            found.append((float(value.min()), float(value.max())))
        elif isinstance(value, (int, float)):
            found.append((float(value), float(value)))
        elif isinstance(value, BatchDependent):
            return EVERYTHING
    return min(low for low, _ in found), max(high for _, high in found)


def _choose_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    mask = constant(draw, *shape) > 0
    other = constant(draw, *shape[-1:])
    return draw.choice([
        lambda x, y: torch.where(mask, x, y), lambda x, y: torch.where(mask, other, x),
        lambda x, y: x.masked_fill(mask, 2.0), lambda x, y: torch.where(mask, x, 0.0),
    ])  # fmt: skip


@op("where.self", "where.ScalarOther", "where.ScalarSelf", "masked_fill.Scalar",
    "masked_fill.Tensor", reads=("condition", "self", "mask", "value", "other"),
    linear=Linear(_choose_linear, moves=True, when=lambda call: True), interval=_either_range,
    samples=_choose_samples)  # fmt: skip
def _choose(call: Call) -> Step:
    """Entries of one operand or the other, by a mask that does not see the input."""
    names = ("self", "value") if "mask" in call.arguments else ("self", "other")
    mask = call.given("mask", call.given("condition"))
    if isinstance(mask, Operand):
        call.refuse(
            "the mask of a choice must be a constant",
            "A choice by value may jump: write it with relu, abs, maximum or minimum",
        )
    rounding = scalar_rounding(call, *(call[name] for name in names))
    return Step(each_repeated(call), "choice by a constant mask", "hypot", rounding)
