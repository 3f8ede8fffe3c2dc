"""Scores that measure how badly a class fits the logits, and how far a perturbation moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify import LipschitzCertificate
from orthonet.downstream._moves import below, checked_outputs, moves_of, times
from orthonet.linalg.bounds.rounding import div_up, sqrt_up

__all__ = [
    "SCORES",
    "checked_logits",
    "conformal_scores",
    "score_bounds",
    "score_lipschitz",
    "score_slack",
]

SCORES = ("sigmoid", "softmax", "margin", "excess")
_ENTRIES = 2**24  # of the differences that are held at once


def conformal_scores(logits: Tensor, *, score: str = "softmax", temperature: float = 1.0) -> Tensor:
    r"""Return how badly each class fits the logits, in float64.

    With $p = \mathrm{softmax}(z / T)$:

    | score | of class y | constant in l2 |
    |---|---|---|
    | `"sigmoid"` | $1 - \sigma(z_y / T)$ | $1 / 4T$ |
    | `"softmax"` | $1 - p_y$ | $\sqrt 2 / 4T$ |
    | `"margin"` | $\max_{j \ne y} z_j - z_y$ | $\sqrt 2$ |
    | `"excess"` | $\sum_j \max(p_j - p_y, 0)$ | $1 / T$ |

    The first two are the least ambiguous classifiers of the literature (LAC), and "sigmoid" is the
    score of lip-rcp. "excess" is the probability by which other classes exceed y: like the sum of
    APS it adapts to how spread the probabilities are, and unlike it it is continuous.

    Args:
        logits: What a classifier returned, in any floating dtype.
        score: The name of the score.
        temperature: The temperature T; "margin" does not read it.

    Shape:
        logits: (N, classes), returned with the same shape

    Raises:
        ValueError: The logits are not finite or have fewer than two classes, or `temperature` is
            not positive.

    Examples:
        >>> conformal_scores(torch.tensor([[2.0, 0.5, 0.0]]), score="margin")
        tensor([[-1.5000,  1.5000,  2.0000]], dtype=torch.float64)

    References:
        M. Sadinle, J. Lei, L. Wasserman, *Least ambiguous set-valued classifiers*, JASA 2019; Y.
        Romano, M. Sesia, E. Candès, *Classification with valid and adaptive coverage*, NeurIPS
        2020; T. Massena et al., *Efficient robust conformal prediction via Lipschitz-bounded
        networks*, ICML 2025, arXiv 2506.05434.
    """
    owner = "conformal_scores"
    _check_score(owner, score, temperature)
    logits = checked_logits(owner, logits)
    parts = logits.split(max(1, _ENTRIES // logits.shape[1] ** 2))
    return torch.cat([_plain(z, score, temperature) for z in parts])


def score_lipschitz(score: str, temperature: float = 1.0) -> float:
    r"""Return the l2 constant of a score as a function of the logits, rounded upward.

    *sigmoid*: $\sigma' = \sigma (1 - \sigma) \le 1/4$. *softmax*: the gradient of $p_y$ is
    $p_y (e_y - p) / T$, and $(1 - p_y)^2 + \sum_{j \ne y} p_j^2 \le 2 (1 - p_y)^2$, so its norm is
    at most $\sqrt 2\, p_y (1 - p_y) / T$; attained by two equal logits. *margin*: the gradient is
    $e_j - e_y$. *excess*: let A be the m classes with $p_j > p_y$, P their mass, s the score and
    $R = 1 - P - p_y$. The gradient is $p_j (1 - s)$ in A, $s p_y - (P - s)$ at y and $-s p_j$
    elsewhere, over T. Since $m p_y = P - s$, $\sum_A p_j^2 \le (P^2 + (m - 1) s^2) / m$, and
    $(P(1 - s) - sR)^2 + s^2 R^2 \le P^2 (1 - s)^2$. With $P \le (m + s) / (m + 1)$ the squares add
    up to at most $(1 - s)^2 ((m + s)^2 / (m (m + 1)) + (m - 1) s^2 / m) \le 1$. At $s = 0$ that is
    $m / (m + 1)$, which C classes attain with $m = C - 1$.

    Args:
        score: The name of the score, see
            [`conformal_scores`][orthonet.downstream.conformal_scores].
        temperature: The temperature.

    Guarantee:
        Upper bound of the Lipschitz constant for any number of classes; exact for "sigmoid",
        "softmax" and "margin".

    Raises:
        ValueError: `score` is unknown, or `temperature` is not positive.

    Examples:
        >>> round(score_lipschitz("softmax", 0.5), 6)
        0.707107
    """
    _check_score("score_lipschitz", score, temperature)
    if score == "margin":
        return sqrt_up(2.0)
    top = {"sigmoid": 0.25, "softmax": sqrt_up(0.125), "excess": 1.0}[score]
    return div_up(top, float(temperature))


def score_bounds(
    logits: Tensor,
    certificate: LipschitzCertificate,
    eps: float,
    inputs: Tensor | Sequence[Tensor] | None,
    *,
    score: str = "softmax",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Return bounds of the scores of each class within an l2 distance of the inputs.

    Within $\epsilon$, a logit moves by at most $K \epsilon + 2 e$ and the difference of two by
    $K_{yj} \epsilon + 2 \sqrt 2 e$, with the constants of the certificate and the rounding e of a
    forward pass. Every score but "excess" is monotone in these, so its bounds are its values at
    their ends, which are at least as tight as its Lipschitz constant times the move. "excess" is
    bounded by bounds of the probabilities and by its constant.

    Args:
        logits: What the model returned.
        certificate: The certificate of the model.
        eps: The l2 size of the perturbation.
        inputs: The inputs of the model; None leaves the rounding out.
        score: Name of the score.
        temperature: Its temperature.

    Shape:
        logits: (N, classes); returns two tensors of that shape, float64

    Guarantee:
        The scores that `conformal_scores` computes for the logits of the deployed model at any
        point within eps lie between the bounds, if `exp` is accurate to 64 units in the last place;
        without the inputs, for logits in exact arithmetic.

    Raises:
        ValueError: The logits do not fit the certificate, or a number is out of range.
        UncertifiableError: With the inputs, the rounding of an operation is not known.
    """
    owner = "score_bounds"
    _check_score(owner, score, temperature)
    z = checked_logits(owner, logits)
    moves = moves_of(owner, certificate, logits, eps, inputs)
    size = max(1, _ENTRIES // z.shape[1] ** 2)
    lows, highs = [], []
    for start in range(0, len(z), size):
        rows = slice(start, start + size)
        low, high = _enclosed(z[rows], moves.total[rows], moves.pairs(rows), score, temperature)
        found = _plain(z[rows], score, temperature)
        lows.append(torch.minimum(low, found))
        highs.append(torch.maximum(high, found))
    return torch.cat(lows), torch.cat(highs)


def checked_logits(owner: str, logits: Tensor) -> Tensor:
    """Return logits (N, classes) in float64 on the CPU."""
    _checks.floating(owner, logits=logits)
    good = logits.ndim == 2 and len(logits) > 0 and logits.shape[1] >= 2
    text = "logits must be (N, classes), with a sample and two classes or more"
    return checked_outputs(owner, "logits", logits, text, good)


def _check_score(owner: str, score: str, temperature: float) -> None:
    _checks.one_of(owner, SCORES, score=score)
    _checks.in_range(owner, 1e-6, 1e6, temperature=temperature)


def _plain(z: Tensor, score: str, temperature: float) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(-z / temperature)
    return _of_differences(z[:, :, None] - z[:, None, :], score, temperature)


def _of_differences(rise: Tensor, score: str, temperature: float) -> Tensor:
    """The score from z_j - z_y, (N, j, y)."""
    if score == "margin":
        other = torch.eye(rise.shape[1], dtype=torch.bool)
        return rise.masked_fill(other, -math.inf).amax(1)
    p = _probabilities(rise, temperature)
    if score == "softmax":
        return 1.0 - p
    return (p[:, :, None] - p[:, None, :]).clamp_min(0.0).sum(1)


def _probabilities(rise: Tensor, temperature: float) -> Tensor:
    """1 / sum_j exp((z_j - z_y) / T), which underflows to 0 where the sum overflows."""
    return 1.0 / (rise / temperature).exp().sum(1)


def _enclosed(
    z: Tensor, total: Tensor, pairs: Tensor, score: str, temperature: float
) -> tuple[Tensor, Tensor]:
    slack = 2.0 * score_slack(z.shape[1], score)
    if score == "sigmoid":
        r = total[:, None]
        low = torch.sigmoid(below(-z, r) / temperature)
        return low - slack, torch.sigmoid(-below(z, r) / temperature) + slack
    rise = z[:, :, None] - z[:, None, :]
    least, most = below(rise, pairs), -below(-rise, pairs)
    for each in (least, most):  # z_y - z_y is 0
        each.diagonal(dim1=1, dim2=2).zero_()
    if score != "excess":
        low, high = (_of_differences(ends, score, temperature) for ends in (least, most))
        return low - slack, high + slack
    high_p, low_p = (_probabilities(ends, temperature) for ends in (least, most))
    low = (low_p[:, :, None] - high_p[:, None, :]).clamp_min(0.0)
    high = (high_p[:, :, None] - low_p[:, None, :]).clamp_min(0.0)
    for each in (low, high):
        each.diagonal(dim1=1, dim2=2).zero_()
    found = _plain(z, score, temperature)
    reach = times(total, score_lipschitz(score, temperature))[:, None]
    low = torch.maximum(low.sum(1), below(found, reach))
    high = torch.minimum(high.sum(1), -below(-found, reach))
    return low - slack, high + slack


def score_slack(classes: int, score: str) -> float:
    """A bound of the error of a computed score, if exp is accurate to 64 units in the last place.

    An argument t of exp is off by 2 u |t|, its value by 128 u, a sum of C terms by C u. Relative to
    a probability that is 2 u sum_j p_j |t_j| + 128 u + C u, and p_y |t_j| <= 1 / e where t_j > 0,
    while sum_j p_j |t_j| <= log C elsewhere: below 2^-45 (C + 8) in all. "excess" sums C
    differences of probabilities. "margin" is a difference, and rounding is monotone.
    """
    if score == "margin":
        return 0.0
    return 2.0**-45 * (classes + 8) * (classes if score == "excess" else 1)
