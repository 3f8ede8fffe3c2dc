"""Choices by constants: indices, masks, and entries that are written into a tensor."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.ops.registry import (
    EVERYTHING,
    NOTHING,
    ONE,
    Constant,
    Interval,
    Linear,
    Values,
    amplification,
    as_input,
    constant,
    each_repeated,
    interval_of,
    op,
    plain,
    zeros,
)
from orthonet.certify.rules import (
    COPY,
    BatchDependent,
    Call,
    Operand,
    Step,
    exact,
    scalar_rounding,
)
from orthonet.linalg.bounds.rounding import mul_up, sqrt_up

__all__: list[str] = []


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


def _mask_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    places = torch.tensor([draw.random() < 0.5 for _ in range(math.prod(shape))] or [True])
    mask = places.reshape(shape) if shape else places
    mask.view(-1)[0] = True
    return lambda x, y: x[:, mask]


@op(
    "index_select.default",
    reads=("dim", "index"),
    linear=Linear(_listed, moves=True),
    interval=as_input,
    samples=_index_samples,
)
def _index_select(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    (where,), index = call.feature_dims(call["dim"]), call["index"]
    if not isinstance(index, Tensor):
        call.refuse("an index must be a constant list of integers", "Use slices")
    return _repeated(index % max(1, call.operand.shape[where]))


@op(
    "index.Tensor",
    reads=("indices",),
    linear=Linear(_listed, moves=True),
    interval=as_input,
    samples=_mask_samples,
)
def _index(call: Call) -> Step:
    return _repeated(_places(call, call.operand.shape))


def _repeated(places: Tensor) -> Step:
    """The constant of a copy of entries at these places."""
    most = int(places.flatten().bincount(minlength=1).max())
    return exact(sqrt_up(most), "selection, repeated at most so often", COPY)


def _places(call: Call, shape: tuple[int, ...]) -> Tensor:
    """Which entries of a sample the constant indices and masks of a call name, in their order.

    Found by indexing numbers in place of entries. Every sample must keep its own place.
    """
    indices: Any = call["indices"]
    wanted = "indices must be constant integers or masks of feature dimensions"
    advice = "Use slices, masks of the features, or torch.index_select with a constant index"
    kinds = (torch.int64, torch.int32, torch.bool)
    if any(i is not None and not (isinstance(i, Tensor) and i.dtype in kinds) for i in indices):
        call.refuse(wanted, advice)
    at = tuple(slice(None) if i is None else i.cpu() for i in indices)
    size, found = math.prod(shape), torch.empty(0)
    for batch in (2, 3):
        found = torch.arange(batch * size).view(batch, *shape)[at]
        own = size * torch.arange(batch).view(-1, *[1] * (found.ndim - 1))
        if len(found) != batch or not bool((found == found[:1] + own).all()):
            call.refuse(f"dim 0 must stay the batch, and {wanted}", advice)
    return found[0]


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


@op(
    "gather.default",
    reads=("dim", "index"),
    free=("sparse_grad",),
    linear=Linear(_listed, moves=True),
    interval=as_input,
    samples=_gather_samples,
)
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


@op(
    "slice_scatter.default",
    "select_scatter.default",
    reads=("src", "dim", "start", "end", "step", "index"),
    linear=Linear(_written, moves=True, when=lambda call: True),
    samples=_write_samples,
)
def _write(call: Call) -> Step:
    call.feature_dims(call["dim"])
    return _one_or_the_other(call, COPY)


def _one_or_the_other(call: Call, rounding: Any) -> Step:
    """Entries of two tensors; of one of them there may be none left, so that 1 is a bound."""
    gains = (Bound(1.0),) * len(call.operands)
    return Step(gains, "entries of one or the other", "hypot", rounding)


def _copied(a: Values, absolute: bool) -> Any:
    """The second argument in the shape of the first."""
    shape = a["self"].value.shape if isinstance(a["self"], Constant) else a["self"].shape
    return zeros(a["src"]).to(torch.float64).expand(shape)


@op(
    "copy.default",
    reads=("src",),
    free=("non_blocking",),
    linear=Linear(_copied, moves=True, when=lambda call: True),
)
def _copy(call: Call) -> Step:
    """The second argument in the shape of the first."""
    gains = [NOTHING] if isinstance(call["self"], Operand) else []
    if isinstance(call["src"], Operand):
        gains.append(Bound(amplification(call, call["src"]), kind="exact"))
    return Step(tuple(gains), "copy", roundings=scalar_rounding(call, call["src"]))


def _put_run(a: Values, absolute: bool) -> Any:
    """The linear part of a tensor in which entries at indices are replaced."""
    values, target = (zeros(a[k]).to(torch.float64) for k in ("values", "self"))
    if isinstance(a["self"], Constant) and len(target) != len(values):
        target = target[:1].expand(len(values), *target.shape[1:])
    return a.target(target, plain(a["indices"]), values, False)


def _put_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[:: draw.choice([1, 2])] = True

    def put(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, mask] = y[:, mask].relu() if use else 2.0
        return x

    use = draw.random() < 0.5
    return put


@op(
    "index_put.default",
    reads=("indices", "values", "accumulate"),
    samples=_put_samples,
    linear=Linear(_put_run, moves=True, when=lambda call: not call["accumulate"]),
)
def _index_put(call: Call) -> Step:
    places = _places(call, call.output_shape)
    most = int(places.flatten().bincount(minlength=1).max()) if places.numel() else 0
    adds, values, gains = call.flag("accumulate"), call["values"], []
    single = not isinstance(values, Operand) and getattr(values, "numel", lambda: 1)() == 1
    if not adds and most > 1 and not single:
        call.refuse("no entry may be written twice", "The order of writing is not defined")
    if isinstance(call["self"], Operand):
        gains.append(Bound(1.0))
    if isinstance(values, Operand):
        if len(values.shape) != places.ndim:
            call.refuse("dim 0 must stay the batch", "Write values of the shape of x[index]")
        repeats = math.prod(places.shape) / max(1, math.prod(values.shape))
        gains.append(Bound(sqrt_up(math.ceil(repeats) * (most if adds else 1))))
    rounding = float(most) if adds else scalar_rounding(call, values)
    return Step(tuple(gains), "entries of one or the other", "sum" if adds else "hypot", rounding)


def _scatter_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = draw.randrange(len(shape))
    size = shape[dim]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(draw.randrange(999)))
    index = order.reshape(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()
    scale = draw.choice([1.0, -2.0])
    repeated = torch.tensor([draw.randrange(size) for _ in range(size)])
    return draw.choice(
        [
            lambda x, y: x.scatter(dim + 1, index.expand(x.shape[0], *shape), y),
            lambda x, y: x.scatter(dim + 1, index[:1].expand(x.shape[0], *index[:1].shape), 3.0),
            lambda x, y: x.scatter_add(dim + 1, index.expand(x.shape[0], *shape), y),
            lambda x, y: x.index_add(dim + 1, repeated, y, alpha=scale),
        ]
    )


@op(
    "scatter.src", "scatter.value", reads=("dim", "index", "src", "value"), samples=_scatter_samples
)
def _scatter(call: Call) -> Step:
    (where,) = call.feature_dims(call["dim"])
    index, size = _one_row(call, "index"), call.output_shape[where]
    if "src" in call.arguments and _counted(call, where, index, size) > 1:
        call.refuse("no entry may be written twice", "The order of writing is not defined")
    return _one_or_the_other(call, scalar_rounding(call, call.given("value")))


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
    found = []
    for name in ("self", "other", "value"):
        value = call.given(name)
        if isinstance(value, Operand):
            found.append(interval_of(value))
        elif isinstance(value, Tensor) and value.numel() and not value.is_complex():
            found.append((float(value.min()), float(value.max())))
        elif isinstance(value, (int, float)):
            found.append((float(value), float(value)))
        elif value is not None and not (isinstance(value, Tensor) and not value.numel()):
            return EVERYTHING
    if any(math.isnan(end) for ends in found for end in ends):
        return EVERYTHING
    return min(low for low, _ in found), max(high for _, high in found)


def _choose_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    mask = constant(draw, *shape) > 0
    other = constant(draw, *shape[-1:])
    return draw.choice(
        [
            lambda x, y: torch.where(mask, x, y),
            lambda x, y: torch.where(mask, other, x),
            lambda x, y: x.masked_fill(mask, 2.0),
            lambda x, y: torch.where(mask, x, 0.0),
        ]
    )


@op(
    "where.self",
    "where.ScalarOther",
    "where.ScalarSelf",
    "masked_fill.Scalar",
    "masked_fill.Tensor",
    reads=("condition", "self", "mask", "value", "other"),
    linear=Linear(_choose_linear, moves=True, when=lambda call: True),
    interval=_either_range,
    samples=_choose_samples,
)
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
