"""Radii from the moves of the outputs in balls around single samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from orthonet.certify._radius import certified_radius
from orthonet.certify.graph.replay import replay
from orthonet.certify.local.ball import Ball, Point
from orthonet.certify.local.moves import TooLargeError
from orthonet.certify.rounding.modes import check_products
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import mul_up, up

__all__ = ["Ends", "enlarged", "local_constants", "local_reaches", "radii_of_balls"]

_WORTH = 1.02  # a gain below this factor is not searched for
_HOPE = 1.2  # nor one where no bound of the kind can gain more than this
_NEAR = 1.25  # a quotient this near to its radius needs no further search
_NEARER = 1.05  # the same where balls cost little
_TOGETHER = 16  # samples whose gradients are taken at once
_FAR = 1e6  # a radius beyond which no search starts
_SHRINK = 0.25  # of a ball in which nothing is known
_TRIES = 3  # balls that are proved, each smaller, where one proves nothing
_FEW = 2048  # rows of a ball that costs little
_SLOPE = 1.0  # of the logarithm of the quotient, until two balls have told
_FAILED = (TooLargeError, OverflowError, UncertifiableError)


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
    ceilings = _ceilings(walker, batch, logits, pairs)
    search, found = _Search(walker, steps), []
    for i, (start, ceiling) in enumerate(zip(radii.tolist(), ceilings.tolist(), strict=True)):
        sample, row = tuple(t[i : i + 1] for t in batch), logits[i : i + 1]
        top = int(row.argmax())

        def within(
            constants: Tensor,
            lost: Tensor,
            row: Tensor = row,
            top: int = top,
        ) -> float:
            table = pairs.clone()
            table[top] = constants
            return float(certified_radius(row, constant, table, lost))

        task = _Task(sample, top, start, ceiling, pairs[top], rounding, within)
        found.append(search.radius(task))
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class _Task:
    """A sample whose radius is searched for.

    Attributes:
        inputs: The sample.
        top: Its class.
        start: The radius that is proved already.
        ceiling: About the largest one that could be.
        most: The global constants of the differences of logits.
        rounding: Bounds of the rounding of a forward pass, `rounding(x, within=r)`.
        within: The distance that margins allow with constants of their differences.
    """

    inputs: Sequence[Tensor]
    top: int
    start: float
    ceiling: float
    most: Tensor
    rounding: Callable[..., Tensor]
    within: Callable[[Tensor, Tensor], float]


class _Search:
    """Finds radii of samples one after the other; what it learned is where the next one starts.

    For balls of radius r, the distance q that margins allow falls with r, and the smaller one of
    both is a radius. The search for q = r works with estimates in single precision; the ball that
    it ends at is proved.
    """

    def __init__(self, walker: Walker, steps: int) -> None:
        self.walker, self.steps = walker, steps
        self.share, self.slope, self.seen = 0.5, _SLOPE, 0
        self.dtype = torch.float32
        try:
            check_products("LipschitzCertificate", {torch.device("cpu")}, {torch.float32})
        except UncertifiableError:
            self.dtype = torch.float64

    def radius(self, task: _Task) -> float:
        """Return a radius that is at least the one that is proved already."""
        if not 0.0 < task.start < math.inf or task.ceiling < _HOPE * task.start:
            return task.start
        for dtype in dict.fromkeys((self.dtype, torch.float64)):
            try:
                return self._found(task, dtype)
            except _FAILED:
                continue
        return task.start

    def alone(self, inputs: Sequence[Tensor], node: fx.Node) -> tuple[int, float]:
        """Return the class of a sample, and a radius that rests on no global constant."""
        point = Point(self.walker, inputs)
        row = point.values[node]
        top, lost = int(row.argmax()), torch.tensor([point.off(self.walker.states[node])])
        most = torch.full((row.shape[1],), math.inf, dtype=torch.float64)
        table = most.repeat(len(most), 1)
        whole = self.walker.bound.value
        start = float(certified_radius(row, whole, None, lost)) if whole < math.inf else 0.0
        if start == math.inf or not float(certified_radius(row, 1.0, None, lost)) > 0.0:
            return top, start  # nothing moves, or the class itself is open

        def quotient(radius: float, proved: bool, dtype: torch.dtype) -> float:
            best = 0.0
            try:
                for _, ball in _balls(point, radius, proved, dtype):
                    table[top] = ball.differences(node, top, most)
                    best = max(best, float(certified_radius(row, math.inf, table, lost)))
            except _FAILED:
                pass
            return best

        ceiling = float(_ceilings(self.walker, inputs, row, torch.ones_like(table)))
        radius = max(start, 0.5 * ceiling if 0.0 < ceiling < _FAR else 1.0)
        for _ in range(self.steps):
            found = quotient(radius, False, self.dtype)
            gap = math.log(found / radius) if found > 0.0 else -math.inf
            if abs(gap) < math.log(_NEARER):
                break
            # Where the rows grow like the radius, the quotient falls like its inverse.
            radius *= max(math.exp(gap / 2.0), _SHRINK)
        best = start
        for _ in range(_TRIES):
            best = max(best, min(radius, quotient(radius, True, self.dtype)))
            if best > 0.5 * radius:
                break
            radius *= _SHRINK
        return top, best

    def _found(self, task: _Task, dtype: torch.dtype) -> float:
        point = Point(self.walker, task.inputs)
        span = math.log(min(task.ceiling, 1e6 * task.start) / task.start)
        radius = task.start * math.exp(self.share * span)
        lost = task.rounding(task.inputs, within=radius)
        joints: Sequence[bool] | None = None
        before: tuple[float, float] | None = None
        for _ in range(self.steps):
            found = -math.inf
            for joint, ball in _balls(point, radius, False, dtype, joints):
                node = self.walker.program.outputs[0]
                near = _NEARER if ball.space.total < _FEW else _NEAR
                here = task.within(ball.differences(node, task.top, task.most), lost)
                if here > found:
                    found, best = here, joint
            joints = (best,)
            if found < _WORTH * task.start:
                return task.start
            gap = math.log(found / radius)
            if before is not None and abs(before[0] - math.log(radius)) > 0.05:
                slope = (before[1] - math.log(found)) / (math.log(radius) - before[0])
                self.slope = min(max(slope, 0.2), 4.0)
            before = math.log(radius), math.log(found)
            # Where the line through the quotient, of this slope in both logarithms, is the radius.
            radius *= math.exp(gap / (1.0 + self.slope))
            if abs(gap) < math.log(near):
                break
        radius = max(radius, task.start)
        if radius < _WORTH * task.start:
            return task.start
        (_, ball), *_ = _balls(point, radius, True, dtype, joints)
        constants = ball.differences(self.walker.program.outputs[0], task.top, task.most)
        result = min(radius, task.within(constants, task.rounding(task.inputs, within=radius)))
        if span > 0.0 and result > task.start:
            self.seen += 1
            share = math.log(result / task.start) / span
            self.share += (share - self.share) / self.seen
        return max(task.start, result)


def radii_of_balls(walker: Walker, batch: Sequence[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Return the predicted classes and their radii in exact arithmetic, by balls alone.

    Args:
        walker: The graph, with one output (N, classes); its global bound may be infinite.
        batch: The inputs.
        steps: Balls that are tried for each sample, besides those that are proved.
    """
    search = _Search(walker, steps)
    (node,) = walker.program.outputs
    found = [search.alone(tuple(t[i : i + 1] for t in batch), node) for i in range(len(batch[0]))]
    classes, radii = zip(*found, strict=True) if found else ((), ())
    return torch.tensor(classes, dtype=torch.long), torch.tensor(radii, dtype=torch.float64)


def _ceilings(walker: Walker, batch: Sequence[Tensor], logits: Tensor, pairs: Tensor) -> Tensor:
    """About the largest radii (N,) that any bound of slopes can prove: nothing rests on them.

    The slope at the sample itself of the margin that decides on the global radius.
    """
    logits = logits.detach().cpu().double()
    top = logits.argmax(1)
    margins = logits.gather(1, top[:, None]) - logits
    quotients = margins / pairs[top].clamp_min(1e-300)
    rival = quotients.scatter(1, top[:, None], math.inf).argmin(1)
    found = []
    for part in torch.arange(len(logits)).split(_TOGETHER):
        inputs = [x[part.to(x.device)].detach().cpu().double().requires_grad_() for x in batch]
        pair = torch.stack([top[part], rival[part]], 1)
        try:
            length = _slopes(walker, inputs, pair)
        except RuntimeError:  # an operation that has no derivative, or writes to its input
            length = torch.zeros(len(part), dtype=torch.float64)
        margin = margins[part].gather(1, pair[:, 1:])[:, 0]
        found.append(torch.where(length > 0, margin / length.clamp_min(1e-300), math.inf))
    return torch.cat(found)


def _slopes(walker: Walker, inputs: list[Tensor], pair: Tensor) -> Tensor:
    """The length of the gradient of the difference of two logits of each sample."""
    with torch.enable_grad():
        output = replay(walker.program, inputs)[walker.program.outputs[0]]
        ends = output.gather(1, pair)
        parts = torch.autograd.grad((ends[:, 0] - ends[:, 1]).sum(), inputs, allow_unused=True)
    squares = [p.flatten(1).square().sum(1) for p in parts if p is not None]
    return torch.stack(squares).sum(0).sqrt()


def _balls(
    point: Point,
    radius: float,
    proved: bool = True,
    dtype: torch.dtype = torch.float64,
    joints: Sequence[bool] | None = None,
    chords: bool = True,
) -> Iterator[tuple[bool, Ball]]:
    """The ball, and where there is a choice the same one with joint activations."""
    if joints is None:
        ball = Ball(point, radius, chords=chords, proved=proved, dtype=dtype)
        joints = (True,) if ball.choices else ()
        yield False, ball
        del ball
    for joint in joints:
        yield joint, Ball(point, radius, chords=chords, proved=proved, dtype=dtype, joint=joint)


@dataclass(frozen=True, eq=False)
class Ends:
    """A graph and the samples around which it is bounded."""

    walker: Walker
    batch: tuple[Tensor, ...]


def local_constants(walker: Walker, batch: Sequence[Tensor], radius: float) -> list[float]:
    """Return bounds of the constants in the balls around all samples, at most the global one."""
    return _norms(walker, batch, radius, False)


def local_reaches(walker: Walker, batch: Sequence[Tensor], radius: float) -> list[float]:
    """Return bounds of the slopes of secants that start at the samples, likewise."""
    return _norms(walker, batch, radius, True)


def _norms(walker: Walker, batch: Sequence[Tensor], radius: float, chords: bool) -> list[float]:
    """The norms of the rows of all outputs, for each sample."""
    states = [s for s in walker.outputs if s is not None]
    found = []
    for i in range(len(batch[0])):
        best = walker.bound.value
        try:
            point = Point(walker, tuple(t[i : i + 1] for t in batch))
            balls = _balls(point, radius, chords=chords)
            for _, ball in balls:
                norms = (ball.norm(s) if s.node in ball.moves else math.inf for s in states)
                best = min(best, math.hypot(*norms) * (1.0 + 2.0**-50 * (len(states) + 2)))
        except _FAILED:
            pass
        found.append(best)
    return found
