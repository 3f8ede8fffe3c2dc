"""A lower bound of the Lipschitz constant: the steepest secant that a search finds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from orthonet.certify._bound import Bound, norm_text
from orthonet.certify._radius import longer
from orthonet.certify.attacks.secants import lengths_in, steepest_mixed, steepest_secant
from orthonet.certify.graph.replay import Replay
from orthonet.certify.norms import limits
from orthonet.certify.rounding.forward import forward_error
from orthonet.errors import UncertifiableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from orthonet.certify.walk.walker import Walker

__all__ = ["lower_bound", "lower_mixed"]

_LENGTHS = (1.0, 16.0, 256.0, 4096.0)
_UNPROVED = 1e-6
_MOST_STEPS, _MOST_STARTS = 3, 4  # as multiples of those of an effort
_ENOUGH = 1e-4  # a gap that no further search would narrow in a way that counts
_GLANCE = 6  # steps, from one start, where every operation keeps distances
_OVERHEAD = 2e5  # floating-point operations that the calls of a small model are worth


def lower_bound(walker: Walker, examples: Sequence[Tensor]) -> Bound | None:
    """The ratio |f(b) - f(a)| / |b - a| of two points, less what rounding can have added.

    The points are found by ascent on the Jacobian, from the examples and from noise around them;
    the ratio is that of values of the function itself, in float64 with the deployed weights. The
    search ends where the ratio is within 1e-4 of the bound. Where the constants of all operations
    are 1 to that accuracy, as in a network of orthogonal layers, a few steps have to do: the bound
    cannot be off by more than what the layers do to one particular direction.
    Where the rounding of an operation is not known it is taken to be less than 1e-6 of the ratio.
    """
    if not limits().search:
        return None
    function = Replay(walker.program).eval()
    generator = torch.Generator().manual_seed(0)
    points = _flat(examples)
    isometric = all(
        abs(row.constant - 1.0) <= _ENOUGH and row.method != "largest slope"
        for row in walker.rows()
    )
    steps, starts = (_GLANCE, 1) if isometric else _extent(function, points[:1])
    copies = points[torch.arange(starts) % len(points)]
    noise = torch.randn(copies.shape, generator=generator, dtype=torch.float64)
    noise[: len(points)] = 0.0
    found = steepest_secant(
        function,
        copies + noise,
        steps=steps,
        step_size=0.3,
        generator=generator,
        goal=walker.bound.value * (1.0 - _ENOUGH),
    )
    if found is None:
        return Bound(0.0, kind="estimate")
    _, a, difference = found
    lengths = _LENGTHS[:1] if isometric else _LENGTHS
    points = torch.cat([a, *(a + factor * difference for factor in lengths)])
    with torch.no_grad():
        values = function(points)
    return Bound(_proved(walker, function, points, values, "l2", "l2"), kind="estimate")


def lower_mixed(
    walker: Walker, examples: Sequence[Tensor], norm: str, to: str, goal: float
) -> Bound | None:
    """The same between other norms."""
    if not limits().search:
        return None
    function = Replay(walker.program).eval()
    generator = torch.Generator().manual_seed(0)
    points = _flat(examples)
    steps, starts = _extent(function, points[:1])
    copies = points[torch.arange(starts) % len(points)]
    noise = torch.randn(copies.shape, generator=generator, dtype=torch.float64)
    noise[: len(points)] = 0.0
    found = steepest_mixed(function, copies + noise, norm, to, steps, generator, goal)
    if found is None:
        return Bound(0.0, norm_text(norm, to), "estimate")
    a, difference = found
    points = torch.cat([a, *(a + factor * difference for factor in _LENGTHS)])
    with torch.no_grad():
        values = function(points)
    return Bound(
        _proved(walker, function, points, values, norm, to), norm_text(norm, to), "estimate"
    )


def _flat(examples: Sequence[Tensor]) -> Tensor:
    """The examples as one row for each sample; zeros where there is none."""
    return torch.cat(
        [
            x.detach().cpu().double().reshape(len(x), -1)
            if len(x)
            else torch.zeros(1, math.prod(x.shape[1:]), dtype=torch.float64)
            for x in examples
        ],
        1,
    )


def _proved(
    walker: Walker, function: Replay, points: Tensor, values: Tensor, norm: str, to: str
) -> float:
    """The steepest secant from the first point to another one, less what rounding can add."""
    rises = lengths_in(values[1:] - values[:1], to)
    try:
        errors = forward_error(walker, function.split(points), 0.0, torch.float64)
        errors = errors * longer("l2", to, values.shape[1])
    except UncertifiableError:
        errors = _UNPROVED / 2 * torch.cat([torch.zeros(1).double(), 2.0 * rises])
    runs = lengths_in(points[1:] - points[:1], norm)
    best = 0.0
    for i in range(len(rises)):
        rise, run = float(rises[i]) * (1.0 - 1e-12), float(runs[i]) * (1.0 + 1e-12)
        ratio = (rise - float(errors[0] + errors[i + 1])) / run if run else 0.0
        best = max(best, ratio if ratio == ratio else 0.0)
    return best


def _extent(function: Replay, point: Tensor) -> tuple[int, int]:
    """Steps and starts of the search: as many as its work allows, at least those of the effort."""
    allowed = limits()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        function(point)
    rounds = allowed.work / (6.0 * (counter.get_total_flops() + _OVERHEAD))  # two points, and back
    more = max(1.0, rounds / (allowed.search * allowed.starts))
    starts = int(allowed.starts * min(_MOST_STARTS, more**0.5))
    return min(_MOST_STEPS * allowed.search, int(allowed.search * more**0.5)), starts
