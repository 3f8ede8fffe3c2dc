"""Rules of choices by a constant: masks, indices, and windows of an input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._advice import ADVICE
from orthonet.certify._function_rules import each_repeated
from orthonet.certify._rules import (
    COPY,
    BatchDependent,
    Call,
    Operand,
    Step,
    exact,
    register_rule,
    scalar_rounding,
)
from orthonet.linalg._rounding import sqrt_up

__all__: list[str] = []


@register_rule("where", "masked_fill")
def _choose(call: Call) -> Step:
    """Entries of one operand or the other, by a mask that does not see the input."""
    places = (1, 2) if call.op == "where" else (0, 2)
    mask = call.args[0 if call.op == "where" else 1]
    if isinstance(mask, Operand) or len(call.args) < 3:
        call.refuse("the mask of a choice must be a constant", ADVICE["where"])
    rounding = scalar_rounding(call, *(call.args[place] for place in places))
    return Step(each_repeated(call), "choice by a constant mask", "hypot", rounding)


@register_rule("gather")
def _gather(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    (place,) = call.feature_dims(call.get(1, "dim", 0))
    index: Any = call.get(2, "index", None)
    if isinstance(index, BatchDependent) and index.rows:
        index = index.value[:1]
    if not isinstance(index, Tensor) or len(index) != 1:
        call.refuse(
            "an index must be constant, and the same for every sample",
            "Use torch.index_select with a constant index, or index.expand(len(x), ...)",
        )
    index = index[0].cpu().movedim(place, 0)
    seen = torch.zeros(call.operand.shape[place], *index.shape[1:])
    seen.scatter_add_(0, index, torch.ones(()).expand(index.shape))
    most = int(seen.max()) if seen.numel() else 0
    return exact(sqrt_up(most), "selection, repeated at most so often", COPY)


@register_rule("tril", "triu")
def _triangle(call: Call) -> Step:
    if len(call.operand.shape) < 2:
        call.refuse("dim 0 must stay the batch", "Take the triangle of feature dims")
    return exact(1.0, "selection", COPY)


@register_rule("unfold")
def _windows(call: Call) -> Step:
    (place,) = call.feature_dims(call.get(1, "dimension", 0))
    ones = torch.arange(call.operand.shape[place])
    windows = ones.unfold(0, call.get(2, "size", 1), call.get(3, "step", 1))
    return _overlap(windows.flatten().bincount())


@register_rule("im2col", "col2im")
def _patches(call: Call) -> Step:
    """Patches of an image, or their sum in one: adjoint maps."""
    image = call.operand.shape if call.op == "im2col" else call.output_shape
    if len(image) != 3:
        call.refuse("the input must have a batch dimension", "Add it, so that none is mistaken")
    geometry = call.args[1:] if call.op == "im2col" else call.args[2:]
    ones = torch.ones(1, *image, dtype=torch.float64)
    counts = F.fold(F.unfold(ones, *geometry), image[1:], *geometry)
    step = _overlap(counts)
    return step if call.op == "im2col" else step._replace(roundings=float(counts.max()))


def _overlap(counts: Tensor) -> Step:
    most = int(counts.max()) if counts.numel() else 0
    return exact(sqrt_up(most), f"windows, {most} over an entry at most", COPY)
