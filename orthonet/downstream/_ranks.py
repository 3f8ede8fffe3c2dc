"""Exact finite-sample laws: the rank that calibrates a conformal set, and the bound of a share."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.bounds.rounding import down, gamma

__all__ = [
    "Coverage",
    "checked_level",
    "checked_threshold",
    "conformal_quantile",
    "coverage_of",
    "share_bound",
]


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    r"""Return the score that a fresh one does not exceed with probability $1 - \alpha$.

    It is the k-th smallest of n scores, $k = \lceil (n + 1)(1 - \alpha) \rceil$. If the n scores
    and a fresh one are exchangeable, the fresh one is at most this with probability $k / (n + 1)
    \ge 1 - \alpha$, or more where scores are tied. Where k exceeds n there are too few scores, and
    the result is infinity. k is computed in exact arithmetic; $\alpha$ is the decimal number that
    Python prints, so that 0.3 means 3/10.

    Args:
        scores: Scores of the calibration samples, in any order. They may be infinite.
        alpha: The share of misses that is allowed, between 0 and 1.

    Shape:
        scores: (n,)

    Guarantee:
        Exact for every n and every law of the scores, ties included.

    Raises:
        ValueError: `scores` is not a vector of numbers, or `alpha` is out of range.

    Warns:
        UserWarning: There are too few scores; the message says how many it takes.

    Examples:
        >>> scores = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4, 0.9, 0.7, 0.6, 0.8])
        >>> round(conformal_quantile(scores, 0.1), 6)
        0.9
        >>> round(conformal_quantile(scores, 0.3), 6)
        0.7

    References:
        V. Vovk, A. Gammerman, G. Shafer, *Algorithmic learning in a random world*, 2005; H.
        Papadopoulos et al., *Inductive confidence machines for regression*, ECML 2002.
    """
    owner = "conformal_quantile"
    level = checked_level(owner, alpha=alpha)
    _checks.floating(owner, scores=scores)
    _checks.require(
        scores.ndim == 1 and not bool(scores.isnan().any()),
        owner,
        "scores must be a vector without NaN",
        "Pass one score for each calibration sample",
        scores=scores,
    )
    number = len(scores)
    rank = math.ceil((number + 1) * (1 - level))
    if rank > number:
        advice = f"Calibrate on at least {math.ceil(1 / level) - 1} samples, or raise alpha"
        text = _checks.message(
            owner,
            "too few scores for this alpha: the quantile is infinite, and a set holds everything",
            advice,
            scores=number,
            alpha=alpha,
        )
        warnings.warn(text, UserWarning, stacklevel=2)
        return math.inf
    return float(scores.detach().to("cpu", torch.float64).kthvalue(rank).values)


def share_bound(hits: int, samples: int, confidence: float = 0.95) -> float:
    r"""Return a lower bound of a probability from the hits of independent samples.

    The bound of Clopper and Pearson: the largest p at which as many hits or more have the
    probability $P(\mathrm{Bin}(n, p) \ge c) \le 1 - \text{confidence}$.

    Args:
        hits: The number c of samples with the event.
        samples: The number n of samples.
        confidence: The probability, over the samples, that the bound holds.

    Guarantee:
        At most the bound of Clopper and Pearson, and less by no more than $10^{-9}$ for up to
        $10^4$ samples and a confidence of 1/2 or more: the tail of the binomial law is bounded from
        above with the rounding of its sums. Never above the share of hits, which a confidence below
        1/2 would exceed.

    Raises:
        ValueError: `hits` is not between 0 and `samples`, or `confidence` is out of range.

    Examples:
        >>> round(share_bound(10, 10, 0.95), 6)  # 0.05 ** (1 / 10)
        0.741134

    References:
        C. Clopper, E. Pearson, *The use of confidence or fiducial limits illustrated in the case
        of the binomial*, Biometrika 1934.
    """
    owner = "share_bound"
    _checks.non_negative_int(owner, hits=hits)
    _checks.positive_int(owner, samples=samples)
    _checks.require(
        hits <= samples, owner, "hits must be at most samples", "Swap them", hits=hits, n=samples
    )
    risk = _risk(owner, confidence)
    low, high = 0.0, hits / samples
    for _ in range(64):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if _tail(hits, samples, middle) <= risk else (low, middle)
    return low


def _tail(hits: int, samples: int, p: float) -> float:
    """Not less than P(Bin(n, p) >= c), for 0 < p < c / n."""
    odds = p / (1.0 - p)
    # Terms relative to that of c, which is 1: each is the one before times a ratio.
    above = torch.arange(hits, samples, dtype=torch.float64)
    below = torch.arange(hits, 0, -1, dtype=torch.float64)
    more = 1.0 + ((samples - above) / (above + 1.0) * odds).cumprod(0).sum().item()
    less = (below / (samples - below + 1.0) / odds).cumprod(0).sum().item()
    # Five roundings in a step, n steps, and the sums; twice for the quotient. Terms that overflow
    # make the tail 0, far below any risk that is allowed.
    return more / (more + less) * (1.0 + gamma(16 * samples + 64))


@dataclass(frozen=True)
class Coverage:
    r"""How often sets hold the truth when every input may be perturbed.

    Attributes:
        samples: The number of samples that were judged.
        clean: Share of the samples whose truth is in their set, without a perturbation.
        lower: Share of the samples whose truth provably stays in the set under every perturbation.
        upper: Share of the samples whose truth is not provably out of the set under some
            perturbation: no attack can raise the coverage above it.
        proved: Lower bound of the probability that a fresh sample's truth stays in its set under
            every perturbation, by [`share_bound`][orthonet.downstream.share_bound].
        uniform: The same bound, valid for all eps at once: `lower` minus $\sqrt{\ln(1/\delta) /
            2n}$ by Dvoretzky, Kiefer and Wolfowitz, at least 0.
        confidence: Probability, over the samples, that `proved` holds, and that `uniform` does.
    """

    samples: int
    clean: float
    lower: float
    upper: float
    proved: float
    uniform: float
    confidence: float


def coverage_of(clean: Tensor, stays: Tensor, may: Tensor, confidence: float) -> Coverage:
    """Return the coverage of samples from what holds for each of them."""
    number, hits = len(stays), int(stays.sum())
    risk = _risk("Coverage", confidence)
    away = math.sqrt(math.log(1.0 / risk) / (2.0 * number)) if risk < 0.5 else 1.0
    return Coverage(
        number,
        int(clean.sum()) / number,
        hits / number,
        int(may.sum()) / number,
        share_bound(hits, number, confidence),
        max(0.0, hits / number - away - 1e-15),  # above the rounding of four operations
        confidence,
    )


def checked_level(owner: Any, **values: float) -> Fraction:
    """Return a number strictly between 0 and 1 as the fraction that its decimal digits say."""
    ((name, value),) = values.items()
    good = isinstance(value, (int, float)) and 0.0 < value < 1.0
    _checks.require(
        good,
        owner,
        f"{name} must be a number between 0 and 1, both excluded",
        f"Pass e.g. {name}=0.1",
        **values,
    )
    return Fraction(repr(float(value)))


def checked_threshold(owner: Any, threshold: float, alpha: float, samples: int) -> None:
    """Require what a calibration returns."""
    good = isinstance(threshold, (int, float)) and not math.isnan(threshold)
    _checks.require(
        good,
        owner,
        "threshold must be a number or infinity",
        "Make it with calibrate_sets or calibrate_band",
        threshold=threshold,
    )
    checked_level(owner, alpha=alpha)
    _checks.non_negative_int(owner, samples=samples)


def _risk(owner: str, confidence: float) -> float:
    risk = 1 - checked_level(owner, confidence=confidence)
    _checks.require(
        confidence <= 1.0 - 1e-12,
        owner,
        "confidence must be at most 1 - 1e-12",
        "Pass e.g. confidence=0.95",
        confidence=confidence,
    )
    return down(float(risk))
