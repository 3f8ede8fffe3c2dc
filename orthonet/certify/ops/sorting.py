"""Sorting, reflections and the other activations of vectors of `orthonet.functional`."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from orthonet import functional, layers
from orthonet.certify.mlp.slopes import Activation
from orthonet.certify.ops.activations import activation_of
from orthonet.certify.ops.entries import group_entries
from orthonet.certify.ops.registry import constant, op
from orthonet.certify.ops.suprema import SUPREMA
from orthonet.certify.rules import COPY, Call, Step, exact

__all__: list[str] = []


def _max_min_slopes(call: Call, width: int) -> Activation | None:
    return activation_of(layers.MaxMin(call["dim"]), width)


def _group_slopes(call: Call, width: int) -> Activation | None:
    return activation_of(layers.GroupSort(call["group_size"], call["dim"]), width)


def _reflection_slopes(call: Call, width: int) -> Activation | None:
    theta = call.fixed("theta")
    module = layers.HouseholderActivation(2 * len(theta), call["dim"])
    module = module.double().requires_grad_(False)
    module.theta.copy_(theta)
    return activation_of(module, width)


def _even(f: Any) -> Any:
    """On the first feature dim, if its size is even."""
    return lambda draw, shape: f if shape[0] % 2 == 0 else None


def _reflection_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if shape[0] % 2:
        return None
    theta = constant(draw, shape[0] // 2)
    return lambda x, y: functional.householder(x, theta, 1)


def _halves(call: Call, values: Tensor) -> Tensor:
    """The larger one of each pair of channels, one of either half, for both."""
    first, second = values.chunk(2, call["dim"])
    top = torch.maximum(first, second)
    return torch.cat([top, top], call["dim"])


def _groups(call: Call, values: Tensor) -> Tensor:
    dim, size = call["dim"] % values.ndim, call["group_size"]
    groups = values.unflatten(dim, (-1, size))
    return groups.amax(dim + 1, keepdim=True).expand_as(groups).flatten(dim, dim + 1)


def _lengths(call: Call, values: Tensor) -> Tensor:
    """The length of each pair: a reflection keeps it."""
    first, second = values.chunk(2, call["dim"])
    length = torch.hypot(first, second)
    return torch.cat([length, length], call["dim"])


def _sorted(call: Call) -> Step:
    """1-Lipschitz whatever the pairs are, as long as they lie within one sample."""
    if call.op == "householder":
        call.fixed("theta")
    call.feature_dims(call["dim"])
    return exact(1.0, "by construction", 16.0 if call.op == "householder" else COPY)


op(
    functional.max_min,
    reads=("dim",),
    slopes=_max_min_slopes,
    entries=group_entries(_halves),
    samples=_even(lambda x, y: functional.max_min(x, 1)),
)(_sorted)
op(
    functional.group_sort,
    reads=("dim", "group_size"),
    slopes=_group_slopes,
    entries=group_entries(_groups),
    samples=_even(lambda x, y: functional.group_sort(x, 2, 1)),
)(_sorted)
op(
    functional.householder,
    reads=("theta", "dim"),
    slopes=_reflection_slopes,
    entries=group_entries(_lengths),
    samples=_reflection_samples,
)(_sorted)


@op(
    functional.absolute,
    slopes=lambda call, width: activation_of(layers.Abs(), width),
    samples=lambda draw, shape: lambda x, y: functional.absolute(x),
)
def _absolute(call: Call) -> Step:
    call.operand  # noqa: B018
    return exact(max(map(abs, SUPREMA["abs"])), "by construction", COPY)
