"""Conformal sets of classes, robust against perturbations by a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from orthonet.certify import LipschitzCertificate
from orthonet.downstream._moves import checked_classes
from orthonet.downstream._ranks import (
    Coverage,
    checked_level,
    checked_threshold,
    conformal_quantile,
    coverage_of,
)
from orthonet.downstream._scores import (
    conformal_scores,
    score_bounds,
    score_lipschitz,
    score_slack,
)

__all__ = ["ConformalSets", "calibrate_sets"]


@dataclass(frozen=True)
class ConformalSets:
    r"""Sets of classes that hold the true one with a given probability, also under attack.

    The set of an input holds every class whose score is at most `threshold`, or above it by no more
    than rounding: equal logits have scores that differ in the last bits from one place of a batch
    to another. Make it with [`calibrate_sets`][orthonet.downstream.calibrate_sets].

    Attributes:
        threshold: Largest score of a class in the set.
        alpha: The share of misses that is allowed.
        samples: The number of calibration samples.
        score: Name of the score.
        temperature: Temperature of the score.

    Raises:
        ValueError: The threshold is NaN, or another value is out of range.
    """

    threshold: float
    alpha: float
    samples: int
    score: str = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checked_threshold(self, self.threshold, self.alpha, self.samples)
        score_lipschitz(self.score, self.temperature)  # refuses what it does not know

    def predict(self, logits: Tensor) -> Tensor:
        r"""Return the sets without robustness, as truth values for each class.

        Shape:
            logits: (N, classes), returned with the same shape

        Guarantee:
            A fresh sample, exchangeable with those of the calibration, has its class in its set
            with probability $1 - \alpha$ or more. Nothing holds for perturbed inputs.

        Raises:
            ValueError: The logits are not finite or have fewer than two classes.
        """
        scores = conformal_scores(logits, score=self.score, temperature=self.temperature)
        return scores <= self._limit(scores)

    def robust(
        self,
        logits: Tensor,
        certificate: LipschitzCertificate,
        eps: float,
        inputs: Tensor | Sequence[Tensor] | None,
    ) -> Tensor:
        r"""Return sets whose coverage holds if the inputs were perturbed by up to eps in l2.

        The certificate bounds how far each logit and each difference of logits moves within eps of
        the given input. A class is in the set if its score is at most `threshold` somewhere in
        these bounds: the clean input, whose score was calibrated, is among the points.

        Args:
            logits: What the model returned for the (perturbed) inputs.
            certificate: The certificate of the model.
            eps: The l2 size of the perturbation.
            inputs: The (perturbed) inputs: the rounding of the forward passes at both points
                counts. None leaves it out, and the guarantee holds in exact arithmetic.

        Shape:
            logits: (N, classes), returned with the same shape

        Guarantee:
            Let (x, y) be exchangeable with the calibration samples, and x' any point with
            $\|x' - x\|_2 \le \epsilon$, however it was found. The robust set of x' holds y with
            probability $1 - \alpha$ or more. It contains the set of `predict`.

        Raises:
            ValueError: The logits do not fit the certificate, or `eps` is negative or not finite.
            UncertifiableError: With the inputs, the rounding of an operation is not known.

        References:
            T. Massena et al., *Efficient robust conformal prediction via Lipschitz-bounded
            networks*, ICML 2025, arXiv 2506.05434.
        """
        low, _ = score_bounds(
            logits, certificate, eps, inputs, score=self.score, temperature=self.temperature
        )
        return low <= self._limit(low)

    def worst_case(
        self,
        logits: Tensor,
        labels: Tensor,
        certificate: LipschitzCertificate,
        eps: float,
        inputs: Tensor | Sequence[Tensor] | None,
        *,
        confidence: float = 0.95,
    ) -> Coverage:
        r"""Bound the coverage of the sets of `predict` when inputs are perturbed by up to eps.

        The samples must be independent of each other and of the calibration. Each counts as
        covered if its true class stays in its set under every perturbation, by the upper bound of
        its score.

        Args:
            logits: What the model returned for clean inputs.
            labels: Their classes, (N,).
            certificate: The certificate of the model.
            eps: The l2 size of the perturbations.
            inputs: The clean inputs, as in `robust`.
            confidence: Probability that the bound of the coverage holds.

        Raises:
            ValueError: The logits do not fit the certificate or the labels, or a number is out of
                range.
            UncertifiableError: With the inputs, the rounding of an operation is not known.
        """
        owner = "ConformalSets"
        checked_level(owner, confidence=confidence)
        low, high = score_bounds(
            logits, certificate, eps, inputs, score=self.score, temperature=self.temperature
        )
        labels = checked_classes(owner, labels, low.shape[:1], low.shape[1])[:, None]
        clean = self.predict(logits).gather(1, labels)
        stays, may = (ends.gather(1, labels) <= self._limit(low) for ends in (high, low))
        return coverage_of(clean, stays, may, confidence)

    def _limit(self, scores: Tensor) -> float:
        """The threshold, raised by the rounding of both scores that are compared."""
        return self.threshold + 2.0 * score_slack(scores.shape[1], self.score)


def calibrate_sets(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.1,
    *,
    score: str = "softmax",
    temperature: float = 1.0,
) -> ConformalSets:
    r"""Calibrate conformal sets of classes on held-out samples.

    The threshold is the k-th smallest score of the true classes, $k = \lceil (n + 1)(1 - \alpha)
    \rceil$, see [`conformal_quantile`][orthonet.downstream.conformal_quantile].

    Args:
        logits: What the model returned for clean inputs that took no part in its training.
        labels: Their classes, (n,).
        alpha: The share of misses that is allowed.
        score: Name of the score, see
            [`conformal_scores`][orthonet.downstream.conformal_scores].
        temperature: Its temperature.

    Shape:
        logits: (n, classes)

    Raises:
        ValueError: The logits are not finite, the labels do not fit, or a number is out of range.

    Warns:
        UserWarning: There are too few samples for this alpha; every set holds all classes.

    Examples:
        >>> from orthonet.certify import certify
        >>> from orthonet.models import mlp
        >>> model = mlp(2, 3, hidden=(8,)).eval()
        >>> x, y = torch.randn(200, 2), torch.randint(3, (200,))
        >>> certificate = certify(model, x[:1])
        >>> logits = model(x).detach()
        >>> sets = calibrate_sets(logits[:100], y[:100], alpha=0.2)
        >>> robust = sets.robust(logits[100:], certificate, 0.1, x[100:])
        >>> bool((sets.predict(logits[100:]) <= robust).all())
        True
    """
    owner = "calibrate_sets"
    checked_level(owner, alpha=alpha)
    scores = conformal_scores(logits, score=score, temperature=temperature)
    labels = checked_classes(owner, labels, scores.shape[:1], scores.shape[1])
    threshold = conformal_quantile(scores.gather(1, labels[:, None])[:, 0], alpha)
    return ConformalSets(threshold, alpha, len(labels), score, temperature)
