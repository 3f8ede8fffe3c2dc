"""Rules of convolutions, pooling and padding, as functions of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify._rules import Call, Step, exact, register_rule, upper
from orthonet.linalg._rounding import mul_up, sqrt_up, up
from orthonet.linalg.convolution_bounds import NormBound, convolution_norm_bound
from orthonet.linalg.enclosure import spectral_norm_bound

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


def _step(bound: NormBound) -> Step:
    return Step((Bound(bound.value, kind="exact" if bound.tight else "upper"),), bound.method)


def convolution_step(
    kernel: Tensor,
    input_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str = "zeros",
) -> Step:
    """The step of a convolution; any padding mode of torch."""
    extra = 1.0
    if padding_mode not in ("zeros", "circular"):  # padded first, then convolved without padding
        dims = len(input_size)
        spread = _each(dilation, dims)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(spread, kernel.shape[2:], strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        else:
            pads = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
        extra = padding_gain(input_size, pads, padding_mode)
        input_size = [n + sum(pad) for n, pad in zip(input_size, pads, strict=True)]
        padding, padding_mode = 0, "zeros"
    bound = convolution_norm_bound(
        kernel,
        tuple(input_size),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,  # type: ignore[arg-type]
    )
    if extra == 1.0:
        return _step(bound)
    return upper(mul_up(bound.value, extra), f"padding norm {extra:.3g} times {bound.method}")


def transposed_step(
    kernel: Tensor,
    output_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str = "zeros",
) -> Step:
    """A transposed convolution: the adjoint of the convolution from its output to its input."""
    value, method, tight = convolution_norm_bound(
        kernel,
        tuple(output_size),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,  # type: ignore[arg-type]
    )
    return _step(NormBound(value, f"adjoint of a convolution: {method}", tight))


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


@register_rule("pad", "constant_pad_nd")
def _pad(call: Call) -> Step:
    amounts = list(call.get(1, "pad", ()))
    mode = call.get(2, "mode", "constant") if call.op == "pad" else "constant"
    pads = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)][::-1]
    sizes = _spatial_dims(call, len(pads), channels=0)
    return exact(padding_gain(sizes, pads, mode), f"{mode} padding")


@register_rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(call: Call) -> Step:
    dims = int(call.op[-2])
    _spatial_dims(call, dims, channels=0)
    window = _each(call.get(1, "kernel_size", 1), dims)
    stride = _each(call.get(2, "stride", None) or window, dims)
    dilation = _each(call.get(4, "dilation", 1), dims)
    shared = math.prod(
        math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(window, stride, dilation, strict=True)
    )
    return exact(sqrt_up(shared), "disjoint windows" if shared == 1 else f"{shared} windows share")


def _average(call: Call, dims: int, axis: Callable[[Tensor, int], Tensor]) -> Step:
    """An average over boxes is a Kronecker product: the product of the norms along each axis."""
    sizes = _spatial_dims(call, dims, channels=0)
    value = 1.0
    for place, size in enumerate(sizes):
        matrix = axis(torch.eye(size, dtype=torch.float64)[:, None, :], place)[:, 0, :]
        # Entries are non-negative with one rounding each, so the norm has at most that error.
        value = mul_up(value, spectral_norm_bound(matrix), up(1.0 + 2.0**-51))
    return exact(value, "average along each axis, verified")


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


@register_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
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
    return exact(sqrt_up(shared), "disjoint windows" if shared == 1 else f"{shared} windows share")
