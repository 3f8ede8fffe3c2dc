"""Rules of functions and methods that act on entries, or only move, add or select them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify._norms import matrix_norm
from orthonet.certify._rules import (
    COPY,
    REARRANGEMENT,
    Call,
    Operand,
    Rounding,
    Roundings,
    Step,
    exact,
    of_squares,
    register_rule,
    scalar_rounding,
    upper,
)
from orthonet.linalg._rounding import div_up, mul_up, sqrt_up, up

__all__ = ["amplification", "each_repeated"]

_ONE = Bound(1.0, kind="exact")

# The supremum of the absolute derivative; those with many digits were enclosed by interval
# arithmetic and rounded upward.
_SLOPES = {
    "relu": 1.0,
    "relu6": 1.0,
    "abs": 1.0,
    "neg": 1.0,
    "tanh": 1.0,
    "hardtanh": 1.0,
    "sin": 1.0,
    "cos": 1.0,
    "atan": 1.0,
    "softshrink": 1.0,
    "logsumexp": 1.0,
    "log_sigmoid": 1.0,
    "asinh": 1.0,
    "sigmoid": 0.25,
    "hardsigmoid": 0.16666667164,  # torch takes the float32 of 1 / 6
    "hardswish": 1.5,
    "silu": 1.0998393238,
    "mish": 1.0884981641,
    "erf": 1.1283791671,
    "selu": up(1.0507009873554805 * 1.6732632423543772),
}


def amplification(call: Call) -> float:
    """What the repetition of entries by broadcasting alone does to the norm of the operand."""
    inside, outside = math.prod(call.operand.shape), math.prod(call.output_shape)
    return 1.0 if outside <= inside else sqrt_up(div_up(outside, inside))


_EXACT = {"relu", "abs", "neg", "hardtanh", "relu6"}
_SMOOTH = 64.0
"""Roundings that an elementary function of a math library is taken to need, a few ulp in truth."""


@register_rule(*sorted(_SLOPES.keys() - {"logsumexp"}))
def _elementwise(call: Call) -> Step:
    roundings: Roundings = COPY if call.op in _EXACT else _SMOOTH
    if call.op == "hardtanh":
        roundings = scalar_rounding(call, *call.args[1:], *call.kwargs.values())
    return exact(mul_up(_SLOPES[call.op], amplification(call)), "largest slope", roundings)


@register_rule(F.softsign, F.tanhshrink)
def _written_in_python(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    return exact(1.0, "largest slope", _SMOOTH)


@register_rule("logsumexp")
def _log_sum_exp(call: Call) -> Step:
    call.feature_dims(call.get(1, "dim", None))
    return exact(1.0, "gradient is a distribution", _SMOOTH + math.prod(call.operand.shape))


@register_rule("gelu")
def _gelu(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    tanh = call.get(1, "approximate", "none") == "tanh"
    return exact(1.1289930725 if tanh else 1.1289041479, "largest slope", _SMOOTH)


@register_rule("leaky_relu", "rrelu", "elu", "celu", "softplus", "clamp", "prelu")
def _with_parameter(call: Call) -> Step:
    slopes, roundings = [1.0], _ROUNDINGS.get(call.op, _SMOOTH)
    if call.op == "leaky_relu":
        slopes.append(abs(_number(call, 1, "negative_slope", 0.01)))
    elif call.op == "rrelu":
        slopes += [abs(_number(call, 1, "lower", 1 / 8)), abs(_number(call, 2, "upper", 1 / 3))]
    elif call.op == "elu":
        alpha = abs(_number(call, 1, "alpha", 1.0))
        outside, inside = (_number(call, i, n, 1.0) for i, n in ((2, "scale"), (3, "input_scale")))
        slopes = [abs(outside), mul_up(abs(outside), alpha, abs(inside))]
    elif call.op == "celu" and _number(call, 1, "alpha", 1.0) <= 0:
        call.refuse("celu must have a positive alpha", "Use alpha > 0")
    elif call.op == "softplus":
        if _number(call, 1, "beta", 1.0) <= 0 or _number(call, 2, "threshold", 20.0) < 20:
            call.refuse(
                "softplus must have beta > 0 and threshold >= 20, for it jumps at the threshold",
                "Use the default threshold",
            )
        roundings = _softplus_rounding(call)
    elif call.op == "prelu":
        slopes.append(float(call.constant(1, "weight").abs().max()))
    elif call.op == "clamp":
        roundings = scalar_rounding(call, *call.args[1:], *call.kwargs.values())
    return exact(mul_up(max(slopes), amplification(call)), "largest slope", roundings)


_ROUNDINGS: dict[str, Roundings] = {"leaky_relu": 2.0, "rrelu": 2.0, "prelu": 2.0}


def _softplus_rounding(call: Call) -> Callable[[Callable[..., float]], Rounding]:
    """Beyond the rounding of log1p(exp(x)), the jump to x at the threshold, below float32's."""
    beta, threshold = _number(call, 1, "beta", 1.0), _number(call, 2, "threshold", 20.0)
    root = math.sqrt(float(math.prod(call.output_shape))) * (1.0 + 2.0**-40)
    jump = math.log1p(math.exp(-threshold)) / beta * (1.0 + 2.0**-40)

    def rounding(relative: Callable[..., float]) -> Rounding:
        # |softplus(x)| is at most |x| + log(2) / beta, and the gain adds |x| once more.
        return Rounding(_SMOOTH, 2.0, root * (0.7 / beta + jump / relative(_SMOOTH)))

    return rounding


def _number(call: Call, position: int, name: str, default: float) -> float:
    value = call.get(position, name, default)
    if not isinstance(value, (int, float)):
        call.refuse(f"argument {name!r} must be a number", "Use a constant of the model")
    return float(value)


@register_rule("softmax", "log_softmax")
def _softmax(call: Call) -> Step:
    dim = call.get(1, "dim", None)
    if not isinstance(dim, int):
        call.refuse("softmax must name its dim", "Pass dim=1 or another feature dimension")
    (place,) = call.feature_dims(dim)
    # With the differences d to the largest entry, sum softmax d <= log n: what d rounds is bounded.
    count = call.operand.shape[place]
    rows = math.prod(call.operand.shape) // max(1, count)
    offset = math.sqrt(rows) * (3.0 + 2.0 * math.log(max(1, count)))
    if call.op == "softmax":
        rounding = Rounding(count + 140.0, 0.0, offset)
        return exact(0.5, "largest Jacobian of softmax", rounding)
    offset, size = offset * math.sqrt(count), 2.0 + 2.0 * math.sqrt(count)
    rounding = Rounding(count + 140.0, size, offset)
    return exact(sqrt_up(count), "largest Jacobian of log-softmax", rounding)


@register_rule("hypot")
def _hypot(call: Call) -> Step:
    if len(call.operands) == 1:
        return exact(amplification(_first(call)), "the length of a pair", _SMOOTH)
    return Step(each_repeated(call), "the length of a pair", "hypot", roundings=_SMOOTH)


def each_repeated(call: Call) -> tuple[Bound, ...]:
    """What the repetition of entries alone does to the norm of each operand."""
    singles = (Call(call.op, call.path, (x,), {}, call.output_shape) for x in call.operands)
    return tuple(Bound(amplification(single), kind="exact") for single in singles)


@register_rule("lerp")
def _lerp(call: Call) -> Step:
    weight = call.constant(2, "weight")
    gains = []
    for value, factor in zip(call.args[:2], ((1.0 - weight).abs(), weight.abs()), strict=True):
        if isinstance(value, Operand):
            single = Call(call.op, call.path, (value,), {}, call.output_shape)
            # 1 - weight was rounded once
            size = mul_up(float(factor.max()), up(1.0 + 2.0**-52), amplification(single))
            gains.append(Bound(size))
    return Step(tuple(gains), "weighted mean", roundings=4.0)


@register_rule(
    "reshape", "view", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "contiguous",
    "clone", "detach", "alias", "lift_fresh_copy", "permute", "transpose", "movedim",
    "t", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "positive", "pos", "float",
    "double", "to", "type_as", "view_as", "reshape_as",
)  # fmt: skip
def _rearrange(call: Call) -> Step:
    # That the batch stays where it is and whole is checked for every operation by its shapes.
    first = call.get(0, "input", None)
    if call.op == "view" and isinstance(call.get(1, "dtype", None), torch.dtype):
        call.refuse("the bits of a tensor must not be read as another dtype", "Use x.to(dtype)")
    if not isinstance(first, Operand):
        call.refuse("the tensor to rearrange must be the first argument", "Rewrite the call")
    others = (Bound(0.0, kind="exact"),) * (len(call.operands) - 1)  # only their shape or dtype
    return Step((_ONE, *others), REARRANGEMENT, roundings=COPY)


@register_rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
               "feature_alpha_dropout", "feature_dropout")  # fmt: skip
def _dropout(call: Call) -> Step:
    default = call.op in ("dropout", "dropout1d", "dropout2d", "dropout3d")
    if call.get(2, "training", call.get(2, "train", default)) is not False:
        call.refuse(
            "dropout must be switched off",
            "Pass training=self.training and call model.eval()",
        )
    return Step((_ONE,), REARRANGEMENT, roundings=COPY)


@register_rule("flip", "roll", "sort", "amax", "amin", "max", "min", "topk", "narrow", "select",
               "maximum", "minimum", "diagonal")  # fmt: skip
def _select(call: Call) -> Step:
    if call.op in ("max", "min", "maximum", "minimum") and len(call.operands) == 2:
        return Step(each_repeated(call), "larger or smaller of two", "hypot", COPY)
    if call.op in ("maximum", "minimum"):
        rounding = scalar_rounding(call, *call.args)
        return upper(
            amplification(_first(call)), "larger or smaller of it and a constant", rounding
        )
    default: Any = None
    position, name = 1, "dim"
    if call.op == "flip":  # x.flip(1, 2) and x.flip((1, 2))
        dims = call.get(1, "dims", ())
        call.feature_dims(call.args[1:] if isinstance(dims, int) else dims)
        return exact(1.0, "selection or order", COPY)
    if call.op == "roll":
        position, name = 2, "dims"
    elif call.op == "diagonal":
        call.feature_dims((call.get(2, "dim1", 0), call.get(3, "dim2", 1)))
        return exact(1.0, "selection or order", COPY)
    elif call.op in ("sort", "topk"):
        position, default = (1 if call.op == "sort" else 2), -1
    elif isinstance(call.get(1, "dim", None), Tensor):  # torch.max(x, constant)
        rounding = scalar_rounding(call, call.get(1, "dim", None))
        return upper(amplification(call), "larger or smaller of it and a constant", rounding)
    call.feature_dims(call.get(position, name, default))
    return exact(1.0, "selection or order", COPY)


@register_rule("slice")
def _slice(call: Call) -> Step:
    call.feature_dims(call.get(1, "dim", 0))
    return exact(1.0, "selection", COPY)


@register_rule("index", "index_select")
def _index(call: Call) -> Step:
    if call.op == "index_select":
        places = {call.feature_dims(call.get(1, "dim", 0))[0]: call.get(2, "index", None)}
    else:
        listed = enumerate(call.get(1, "indices", ()))
        places = {dim - 1: index for dim, index in listed if index is not None}
    ((place, index),) = places.items() if len(places) == 1 else ((-1, None),)
    if place < 0 or not isinstance(index, Tensor) or index.ndim > 1 or index.dtype != torch.int64:
        call.refuse(
            "an index must be one constant list of integers along a feature dimension",
            "Use slices, or torch.index_select with a constant index",
        )
    counts = (index.flatten() % max(1, call.operand.shape[place])).bincount(minlength=1)
    return exact(sqrt_up(int(counts.max())), "selection, repeated at most so often", COPY)


@register_rule("cumsum")
def _cumsum(call: Call) -> Step:
    (place,) = call.feature_dims(call.get(1, "dim", 0))
    size = call.operand.shape[place]
    value = matrix_norm(torch.ones(size, size, dtype=torch.float64).tril())
    return exact(value, f"triangle of ones {size}x{size}", float(size))


def _first(call: Call) -> Call:
    """The same call with its only operand in the first place, for symmetric operations."""
    if len(call.operands) == 1 and len(call.args) == 2 and call.args[1] is call.operands[0]:
        return Call(call.op, call.path, call.args[::-1], call.kwargs, call.output_shape)
    return call


@register_rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(call: Call) -> Step:
    position = 1 if call.op == "unbind" else 2
    call.feature_dims(call.get(position, "dim", 0))
    return exact(1.0, "each part of a partition", COPY)


@register_rule("expand", "expand_as", "repeat", "tile", "broadcast_to", "repeat_interleave")
def _repeat(call: Call) -> Step:
    if call.op == "expand_as" and len(call.operands) == 2:  # of the second only the shape counts
        single = Call("expand", call.path, call.args[:1], {}, call.output_shape, call.source)
        gain = Bound(amplification(single), kind="exact")
        return Step((gain, Bound(0.0, kind="exact")), "repetition", roundings=COPY)
    if call.op == "repeat_interleave" and not isinstance(call.get(1, "repeats", None), int):
        call.refuse(
            "the number of repetitions must be a constant", "Use torch.repeat_interleave(x, n, dim)"
        )
    if call.op == "repeat_interleave":
        call.feature_dims(call.get(2, "dim", None))
    return exact(amplification(call), "repetition", COPY)


@register_rule("add", "sub", "rsub")
def _add(call: Call) -> Step:
    alpha = abs(_number(call, 2, "alpha", 1.0))
    gains = []
    for place, value in enumerate(call.args[:2] if len(call.args) > 1 else call.args):
        if isinstance(value, Operand):
            scaled = alpha if place == (0 if call.op == "rsub" else 1) else 1.0
            single = Call(call.op, call.path, (value,), {}, call.output_shape)
            gains.append(Bound(mul_up(scaled, amplification(single)), kind="exact"))
    if len(gains) != len(call.operands):
        call.refuse("the terms of a sum must be positional arguments", "Write torch.add(x, y)")
    method = "shift" if len(gains) == 1 else "sum of norms"
    return Step(tuple(gains), method, roundings=2.0)


@register_rule("mul", "div")
def _scale(call: Call) -> Step:
    call = _first(call) if call.op == "mul" else call
    size = amplification(call)
    if call.kwargs.get("rounding_mode") is not None:
        call.refuse("a division must not round", "Leave out rounding_mode")
    other = call.constant(1, "other").abs()
    largest = float(other.max()) if call.op == "mul" else 0.0
    if call.op == "div":
        smallest = float(other.min())
        if smallest == 0.0:
            call.refuse("the divisor must not be zero", "Add an eps to the constant")
        largest = div_up(1.0, smallest)
    value = mul_up(largest, size)
    same = size == 1.0 or bool((other == other.amax()).all())
    return (exact if same else upper)(value, "largest factor", 1.0)


@register_rule("sum", "mean")
def _reduce(call: Call) -> Step:
    places = call.feature_dims(call.get(1, "dim", None))
    count = math.prod(call.operand.shape[place] for place in places)
    root = sqrt_up(count)
    if call.op == "sum":
        return exact(root, f"sum of {count}", float(count))
    return exact(div_up(root, count), f"mean of {count}", count + 1.0)


@register_rule("norm", "vector_norm")
def _norm(call: Call) -> Step:
    order = call.get(1, "ord" if "ord" in call.kwargs else "p", 2)
    if order not in (2, 2.0, "fro", None, math.inf):
        call.refuse("a norm must be the Euclidean one", "Use ord=2")
    places = call.feature_dims(call.get(2, "dim", None))
    count = math.prod(call.operand.shape[place] for place in places)
    rounding = of_squares(count, math.prod(call.output_shape), count)
    return exact(1.0, "a norm is 1-Lipschitz", rounding)


@register_rule("cat", "stack")
def _cat(call: Call) -> Step:
    dim = call.get(1, "dim", 0)
    parts = call.get(0, "tensors", None)
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        call.refuse("the tensors must be given as a list or tuple", "Write torch.cat([x, y], 1)")
    if dim % (len(call.output_shape) + 1) == 0:
        call.feature_dims(0)
    return Step((_ONE,) * len(call.operands), "root of the sum of squares", "hypot", COPY)
