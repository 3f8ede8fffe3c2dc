"""The operations of the file as functions, for what is measured on its graph.

They are definitions of the format, in float64 by PyTorch. No claim rests on them: the checker has
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AFFINE", "FUNCTIONS", "affine"]

Node = Mapping[str, Any]
Constants = Mapping[str, Tensor]


def _number(node: Node, key: str) -> float:
    return float.fromhex(node[key])


def _convolution(node: Node, x: Tensor, get: Constants) -> Tensor:
    flat = [n for pair in reversed(node["padding"]) for n in pair]
    if any(flat):
        mode = "circular" if node["circular"] else "constant"
        x = F.pad(x, flat, mode=mode)
    weight = get[node["weight"]]
    run = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return run(x, weight, None, node["stride"], 0, node["dilation"], node["groups"])


def _batch_norm(node: Node, x: Tensor, get: Constants) -> Tensor:
    weight, bias = (get[node[k]] if k in node else None for k in ("weight", "bias"))
    mean, variance = get[node["mean"]], get[node["variance"]]
    return F.batch_norm(x, mean, variance, weight, bias, eps=_number(node, "eps"))


def _pad(node: Node, x: Tensor, get: Constants) -> Tensor:
    for dim, (a, b) in enumerate(node["amounts"], 1):
        n = x.shape[dim]
        places = torch.arange(-a, n + b)
        if node["mode"] == "constant":
            shape = [*x.shape]
            parts = [x]
            for size, at in ((a, 0), (b, 2)):
                shape[dim] = size
                fill = torch.full(shape, _number(node, "value"), dtype=x.dtype)
                parts.insert(0 if at == 0 else len(parts), fill)
            x = torch.cat(parts, dim)
            continue
        if node["mode"] == "wrap":
            places = places % n
        elif node["mode"] == "edge":
            places = places.clamp(0, n - 1)
        else:
            places = (n - 1) - (places % max(1, 2 * n - 2) - (n - 1)).abs()
        x = x.index_select(dim, places)
    return x


def _average_pool(node: Node, x: Tensor, get: Constants) -> Tensor:
    dims = len(node["window"])
    run = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    lead = x.shape[: x.ndim - dims]
    padding = [a for a, _ in node["padding"]]
    flat = x.reshape(-1, 1, *x.shape[x.ndim - dims :])
    y = run(flat, node["window"], node["stride"], padding, False, node["count_padding"])
    return y.reshape(*lead, *y.shape[2:])


def _adaptive(node: Node, x: Tensor, get: Constants) -> Tensor:
    dims = len(node["outputs"])
    run = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    lead = x.shape[: x.ndim - dims]
    y = run(x.reshape(-1, 1, *x.shape[x.ndim - dims :]), node["outputs"])
    return y.reshape(*lead, *y.shape[2:])


def _slice(node: Node, x: Tensor, get: Constants) -> Tensor:
    places = torch.arange(node["start"], node["stop"], node["step"])
    return x.index_select(node["dim"] + 1, places)


def _mean(node: Node, x: Tensor, get: Constants) -> Tensor:
    dims = [d + 1 for d in node["dims"]]
    return x.sum(dims) if node["sum"] else x.mean(dims)


def _diagonal(node: Node, x: Tensor, get: Constants) -> Tensor:
    factors = get[node["factors"]]
    return x / factors if node["divide"] else x * factors


def _bias(y: Tensor, node: Node, get: Constants, dims: int) -> Tensor:
    return y + get[node["bias"]][(slice(None), *[None] * dims)] if "bias" in node else y


_ONE: dict[str, Callable[[Node, Tensor, Constants], Tensor]] = {
    "affine": lambda n, x, g: _bias(F.linear(x, g[n["weight"]]), n, g, 0),
    "convolution": lambda n, x, g: _bias(_convolution(n, x, g), n, g, x.ndim - 2),
    "reshape": lambda n, x, g: x.reshape(len(x), *n["into"]),
    "permute": lambda n, x, g: x.permute(0, *(d + 1 for d in n["dims"])),
    "flip": lambda n, x, g: x.flip(n["dim"] + 1),
    "roll": lambda n, x, g: x.roll(n["shift"], n["dim"] + 1),
    "slice": _slice,
    "pad": _pad,
    "scale": lambda n, x, g: x * _number(n, "factor"),
    "shift": lambda n, x, g: x + g[n["offset"]],
    "diagonal": _diagonal,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "average_pool": _average_pool,
    "adaptive_average_pool": _adaptive,
}
AFFINE = (*_ONE, "add", "concatenate")
"""The affine operations of the file."""


def affine(node: Node, xs: Sequence[Tensor], constants: Constants, linear: bool = False) -> Tensor:
    """An affine operation on a batch, (N, *); with `linear` without what it adds."""
    op = node["op"]
    if op == "add":
        factors = map(float.fromhex, node["factors"])
        return sum((f * x for f, x in zip(factors, xs, strict=True)), torch.zeros(()).double())
    if op == "concatenate":
        return torch.cat(list(xs), node["dim"] + 1)
    if linear and op == "shift":
        return xs[0]
    if linear:
        zeros = {"mean": torch.zeros_like(constants[node["mean"]])} if op == "batch_norm" else {}
        node = {k: v for k, v in node.items() if k != "bias"} | {k: k for k in zeros}
        node = node | {"value": (0.0).hex()} if op == "pad" else node
        constants = {**constants, **zeros}
    return _ONE[op](node, xs[0], constants)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "selu": F.selu,
    "softshrink": F.softshrink,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "clamp": torch.clamp,
    "clamp_min": lambda x, a: torch.clamp(x, min=a),
    "clamp_max": lambda x, b: torch.clamp(x, max=b),
}
"""The activations of the file."""
