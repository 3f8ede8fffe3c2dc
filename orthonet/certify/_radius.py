"""From logits and Lipschitz constants to certified radii."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg._rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    up,
)

__all__ = ["certified_radius", "correct_within", "pairwise_constants"]

_MOST_CLASSES = 4096


def pairwise_constants(
    rows: Tensor, features: float, constant: float, error: float = 0.0
) -> Tensor | None:
    """Upper bounds of the constants of y_i - y_j for y = W h(x), h of constant `features`.

    The smaller of ||w_i - w_j|| times the bound of the features and sqrt(2) times the whole.
    `error` bounds the Frobenius norm of what W may be off.

    Shape:
        rows: (classes, in), float64; returns (classes, classes), or None beyond 4096 classes.
    """
    classes, width = rows.shape
    if not 2 <= classes <= _MOST_CLASSES:
        return None
    scale = power_of_two_scale(rows) or 1.0
    rows = rows / scale
    # One rounding of the difference, those of the sum of squares and the root; then underflow.
    relative = up(1.0 + 2.0 * gamma(width + 4))
    factor = mul_up(relative, scale, features)
    slack = mul_up(sqrt_up(width), math.sqrt(UNDERFLOW), scale, features)
    slack = add_up(slack, mul_up(up(math.sqrt(2.0)), error, features))
    cap = mul_up(up(math.sqrt(2.0)), constant)
    pairs = torch.empty(classes, classes, dtype=torch.float64)
    for i in range(classes):
        distance = torch.linalg.vector_norm(rows - rows[i], dim=1)
        bound = (distance * factor + slack) * (1.0 + 4 * UNIT_ROUNDOFF)
        # Rows that are equal bit for bit have a constant difference.
        equal = (rows == rows[i]).all(1) & (error == 0.0)
        pairs[i] = torch.where(equal, 0.0, bound.clamp(max=cap))
    return pairs


def certified_radius(
    logits: Tensor, constant: float, pairs: Tensor | None, rounding: Tensor | None = None
) -> Tensor:
    """Radii (N,) in float64, rounded downward; see `LipschitzCertificate.radius`."""
    logits = _checked(logits)
    shrink = 1.0 - 4 * UNIT_ROUNDOFF  # the roundings of a difference, a quotient, and this product
    # Two logits, at the sample and at the other point, are each off by at most the rounding.
    off = torch.zeros(len(logits), dtype=torch.float64) if rounding is None else rounding * 2.0
    off = off * (1.0 + 4 * UNIT_ROUNDOFF)
    if logits.ndim == 1:
        bound = torch.tensor(constant, dtype=torch.float64)
        return _quotient(logits.abs() - off, bound) * shrink
    classes = logits.shape[1]
    if pairs is None:
        value = mul_up(up(math.sqrt(2.0)), constant)
        pairs = torch.full((classes, classes), value, dtype=torch.float64)
    _checks.require(
        pairs.shape[0] == classes,
        "LipschitzCertificate",
        f"logits must have {pairs.shape[0]} classes",
        "Pass the output of the certified model",
        logits=logits,
    )
    top, predicted = logits.max(1)
    margin = (top[:, None] - logits) * shrink - (off * up(math.sqrt(2.0)))[:, None]
    radii = _quotient(margin, pairs[predicted]) * shrink
    radii.scatter_(1, predicted[:, None], math.inf)
    return radii.amin(1)


def _quotient(margin: Tensor, constant: Tensor) -> Tensor:
    """The quotient; a tie has radius 0 even where the constant is 0."""
    return torch.where(margin > 0, margin / constant, 0.0)


def _checked(logits: Tensor) -> Tensor:
    shaped = 1 <= logits.ndim <= 2 and logits.is_floating_point()
    _checks.require(
        shaped and (logits.ndim == 1 or logits.shape[1] >= 1),
        "LipschitzCertificate",
        "logits must be (N, classes), or (N,) or (N, 1) for a binary classifier",
        "Flatten the other dimensions into the batch",
        logits=logits,
    )
    logits = logits.detach().to("cpu", torch.float64)
    _checks.require(
        bool(logits.isfinite().all()),
        "LipschitzCertificate",
        "logits must be finite",
        "A NaN or an infinity has no margin: look for its cause in the inputs or the weights",
        logits=logits,
    )
    return logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 1 else logits


def correct_within(
    logits: Tensor, labels: Tensor, radius: Tensor, radii: Sequence[float]
) -> list[int]:
    """How many samples are predicted rightly and certified beyond each of `radii`."""
    logits, labels = _checked(logits), labels.detach().to("cpu").reshape(-1)
    _checks.require(
        len(labels) == len(logits),
        "certified_accuracy",
        "there must be one label for each sample",
        "Pass class indices, not one-hot vectors",
        labels=labels,
        logits=logits,
    )
    right = (logits > 0) == (labels > 0) if logits.ndim == 1 else logits.argmax(1) == labels
    return [int((right & ((radius > r) | (r <= 0))).sum()) for r in radii]
