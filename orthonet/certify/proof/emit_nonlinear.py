"""The nodes of activations, sorts and other operations that are not affine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orthonet.certify.proof.emit import dim_of, each, emits, single
from orthonet.linalg.bounds.rounding import mul_up

if TYPE_CHECKING:
    from orthonet.certify.proof.nodes import Nodes
    from orthonet.certify.walk.state import State

__all__: list[str] = []

# aten's name: the checker's, and the default values of the numbers that it takes
_ACTIVATIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "relu": ("relu", ()),
    "abs": ("abs", ()),
    "absolute": ("abs", ()),
    "tanh": ("tanh", ()),
    "sin": ("sin", ()),
    "cos": ("cos", ()),
    "atan": ("atan", ()),
    "asinh": ("asinh", ()),
    "sigmoid": ("sigmoid", ()),
    "log_sigmoid": ("log_sigmoid", ()),
    "silu": ("silu", ()),
    "mish": ("mish", ()),
    "hardswish": ("hardswish", ()),
    "hardsigmoid": ("hardsigmoid", ()),
    "selu": ("selu", ()),
    "softsign": ("softsign", ()),
    "tanhshrink": ("tanhshrink", ()),
    "leaky_relu": ("leaky_relu", (0.01,)),
    "softshrink": ("softshrink", (0.5,)),
    "Softsign": ("softsign", ()),
    "Tanhshrink": ("tanhshrink", ()),
}


_ENCLOSED = ("silu", "mish", "gelu", "gelu_tanh")
"""Their slopes are proved by halving intervals, which needs room."""


@emits(*_ACTIVATIONS)
def _activation(writer: Nodes, state: State) -> int | None:
    name, defaults = _ACTIVATIONS[state.call.op]
    given = [*state.call.args[1:], *state.call.kwargs.values()]
    if not single(state) or len(given) > len(defaults):
        return None
    numbers = [*given, *defaults[len(given) :]]
    return _function(writer, state, name, numbers)


def _function(writer: Nodes, state: State, name: str, numbers: Sequence[Any]) -> int | None:
    if not all(isinstance(n, (int, float)) for n in numbers) or state.parents[0].shape != (
        state.shape
    ):
        return None
    if not all(math.isfinite(n) for n in numbers):
        return None
    values = [float(n).hex() for n in numbers]
    gain = mul_up(writer.gain(state), 1.0 + 2.0**-20 if name in _ENCLOSED else 1.0)
    return writer.node("activation", state, function=name, parameters=values, gain=gain)


@emits("gelu")
def _gelu(writer: Nodes, state: State) -> int | None:
    tanh = state.call.get(1, "approximate", "none") == "tanh"
    return _function(writer, state, "gelu_tanh" if tanh else "gelu", ())


@emits("elu")
def _elu(writer: Nodes, state: State) -> int | None:
    call = state.call
    alpha, scale, inner = (call.get(i, n, 1.0) for i, n in _ELU)
    return _function(writer, state, "elu", (alpha,)) if scale == inner == 1.0 else None


_ELU = ((1, "alpha"), (2, "scale"), (3, "input_scale"))


@emits("hardtanh", "relu6", "clamp")
def _clamp(writer: Nodes, state: State) -> int | None:
    call = state.call
    defaults = {"hardtanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}.get(call.op, (None, None))
    names = ("min_val", "max_val") if call.op == "hardtanh" else ("min", "max")
    low, high = (call.get(i, n, d) for i, n, d in zip((1, 2), names, defaults, strict=True))
    bounds = [v for v in (low, high) if v is not None]
    name = "clamp" if len(bounds) == 2 else "clamp_min" if high is None else "clamp_max"
    return _function(writer, state, name, bounds) if bounds else None


@emits("prelu")
def _prelu(writer: Nodes, state: State) -> int | None:
    slopes = state.call.get(1, "weight", None)
    if not single(state) or not isinstance(slopes, Tensor) or not state.shape:
        return None
    if slopes.ndim > 1:  # a kernel of aten gets it in the shape of the input
        slopes = slopes.flatten() if slopes.numel() == max(slopes.shape) else slopes
    if slopes.ndim != 1 or slopes.numel() not in (1, state.shape[0]):
        return None
    return writer.node(
        "prelu", state, slopes=writer.constant(slopes, state, "weight"), gain=writer.gain(state)
    )


@emits("maximum", "minimum")
def _extremum(writer: Nodes, state: State) -> int | None:
    operands = state.call.operands
    if len(operands) != 2 or any(x.shape != state.shape for x in operands):
        return None
    places = [writer.index(x._state) for x in operands]
    return writer.add("extremum", places, state, largest=state.call.op == "maximum")


def _sort(writer: Nodes, state: State, dim: int, size: int, halves: bool, down: bool) -> int | None:
    place = dim_of(dim, state)
    if place is None:
        return None
    return writer.node(
        "sort", state, dim=place, size=size, halves=halves, descending=down, gain=1.0
    )


@emits("max_min", "MaxMin")
def _max_min(writer: Nodes, state: State) -> int | None:
    dim = writer.setting(state, 1, "dim", 1)
    return _sort(writer, state, dim, 2, halves=True, down=True)


@emits("group_sort", "GroupSort")
def _group_sort(writer: Nodes, state: State) -> int | None:
    size, dim = (
        writer.setting(state, i, n, d) for i, n, d in ((1, "group_size", 2), (2, "dim", 1))
    )
    return _sort(writer, state, dim, size, halves=False, down=False)


@emits("FullSort")
def _full_sort(writer: Nodes, state: State) -> int | None:
    dim = writer.setting(state, 1, "dim", 1)
    size = state.call.operand.shape[dim % (len(state.shape) + 1) - 1]
    return _sort(writer, state, dim, size, halves=False, down=False)


@emits("Scale")
def _factor(writer: Nodes, state: State) -> int | None:
    return writer.scale(writer.index(state.parents[0]), float(writer.leaf(state).factor), state)


@emits("LayerCentering")
def _center(writer: Nodes, state: State) -> int | None:
    dims = [dim_of(d, state) for d in each(writer.leaf(state).dim, 1)]
    return None if None in dims else writer.node("center", state, dims=dims, gain=1.0)
