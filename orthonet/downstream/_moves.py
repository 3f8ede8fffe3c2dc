"""How far the outputs of a certified model move under a perturbation, rounding included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify import LipschitzCertificate
from orthonet.linalg.bounds.rounding import mul_up, sqrt_up

__all__ = [
    "Moves",
    "below",
    "checked_classes",
    "checked_outputs",
    "moves_of",
    "plus",
    "reach_of",
    "rounding_of",
    "times",
]


class Moves(NamedTuple):
    """Upper bounds of what a perturbation does to the outputs of each sample, float64.

    Attributes:
        total: The l2 norm of the change of all outputs, (N,).
        moved: The change of the difference of any two outputs in exact arithmetic, (C, C).
        off: What the rounding adds to that, (N,).
    """

    total: Tensor
    moved: Tensor
    off: Tensor

    def pairs(self, rows: slice) -> Tensor:
        """Return the change of the difference of any two outputs of some samples, (n, C, C)."""
        found = plus(self.moved[None], self.off[rows][:, None, None])
        return found.masked_fill(torch.eye(len(self.moved), dtype=torch.bool), 0.0)


def moves_of(
    owner: Any,
    certificate: LipschitzCertificate,
    outputs: Tensor,
    eps: float,
    inputs: Tensor | Sequence[Tensor] | None,
) -> Moves:
    """Return K eps plus the rounding at both points; `outputs` is (N, C)."""
    e, constant = rounding_of(owner, certificate, outputs, eps, inputs), certificate.constant.value
    total = reach_of(certificate, eps, e)
    count, pairs = outputs.shape[1], certificate.pairs
    if pairs is None:
        pairs = torch.full((count, count), mul_up(sqrt_up(2.0), constant), dtype=torch.float64)
    _checks.require(
        pairs.shape == (count, count),
        owner,
        f"outputs must be those of the certified model, which has {len(pairs)}",
        "Pass what the model returned",
        outputs=outputs,
    )
    # Each of the two logits is off by its part of e, at both points.
    return Moves(total, times(pairs, eps), times(e, mul_up(2.0, sqrt_up(2.0))))


def rounding_of(
    owner: Any,
    certificate: LipschitzCertificate,
    outputs: Tensor,
    eps: float,
    inputs: Tensor | Sequence[Tensor] | None,
) -> Tensor:
    """Return a bound (N,) of the rounding of the forward passes within eps; 0 without inputs."""
    _checks.require(
        isinstance(certificate, LipschitzCertificate) and certificate.constant.norm == "l2",
        owner,
        "certificate must be a LipschitzCertificate in l2",
        "Call orthonet.certify(model, x)",
        certificate=certificate,
    )
    good = isinstance(eps, (int, float)) and 0.0 <= eps < math.inf
    _checks.require(
        good and math.isfinite(certificate.constant.value),
        owner,
        "eps must be finite and non-negative, and the constant finite",
        "Pass the l2 size of the perturbation",
        eps=eps,
        constant=certificate.constant.value,
    )
    known = {math.prod(shape) for shape in certificate.output_shapes}
    _checks.require(
        not known or outputs[:1].numel() in (0, *known),
        owner,
        f"outputs must be those of the certified model, which has {max(known, default=0)} a sample",
        "Pass what the model returned",
        outputs=outputs,
    )
    if inputs is None:
        return torch.zeros(len(outputs), dtype=torch.float64)
    dtypes = certificate.output_dtypes
    _checks.require(
        not dtypes or outputs.dtype in dtypes,
        owner,
        "outputs must have the dtype that was certified, whose rounding is counted",
        "Pass them as the model returned them, or call certify with an example of their dtype",
        outputs=outputs.dtype,
        certified=dtypes[0] if dtypes else None,
    )
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs), None)
    _checks.require(
        isinstance(first, Tensor) and first.ndim > 0 and len(first) == len(outputs),
        owner,
        "there must be one input for each row of the outputs",
        "Pass the batch that the model was run on",
        inputs=first,
        outputs=outputs,
    )
    return certificate.rounding(inputs, within=float(eps)).to("cpu", torch.float64)


def reach_of(certificate: LipschitzCertificate, eps: float, e: Tensor) -> Tensor:
    """Return K eps plus the rounding at both points, (N,), rounded upward."""
    return plus(torch.full_like(e, mul_up(certificate.constant.value, float(eps))), e * 2.0)


def checked_outputs(owner: Any, name: str, values: Tensor, requirement: str, good: bool) -> Tensor:
    """Return finite outputs in float64 on the CPU, which is exact."""
    _checks.require(good, owner, requirement, "Pass what the model returned", **{name: values})
    values = values.detach().to("cpu", torch.float64)
    _checks.require(
        bool(values.isfinite().all()),
        owner,
        f"{name} must be finite",
        "Look for a NaN or an infinity in the inputs, the weights or the targets",
        **{name: values},
    )
    return values


def checked_classes(owner: Any, labels: Tensor, shape: Sequence[int], classes: int) -> Tensor:
    """Return labels of this shape as integers on the CPU."""
    _checks.tensor(owner, labels=labels)
    labels = labels.detach().to("cpu")
    good = tuple(labels.shape) == tuple(shape) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if good and labels.numel():
        good = int(labels.min()) >= 0 and int(labels.max()) < classes
    _checks.require(
        good,
        owner,
        f"labels must be class indices from 0 to {classes - 1} of the shape {tuple(shape)}",
        "Pass integers, not one-hot vectors",
        labels=labels,
    )
    return labels.long()


_UP = torch.tensor(math.inf, dtype=torch.float64)


def plus(a: Tensor, b: Tensor) -> Tensor:
    """Return a sum of non-negative tensors, rounded upward; adding zero changes nothing."""
    return torch.where(b == 0, a, torch.where(a == 0, b, (a + b).nextafter(_UP)))


def times(a: Tensor, factor: float) -> Tensor:
    """Return a product of a non-negative tensor and number, rounded upward; zero stays zero."""
    product = (a * float(factor)).nextafter(_UP)
    return torch.where((a == 0) | (factor == 0), 0.0, product)


def below(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b rounded downward, where a itself may be above its true value by a rounding."""
    return (a.nextafter(-_UP) - b).nextafter(-_UP)
