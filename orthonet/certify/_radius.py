"""From logits and Lipschitz constants to certified radii."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    up,
)

__all__ = [
    "FAR",
    "NORMS",
    "Norm",
    "SEPARATION",
    "longer",
    "RadiusCurve",
    "certified_radius",
    "check_radii",
    "convert_radius",
    "correct_within",
    "pairwise_constants",
    "reach",
]

FAR = tuple(2.0**k for k in (120, 60, 40, 30, 25, 20, 15, 10, 5, 0, -10, -20))
"""Radii that are tried where the margin has a constant of 0."""

Norm = Literal["l2", "linf", "l1"]
NORMS = ("l2", "linf", "l1")
SEPARATION = {"l2": up(math.sqrt(2.0)), "linf": 2.0, "l1": 1.0}
"""How far the difference of two entries moves at most where a vector moves by 1 in a norm."""

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
    logits: Tensor,
    constant: float,
    pairs: Tensor | None,
    rounding: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    target: Tensor | None = None,
    outputs: Collection[int] = (),
    dtype: torch.dtype | None = None,
    roundings: float = 0.0,
    to: str = "l2",
) -> Tensor:
    """Radii (N,) in float64, rounded downward; see `LipschitzCertificate.radius`.

    The constants are to the norm `to` of the logits; the radii are in the norm of the input.

    `rounding` bounds the l2 error of all logits of a sample. Without it each logit is off by the
    rounding of its own dtype, or of `dtype`, that of the model, where this one holds all of them.
    Of `roundings` on the way most cancel: 8 times their root counts, or all where there are few,
    relative to the largest logit; in float64 only the last one.
    """
    given, logits = logits, _checked(logits, outputs)
    unit = _roundoff(given, dtype) if rounding is None else None
    many = 0.0
    if unit and unit[0] > UNIT_ROUNDOFF:
        many = min(roundings, 8.0 * math.sqrt(roundings)) * 2.0**-24  # sums are in float32
    # Two logits, at the sample and at the other point, are each off by at most the rounding.
    off = torch.zeros(len(logits), dtype=torch.float64)
    if rounding is not None:
        off = _above(rounding * 2.0)
    if logits.ndim == 1:
        _checks.require(
            target is None,
            "LipschitzCertificate",
            "a binary classifier has no target",
            "Leave it out",
            target=target,
        )
        bound = torch.tensor(constant, dtype=torch.float64)
        if unit:
            off = _above(logits.abs() * (2.0 * max(unit[0], many))) + unit[1]
        radii = _quotient(_less(logits.abs(), off), bound)
        if labels is None:
            return radii
        return torch.where((logits > 0) == (_classes(labels, len(logits), None) > 0), radii, 0.0)
    classes = logits.shape[1]
    if pairs is None:
        value = mul_up(SEPARATION[to], constant)
        pairs = torch.full((classes, classes), value, dtype=torch.float64)
    _checks.require(
        pairs.shape[0] == classes,
        "LipschitzCertificate",
        f"logits must have {pairs.shape[0]} classes",
        "Pass the output of the certified model",
        logits=logits,
    )
    predicted = logits.argmax(1)
    if labels is not None:
        predicted = _classes(labels, len(logits), classes)
    top = logits.gather(1, predicted[:, None])
    less = _above(off * up(math.sqrt(2.0)))[:, None].expand_as(logits)
    if unit:  # of both logits, scaled first so that the sum does not overflow
        twice = 2.0 * unit[0]
        less = _above(top.abs() * twice + logits.abs() * twice) + unit[1]
        if many:
            less = torch.maximum(less, _above(logits.abs().amax(1, keepdim=True) * (4.0 * many)))
    radii = _quotient(_less(top, logits, less), pairs[predicted])
    radii.scatter_(1, predicted[:, None], math.inf)
    least = radii.amin(1)
    if target is None:
        return least
    aim = _classes(target, len(logits), classes, "target")
    # Another class may be the predicted one already: then there is nothing to protect.
    return torch.where(least > 0, radii.gather(1, aim[:, None])[:, 0], 0.0)


def _roundoff(logits: Tensor, dtype: torch.dtype | None) -> tuple[float, float]:
    """The unit roundoff of logits, and four times the smallest number: what underflow takes.

    Logits of a float32 model that were cast to float64 still carry the rounding of float32: where
    the dtype of the model holds all of them, it counts.
    """
    kind = logits.dtype
    if dtype is not None and torch.finfo(dtype).eps > torch.finfo(kind).eps:
        kind = dtype if torch.equal(logits.to(dtype).to(kind), logits) else kind
    info = torch.finfo(kind)
    return info.eps / 2, 4.0 * info.smallest_normal * info.eps


def _above(values: Tensor) -> Tensor:
    """The next floats: not less than what a rounded operation stands for; zero stays zero."""
    return torch.where(values == 0, values, values.nextafter(torch.tensor(torch.inf).double()))


def _less(first: Tensor, *others: Tensor) -> Tensor:
    """A difference rounded downward, also where it overflows or the first operand is subnormal."""
    down = torch.tensor(-torch.inf, dtype=torch.float64)
    for other in others:
        found = (first - other).nextafter(down)
        first = torch.where(other == 0, first, found)
    return first


def _classes(labels: Tensor, count: int, classes: int | None, name: str = "labels") -> Tensor:
    _checks.tensor("LipschitzCertificate", **{name: labels})
    labels = labels.detach().to("cpu").reshape(-1)
    good = len(labels) == count and (classes is None or not labels.is_floating_point())
    if good and classes is not None and count:
        good = int(labels.min()) >= 0 and int(labels.max()) < classes
    _checks.require(
        good,
        "LipschitzCertificate",
        "there must be one class index for each sample",
        "Pass integers from 0 to the number of classes minus 1, not one-hot vectors",
        **{name: labels},
    )
    return labels if classes is None else labels.long()


def longer(norm: str, own: str, entries: int) -> float:
    """How much longer a vector may be in the norm `own` than in `norm`, rounded upward."""
    powers = {"l1": 1.0, "l2": 0.5, "linf": 0.0}
    power = powers[own] - powers[norm]
    if power <= 0.0 or entries <= 1:
        return 1.0
    return float(entries) if power == 1.0 else sqrt_up(entries)


def convert_radius(radii: Tensor, norm: str, entries: int, own: str = "l2") -> Tensor:
    """Radii in the norm `own` as radii in another one: |d|_2 <= |d|_1, |d|_2 <= sqrt(n) |d|_inf."""
    _checks.one_of("LipschitzCertificate", NORMS, norm=norm)
    ratio = longer(norm, own, entries)
    if ratio == 1.0:
        return radii
    quotient = radii / ratio
    below = quotient.nextafter(torch.zeros((), dtype=torch.float64))
    return torch.where(radii.isinf(), radii, below)


def reach(constant: float, radius: float, norm: str, entries: int, own: str = "l2") -> float:
    """How far outputs move at most in a ball, rounded upward; the constant is from `own`."""
    _checks.one_of("LipschitzCertificate", NORMS, norm=norm)
    good = isinstance(radius, (int, float)) and 0.0 <= radius < math.inf
    _checks.require(
        good,
        "LipschitzCertificate",
        "radius must be finite and non-negative",
        "Pass the size of the perturbation",
        radius=radius,
    )
    return mul_up(constant, radius, longer(norm, own, entries))


@dataclass(frozen=True, eq=False)
class RadiusCurve:
    """The certified accuracy of some samples as a function of the radius.

    Attributes:
        radii: The radii of all samples, 0 where the prediction is wrong, (N,), descending.
        correct: The number of right predictions.
        norm: The norm of the radii.
    """

    radii: Tensor
    correct: int
    norm: str = "l2"

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return len(self.radii)

    @property
    def clean(self) -> float:
        """Return the accuracy without perturbation."""
        return self.correct / max(1, self.samples)

    @property
    def area(self) -> float:
        """Return the area under the curve: the average radius, 0 for wrong predictions."""
        return float(self.radii.sum()) / max(1, self.samples)

    def at(self, radius: float) -> float:
        """Return the share of samples certified beyond `radius`; at 0 that is `clean`."""
        check_radii("RadiusCurve", [radius])
        if radius <= 0:
            return self.clean
        return int((self.radii > radius).sum()) / max(1, self.samples)


def check_radii(owner: str, radii: Sequence[float]) -> None:
    """Every radius must be a number that is not negative."""
    good = isinstance(radii, (Sequence, Tensor)) and all(
        isinstance(r, (int, float, Tensor)) and float(r) >= 0.0 for r in radii
    )
    _checks.require(
        good,
        owner,
        "radii must be a list of numbers >= 0",
        "Pass e.g. radii=[0.0, 0.1]; 0 gives the clean accuracy",
        radii=radii,
    )


def _quotient(margin: Tensor, constant: Tensor) -> Tensor:
    """The quotient rounded downward; a tie has radius 0 even where the constant is 0.

    A finite margin over a positive constant is never infinite, even where the division overflows.
    """
    below = (margin / constant).nextafter(torch.zeros((), dtype=torch.float64))
    below = torch.where(constant == 0, math.inf, below)
    return torch.where(margin > 0, below, 0.0)


def _checked(logits: Tensor, outputs: Collection[int] = ()) -> Tensor:
    """The logits in float64; of one output as a vector.

    `outputs` are the numbers of classes that the certified model has, where they are known.
    """
    shaped = isinstance(logits, Tensor) and 1 <= logits.ndim <= 2 and logits.is_floating_point()
    _checks.require(
        shaped and (logits.ndim == 1 or logits.shape[1] >= 1),
        "LipschitzCertificate",
        "logits must be (N, classes), or (N,) or (N, 1) for a binary classifier",
        "Flatten the other dimensions into the batch",
        logits=logits,
    )
    classes = 1 if logits.ndim == 1 else logits.shape[1]
    _checks.require(
        not outputs or classes in outputs,
        "LipschitzCertificate",
        f"logits must have {' or '.join(map(str, sorted(set(outputs))))} classes, "
        "as the output of the certified model has",
        "Pass a batch (N, classes): one sample as logits[None], and nothing squeezed",
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
    check_radii("certified_accuracy", radii)
    _checks.tensor("certified_accuracy", labels=labels)
    logits, labels = _checked(logits), labels.detach().to("cpu").reshape(-1)
    _checks.require(
        len(labels) == len(logits) and (logits.ndim == 1 or not labels.is_floating_point()),
        "certified_accuracy",
        "there must be one label for each sample, an integer",
        "Pass class indices, not one-hot vectors",
        labels=labels,
        logits=logits,
    )
    right = (logits > 0) == (labels > 0) if logits.ndim == 1 else logits.argmax(1) == labels
    return [int((right & ((radius > r) | (r <= 0))).sum()) for r in radii]
