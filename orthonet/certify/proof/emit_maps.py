"""The nodes of matrices, convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthonet.certify.proof.emit import each, emits, padding_of, single
from orthonet.certify.proof.norms import (
    LARGEST,
    convolution_witness,
    matrix_witness,
    square_gain,
)
from orthonet.certify.rules import Operand

if TYPE_CHECKING:
    from orthonet.certify.proof.nodes import Nodes
    from orthonet.certify.walk.state import State

__all__: list[str] = []


@emits("linear", "matmul", "mm", "addmm")
def _linear(writer: Nodes, state: State) -> int | None:
    call = state.call
    if call.op == "addmm":
        bias, first, weight = call.args[:3]
        if call.kwargs or not isinstance(first, Operand):
            return None
    else:
        first, weight = call.args[:2]
        bias = call.get(2, "bias", None) if call.op == "linear" else None
    if not isinstance(first, Operand) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if len(call.operands) != 1 or weight.numel() > LARGEST:
        return None
    weight = weight if call.op == "linear" else weight.mT
    rule, gain, t = writer.witness(matrix_witness, weight)
    extra = {} if t is None else {"t": t.hex()}
    if isinstance(bias, Tensor):
        extra["bias"] = writer.constant(bias, state, "bias")
    extra["weight"] = writer.constant(weight, state, "weight")
    place = writer.index(first._state)
    return writer.add("affine", [place], state, rule=rule, gain=gain, **extra)


@emits("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(writer: Nodes, state: State) -> int | None:
    call = state.call
    weight, bias = call.get(1, "weight", None), call.get(2, "bias", None)
    if not single(state) or not isinstance(weight, Tensor) or weight.numel() > LARGEST:
        return None
    if call.op == "convolution" and (call.get(6, "transposed", False)):
        return None
    dims = weight.ndim - 2
    stride, dilation = (each(call.get(i, n, 1), dims) for i, n in ((3, "stride"), (5, "dilation")))
    groups = call.get(8 if call.op == "convolution" else 6, "groups", 1)
    padding = call.get(4, "padding", 0)
    if isinstance(padding, str):
        whole = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        whole = whole if padding == "same" else [0] * dims
        pads = [[n // 2, n - n // 2] for n in whole]
    else:
        pads = [[n, n] for n in each(padding, dims)]
    source, circular = state.parents[0], False
    if len(source.shape) != dims + 1:
        return None
    wrapped = _circular(source)
    if wrapped is not None and not any(map(any, pads)):
        image, outputs = source.parents[0].shape[1:], state.shape[1:]
        if all(n % s == 0 and o * s <= n for n, s, o in zip(image, stride, outputs, strict=True)):
            source, pads, circular = source.parents[0], wrapped, True
    rule, gain, t = writer.witness(
        convolution_witness,
        weight,
        source.shape[1:],
        stride,
        [(a, b) for a, b in pads],
        dilation,
        groups,
        circular,
    )
    extra = {} if t is None else {"t": t.hex()}
    if isinstance(bias, Tensor):
        extra["bias"] = writer.constant(bias, state, "bias")
    extra["weight"] = writer.constant(weight, state, "weight")
    return writer.add(
        "convolution",
        [writer.index(source)],
        state,
        stride=stride,
        padding=pads,
        dilation=dilation,
        groups=groups,
        circular=circular,
        rule=rule,
        gain=gain,
        **extra,
    )


def _circular(state: State) -> list[list[int]] | None:
    """The padding of the pixels, if that is what a node is."""
    if state.call.op != "pad" or state.call.get(2, "mode", "constant") != "circular":
        return None
    amounts = padding_of(state)
    return None if amounts is None or any(amounts[0]) else amounts[1:]


@emits(*(f"max_pool{d}d{tail}" for d in (1, 2, 3) for tail in ("", "_with_indices")))
def _max_pool(writer: Nodes, state: State) -> int | None:
    call = _producer(state).call
    dims = int(call.op[8])
    window = each(call.get(1, "kernel_size", 1), dims)
    stride = each(call.get(2, "stride", None) or window, dims)
    padding, dilation = (
        each(call.get(i, n, default), dims)
        for i, n, default in ((3, "padding", 0), (4, "dilation", 1))
    )
    if call.get(5, "ceil_mode", False) or len(call.operand.shape) < dims:
        return None
    shared = math.prod(
        math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(window, stride, dilation, strict=True)
    )
    return writer.add(
        "max_pool",
        [writer.index(_producer(state).parents[0])],
        state,
        window=window,
        stride=stride,
        padding=[[n, n] for n in padding],
        dilation=dilation,
        gain=square_gain(shared) if shared > 1 else 1.0,
    )


def _producer(state: State) -> State:
    """The node of the operation, behind which one of its outputs may be taken."""
    return state.parents[0] if state.call.op == "getitem" else state


@emits("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average_pool(writer: Nodes, state: State) -> int | None:
    call = state.call
    dims = int(call.op[-2])
    window = each(call.get(1, "kernel_size", 1), dims)
    stride = each(call.get(2, "stride", None) or window, dims)
    padding = each(call.get(3, "padding", 0), dims)
    inside = call.get(5, "count_include_pad", True)
    if call.get(4, "ceil_mode", False) or call.get(6, "divisor_override", None) is not None:
        return None
    axes = []
    for n, k, s, p in zip(state.parents[0].shape[-dims:], window, stride, padding, strict=True):
        axes.append(
            [
                (i * s - p, i * s - p + k, k if inside else 0)
                for i in range((n + 2 * p - k) // s + 1)
            ]
        )
    gain = _schur(axes, state.parents[0].shape[-dims:])
    return writer.node(
        "average_pool",
        state,
        window=window,
        stride=stride,
        padding=[[n, n] for n in padding],
        count_padding=inside,
        gain=gain,
    )


@emits(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def _adaptive_pool(writer: Nodes, state: State) -> int | None:
    dims = int(state.call.op[-2])
    sizes, outputs = state.parents[0].shape[-dims:], state.shape[-dims:]
    axes = [
        [(i * n // m, -(-(i + 1) * n // m), 0) for i in range(m)]
        for n, m in zip(sizes, outputs, strict=True)
    ]
    gain = _schur(axes, sizes)
    return writer.node("adaptive_average_pool", state, outputs=list(outputs), gain=gain)


def _schur(axes: list[list[tuple[int, int, int]]], sizes: Sequence[int]) -> float:
    """The root of row sums times column sums, axis by axis, of means of windows."""
    square = 1.0
    for windows, n in zip(axes, sizes, strict=True):
        matrix = torch.zeros(len(windows), n, dtype=torch.float64)
        for row, (a, b, count) in zip(matrix, windows, strict=True):
            row[max(a, 0) : b] = 1.0 / (count or min(b, n) - max(a, 0))
        square *= float(matrix.sum(0).max()) * float(matrix.sum(1).max())
    return square_gain(square)
