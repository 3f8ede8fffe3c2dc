r"""The rounding of layer, group, instance and root-mean-square normalization.

A group of n entries x with variance v is centred, divided by $\sqrt{v + \epsilon}$ and scaled.
Its mean may be computed by any order of summation or by Welford's recursion, whose means m_k err
by at most $8 u \|x\|_1$; its variance by two passes, by that recursion or as
$E x^2 - (E x)^2$, with an error of at most $\gamma_{32 n + 64} \|x\|^2 / n$. A normalization has
no bound of its rounding that is proportional to its input: that of the samples themselves counts,
whose centred norm is 1-Lipschitz in the input.

T. Chan, G. Golub, R. LeVeque, Algorithms for computing the sample variance, The American
Statistician 37 (1983).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from orthonet.certify._rules import Call

__all__ = ["normalization_error"]

_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself


def normalization_error(
    call: Call, values: Tensor, near: Tensor, error: Tensor, relative: Callable[[float], float]
) -> Tensor | None:
    """The error (N,) of a normalization of inputs within `near` (N,) of `values`.

    `error` is that of its input; it grows by the slope that the normalization has there.
    None if the operation is none, or takes statistics that were stored.
    """
    groups = _groups(call, values)
    if groups is None:
        return None
    centred = call.op != "rms_norm"
    n = groups.shape[-1]
    near = near[:, None]
    length = torch.linalg.vector_norm(groups, dim=-1) * _SAFE + near
    rest = groups - groups.mean(-1, keepdim=True) if centred else groups
    # The float64 mean errs by far less than 2^-40 of the length.
    apart = torch.linalg.vector_norm(rest, dim=-1) - near - length * 2.0**-40
    variance = (apart.clamp_min(0.0).square() / n + _eps(call)) / _SAFE
    spread = relative(32.0 * n + 64.0) if centred else relative(n + 8.0)
    shifted = relative(8.0 * n + 16.0) if centred else relative(8.0)
    share = spread * length.square() / n / variance  # relative, of the variance that is computed
    share = torch.where(share < 0.5, share, math.inf)
    each = 2.0 * shifted * length / variance.sqrt() + share * math.sqrt(n)
    place = {"instance_norm": 1}.get(call.op, 2)
    weight, bias = (
        None if call.get(at, name, None) is None else call.constant(at, name)
        for at, name in ((place, "weight"), (place + 1, "bias"))
    )
    if call.op == "rms_norm":
        bias = None
    gain = 1.0 if weight is None else float(weight.abs().max())
    entries = values[0].numel()
    offset = 0.0
    if bias is not None:
        offset = float(bias.norm()) * math.sqrt(entries / bias.numel())
    rounded = relative(8.0) * (gain * math.sqrt(entries) + offset)
    slope = variance.amin(-1).rsqrt()
    own = torch.linalg.vector_norm(each, dim=-1)
    return (gain * (own + slope * error) + rounded) * _SAFE


def _groups(call: Call, values: Tensor) -> Tensor | None:
    """The entries that are normalized together, (N, groups, n)."""
    if call.op in ("layer_norm", "rms_norm"):
        n = math.prod(call.get(1, "normalized_shape", ()))
        return values.reshape(len(values), -1, n)
    if call.op == "group_norm":
        return values.reshape(len(values), call.get(1, "num_groups", 1), -1)
    if call.op == "instance_norm" and call.get(5, "use_input_stats", True):
        return values.flatten(2)
    return None


def _eps(call: Call) -> float:
    place = {"layer_norm": 4, "group_norm": 4, "instance_norm": 7, "rms_norm": 3}[call.op]
    return float(call.get(place, "eps", 1e-5))
