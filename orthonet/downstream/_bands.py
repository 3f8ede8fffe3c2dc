"""Intervals for regression: what a perturbation can do to an output, and what holds the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify import LipschitzCertificate
from orthonet.downstream._moves import checked_outputs, reach_of, rounding_of
from orthonet.downstream._ranks import (
    Coverage,
    checked_level,
    checked_threshold,
    conformal_quantile,
    coverage_of,
)

__all__ = ["ConformalBand", "calibrate_band", "certified_interval"]

_UP = torch.tensor(math.inf, dtype=torch.float64)


def certified_interval(
    outputs: Tensor,
    certificate: LipschitzCertificate,
    eps: float,
    inputs: Tensor | Sequence[Tensor] | None,
) -> Tensor:
    r"""Return an interval of each output that holds it under every perturbation up to eps.

    $[f_i(x) - K\epsilon - 2e,\ f_i(x) + K\epsilon + 2e]$, with the constant K and the rounding e of
    a forward pass.

    Args:
        outputs: What the model returned.
        certificate: The certificate of the model.
        eps: The l2 size of the perturbation.
        inputs: The inputs of the model; None leaves the rounding out.

    Shape:
        outputs: (N, *); returns (N, *, 2), float64

    Guarantee:
        What the deployed model returns at any point within eps of the input lies in the interval;
        without the inputs, what it returns in exact arithmetic.

    Raises:
        ValueError: The outputs are not finite, or `eps` is negative or not finite.
        UncertifiableError: With the inputs, the rounding of an operation is not known.

    Examples:
        >>> from orthonet.certify import certify
        >>> model = torch.nn.Linear(1, 1).requires_grad_(False).eval()
        >>> _ = model.weight.fill_(3.0), model.bias.zero_()
        >>> x = torch.ones(1, 1)
        >>> certified_interval(model(x), certify(model, x), 0.5, None).round(decimals=6)
        tensor([[[1.5000, 4.5000]]], dtype=torch.float64)
    """
    owner = "certified_interval"
    _checks.floating(owner, outputs=outputs)
    good = outputs.ndim >= 1 and len(outputs) > 0
    values = checked_outputs(owner, "outputs", outputs, "outputs must be a batch (N, *)", good)
    reach = _reach(owner, certificate, outputs, eps, inputs)
    reach = reach.reshape(-1, *[1] * (values.ndim - 1))
    return torch.stack((-_over(-values, reach), _over(values, reach)), -1)


@dataclass(frozen=True)
class ConformalBand:
    r"""Intervals that hold the target with a given probability, also under attack.

    Make it with [`calibrate_band`][orthonet.downstream.calibrate_band].

    Attributes:
        threshold: How far an interval reaches beyond the output or outputs.
        alpha: The share of misses that is allowed.
        samples: The number of calibration samples.

    Raises:
        ValueError: The threshold is NaN, or another value is out of range.
    """

    threshold: float
    alpha: float
    samples: int

    def __post_init__(self) -> None:
        checked_threshold(self, self.threshold, self.alpha, self.samples)

    def predict(self, outputs: Tensor) -> Tensor:
        r"""Return the intervals without robustness.

        $[f - q, f + q]$ with the threshold q, or $[f_1 - q, f_2 + q]$ for two outputs. An interval
        whose ends are in the wrong order is empty.

        Shape:
            outputs: (N,), (N, 1) or (N, 2); returns (N, 2), float64

        Guarantee:
            A fresh sample, exchangeable with those of the calibration, has its target in its
            interval with probability $1 - \alpha$ or more. Nothing holds for perturbed inputs.

        Raises:
            ValueError: The outputs are not finite or of another shape.
        """
        return self._grown(_ends("ConformalBand", outputs), torch.zeros(()).double())

    def robust(
        self,
        outputs: Tensor,
        certificate: LipschitzCertificate,
        eps: float,
        inputs: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        r"""Return intervals whose coverage holds if the inputs were perturbed by up to eps in l2.

        Both ends of `predict` move outward by $K\epsilon + 2e$, with the rounding e.

        Args:
            outputs: What the model returned for the (perturbed) inputs.
            certificate: The certificate of the model.
            eps: The l2 size of the perturbation.
            inputs: The (perturbed) inputs; None leaves the rounding out, and the guarantee holds in
                exact arithmetic.

        Shape:
            outputs: (N,), (N, 1) or (N, 2); returns (N, 2), float64

        Guarantee:
            Let (x, y) be exchangeable with the calibration samples, and x' any point with
            $\|x' - x\|_2 \le \epsilon$. The interval of x' holds y with probability $1 - \alpha$ or
            more. It contains the interval of `predict`.

        Raises:
            ValueError: The outputs do not fit, or `eps` is negative or not finite.
            UncertifiableError: With the inputs, the rounding of an operation is not known.
        """
        ends = _ends("ConformalBand", outputs)
        reach = _reach("ConformalBand", certificate, outputs, eps, inputs)
        return self._grown(ends, reach)

    def worst_case(
        self,
        outputs: Tensor,
        targets: Tensor,
        certificate: LipschitzCertificate,
        eps: float,
        inputs: Tensor | Sequence[Tensor] | None,
        *,
        confidence: float = 0.95,
    ) -> Coverage:
        r"""Bound the coverage of the intervals of `predict` under perturbations of up to eps.

        The samples must be independent of each other and of the calibration.

        Args:
            outputs: What the model returned for clean inputs.
            targets: Their targets, (N,).
            certificate: The certificate of the model.
            eps: The l2 size of the perturbations.
            inputs: The clean inputs, as in `robust`.
            confidence: Probability that the bound of the coverage holds.

        Raises:
            ValueError: The outputs and the targets do not fit, or a number is out of range.
            UncertifiableError: With the inputs, the rounding of an operation is not known.
        """
        owner = "ConformalBand"
        checked_level(owner, confidence=confidence)
        ends = _ends(owner, outputs)
        misses = _misses(owner, ends, targets)
        reach = _reach(owner, certificate, outputs, eps, inputs)
        least, most = -_over(-misses, reach), _over(misses, reach)
        clean, stays, may = (each <= self.threshold for each in (misses, most, least))
        return coverage_of(clean, stays, may, confidence)

    def _grown(self, ends: Tensor, reach: Tensor) -> Tensor:
        """The ends moved outward by the threshold and the reach, rounded outward."""
        low = -_over(_over(-ends[:, 0], torch.tensor(self.threshold).double()), reach)
        high = _over(_over(ends[:, 1], torch.tensor(self.threshold).double()), reach)
        return torch.stack((low, high), 1)


def calibrate_band(outputs: Tensor, targets: Tensor, alpha: float = 0.1) -> ConformalBand:
    r"""Calibrate conformal intervals on held-out samples.

    The score of a sample is how far its target is outside: $|y - f|$ for one output, and
    $\max(f_1 - y, y - f_2)$ for two, which are a lower and an upper quantile that the model has
    learned (conformalized quantile regression). The threshold is the k-th smallest, $k = \lceil (n
    + 1)(1 - \alpha) \rceil$.

    Args:
        outputs: What the model returned for clean inputs that took no part in its training.
        targets: Their targets, (n,).
        alpha: The share of misses that is allowed.

    Shape:
        outputs: (n,), (n, 1) or (n, 2)

    Raises:
        ValueError: The outputs or the targets are not finite or do not fit, or `alpha` is out of
            range.

    Warns:
        UserWarning: There are too few samples for this alpha; every interval is the whole line.

    Examples:
        >>> outputs, targets = torch.zeros(9), torch.arange(9.0)
        >>> calibrate_band(outputs, targets, alpha=0.2).predict(torch.zeros(1)).round()
        tensor([[-7.,  7.]], dtype=torch.float64)

    References:
        J. Lei et al., *Distribution-free predictive inference for regression*, JASA 2018; Y.
        Romano, E. Patterson, E. Candès, *Conformalized quantile regression*, NeurIPS 2019.
    """
    owner = "calibrate_band"
    checked_level(owner, alpha=alpha)
    misses = _misses(owner, _ends(owner, outputs), targets)
    return ConformalBand(conformal_quantile(misses, alpha), alpha, len(misses))


def _ends(owner: str, outputs: Tensor) -> Tensor:
    """The two outputs, or twice the only one, (N, 2) in float64."""
    _checks.floating(owner, outputs=outputs)
    good = outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] in (1, 2))
    good = good and len(outputs) > 0
    text = "outputs must be (N,), (N, 1) or (N, 2)"
    values = checked_outputs(owner, "outputs", outputs, text, good)
    return values.reshape(len(values), -1).expand(-1, 2)


def _misses(owner: str, ends: Tensor, targets: Tensor) -> Tensor:
    """How far targets are outside, rounded upward; negative inside."""
    _checks.floating(owner, targets=targets)
    good = targets.shape in (ends.shape[:1], (len(ends), 1))
    text = f"targets must be one number for each of {len(ends)} outputs"
    y = checked_outputs(owner, "targets", targets, text, good).reshape(-1)
    return torch.maximum(_over(ends[:, 0], -y), _over(y, -ends[:, 1]))


def _reach(owner: str, certificate: LipschitzCertificate, outputs: Tensor, *rest: Any) -> Tensor:
    """How far each output can move within eps, of (eps, inputs)."""
    e = rounding_of(owner, certificate, outputs, *rest)
    return reach_of(certificate, rest[0], e)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """A sum rounded upward; adding zero changes nothing."""
    return torch.where(b == 0, a, (a + b).nextafter(_UP))
