"""An attack that maximizes any score within an l2 ball, and the splits that coverage is told on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["halves", "raised"]

Score = Callable[[Tensor], Tensor]


def raised(
    model: nn.Module, x: Tensor, eps: float, slope: Score, score: Score, steps: int
) -> tuple[Tensor, Tensor]:
    """Ascend within an l2 ball around each sample; return the worst points and their outputs.

    Args:
        model: A model in eval mode; x decides the dtype.
        x: The samples, (N, *).
        eps: Radius of the balls.
        slope: What is ascended: a differentiable number for each sample, from the outputs.
        score: What is maximized: the point of the largest score of all steps is returned.
        steps: Gradient steps; their length falls from the diameter of the ball.

    Returns:
        Points whose distance to x, computed in float64, is at most eps, and the outputs there.
    """
    lead = [-1] + [1] * (x.ndim - 1)
    # Inside by a part in a million and by what the sum x + delta may be rounded.
    room = eps * (1.0 - 1e-6) - x.flatten(1).norm(dim=1) * torch.finfo(x.dtype).eps
    room = room.clamp_min(0.0)
    delta, best = torch.zeros_like(x), x.clone()
    with torch.no_grad():
        outputs = model(x)
        highest = score(outputs)
    for step in range(steps if eps > 0 else 0):
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            (way,) = torch.autograd.grad(slope(model(point)).sum(), point)
        way = way / way.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(lead)
        delta = delta + 2.0 * eps * (1.0 - step / steps) * way
        length = delta.flatten(1).norm(dim=1).clamp_min(eps)
        delta = delta * (room / length).reshape(lead)
        with torch.no_grad():
            point = x + delta
            inside = (point.double() - x.double()).flatten(1).norm(dim=1) <= eps
            found = model(point)
            value = torch.where(inside, score(found), -torch.inf)
        better = value > highest
        highest = torch.where(better, value, highest)
        best = torch.where(better.reshape(lead), point, best)
        outputs = torch.where(better.reshape(-1, *[1] * (found.ndim - 1)), found, outputs)
    return best, outputs


def halves(number: int, splits: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random halves of the samples: to calibrate on, and to judge by."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(splits):
        order = torch.randperm(number, generator=generator)
        yield order[: number // 2], order[number // 2 :]
