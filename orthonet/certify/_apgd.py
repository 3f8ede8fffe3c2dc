"""A second attack, whose steps adapt themselves: what one attack misses, another may find."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orthonet.certify._empirical import _ball, _gain
from orthonet.certify._secants import _TINY, _rows, _unit

__all__ = ["apgd_l2"]


def _dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The margin, for three classes and more in units of the distance of the first and third."""
    gain = _gain(logits, y)
    if logits.ndim == 1 or logits.shape[1] < 3:
        return gain
    ordered = logits.sort(dim=1, descending=True).values
    return gain / (ordered[:, 0] - ordered[:, 2]).clamp_min(_TINY)


def apgd_l2(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 60,
    restarts: int = 1,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Auto-PGD on the difference of logits ratio, within an l2 ball of its own for each sample.

    Ascent with momentum from the diameter down: a sample whose objective rose in less than three
    quarters of the steps since the last check, or whose best value stood still, halves its step
    and goes on from its best point. The objective is
    \((\max_{j \ne y} f_j - f_y) / (f_{(1)} - f_{(3)})\), which no scaling of the logits changes.

    Args:
        model: A classifier in eval mode.
        x: The samples, inside `bounds`.
        y: The classes to leave, (N,); of a binary classifier with one output 0 or 1.
        radius: The radius, or one for each sample.
        steps: Steps of each start.
        restarts: Number of starts; the first at the sample, the others at random.
        bounds: The box of valid inputs, or None.
        generator: Source of the random starts.

    Shape:
        x: (N, *), returned with the same shape and dtype

    Guarantee:
        Every returned point lies in the box, and its distance to x, computed in float64 from the
        rounded points, is at most `radius`.

    Raises:
        ValueError: The model is in train mode, x lies outside the box, or a radius is negative or
            not finite.

    References:
        F. Croce, M. Hein, Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, ICML 2020, algorithm 1 and equation 6.
    """
    ball = _ball("apgd_l2", model, x, y, radius, bounds, steps, restarts)
    x, y = ball.x, ball.y

    def climb(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point = ball.point(delta).requires_grad_()
        with torch.enable_grad():
            logits = model(point)
            value = _dlr(logits, y)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), _gain(logits.detach(), y), _unit(gradient)

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
