"""Attacks whose steps adapt themselves: what one of them misses, another may find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._radius import Norm
from orthonet.certify.attacks.ball import Ball, ball_of
from orthonet.certify.attacks.pgd import _gain, _predicted, _rivals, check_labels
from orthonet.certify.attacks.secants import _TINY, _rows

__all__ = ["apgd", "apgd_ensemble_l2", "apgd_l2"]

LOSSES = ("dlr", "ce")

_Loss = Callable[[Tensor, Tensor], Tensor]


def _dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The margin, for three classes and more in units of the distance of the first and third."""
    gain = _gain(logits, y)
    if logits.ndim == 1 or logits.shape[1] < 3:
        return gain
    ordered = logits.sort(dim=1, descending=True).values
    return gain / (ordered[:, 0] - ordered[:, 2]).clamp_min(_TINY)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of the true class; of one output the margin, which orders points alike."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        return _gain(logits, y)
    return F.cross_entropy(logits, y, reduction="none")


_OBJECTIVES = {"dlr": _dlr, "ce": _cross_entropy}


def _toward(rank: int) -> _Loss:
    """The targeted ratio: the margin of the class that was the `rank`-th rival at the start."""
    rivals: list[Tensor] = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        if not rivals:
            rivals.append(_rivals(logits.detach(), y).argsort(1, descending=True)[:, rank])
        gain = _gain(logits, y, rivals[0])
        if logits.shape[1] < 4:
            return gain
        ordered = logits.sort(dim=1, descending=True).values
        width = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
        return gain / width.clamp_min(_TINY)

    return loss


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    norm: Norm = "l2",
    steps: int = 60,
    restarts: int = 1,
    loss: Literal["dlr", "ce"] = "dlr",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Attack with Auto-PGD within a ball around each sample.

    The attack ascends with momentum, starting with steps of one diameter. If the objective of a
    sample rose in less than three quarters of the steps since the last check, or its best value did
    not change, the sample halves its step and continues from its best point. The objective is the
    difference of logits ratio \((\max_{j \ne y} f_j - f_y) / (f_{(1)} - f_{(3)})\), which does not
    depend on the scale of the logits, or the cross-entropy.

    Args:
        model: See [`pgd`][orthonet.certify.pgd], as for every argument but `loss`.
        x: The samples.
        y: The classes to leave.
        radius: The radius, or one for each sample.
        norm: The norm of the ball.
        steps: Steps of each start.
        restarts: Number of starts; the first at the sample, the others at random.
        loss: The objective: the ratio, `"dlr"`, or the cross-entropy, `"ce"`.
        bounds: The box of valid inputs, or None.
        generator: Source of the random starts.

    Shape, guarantee and errors are those of `pgd`.

    References:
        F. Croce, M. Hein, Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, ICML 2020, algorithm 1 and equation 6.
    """
    _checks.one_of("apgd", LOSSES, loss=loss)
    ball = ball_of("apgd", model, x, y, radius, bounds, steps, restarts, norm)
    return _ascend(model, ball, _OBJECTIVES[loss], steps, restarts, generator)


def apgd_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 60,
    restarts: int = 1,
    loss: Literal["dlr", "ce"] = "dlr",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack in l2: [`apgd`][orthonet.certify.apgd] with the same arguments, less `norm`."""
    _checks.one_of("apgd_l2", LOSSES, loss=loss)
    ball = ball_of("apgd_l2", model, x, y, radius, bounds, steps, restarts)
    return _ascend(model, ball, _OBJECTIVES[loss], steps, restarts, generator)


def _ascend(
    model: nn.Module,
    ball: Ball,
    loss: _Loss,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The points with the largest margin that Auto-PGD on `loss` meets."""
    x, y = ball.x, ball.y

    def climb(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point = ball.point(delta).requires_grad_()
        with torch.enable_grad():
            logits = model(point)
            check_labels("apgd", y, logits)
            value = loss(logits, y)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), _gain(logits.detach(), y), ball.ascent(gradient, delta)

    found, found_gain = torch.zeros_like(x), None
    for restart in range(restarts):
        delta = ball.start(generator) if restart else torch.zeros_like(x)
        before, best, top = delta, delta, torch.full_like(ball.radius, -torch.inf).to(x.dtype)
        length = torch.full_like(top, 2.0)
        last, mark, rises, since = top, top, torch.zeros_like(top), 0
        period = max(1, round(0.22 * steps))
        for step in range(steps + 1):
            value, gain, ascent = climb(delta)
            if found_gain is None:
                found_gain = gain
            better = gain > found_gain
            found_gain = torch.where(better, gain, found_gain)
            found = torch.where(_rows(better, x), delta, found)
            rises, since, last = rises + (value > last), since + 1, value
            higher = value > top
            top, best = torch.where(higher, value, top), torch.where(_rows(higher, x), delta, best)
            goal = ball.project(delta + _rows(length, x) * ball.rows * ascent)
            share = 0.75 if step else 1.0
            moved = ball.project(delta + share * (goal - delta) + (1.0 - share) * (delta - before))
            before, delta = delta, moved
            if since >= period:
                stuck = (rises < 0.75 * since) | (top <= mark)
                length = torch.where(stuck, length / 2, length)
                delta = torch.where(_rows(stuck, x), best, delta)
                mark, rises, since = top, torch.zeros_like(top), 0
                period = max(max(1, round(0.06 * steps)), period - max(1, round(0.03 * steps)))
    return ball.inside(found)


def apgd_ensemble_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 100,
    targets: int = 9,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack with three kinds of Auto-PGD in turn, on the samples that are still correct.

    Auto-PGD runs on the cross-entropy, on the difference of logits ratio, and toward each of the
    `targets` best rivals. This is the first half of AutoAttack, in the published order; FAB and
    Square are not part of it. To compare AutoAttack with a certificate, use
    `attack_certificate(..., attack=...)`.

    Args:
        model: See [`pgd`][orthonet.certify.pgd], as for the arguments that are not explained here.
        x: The samples.
        y: The classes to leave.
        radius: The radius, or one for each sample.
        steps: Steps of each attack.
        targets: Number of rivals to pursue, the best ones first.
        bounds: The box of valid inputs, or None.
        generator: Source of the random starts.

    Shape, guarantee and errors are those of `pgd`. A sample that does not reach another class is
    returned unchanged.

    References:
        F. Croce, M. Hein, Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, ICML 2020.
    """
    owner = "apgd_ensemble_l2"
    _checks.positive_int(owner, targets=targets)
    ball = ball_of(owner, model, x, y, radius, bounds, steps, 1)
    with torch.no_grad():
        clean = model(ball.x)
    classes = 1 if clean.ndim == 1 else clean.shape[1]
    losses = [_cross_entropy, _dlr]
    losses += [_toward(rank) for rank in range(min(targets, classes - 1) if classes > 2 else 0)]
    found, stands = ball.x.clone(), _gain(clean, ball.y) <= 0
    for loss in losses:
        part = stands.nonzero()[:, 0]
        if not len(part):
            break
        few = ball._replace(x=ball.x[part], y=ball.y[part], radius=ball.radius[part])
        points = _ascend(model, few, loss, steps, 1, generator)
        with torch.no_grad():
            moved = _predicted(model(points)) != few.y
        found[part[moved]] = points[moved]
        stands[part[moved]] = False
    return found
