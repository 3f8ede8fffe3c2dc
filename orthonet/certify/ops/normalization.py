r"""Normalization by stored statistics, and by the statistics of the input.

A group of n entries x with variance v is centered, divided by $\sqrt{v + \epsilon}$ and scaled.
Its mean may be computed by any order of summation or by Welford's recursion, whose means m_k err
by at most $8 u \|x\|_1$; its variance by two passes, by that recursion or as
$E x^2 - (E x)^2$, with an error of at most $\gamma_{32 n + 64} \|x\|^2 / n$. A normalization has
no bound of its rounding that is proportional to its input: that of the samples themselves counts,
whose centered norm is 1-Lipschitz in the input.

T. Chan, G. Golub, R. LeVeque, Algorithms for computing the sample variance, The American
Statistician 37 (1983).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify.ops.registry import Linear, Values, aten_name, constant, f64, op
from orthonet.certify.rules import Call, Rounding, Step, exact, upper
from orthonet.certify.walk.forms import Form, scaled
from orthonet.linalg.bounds.rounding import div_up, down, mul_up, up

__all__ = ["groups_of"]

_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself


# --- stored statistics ---------------------------------------------------------------------------


def _scale(call: Call) -> Tensor:
    """The factor of each channel."""
    scale = (call.fixed("running_var") + call.number("eps")).rsqrt()
    return scale if call["weight"] is None else scale * call.fixed("weight")


def _run(a: Values, absolute: bool) -> Any:
    scale = (f64(a["running_var"], False) + a["eps"]).rsqrt()
    if a["weight"] is not None:
        scale = scale * f64(a["weight"], absolute)
    x = a["input"]
    result = x * scale.reshape(-1, *[1] * (x.ndim - 2))
    return (result,) if "native" in aten_name(a.target) else result


def _form(state: Any, forms: list[Form]) -> Form | None:
    return scaled(forms[0], _scale(state.call), 8)


def _shift(call: Call) -> float:
    """The norm of what is added to the linear part."""
    shift = (_scale(call) * call.fixed("running_mean")).norm()
    if call["bias"] is not None:
        shift = shift + call.fixed("bias").norm()
    return float(shift) * math.sqrt(math.prod(call.output_shape[1:])) * _SAFE


def _stored_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) < 2:
        return None
    mean, bias, weight = (constant(draw, shape[0]) for _ in range(3))
    variance = constant(draw, shape[0]).square()
    return lambda x, y: F.batch_norm(x, mean, variance, weight, bias, eps=0.1)


@op(
    "batch_norm.default",
    "_native_batch_norm_legit_no_training.default",
    reads=("weight", "running_mean", "running_var", "training", "eps"),
    free=("bias", "momentum", "cudnn_enabled"),
    kernel=_form,
    offset=_shift,
    linear=Linear(
        _run,
        lambda state: 12,
        scales=lambda call: [(call.fixed("running_var") + call.number("eps")).rsqrt()],
        when=lambda call: len(call.operands) == 1 and call["running_var"] is not None,
    ),
    samples=_stored_samples,
)
def _batch_norm(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    if call.flag("training") or call["running_var"] is None:
        call.refuse(
            "normalization must use running statistics, not batch statistics",
            "Use track_running_stats=True and train it again",
        )
    return _stored(call)


def _stored(call: Call) -> Step:
    variance = call.fixed("running_var") + call.number("eps")
    if not bool((variance > 0).all()):
        call.refuse("running_var + eps must be positive", "Use a positive eps")
    call.fixed("running_mean")
    # Four roundings of a non-negative number.
    value = mul_up(float(_scale(call).abs().max()), up(1.0 + 2.0**-49))
    return exact(value, "diagonal of running statistics", 6.0)


_BATCH = (
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
    "use_input_stats",
    "cudnn_enabled",
)


@op(
    "_native_batch_norm_legit.default",
    "_native_batch_norm_legit.no_stats",
    "native_batch_norm.default",
    "_batch_norm_impl_index.default",
    reads=_BATCH,
)
def _batch_statistics(call: Call) -> Step:
    call.refuse(
        "normalization must use running statistics, not batch statistics",
        "Use track_running_stats=True and train it again",
    )


# --- statistics of the input ---------------------------------------------------------------------


def _normalization_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    weight, eps = constant(draw, shape[-1]), draw.choice([1e-1, 1e-3, 1.0])
    groups = draw.choice([g for g in (1, 2) if shape[0] % g == 0])
    options = [
        lambda x, y: F.layer_norm(x, shape[-1:], weight, None, eps),
        lambda x, y: F.rms_norm(x, shape[-1:], weight, eps),
        lambda x, y: F.layer_norm(x, shape, eps=eps),
    ]
    if len(shape) > 1:
        options += [
            lambda x, y: F.group_norm(x, groups, eps=eps),
            lambda x, y: F.instance_norm(x, eps=eps),
        ]
    return draw.choice(options) if math.prod(shape[1:]) > 1 else None


@op(
    "layer_norm.default",
    "group_norm.default",
    "instance_norm.default",
    "rms_norm.default",
    reads=(
        "normalized_shape",
        "num_groups",
        "weight",
        "running_mean",
        "running_var",
        "use_input_stats",
        "eps",
    ),
    free=("bias", "momentum", "cudnn_enable", "cudnn_enabled"),
    samples=_normalization_samples,
    error=lambda *args: _error(*args),
)
def _normalization(call: Call) -> Step:
    """Centering is a projection, and x / sqrt(mean(x^2) + eps) has slope at most 1 / sqrt(eps)."""
    call.operand  # noqa: B018 (refuses a second one)
    eps = call["eps"]
    if not isinstance(eps, (int, float)) or eps <= 0.0:
        call.refuse("a normalization must have a positive eps", "Pass a fixed eps, such as 1e-5")
    if call.op == "instance_norm" and not call["use_input_stats"]:
        step = _stored(call)
        offset = _shift(call)
        rounding = Rounding(8.0, step.gains[0].value, offset)
        return step._replace(roundings=rounding)
    gain = 1.0 if call["weight"] is None else float(call.fixed("weight").abs().max())
    root = down(math.sqrt(eps))
    return upper(mul_up(gain, div_up(1.0, root)), "1 / sqrt(eps): normalizing a small input")


def _error(
    call: Call, values: Tensor, near: Tensor, error: Tensor, relative: Callable[[float], float]
) -> Tensor | None:
    """The error (N,) of a normalization of inputs within `near` (N,) of `values`.

    `error` is that of its input; it grows by the slope that the normalization has there.
    None if the operation is none, or takes statistics that were stored.
    """
    groups = groups_of(call, values)
    if groups is None:
        return None
    centered = call.op != "rms_norm"
    n = groups.shape[-1]
    near = near[:, None]
    length = torch.linalg.vector_norm(groups, dim=-1) * _SAFE + near
    rest = groups - groups.mean(-1, keepdim=True) if centered else groups
    # The float64 mean errs by far less than 2^-40 of the length.
    apart = torch.linalg.vector_norm(rest, dim=-1) - near - length * 2.0**-40
    variance = (apart.clamp_min(0.0).square() / n + call.number("eps")) / _SAFE
    spread = relative(32.0 * n + 64.0) if centered else relative(n + 8.0)
    shifted = relative(8.0 * n + 16.0) if centered else relative(8.0)
    share = spread * length.square() / n / variance  # relative, of the variance that is computed
    share = torch.where(share < 0.5, share, math.inf)
    each = 2.0 * shifted * length / variance.sqrt() + share * math.sqrt(n)
    weight, bias = (
        None if call.given(name) is None else call.fixed(name) for name in ("weight", "bias")
    )
    gain = 1.0 if weight is None else float(weight.abs().max())
    entries = values[0].numel()
    offset = 0.0
    if bias is not None:
        offset = float(bias.norm()) * math.sqrt(entries / bias.numel())
    rounded = relative(8.0) * (gain * math.sqrt(entries) + offset)
    slope = variance.amin(-1).rsqrt()
    own = torch.linalg.vector_norm(each, dim=-1)
    return (gain * (own + slope * error) + rounded) * _SAFE


def groups_of(call: Call, values: Tensor) -> Tensor | None:
    """The entries that are normalized together, (N, groups, n)."""
    if call.op in ("layer_norm", "rms_norm"):
        n = math.prod(call["normalized_shape"])
        return values.reshape(len(values), -1, n)
    if call.op == "group_norm":
        return values.reshape(len(values), call["num_groups"], -1)
    if call.op == "instance_norm" and call["use_input_stats"]:
        return values.flatten(2)
    return None
