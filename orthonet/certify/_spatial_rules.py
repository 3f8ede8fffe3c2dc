"""Rules of convolutions, pooling and padding, as functions of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._norms import conv_norm, matrix_norm
from orthonet.certify._rules import (
    COPY,
    Call,
    Step,
    exact,
    of_squares,
    register_rule,
    scalar_rounding,
    upper,
)
from orthonet.errors import UncertifiableError
from orthonet.linalg._rounding import add_up, mul_up, sqrt_up, up
from orthonet.linalg.convolution_bounds import NormBound

__all__ = ["convolution_step", "padding_gain", "transposed_step"]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _spatial_dims(call: Call, dims: int, channels: int) -> tuple[int, ...]:
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


def convolution_step(
    kernel: Tensor, input_size: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Step:
    """The step of a convolution."""
    bound = conv_norm(
        kernel, tuple(input_size), stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return _step(bound, kernel[0].numel() + 2.0)


def transposed_step(
    kernel: Tensor,
    output_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Step:
    """A transposed convolution: the adjoint of the convolution from its output to its input."""
    value, method, tight = conv_norm(
        kernel,
        tuple(output_size),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    bound = NormBound(value, f"adjoint of a convolution: {method}", tight)
    return _step(bound, kernel.numel() / kernel.shape[1] + 2.0)


@register_rule("conv1d", "conv2d", "conv3d")
def _convolution(call: Call) -> Step:
    kernel = call.constant(1, "weight")
    dims = kernel.ndim - 2
    return convolution_step(
        kernel,
        _spatial_dims(call, dims, channels=1),
        call.get(3, "stride", 1),
        call.get(4, "padding", 0),
        call.get(5, "dilation", 1),
        call.get(6, "groups", 1),
    )


@register_rule("convolution")
def _general(call: Call) -> Step:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed",
             "output_padding", "groups")  # fmt: skip
    value = {name: call.get(i, name, None) for i, name in enumerate(names)}
    kernel = call.constant(1, "weight")
    geometry = [value[name] for name in ("stride", "padding", "dilation", "groups")]
    if value["transposed"]:
        return transposed_step(kernel, call.output_shape[1:], *geometry)
    return convolution_step(kernel, _spatial_dims(call, kernel.ndim - 2, 1), *geometry)


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(call: Call) -> Step:
    kernel = call.constant(1, "weight")
    _spatial_dims(call, kernel.ndim - 2, channels=1)
    return transposed_step(
        kernel,
        call.output_shape[1:],
        call.get(3, "stride", 1),
        call.get(4, "padding", 0),
        call.get(7, "dilation", 1),
        call.get(6, "groups", 1),
    )


def padding_gain(input_size: Sequence[int], pads: Sequence[tuple[int, int]], mode: str) -> float:
    """The norm of a padding: the root of how often its most repeated entry is copied."""
    if mode in ("constant", "zeros"):
        return 1.0
    copies = 1
    for size, pad in zip(input_size, pads, strict=True):
        places = torch.arange(float(size)).reshape(1, 1, -1)
        copies *= int(F.pad(places, pad, mode=mode).long().flatten().bincount().max())
    return sqrt_up(copies)


_PADS = [f"{mode}_pad{d}d" for mode in ("reflection", "replication") for d in (1, 2, 3)]


@register_rule("pad", "constant_pad_nd", *_PADS)
def _pad(call: Call) -> Step:
    amounts = list(call.get(1, "padding" if call.op in _PADS else "pad", ()))
    mode = call.get(2, "mode", "constant") if call.op == "pad" else "constant"
    if call.op in _PADS:
        mode = "reflect" if call.op.startswith("reflection") else "replicate"
    pads = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)][::-1]
    sizes = _spatial_dims(call, len(pads), channels=0)
    value = call.get(3 if call.op == "pad" else 2, "value", None) if call.op not in _PADS else None
    return exact(padding_gain(sizes, pads, mode), f"{mode} padding", scalar_rounding(call, value))


@register_rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
               "max_pool3d_with_indices")  # fmt: skip
def _max_pool(call: Call) -> Step:
    dims = int(call.op[8])
    _spatial_dims(call, dims, channels=0)
    window = _each(call.get(1, "kernel_size", 1), dims)
    stride = _each(call.get(2, "stride", None) or window, dims)
    dilation = _each(call.get(4, "dilation", 1), dims)
    shared = math.prod(
        math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(window, stride, dilation, strict=True)
    )
    return exact(sqrt_up(shared), _shared(shared), COPY)


def _shared(count: int) -> str:
    return "disjoint windows" if count == 1 else f"{count} windows share"


def lp_step(
    order: float, window: Sequence[int], stride: Sequence[int], ceil: bool, size: int
) -> Step:
    """The 2-norm of windows: the constant is the root of how many windows share a pixel."""
    shared = math.prod(-(-k // s) for k, s in zip(window, stride, strict=True))
    if order not in (2, 2.0) or ceil:
        _checks.fail(
            "certify", "a power-average pool must have norm_type 2 and no ceil_mode",
            "Use LPPool2d(2, ...) or L2NormPool2d", UncertifiableError, norm_type=order,
        )  # fmt: skip
    # the average is multiplied by the size of the window: a few roundings
    value = mul_up(sqrt_up(shared), up(1.0 + 2.0**-48))
    rounding = of_squares(math.prod(window) + 54.0, size, math.prod(window))
    return upper(value, _shared(shared), rounding._replace(size=value))


def _average(call: Call, dims: int, axis: Callable[[Tensor, int], Tensor]) -> Step:
    """An average over boxes is a Kronecker product: the product of the norms along each axis."""
    sizes = _spatial_dims(call, dims, channels=0)
    value = 1.0
    for place, size in enumerate(sizes):
        matrix = axis(torch.eye(size, dtype=torch.float64)[:, None, :], place)[:, 0, :]
        # Entries are non-negative with one rounding each, so the norm has at most that error.
        value = mul_up(value, matrix_norm(matrix), up(1.0 + 2.0**-51))
    return exact(value, "average along each axis, verified", math.prod(sizes) + 2.0)


@register_rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(call: Call) -> Step:
    dims = int(call.op[-2])
    window = _each(call.get(1, "kernel_size", 1), dims)
    stride = _each(call.get(2, "stride", None) or window, dims)
    padding = _each(call.get(3, "padding", 0), dims)
    ceil_mode, inside = call.get(4, "ceil_mode", False), call.get(5, "count_include_pad", True)
    if call.get(6, "divisor_override", None) is not None:
        call.refuse(
            "an average must be divided by the size of its window", "Leave out divisor_override"
        )

    def axis(rows: Tensor, i: int) -> Tensor:
        return F.avg_pool1d(rows, window[i], stride[i], padding[i], ceil_mode, inside)

    return _average(call, dims, axis)


@register_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
               "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")  # fmt: skip
def _adaptive_avg_pool(call: Call) -> Step:
    dims = int(call.op[-2])
    sizes = call.output_shape[len(call.output_shape) - dims :]
    return _average(call, dims, lambda rows, i: F.adaptive_avg_pool1d(rows, sizes[i]))


@register_rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(call: Call) -> Step:
    dims = int(call.op[-2])
    shared = 1
    outputs = call.output_shape[len(call.output_shape) - dims :]
    for size, count in zip(_spatial_dims(call, dims, channels=0), outputs, strict=True):
        hits = torch.zeros(size, dtype=torch.int64)
        for i in range(count):
            hits[i * size // count : -(-(i + 1) * size // count)] += 1
        shared *= int(hits.max())
    return exact(sqrt_up(shared), _shared(shared), COPY)


_RESIZE = [
    f"upsample_{kind}"
    for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d",
                 "bicubic2d")
]  # fmt: skip
_RESIZE += [f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)]
_RESIZE += ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]


@register_rule(*_RESIZE)
def _interpolate(call: Call) -> Step:
    """Interpolation is a Kronecker product: the product of the norms along each axis."""
    sizes = call.operand.shape[1:]
    outputs = call.output_shape[1:]
    kind = call.op.removeprefix("_").removeprefix("upsample_")
    mode = {"n": "nearest-exact" if "exact" in kind else "nearest"}.get(kind[0], "linear")
    mode = "bicubic" if "bicubic" in kind else mode
    corners = call.get(2, "align_corners", False) if "nearest" not in kind else None
    scales = call.args[-1] if isinstance(call.args[-1], (tuple, list)) else (None,) * len(sizes)
    value = 1.0
    for size, out, scale in zip(sizes, outputs, scales, strict=True):
        aim: dict[str, Any] = (
            {"scale_factor": scale, "recompute_scale_factor": False} if scale else {"size": out}
        )
        if mode == "bicubic" or kind.endswith("_aa"):  # exist for images only
            aim = {key: v if v is False else (v, 1) for key, v in aim.items()}
        norms = []
        # The nearest pixel depends on the rounding of its place: that of either dtype.
        for dtype in (torch.float32, torch.float64) if "nearest" in kind else (torch.float64,):
            rows = torch.eye(size, dtype=dtype)[:, None]
            if isinstance(next(iter(aim.values())), tuple):
                how = "bicubic" if mode == "bicubic" else "bilinear"
                smooth = kind.endswith("_aa")
                matrix = F.interpolate(
                    rows[..., None], mode=how, align_corners=corners, antialias=smooth, **aim
                )[..., 0]
            else:
                matrix = F.interpolate(rows, mode=mode, align_corners=corners, **aim)
            if matrix.shape[2] != out:
                call.refuse("the output size must follow from the scale factor", "Pass size=")
            norms.append(matrix_norm(matrix[:, 0].double()))
        # The places between pixels are rounded; that moves a weight by less than 2^-40.
        lost = 0.0 if "nearest" in kind else mul_up(2.0**-40, sqrt_up(size * out))
        value = mul_up(value, add_up(max(norms), lost))
    return exact(value, f"{mode} along each axis, verified", 2.0 if "nearest" in kind else 64.0)
