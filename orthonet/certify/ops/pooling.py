"""Pooling, windows and their sums, and interpolation: Kronecker products over the axes."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks, functional
from orthonet._torch import NEAREST_EXACT_2D, operation_name
from orthonet.certify.norms import matrix_norm
from orthonet.certify.ops import axes
from orthonet.certify.ops.convolution import spatial_sizes
from orthonet.certify.ops.entries import window_entries
from orthonet.certify.ops.registry import Linear, Values, as_input, aten_name, each, op, wide
from orthonet.certify.rules import (
    COPY,
    Call,
    Rounding,
    Step,
    exact,
    of_squares,
    register_rule,
    upper,
)
from orthonet.certify.walk.forms import Form, on_identity, pairs_of
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import add_up, mul_up, sqrt_up, up

__all__ = ["pooling_windows"]


def _dims_of(target: Any) -> int:
    """The number of spatial dims, from a name like avg_pool2d or adaptive_max_pool1d."""
    name = operation_name(target) or target.__name__
    return int(next(c for c in reversed(name.replace("_aa", "")) if c.isdigit()))


def _shared(count: int) -> str:
    return "disjoint windows" if count == 1 else f"{count} windows share"


# --- largest entries -----------------------------------------------------------------------------


def _pool_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3 or min(shape[1:]) < 3:
        return None
    kernel, stride = draw.choice([2, 3]), draw.choice([1, 2, 3])
    pad, ceil = draw.choice([0, 1]), draw.random() < 0.3
    dilation = draw.choice([1, 1, 2]) if min(shape[1:]) + 2 * pad > 4 else 1
    count, size = draw.choice([(1, 2), (3, 2)]), draw.randrange(1, 5)
    divisor = draw.choice([None, None, 2, -3])
    inside = draw.random() < 0.5
    return draw.choice(
        [
            lambda x, y: F.max_pool2d(x, kernel, stride, pad, dilation, ceil),
            lambda x, y: F.avg_pool2d(x, kernel, stride, pad, ceil, inside, divisor),
            lambda x, y: F.adaptive_avg_pool2d(x, count),
            lambda x, y: F.adaptive_max_pool2d(x, size),
            lambda x, y: F.lp_pool2d(x, 2, kernel, stride),
        ]
    )


_MAX = [f"max_pool{d}d{kind}.default" for d in (1, 2, 3) for kind in ("", "_with_indices")]


def pooling_windows(call: Call) -> Tensor:
    """The places of the entries of each window; in padding, those of an entry inside of it."""
    dims = int(call.op[8])
    sizes = spatial_sizes(call, dims, channels=0)
    kernel = each(call["kernel_size"], dims)
    stride = each(call["stride"] or kernel, dims)
    pads, dilation = each(call["padding"], dims), each(call["dilation"], dims)
    outputs = call.output_shape[len(call.output_shape) - dims :]
    places = torch.zeros(1, 1, dtype=torch.long)
    for size, count, taps, step, pad, spread in zip(
        sizes, outputs, kernel, stride, pads, dilation, strict=True
    ):
        place = torch.arange(count)[:, None] * step - pad + torch.arange(taps) * spread
        inside = (place >= 0) & (place < size)
        first = place.gather(1, inside.int().argmax(1, keepdim=True))
        place = torch.where(inside, place, first)
        places = places[:, None, :, None] * size + place[:, None]
        places = places.flatten(2).flatten(0, 1)
    return places


@op(
    *_MAX,
    reads=("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    interval=as_input,
    samples=_pool_samples,
    windows=pooling_windows,
    entries=window_entries(pooling_windows),
)
def _max_pool(call: Call) -> Step:
    dims = int(call.op[8])
    sizes = spatial_sizes(call, dims, channels=0)
    kernel = each(call["kernel_size"], dims)
    stride = each(call["stride"] or kernel, dims)
    pads, dilation = each(call["padding"], dims), each(call["dilation"], dims)
    outputs = call.output_shape[len(call.output_shape) - dims :]
    grids = list(zip(sizes, outputs, kernel, stride, pads, dilation, strict=True))
    if any(axes.empty(*grid) for grid in grids):
        call.refuse(
            "every window of a max pooling must hold an entry: others are minus infinity",
            "Use less dilation, or a larger input",
        )
    shared = math.prod(axes.windows(*grid) for grid in grids)
    return exact(sqrt_up(shared), _shared(shared), COPY)


@op(
    *(f"adaptive_max_pool{d}d.default" for d in (1, 2, 3)),
    reads=("output_size",),
    interval=as_input,
    entries=window_entries(),
)
def _adaptive_max_pool(call: Call) -> Step:
    dims = _dims_of(call.target)
    outputs = call.output_shape[len(call.output_shape) - dims :]
    shared = 1
    for size, count in zip(spatial_sizes(call, dims, channels=0), outputs, strict=True):
        shared *= int((axes.adaptive(size, count) > 0).sum(0).max())
    return exact(sqrt_up(shared), _shared(shared), COPY)


# --- averages ------------------------------------------------------------------------------------


def _average_axes(target: Any, get: Any, sizes: Any, outputs: Any) -> tuple[list[Tensor], float]:
    """The matrices of an average along its axes, and the factor of all of them."""
    dims = len(sizes)
    if "adaptive" in (operation_name(target) or ""):
        return [axes.adaptive(n, m) for n, m in zip(sizes, outputs, strict=True)], 1.0
    kernel = each(get("kernel_size"), dims)
    stride = each(get("stride") or kernel, dims)
    pads = each(get("padding"), dims)
    divisor = get("divisor_override")
    inside = not get("count_include_pad")
    found = [
        axes.average(*axis, inside, divisor is not None)
        for axis in zip(sizes, outputs, kernel, stride, pads, strict=True)
    ]
    return found, 1.0 if divisor is None else 1.0 / divisor


def _average_run(a: Values, absolute: bool) -> Any:
    dims, x = _dims_of(a.target), a["self"]
    sizes = x.shape[x.ndim - dims :]
    # The shape of the output follows from torch, the entries from the definition.
    outputs = a.target(x.new_zeros(1, 1, *sizes), *a.args[1:], **a.kwargs).shape[2:]
    found, factor = _average_axes(a.target, a.get, sizes, outputs)
    return axes.along(x, found) * (abs(factor) if absolute else factor)


def _average_form(state: Any, forms: list[Form]) -> Form | None:
    (form,) = forms
    call, dims = state.call, form.dims
    window = each(call["kernel_size"], dims)
    stride = each(call["stride"] or window, dims)
    pads = pairs_of(call["padding"], window, (1,) * dims)
    odd = call["ceil_mode"] or call.given("divisor_override") is not None
    uneven = not call["count_include_pad"] and any(p != (0, 0) for p in pads)
    if form.kernel is not None or odd or uneven or dims != _dims_of(call.target):
        return None
    kernel = torch.full((form.channels, 1, *window), 1 / math.prod(window), dtype=torch.float64)
    own = Form(
        form.size,
        form.channels,
        kernel,
        kernel,
        pads,
        stride,
        (1,) * dims,
        form.channels,
        outputs=tuple(state.shape[1:]),
        roundings=2,
    )
    return on_identity(form, own)


_AVERAGE = Linear(_average_run, wide, heavy=True)


def _average(call: Call) -> Step:
    """An average over boxes is a Kronecker product: the product of the norms along each axis."""
    dims = _dims_of(call.target)
    sizes = spatial_sizes(call, dims, channels=0)
    outputs = call.output_shape[len(call.output_shape) - dims :]
    found, factor = _average_axes(call.target, call.given, sizes, outputs)
    # Entries are non-negative with one rounding each, so the norm has at most that error.
    value = up(abs(factor)) if factor != 1.0 else 1.0
    for matrix in found:
        value = mul_up(value, matrix_norm(matrix), up(1.0 + 2.0**-51))
    return exact(value, "average along each axis, verified", math.prod(sizes) + 2.0)


op(
    "avg_pool1d.default",
    "avg_pool2d.default",
    "avg_pool3d.default",
    reads=(
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
    linear=_AVERAGE,
    kernel=_average_form,
)(_average)
op(
    *(f"adaptive_avg_pool{d}d.default" for d in (1, 2, 3)),
    "_adaptive_avg_pool2d.default",
    "_adaptive_avg_pool3d.default",
    reads=("output_size",),
    linear=_AVERAGE,
)(_average)


# --- norms of windows ----------------------------------------------------------------------------


def _lp_step(order: Any, kernel: Any, stride: Any, ceil: bool, dims: int, size: int) -> Step:
    """The 2-norm of windows: the constant is the root of how many windows share a pixel."""
    window = each(kernel, dims)
    step = each(stride or window, dims)
    shared = math.prod(-(-k // s) for k, s in zip(window, step, strict=True))
    if order not in (2, 2.0) or ceil:
        _checks.fail(
            "certify",
            "a power-average pool must have norm_type 2 and no ceil_mode",
            "Use LPPool2d(2, ...) or L2NormPool",
            UncertifiableError,
            norm_type=order,
        )
    # the average is multiplied by the size of the window: a few roundings
    value = mul_up(sqrt_up(shared), up(1.0 + 2.0**-48))
    rounding = of_squares(math.prod(window) + 54.0, size, math.prod(window))
    return upper(value, _shared(shared), rounding._replace(size=value))


@register_rule(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
def _lp_module(module: Any, input_shape: tuple[int, ...]) -> Step:
    dims = int(type(module).__name__[-2])
    return _lp_step(
        module.norm_type,
        module.kernel_size,
        module.stride,
        module.ceil_mode,
        dims,
        math.prod(input_shape),
    )


@op(
    F.lp_pool1d,
    F.lp_pool2d,
    F.lp_pool3d,
    reads=("norm_type", "kernel_size", "stride", "ceil_mode"),
    interval=lambda call: (0.0, math.inf),
    entries=window_entries(lost=2.0**-500),
)
def _lp_pool(call: Call) -> Step:
    size = math.prod(call.operand.shape)
    return _lp_step(
        call["norm_type"],
        call["kernel_size"],
        call["stride"],
        call["ceil_mode"],
        int(call.target.__name__[-2]),
        size,
    )


def _square_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3 or min(shape[1:]) < 2:
        return None
    stride = draw.choice([1, 2])
    return draw.choice(
        [
            lambda x, y: functional.l2_norm_pool(x, [2, 2], [stride, stride]),
            lambda x, y: functional.global_l2_norm_pool(x, 2),
        ]
    )


# ceil_mode and padding alike leave every pixel its windows: forward divides by the largest count.
@op(
    functional.l2_norm_pool,
    functional.global_l2_norm_pool,
    reads=("kernel_size", "spatial", "stride", "padding", "ceil_mode", "eps"),
    free=("keepdim",),
    interval=lambda call: (0.0, math.inf),
    entries=window_entries(lost=2.0**-500),
    samples=_square_samples,
)
def _square_pool(call: Call) -> Step:
    spatial = call.given("kernel_size", call.given("spatial"))
    dims = spatial if isinstance(spatial, int) else len(tuple(spatial or ()))
    if len(call.operand.shape) < dims:
        call.refuse("the batch dimension must not be pooled", "Add a channel dimension")
    # The scale is a float that was computed in a few roundings.
    count = math.prod(call.operand.shape)
    rounding = of_squares(count, math.prod(call.output_shape), count)
    return upper(add_up(1.0, 2.0**-48), "by construction", rounding)


# --- windows -------------------------------------------------------------------------------------


def _overlap(most: int, rounding: float = COPY) -> Step:
    return exact(sqrt_up(most), f"windows, {most} over an entry at most", rounding)


@op(
    "unfold.default",
    "unfold_copy.default",
    reads=("dimension", "size", "step"),
    interval=as_input,
    linear=Linear(lambda a, absolute: a.run(), moves=True),
    samples=lambda draw, shape: (
        lambda x, y, n=draw.randrange(1, 1 + shape[-1]), s=draw.choice([1, 2]): x.unfold(-1, n, s)
    ),
)
def _windows(call: Call) -> Step:
    (where,) = call.feature_dims(call["dimension"])
    outputs = call.output_shape[where]
    most = axes.windows(call.operand.shape[where], outputs, call["size"], call["step"], 0)
    return _overlap(most)


def _patch_axes(get: Any, image: Any) -> list[Tensor]:
    """(kernel, outputs, size) for both axes of an image."""
    kernel, dilation, pads, stride = (
        each(get(name), 2) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    found = []
    for n, k, s, p, d in zip(image, kernel, stride, pads, dilation, strict=True):
        outputs = (n + 2 * p - d * (k - 1) - 1) // s + 1
        found.append(axes.taps(n, outputs, k, s, p, d))
    return found


def _im2col_run(a: Values, absolute: bool) -> Any:
    x = a["self"]
    high, wide_ = _patch_axes(a.get, x.shape[2:])
    return torch.einsum("nchw,koh,lpw->ncklop", x, high, wide_).flatten(4).flatten(1, 3)


def _col2im_run(a: Values, absolute: bool) -> Any:
    x = a["self"]
    high, wide_ = _patch_axes(a.get, a["output_size"])
    x = x.unflatten(1, (-1, len(high), len(wide_)))
    x = x.unflatten(-1, (high.shape[1], wide_.shape[1]))
    return torch.einsum("ncklop,koh,lpw->nchw", x, high, wide_)


def _patch_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3 or min(shape[1:]) < 3:
        return None
    kernel, stride, pad = draw.choice([2, (3, 1)]), draw.choice([1, 2]), draw.choice([0, 1])
    options = {"stride": stride, "padding": pad}
    return draw.choice(
        [
            lambda x, y: F.unfold(x, kernel, **options),
            lambda x, y: F.fold(F.unfold(x, kernel, **options), x.shape[2:], kernel, **options),
        ]
    )


_PATCHES = ("output_size", "kernel_size", "dilation", "padding", "stride")


@op(
    "im2col.default", reads=_PATCHES, linear=Linear(_im2col_run, moves=True), samples=_patch_samples
)
def _patches(call: Call) -> Step:
    """Patches of an image."""
    return _patch_step(call, call.operand.shape)


@op("col2im.default", reads=_PATCHES, linear=Linear(_col2im_run, wide))
def _image(call: Call) -> Step:
    """The sum of patches in an image: the adjoint."""
    step = _patch_step(call, call.output_shape)
    return step._replace(roundings=step.gains[0].value ** 2 + 1.0)


def _patch_step(call: Call, image: tuple[int, ...]) -> Step:
    if len(image) != 3:
        call.refuse("the input must have a batch dimension", "Add it, so that none is mistaken")
    counts = [m.sum((0, 1)) for m in _patch_axes(call.given, image[1:])]
    return _overlap(math.prod(int(c.max()) if c.numel() else 0 for c in counts))


# --- interpolation -------------------------------------------------------------------------------

_RESIZE = {
    **{f"upsample_nearest{d}d": "nearest" for d in (1, 2, 3)},
    **{f"_upsample_nearest_exact{d}d": "nearest-exact" for d in (1, 2, 3)},
    "upsample_linear1d": "linear",
    "upsample_bilinear2d": "linear",
    "upsample_trilinear3d": "linear",
    "upsample_bicubic2d": "cubic",
    "_upsample_bilinear2d_aa": "linear-aa",
    "_upsample_bicubic2d_aa": "cubic-aa",
}
_SCALES = ("scales_d", "scales_h", "scales_w")


def _grids(target: Any, get: Any, sizes: Any, outputs: Any) -> list[axes.Grid]:
    """One grid for each axis, with the scale factors in whatever argument they stand."""
    dims, mode = len(sizes), _RESIZE[aten_name(target)]
    listed = get("scale_factors")
    if listed is None:
        named = [get("scales")] if dims == 1 else [get(name) for name in _SCALES[3 - dims :]]
        listed = named
    corners = bool(get("align_corners")) if "nearest" not in mode else False
    return [
        axes.interpolation(n, m, mode, corners, None if f is None else float(f))
        for n, m, f in zip(sizes, outputs, listed, strict=True)
    ]


def _resize_run(a: Values, absolute: bool) -> Any:
    x = a["self"] if "self" in a else a["input"]
    small = torch.zeros(1, 1, *x.shape[2:], dtype=torch.float64)
    outputs = a.target(small, *a.args[1:], **a.kwargs).shape[2:]
    grids = _grids(a.target, a.get, x.shape[2:], outputs)
    matrices = [grid.matrix.abs() if absolute else grid.matrix for grid in grids]
    return axes.along(x, matrices)


def _resizes_for_sure(call: Call) -> bool:
    """Whether the matrices are the map, in every dtype."""
    if len(call.operands) != 1:
        return False
    sizes, outputs = call.operand.shape[1:], call.output_shape[1:]
    return all(grid.certain for grid in _grids(call.target, call.given, sizes, outputs))


def _resize_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) not in (2, 3) or max(shape[1:]) > 8:
        return None
    flat = len(shape) == 2
    mode = draw.choice(
        ["nearest", "linear", "nearest-exact"]
        if flat
        else ["nearest", "bilinear", "bicubic", "nearest-exact", "aa"]
    )
    options: dict[str, Any] = {"mode": mode}
    if mode == "aa":
        options = {"mode": draw.choice(["bilinear", "bicubic"]), "antialias": True}
    if "linear" in options["mode"] or options["mode"] == "bicubic":
        options["align_corners"] = draw.choice([True, False])
    if draw.random() < 0.3:  # a scale that is not the quotient of the sizes
        size = [draw.randrange(1, 9) for _ in shape[1:]]
        scale = [draw.choice([0.7, 2.0, 100.0, 0.01]) for _ in shape[1:]]
        target = (
            {"nearest": torch.ops.aten.upsample_nearest1d.default}
            if flat
            else {
                "nearest": torch.ops.aten.upsample_nearest2d.default,
                "nearest-exact": NEAREST_EXACT_2D,
            }
        )
        if mode in target:
            return lambda x, y: target[mode](x, size, *scale)
        if mode in ("linear", "bilinear"):
            aten: Any = torch.ops.aten
            f = aten.upsample_linear1d if flat else aten.upsample_bilinear2d
            return lambda x, y: f.default(x, size, options["align_corners"], *scale)
    if draw.random() < 0.5:
        aim = [draw.randrange(1, 9) for _ in shape[1:]]
        return lambda x, y: F.interpolate(x, aim, **options)
    factor = draw.choice([2, 0.6, 1.5])
    if min(int(n * factor) for n in shape[1:]) < 1:
        return None
    return lambda x, y: F.interpolate(x, scale_factor=factor, **options)


@op(
    *(f"{name}.{kind}" for name in _RESIZE for kind in ("default", "vec")),
    reads=("output_size", "align_corners", "scale_factors", "scales", *_SCALES),
    samples=_resize_samples,
    linear=Linear(
        _resize_run,
        lambda state: 16 * max(state.parents[0].shape) + 64,
        heavy=True,
        when=_resizes_for_sure,
    ),
)
def _interpolate(call: Call) -> Step:
    """Interpolation is a Kronecker product: the product of the norms along each axis."""
    sizes, outputs = call.operand.shape[1:], call.output_shape[1:]
    grids = _grids(call.target, call.given, sizes, outputs)
    norms = [matrix_norm(grid.matrix) for grid in grids]
    value, moved = 1.0, 0.0
    for i, (grid, norm) in enumerate(zip(grids, norms, strict=True)):
        # The places between pixels are rounded in float64 here, and in the dtype of the model.
        lost = mul_up(2.0**-50, grid.reach, grid.moved)
        value = mul_up(value, add_up(norm, lost))
        others = math.prod(norms[:i] + norms[i + 1 :])
        moved += others * grid.moved * grid.reach
    mode = _RESIZE[aten_name(call.target)]
    if "nearest" in mode:
        certain = all(grid.certain for grid in grids)
        method = f"{mode} along each axis, verified"
        return exact(value, method, COPY) if certain else upper(value, method)
    # Of 64 roundings, 8 move each place: by as much as the axis is long.
    rounding = Rounding(64.0, 1.0 + value + moved / 8.0)
    return exact(value, f"{mode} along each axis, verified", rounding)
