"""Convolutions, transposed ones, and padding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.norms import conv_norm
from orthonet.certify.ops import axes
from orthonet.certify.ops.contraction import bias_norm
from orthonet.certify.ops.registry import (
    Interval,
    Linear,
    Values,
    aten_name,
    constant,
    each,
    f64,
    first_moves,
    interval_of,
    number,
    op,
    wide,
)
from orthonet.certify.rules import Call, Operand, Step, exact, scalar_rounding
from orthonet.certify.walk.forms import Form, on_identity, pairs_of, pointwise
from orthonet.linalg.bounds.convolutions import NormBound
from orthonet.linalg.bounds.rounding import sqrt_up
from orthonet.linalg.bounds.sizes import absolute_convolution

__all__ = ["spatial_sizes"]


def spatial_sizes(call: Call, dims: int, channels: int) -> tuple[int, ...]:
    """The spatial sizes of the operand, which must have a batch (and a channel) dimension."""
    shape = call.operand.shape
    if len(shape) < dims + channels:
        call.refuse(
            f"the input must have a batch dimension and {dims} spatial ones",
            "Add the batch dimension, so that channels are not taken for samples",
        )
    return shape[len(shape) - dims :]


def _step(bound: NormBound, terms: float) -> Step:
    kind = "exact" if bound.tight else "upper"
    return Step((Bound(bound.value, kind=kind),), bound.method, roundings=terms)


def _convolution_step(kernel: Tensor, input_size: Sequence[int], **geometry: Any) -> Step:
    bound = conv_norm(kernel, tuple(input_size), **geometry)
    return _step(bound, kernel[0].numel() + 2.0)


def _transposed_step(kernel: Tensor, output_size: Sequence[int], **geometry: Any) -> Step:
    """A transposed convolution: the adjoint of the convolution from its output to its input."""
    value, method, tight = conv_norm(kernel, tuple(output_size), **geometry)
    bound = NormBound(value, f"adjoint of a convolution: {method}", tight)
    return _step(bound, kernel.numel() / kernel.shape[1] + 2.0)


def _geometry(call: Call) -> dict[str, Any]:
    return {name: call[name] for name in ("stride", "padding", "dilation", "groups")}


def _run(a: Values, absolute: bool) -> Any:
    """The convolution without its bias."""
    named = {**a, "weight": f64(a["weight"], absolute), "bias": None}
    return a.target(**named)


def _taps(state: Any) -> int:
    """How many products an output sums: those of one filter, at most."""
    call = state.call
    weight = call.fixed("weight")
    transposed = "transpose" in str(call.target) or call.given("transposed", False)
    return weight.numel() // max(1, weight.shape[1 if transposed else 0]) + 16


_LINEAR = Linear(_run, wide, heavy=True, when=first_moves, forward=_taps)


def _absolute(call: Call) -> float:
    return absolute_convolution(call.fixed("weight"), call["groups"])


def _taps_in_half(call: Call) -> int:
    """A transposed convolution may add its taps in half precision."""
    return 1 + math.ceil(math.prod(call.fixed("weight").shape[2:]) / 3)


# --- convolutions --------------------------------------------------------------------------------


def _form(state: Any, forms: list[Form]) -> Form | None:
    (form,) = forms
    call, dims = state.call, form.dims
    weight = call.fixed("weight")
    if weight.ndim != dims + 2 or not isinstance(call.args[0], Operand):
        return None
    if call.given("transposed", False):
        return None
    dilation = each(call["dilation"], dims)
    own = Form(
        form.size,
        form.channels,
        weight,
        weight.abs(),
        pairs_of(call["padding"], weight.shape[2:], dilation),
        each(call["stride"], dims),
        dilation,
        call["groups"],
        outputs=tuple(state.shape[1:]),
    )
    if form.kernel is None:
        return on_identity(form, own)
    if form.transposed:
        return None
    if pointwise(own):
        own, form = own.dense(), form.dense()
        kernel, majorant = (
            (a.flatten(1) @ b.flatten(1)).unflatten(1, b.shape[1:])
            for a, b in ((own.kernel, form.kernel), (own.majorant, form.majorant))
        )
        count = form.roundings + form.kernel.shape[0] + 2
        return replace(form, kernel=kernel, majorant=majorant, roundings=count)
    if pointwise(form):
        own, form = own.dense(), form.dense()
        kernel, majorant = (
            torch.einsum("oi...,ij->oj...", a, b.flatten(1))
            for a, b in ((own.kernel, form.kernel), (own.majorant, form.majorant))
        )
        count = form.roundings + form.kernel.shape[0] + 2
        return replace(own, kernel=kernel, majorant=majorant, roundings=count)
    return None


def _conv_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) not in (2, 3):
        return None
    dims = len(shape) - 1
    groups = draw.choice([g for g in (1, 2) if shape[0] % g == 0])
    outputs, taps = groups * draw.choice([1, 2]), draw.choice([1, 2, 3])
    weight = number(draw) * constant(draw, outputs, shape[0] // groups, *[taps] * dims)
    dilation = draw.choice([1, 1, 2])
    options: dict[str, Any] = {"groups": groups, "dilation": dilation}
    if draw.random() < 0.3:
        options["padding"] = "same"
    else:
        options |= {"padding": draw.choice([0, 1, 2]), "stride": draw.choice([1, 1, 2, 3])}
        if min(shape[1:]) + 2 * options["padding"] < dilation * (taps - 1) + 1:
            return None
    bias = draw.choice([None, constant(draw, outputs)])
    f = F.conv1d if dims == 1 else F.conv2d
    return lambda x, y: f(x, weight, bias, **options)


_CONVOLUTIONS = [f"conv{d}d.{kind}" for d in (1, 2, 3) for kind in ("default", "padding")]


@op(
    *_CONVOLUTIONS,
    reads=("weight", "stride", "padding", "dilation", "groups"),
    free=("bias",),
    linear=_LINEAR,
    kernel=_form,
    absolute=_absolute,
    offset=bias_norm,
    samples=_conv_samples,
)
def _convolution(call: Call) -> Step:
    kernel = call.fixed("weight")
    sizes = spatial_sizes(call, kernel.ndim - 2, channels=1)
    return _convolution_step(kernel, sizes, **_geometry(call))


@op(
    "convolution.default",
    reads=("weight", "stride", "padding", "dilation", "transposed", "output_padding", "groups"),
    free=("bias",),
    linear=_LINEAR,
    kernel=_form,
    absolute=_absolute,
    offset=bias_norm,
)
def _general(call: Call) -> Step:
    kernel = call.fixed("weight")
    sizes = spatial_sizes(call, kernel.ndim - 2, channels=1)
    if call["transposed"]:
        return _transposed_step(kernel, call.output_shape[1:], **_geometry(call))
    return _convolution_step(kernel, sizes, **_geometry(call))


# --- transposed convolutions ---------------------------------------------------------------------


def _transposed_form(state: Any, forms: list[Form]) -> Form | None:
    """A transposed convolution, also behind circular padding that makes it a circular one."""
    (form,) = forms
    call, dims = state.call, form.dims
    weight = call.fixed("weight")
    if form.kernel is not None or weight.ndim != dims + 2:
        return None
    stride, crop = each(call["stride"], dims), each(call["padding"], dims)
    dilation = each(call["dilation"], dims)
    own = Form(
        form.size,
        form.channels,
        weight,
        weight.abs(),
        tuple((p, p) for p in crop),
        stride,
        dilation,
        call["groups"],
        transposed=True,
        outputs=tuple(state.shape[1:]),
    )
    if all(pad == (0, 0) for pad in form.pads):
        return own
    if not form.circular:
        return None
    shift = []
    for (left, right), n, k, s, d, p, out in zip(
        form.pads, form.size, weight.shape[2:], stride, dilation, crop, own.outputs, strict=True
    ):
        offset = p - s * left  # output o reads input (o + offset - d t) / s, wrapped around
        first, last = offset - d * (k - 1), out - 1 + offset
        if out != s * n or first < -s * left or last > s * (n + right - 1) + s - 1 or offset < 0:
            return None
        shift.append((offset, offset))
    return replace(own, pads=tuple(shift), circular=True)


def _transposed_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3 or max(shape[1:]) > 6:
        return None
    groups = draw.choice([g for g in (1, 2) if shape[0] % g == 0])
    weight = constant(draw, shape[0], draw.choice([1, 2]), 3, 3)
    stride = draw.choice([1, 2])
    extra = draw.randrange(stride)
    return lambda x, y: F.conv_transpose2d(x, weight, None, stride, 1, extra, groups)


@op(
    "conv_transpose1d.default",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    reads=("weight", "stride", "padding", "output_padding", "groups", "dilation"),
    free=("bias",),
    linear=_LINEAR,
    kernel=_transposed_form,
    absolute=_absolute,
    offset=bias_norm,
    stages=_taps_in_half,
    samples=_transposed_samples,
)
def _transposed(call: Call) -> Step:
    kernel = call.fixed("weight")
    spatial_sizes(call, kernel.ndim - 2, channels=1)
    return _transposed_step(kernel, call.output_shape[1:], **_geometry(call))


# --- padding -------------------------------------------------------------------------------------


def _pads(target: Any, given: Callable[..., Any], rank: int) -> tuple[list[tuple[int, int]], str]:
    """The padding of the last dims of samples of this rank, and how it is filled."""
    name = aten_name(target)
    amounts = list(given("pad", given("padding", ())))
    mode = given("mode", "constant")
    if name.startswith(("reflection", "replication")):
        mode = "reflect" if name.startswith("reflection") else "replicate"
    pads = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)][::-1]
    if len(pads) == rank + 1 and pads[0] == (0, 0):  # of the batch
        del pads[0]
    return pads, mode


def _pad_run(a: Values, absolute: bool) -> Any:
    pads, mode = _pads(a.target, a.get, a["self"].ndim - 1)
    x = a["self"]
    sizes = x.shape[x.ndim - len(pads) :]
    return axes.along(x, [axes.padding(n, p, mode) for n, p in zip(sizes, pads, strict=True)])


def _pad_form(state: Any, forms: list[Form]) -> Form | None:
    (form,) = forms
    pads, mode = _pads(state.call.target, state.call.given, len(state.parents[0].shape))
    bare = form.kernel is None and all(pad == (0, 0) for pad in form.pads)
    if not bare or len(pads) != form.dims or min(min(p) for p in pads) < 0:
        return None
    if mode not in ("constant", "circular"):
        return None
    return replace(
        form, pads=tuple(pads), circular=mode == "circular", outputs=tuple(state.shape[1:])
    )


def _pad_range(call: Call) -> Interval:
    low, high = interval_of(call.operands[0])
    value = call.given("value") or 0.0
    return min(low, float(value)), max(high, float(value))


def _pad_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) not in (2, 3):
        return None
    mode = draw.choice(["constant", "constant", "reflect", "replicate", "circular"])
    least = 1 - min(shape[1:])
    most = 3 if mode in ("constant", "replicate") else min(shape[1:]) - 1
    amounts: list[int] = []
    for size in shape[:0:-1]:
        left = draw.randint(max(least, -1), most)
        right = draw.randint(max(least, -1), most)
        if size + left + right < 1:
            return None
        amounts += [left, right]
    value = draw.choice([None, 0.3]) if mode == "constant" else None
    return lambda x, y: F.pad(x, amounts, mode, value)


_PADS = [f"{mode}_pad{d}d.default" for mode in ("reflection", "replication") for d in (1, 2, 3)]


@op(
    "pad.default",
    "constant_pad_nd.default",
    *_PADS,
    reads=("pad", "padding", "mode", "value"),
    linear=Linear(_pad_run, moves=True),
    kernel=_pad_form,
    interval=_pad_range,
    samples=_pad_samples,
)
def _pad(call: Call) -> Step:
    pads, mode = _pads(call.target, call.given, len(call.operands[0].shape))
    sizes = spatial_sizes(call, len(pads), channels=0)
    wide = any(max(pad) > axes.kept(n, pad) for n, pad in zip(sizes, pads, strict=True))
    if mode == "circular" and wide:
        call.refuse(
            "circular padding must be no wider than what negative pads leave, because PyTorch "
            "copies memory that it has not written",
            "Cut first, e.g. x[..., 1:-1], then pad",
        )
    value = scalar_rounding(call, call.given("value"))
    return exact(padding_gain(sizes, pads, mode), f"{mode} padding", value)


def padding_gain(sizes: Sequence[int], pads: Sequence[tuple[int, int]], mode: str) -> float:
    """The norm of a padding: the root of how often its most repeated entry is copied."""
    copies = 1
    for size, pad in zip(sizes, pads, strict=True):
        counts = axes.padding(size, pad, mode).sum(0)
        copies *= int(counts.max()) if counts.numel() else 0
    return sqrt_up(copies)
