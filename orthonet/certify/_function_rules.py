"""Rules of functions and methods that act on entries, or only move, add or select them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthonet import functional
from orthonet.certify._bound import Bound
from orthonet.certify._rules import REARRANGEMENT, Call, Operand, Step, exact, register_rule, upper
from orthonet.linalg._rounding import add_up, div_up, down, mul_up, sqrt_up, up
from orthonet.linalg.enclosure import spectral_norm_bound

__all__ = ["amplification"]

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
    "softsign": 1.0,
    "softshrink": 1.0,
    "tanhshrink": 1.0,
    "logsigmoid": 1.0,
    "log_sigmoid": 1.0,
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


@register_rule(*_SLOPES)
def _elementwise(call: Call) -> Step:
    return exact(mul_up(_SLOPES[call.op], amplification(call)), "largest slope")


@register_rule("gelu")
def _gelu(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    tanh = call.get(1, "approximate", "none") == "tanh"
    return exact(1.1289930725 if tanh else 1.1289041479, "largest slope")


@register_rule("leaky_relu", "rrelu", "elu", "celu", "softplus", "clamp", "prelu")
def _with_parameter(call: Call) -> Step:
    slopes = [1.0]
    if call.op == "leaky_relu":
        slopes.append(abs(_number(call, 1, "negative_slope", 0.01)))
    elif call.op == "rrelu":
        slopes += [abs(_number(call, 1, "lower", 1 / 8)), abs(_number(call, 2, "upper", 1 / 3))]
    elif call.op == "elu":
        slopes.append(abs(_number(call, 1, "alpha", 1.0)))
        if not isinstance(call.get(2, "scale", False), bool) or "input_scale" in call.kwargs:
            call.refuse("elu is certified without a scale", "Multiply its output instead")
    elif call.op == "celu" and _number(call, 1, "alpha", 1.0) <= 0:
        call.refuse("celu must have a positive alpha", "Use alpha > 0")
    elif call.op == "softplus":
        if _number(call, 1, "beta", 1.0) <= 0 or _number(call, 2, "threshold", 20.0) < 20:
            call.refuse(
                "softplus must have beta > 0 and threshold >= 20, for it jumps at the threshold",
                "Use the default threshold",
            )
    elif call.op == "prelu":
        slopes.append(float(call.constant(1, "weight").abs().max()))
    return exact(mul_up(max(slopes), amplification(call)), "largest slope")


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
    if call.op == "softmax":
        return exact(0.5, "largest Jacobian of softmax")
    return exact(sqrt_up(call.operand.shape[place]), "largest Jacobian of log-softmax")


@register_rule(
    "reshape", "view", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "contiguous",
    "clone", "detach", "alias", "permute", "transpose", "movedim", "t", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "positive", "pos", "float",
    "double", "to", "type_as",
)  # fmt: skip
def _rearrange(call: Call) -> Step:
    # That the batch stays where it is and whole is checked for every operation by its shapes.
    first = call.get(0, "input", None)
    if call.op == "view" and isinstance(call.get(1, "dtype", None), torch.dtype):
        call.refuse("the bits of a tensor must not be read as another dtype", "Use x.to(dtype)")
    if not isinstance(first, Operand):
        call.refuse("the tensor to rearrange must be the first argument", "Rewrite the call")
    others = (Bound(0.0, kind="exact"),) * (len(call.operands) - 1)  # only their shape or dtype
    return Step((_ONE, *others), REARRANGEMENT)


@register_rule(getattr)
def _attribute(call: Call) -> Step:
    if call.args[1] not in ("data", "T", "mT", "real"):
        call.refuse(
            f"the attribute {call.args[1]!r} of a tensor has no rule", "Use a function of torch"
        )
    return Step((_ONE,), REARRANGEMENT)


@register_rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
               "feature_alpha_dropout", "feature_dropout")  # fmt: skip
def _dropout(call: Call) -> Step:
    default = call.op in ("dropout", "dropout1d", "dropout2d", "dropout3d")
    if call.get(2, "training", call.get(2, "train", default)) is not False:
        call.refuse(
            "dropout must be switched off",
            "Pass training=self.training and call model.eval()",
        )
    return exact(1.0, "identity in eval mode")


@register_rule("flip", "roll", "sort", "amax", "amin", "max", "min", "topk", "narrow", "select",
               "index_select", "maximum", "minimum", "cummax", "cummin")  # fmt: skip
def _select(call: Call) -> Step:
    if call.op in ("max", "min", "maximum", "minimum") and len(call.operands) == 2:
        return Step((_ONE, _ONE), "larger or smaller of two", "hypot")
    if call.op in ("maximum", "minimum"):
        return upper(amplification(_first(call)), "larger or smaller of it and a constant")
    if call.op in ("index_select", "cummax", "cummin"):
        call.refuse(f"{call.op} may repeat entries", "Use a slice, or amax")
    default: Any = None
    position, name = 1, "dim"
    if call.op == "flip":  # x.flip(1, 2) and x.flip((1, 2))
        dims = call.get(1, "dims", ())
        call.feature_dims(call.args[1:] if isinstance(dims, int) else dims)
        return exact(1.0, "selection or order")
    if call.op == "roll":
        position, name = 2, "dims"
    elif call.op in ("sort", "topk"):
        position, default = (1 if call.op == "sort" else 2), -1
    elif isinstance(call.get(1, "dim", None), Tensor):  # torch.max(x, constant)
        return upper(amplification(call), "larger or smaller of it and a constant")
    call.feature_dims(call.get(position, name, default))
    return exact(1.0, "selection or order")


def _first(call: Call) -> Call:
    """The same call with its only operand in the first place, for symmetric operations."""
    if len(call.operands) == 1 and len(call.args) == 2 and call.args[1] is call.operands[0]:
        return Call(call.op, call.path, call.args[::-1], call.kwargs, call.output_shape)
    return call


@register_rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def _split(call: Call) -> Step:
    position = 1 if call.op == "unbind" else 2
    call.feature_dims(call.get(position, "dim", 0))
    return exact(1.0, "each part of a partition")


@register_rule("getitem")
def _getitem(call: Call) -> Step:
    index = call.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    whole = entries[0] is Ellipsis or entries[0] == slice(None)
    plain = all(e is None or e is Ellipsis or isinstance(e, (int, slice)) for e in entries)
    if not whole or not plain or any(isinstance(e, bool) for e in entries):
        call.refuse(
            "an index must leave the batch whole and hold only numbers, slices, None and ...",
            "Write x[:, a:b]; a list of indices may repeat an entry",
        )
    return exact(1.0, "selection")


@register_rule("expand", "repeat", "tile", "broadcast_to")
def _repeat(call: Call) -> Step:
    return exact(amplification(call), "repetition")


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
    return Step(tuple(gains), "shift" if len(gains) == 1 else "sum of norms")


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
    return exact(mul_up(largest, size), "largest factor")


@register_rule("sum", "mean")
def _reduce(call: Call) -> Step:
    places = call.feature_dims(call.get(1, "dim", None))
    count = math.prod(call.operand.shape[place] for place in places)
    root = sqrt_up(count)
    if call.op == "sum":
        return exact(root, f"sum of {count}")
    return exact(div_up(root, count), f"mean of {count}")


@register_rule("norm", "vector_norm")
def _norm(call: Call) -> Step:
    order = call.get(1, "ord" if "ord" in call.kwargs else "p", 2)
    if order not in (2, 2.0, "fro", None, math.inf):
        call.refuse("a norm must be the Euclidean one", "Use ord=2")
    call.feature_dims(call.get(2, "dim", None))
    return exact(1.0, "a norm is 1-Lipschitz")


@register_rule("cat", "stack")
def _cat(call: Call) -> Step:
    dim = call.get(1, "dim", 0)
    parts = call.get(0, "tensors", None)
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        call.refuse("the tensors must be given as a list or tuple", "Write torch.cat([x, y], 1)")
    if dim % (len(call.output_shape) + 1) == 0:
        call.feature_dims(0)
    return Step((_ONE,) * len(call.operands), "root of the sum of squares", "hypot")


@register_rule("linear", "matmul", "mm", "addmm")
def _linear(call: Call) -> Step:
    if call.op == "addmm":
        if call.kwargs:
            call.refuse("addmm must have no factors", "Leave out beta and alpha")
        call = Call(call.op, call.path, call.args[1:], {}, call.output_shape)
    operand = call.operand
    weight = call.constant(1, "weight" if call.op == "linear" else "other")
    if weight.ndim != 2:
        call.refuse(
            "the factor of a matrix product must be a constant matrix",
            "Use torch.nn.Linear, or one product for each matrix",
        )
    weight = weight if call.op == "linear" else weight.T
    out_features, in_features = weight.shape
    return Step(
        (Bound(spectral_norm_bound(weight), kind="exact"),),
        f"matrix {out_features}x{in_features}, verified",
        rows=weight if len(operand.shape) == 1 else None,
    )


@register_rule("layer_norm", "group_norm")
def _layer_norm(call: Call) -> Step:
    eps = _number(call, 4, "eps", 1e-5)
    if eps <= 0.0:
        call.refuse("a normalization must have a positive eps", "Use the default eps=1e-5")
    weight = call.get(2, "weight", None)
    gain = 1.0 if weight is None else float(call.constant(2, "weight").abs().max())
    root = down(math.sqrt(eps))
    return upper(mul_up(gain, div_up(1.0, root)), "1 / sqrt(eps): normalizing a small input")


@register_rule(functional.max_min, functional.group_sort, functional.householder)
def _sorting(call: Call) -> Step:
    """1-Lipschitz whatever the pairs are, as long as they lie within one sample."""
    if call.op == "householder":
        call.constant(1, "theta")
    call.feature_dims(call.get(1 if call.op == "max_min" else 2, "dim", 1))
    return exact(1.0, "by construction")


@register_rule(functional.absolute, functional.space_to_depth, functional.depth_to_space)
def _permutation(call: Call) -> Step:
    call.operand  # noqa: B018
    return exact(1.0, "by construction")


@register_rule(
    functional.l2_norm_pool,
    functional.scaled_avg_pool,
    functional.global_l2_norm_pool,
    functional.global_scaled_avg_pool,
)
def _pooling(call: Call) -> Step:
    spatial = call.get(1, "kernel_size" if "global" not in call.op else "spatial", None)
    dims = spatial if isinstance(spatial, int) else len(tuple(spatial or ()))
    if len(call.operand.shape) < dims:
        call.refuse("the batch dimension must not be pooled", "Add a channel dimension")
    # The scale is a float that was computed in a few roundings.
    return upper(add_up(1.0, 2.0**-48), "by construction")
