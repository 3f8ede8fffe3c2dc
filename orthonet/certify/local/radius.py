"""Radii from the moves of the outputs in balls around single samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify._radius import certified_radius
from orthonet.certify.local.ball import Ball, TooLargeError
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import mul_up, up

__all__ = ["enlarged", "local_constants"]

_WORTH = 1.02  # a gain below this factor is not searched for
_FIRST = 1.5  # of the radius that is known, the first one that is tried


def enlarged(
    walker: Walker,
    batch: Sequence[Tensor],
    logits: Tensor,
    radii: Tensor,
    constant: float,
    pairs: Tensor | None,
    rounding: Callable[..., Tensor],
    steps: int,
) -> Tensor:
    """Return the radii of a batch, enlarged sample by sample.

    Args:
        walker: The graph with its global bounds.
        batch: The inputs.
        logits: What the deployed model returns for them, (N, classes).
        radii: What is proved already, (N,).
        constant: The global constant.
        pairs: The global constants of differences of logits, if they are known.
        rounding: Bounds of the rounding of a sample's forward pass, `rounding(x, within=r)`.
        steps: Balls that are tried for each sample, besides the one that is proved.
    """
    if pairs is None:
        value = mul_up(up(math.sqrt(2.0)), constant)
        pairs = torch.full((logits.shape[1],) * 2, value, dtype=torch.float64)
    found = []
    for i, start in enumerate(radii.tolist()):
        sample, row = tuple(t[i : i + 1] for t in batch), logits[i : i + 1]
        top = int(row.argmax())

        def within(constants: Tensor, radius: float, x: Any = sample, row: Tensor = row) -> float:
            table = pairs.clone()
            table[int(row.argmax())] = constants
            return float(certified_radius(row, constant, table, rounding(x, within=radius)))

        found.append(_grown(walker, sample, top, start, pairs[top], within, steps))
    return torch.tensor(found, dtype=torch.float64)


def _grown(
    walker: Walker,
    inputs: Sequence[Tensor],
    top: int,
    start: float,
    most: Tensor,
    within: Callable[[Tensor, float], float],
    steps: int,
) -> float:
    """Return a radius of one sample that is at least `start`, which is proved already.

    For balls of growing radius r, `within(constants, r)` is the distance that margins allow with
    these constants of their differences, at most `most`; the smaller of it and r is a radius. The
    search works with estimates of norms; the ball that it ends at is proved.
    """
    node = walker.program.outputs[0]

    def quotient(radius: float, proved: bool = False) -> float:
        constants = most
        for ball in _balls(walker, inputs, radius, proved):
            constants = ball.differences(node, top, constants)
        return within(constants, radius)

    if not 0.0 < start < math.inf:
        return start
    try:
        # The quotient falls with the radius: a radius below its own quotient is a certified one,
        # and so is, for a radius above it, that quotient.
        low, high, radius, before = start, math.inf, _FIRST * start, None
        for _ in range(steps):
            found = quotient(radius)
            low = max(low, min(radius, found))
            high = min(high, max(radius, found))
            if high < _WORTH * low or found < _WORTH * start:
                break
            before, radius = (radius, found), _next(low, high, before, (radius, found))
        if low < _WORTH * start:
            return start
        return max(start, min(low, quotient(low, True)))
    except (TooLargeError, OverflowError, UncertifiableError):
        return start


def _next(
    low: float, high: float, before: tuple[float, float] | None, last: tuple[float, float]
) -> float:
    """Where the quotient is expected to be the radius: by a secant of both logarithms."""
    middle = math.sqrt(low * high) if math.isfinite(high) else 4.0 * low
    if before is None or not math.isfinite(high):
        return middle
    gaps = [
        math.log(found / radius) if found > 0 else -math.inf for radius, found in (before, last)
    ]
    if not all(map(math.isfinite, gaps)) or gaps[0] == gaps[1]:
        return middle
    step = math.log(last[0] / before[0]) * gaps[1] / (gaps[0] - gaps[1])
    radius = last[0] * math.exp(step)
    return radius if low < radius < high else middle


def _balls(
    walker: Walker,
    inputs: Sequence[Tensor],
    radius: float,
    proved: bool = True,
    chords: bool = True,
) -> Iterator[Ball]:
    """The ball, and where there is a choice the same one with joint activations."""
    ball = Ball(walker, inputs, radius, chords=chords, proved=proved)
    choices = ball.choices
    yield ball
    del ball
    if choices:
        yield Ball(walker, inputs, radius, chords=chords, proved=proved, joint=True)


def local_constants(walker: Walker, batch: Sequence[Tensor], radius: float) -> tuple[Bound, ...]:
    """Return bounds of the constants in the balls around all samples, at most the global one."""
    samples = (tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0])))
    return tuple(_constant(walker, sample, radius) for sample in samples)


def _constant(walker: Walker, inputs: Sequence[Tensor], radius: float) -> Bound:
    """The same of one sample."""
    states = [s for s in walker.outputs if s is not None]
    try:
        found = min(
            math.hypot(*(ball.norm(s) if s.node in ball.moves else math.inf for s in states))
            for ball in _balls(walker, inputs, radius, chords=False)
        )
    except (TooLargeError, OverflowError, UncertifiableError):
        return walker.bound
    found *= 1.0 + 2.0**-50 * (len(states) + 2)
    return Bound(found) if found < walker.bound.value else walker.bound
