r"""How a graph moves in an l2 ball around one input, node by node.

Every difference $h(a) - h(x)$, for a in the ball, is a matrix J times $a - x$. Affine operations
are run on the rows of J; at an activation every unit has a slope in an interval, which follows
from how far its input can move: the mean of the interval is kept, and the rest becomes an unknown
factor. A sort compares pairs step by step, and the order of each pair is such a slope. With slopes
of chords that start at x the rows of J bound $|h_i(a) - h_i(x)| / \|a - x\|$, which is all that a
radius needs; with the slopes of all chords in the ball, the Lipschitz constants of the units.
Products, softmax and normalizations are those of `nonlinear`; any other operation is known by its
gain alone.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from orthonet.certify.graph.marks import mark_of
from orthonet.certify.graph.replay import replay
from orthonet.certify.local.moves import Moves, Rows, TooLargeError
from orthonet.certify.local.nonlinear import ALL, PointErrors, in_ball
from orthonet.certify.local.order import Step, steps_of, two_of
from orthonet.certify.local.unknown import Unknown
from orthonet.certify.mlp.chain import frobenius_up
from orthonet.certify.mlp.slopes import Activation, Kinks
from orthonet.certify.ops.activations import activation_of
from orthonet.certify.rules import record_of
from orthonet.certify.walk.islands import action_of, linear_action
from orthonet.certify.walk.state import State
from orthonet.certify.walk.walker import Walker
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up

__all__ = ["Ball", "Point"]

_OUTWARD = 1.0 + 2.0**-45  # covers the roundings of a few entrywise operations and a short sum
_RELU = Kinks((0.0,), (0.0, 1.0))
_POSITIVE = Activation(
    torch.relu,
    torch.zeros((), dtype=torch.float64),
    torch.ones((), dtype=torch.float64),
    narrow=_RELU,
    chords=_RELU.chords,
)


class Point:
    """The values of all nodes of a graph at one sample, and what they may be off.

    Args:
        walker: The graph of the model, with its global bounds.
        inputs: One sample of each input, (1, *shape).

    Raises:
        UncertifiableError: The rounding of an operation is not known.
    """

    def __init__(self, walker: Walker, inputs: Sequence[Tensor]) -> None:
        self.walker = walker
        self.inputs = [x.detach().cpu().double() for x in inputs]
        self.size = sum(x.numel() for x in self.inputs)
        with torch.no_grad():
            self.values = replay(walker.program, self.inputs)
            none = torch.zeros(1, dtype=torch.float64)
            self.errors = PointErrors(walker, self.values, none, torch.float64, None)

    def off(self, state: State) -> float:
        """What the value of an entry at the sample may be off."""
        return mul_up(float(self.errors.of(state)), 1.0 + 2.0**-40)


class Ball:
    """The rows of all nodes of a graph in the ball around one sample.

    Args:
        point: The sample.
        radius: The radius of the ball, in the l2 norm of all inputs together.
        chords: Take the slopes of chords that start at the sample: the rows bound how far units
            move from it, and are no Lipschitz constants.
        proved: Bound norms and roundings; without, estimate norms and leave roundings out.
        joint: Take activations of several entries together and largest entries of windows by
            their gain: better in large balls, where few of their slopes are known.
        dtype: Of the rows, float32 or float64.

    Attributes:
        choices: How many operations `joint` makes a difference to.

    Raises:
        TooLargeError: The rows would not fit into memory.
        OverflowError: A unit moves without a bound.
    """

    def __init__(
        self,
        point: Point,
        radius: float,
        *,
        chords: bool = True,
        proved: bool = True,
        joint: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.point, self.walker, self.radius, self.chords = point, point.walker, radius, chords
        self.values = point.values
        self.unknown = Unknown(point.size, dtype, proved)
        self.space = Rows(self.unknown)
        self.moves: dict[fx.Node, Moves] = {}
        self.parts: dict[fx.Node, tuple[dict[fx.Node, Moves], Any]] = {}
        self.sorted: dict[fx.Node | tuple[fx.Node, fx.Node], Moves] = {}
        self.joint, self.choices = joint, 0
        walker = self.walker
        with torch.no_grad():
            first = 0
            for node in walker.program.inputs:
                shape = self.values[node].shape[1:]
                self.moves[node] = self.space.inputs(first, shape)
                first += shape.numel()
            self.left = Counter(p.node for s in walker.states.values() for p in {*s.parents})
            self.left.update(walker.program.outputs)
            for state in walker.states.values():
                if state.node not in self.moves:
                    self._visit(state)
                for node in {p.node for p in state.parents}:
                    self.left[node] -= 1
                    if not self.left[node]:  # its rows are read no more
                        self.moves.pop(node, None)

    def off(self, state: State) -> float:
        """What the value of an entry at the sample may be off."""
        return self.point.off(state)

    def rows(self, moves: Moves, most: float = math.inf) -> Tensor:
        """Bounds of the rows of a node, each at most `most`."""
        return self.space.measured(moves)[1].clamp(max=most)

    def differences(self, node: fx.Node, top: int, most: Tensor) -> Tensor:
        """Bounds of the rows of entry `top` less every entry of a vector, each at most `most`."""
        with torch.no_grad():
            moves = self.space.dense(self.moves[node])
            sizes = self.space.measured(moves)[0].sizes
            error = moves.error[top] + moves.error
            error = error + 2 * self.unknown.unit * (sizes[top] + sizes) + self.unknown.lost
            rows = moves.known[:, top, None] - moves.known
            return torch.minimum(self.rows(Moves(rows, error * _OUTWARD, sizes)), most)

    def norm(self, state: State) -> float:
        """A bound of the norm of all rows of a node together."""
        whole = self.walker.bound_of(state).value
        moves = self.space.dense(self.moves[state.node])
        rows = self.rows(moves, whole).flatten()
        if not len(rows):
            return 0.0
        found = self.unknown.norm(
            moves.known.reshape(len(moves.known), -1), torch.ones_like(rows), moves.error.flatten()
        )
        return min(whole, found, frobenius_up(rows))

    # operations -------------------------------------------------------------------------------

    def _visit(self, state: State) -> None:
        value = self.values[state.node]
        known = all(p.node in self.moves for p in state.parents)
        if not isinstance(value, Tensor):
            if known and action_of(state) is not None:
                self._cut(state)
            elif known and (found := self._ordered(state)) is not None:
                self.sorted[state.node] = found
            return  # the parts are seen where they are read
        if value.is_complex():
            return  # units are real: what reads it counts with its gain
        self.space.check(value.numel())
        if state.parents and state.parents[0].node in self.parts:
            self.moves[state.node] = self._part(state)
            return
        if state.parents and state.parents[0].node in self.sorted and state.node.args[1] == 0:
            self.moves[state.node] = self.sorted.pop(state.parents[0].node)
            return
        if known and action_of(state) is not None:
            found = self._affine(state)
            if found is not None:
                self.moves[state.node] = found
                return
        bounded = known and state.call.op in ALL and self._has_gain(state)
        self.choices += bounded
        found = None
        if known and mark_of(state.node) is None and not (bounded and self.joint):
            found = in_ball(self, state)
        if found is None and known:
            found = self._ordered(state)
        if found is not None:
            self.moves[state.node] = found
            return
        single = known and len(state.parents) == 1
        record = record_of(state.node.target) if single and mark_of(state.node) is None else None
        activation = self._activation(state) if single else None
        windows = None if record is None else record.windows
        several = windows is not None or (activation is not None and activation[1] is not None)
        self.choices += several
        if several and self.joint:
            found = self._opaque(state)
        elif activation is not None:
            found = self._activated(state, *activation)
        elif windows is not None:
            found = self._largest(state, windows(state.call))
        else:
            found = self._opaque(state)
        self.moves[state.node] = found

    def _affine(self, state: State) -> Moves | None:
        """Follow the linear part of an operation; its rows are run where they are needed."""
        parents = {p.node: self.moves[p.node] for p in state.parents}
        both = {n: torch.stack([m.error, m.sizes]) for n, m in parents.items()}
        try:
            error, sizes = linear_action(state, both, 2, True)
        except ValueError:
            return None
        action: Any = action_of(state)
        if not action.moves:
            count = (action.forward or action.terms)(state) + 8
            lost = (
                count
                * self.unknown.lost
                * (1.0 + sum(float(m.sizes.sum()) for m in parents.values()))
            )
            error = error + self.unknown.gamma(count) * (sizes + error) + lost
        found = self.space.later(state, parents, error * _OUTWARD, sizes * _OUTWARD)
        return found if self.left[state.node] < 2 else self.space.kept(found)

    def _cut(self, state: State) -> None:
        """Follow an affine operation that returns several tensors."""
        parents = {p.node: self.moves[p.node] for p in state.parents}
        both = {n: torch.stack([m.error, m.sizes]) for n, m in parents.items()}
        with contextlib.suppress(ValueError):
            self.parts[state.node] = parents, linear_action(state, both, 2, True)

    def _part(self, state: State) -> Moves:
        """One of the tensors that an operation returned, which are pieces of its input."""
        cut = state.parents[0]
        parents, both = self.parts[cut.node]
        error, sizes = linear_action(state, {cut.node: both}, 2, True)
        whole = self.space.later(cut, parents, error, sizes)
        return replace(whole, path=(*whole.path, state))

    def _activated(self, state: State, act: Activation, dim: int | None) -> Moves:
        """Bring an activation into its basis, and back."""
        parent = state.parents[0]
        moves = self._turned(self.moves[parent.node], act, dim)
        value = _turn(self.values[parent.node], act.basis, dim)[0]
        off = self.off(parent)
        if act.basis is not None:
            lost = add_up(mul_up(2.0, gamma(len(act.basis) + 4)), act.basis_error)
            off = add_up(off, mul_up(lost, frobenius_up(value)))
        whole = self.walker.bound_of(parent).value * (1.0 + 2.0**-40)  # also in the basis
        found = self.split(moves, value, off, act, dim, whole, whole)
        return self._turned(found, act, dim, back=True)

    def _largest(self, state: State, windows: Tensor) -> Moves:
        """Follow the largest entry of windows: m becomes m + relu(x - m), one place at a time."""
        parent = state.parents[0]
        source, reach = self.space.measured(self.moves[parent.node])
        value = self.values[parent.node][0]
        whole, off = self.walker.bound_of(parent).value, self.off(parent)
        channels = math.prod(state.shape) // len(windows)  # samples may have no dim of them

        def at(x: Tensor, tap: int, lead: int) -> Tensor:
            rest = x.reshape(*x.shape[:lead], channels, -1)
            return rest[..., windows[:, tap]].reshape(*x.shape[:lead], *state.shape)

        largest, best = source.each(lambda x, lead: at(x, 0, lead)), at(value, 0, 0)
        for tap in range(1, windows.shape[1]):
            other, here = source.each(lambda x, lead, t=tap: at(x, t, lead)), at(value, tap, 0)
            gap = self.space.sum(other, largest, -1.0)
            # Windows share entries, so that all gaps together may move farther than the image.
            rise = self.split(gap, here - best, 2.0 * off, _POSITIVE, None, 2.0 * whole, math.inf)
            largest = self.space.sum(rise, largest, 1.0)
            best = torch.maximum(best, here)
        # An entry moves no farther than one of its window; what its row says may be worse.
        reach = reach.clamp(max=whole)
        most = torch.stack([at(reach, tap, 0) for tap in range(windows.shape[1])]).amax(0)
        return self._replaced(largest, most, self.walker.bound_of(state).value)

    def _ordered(self, state: State) -> Moves | None:
        """Follow a sort, or the larger or the smaller one of two values; None for all else."""
        steps, two = steps_of(self.walker.program, state), two_of(state)
        if steps is None and two is None:
            return None
        self.choices += 1
        found = None if self.joint else self._compared(state, steps, two)
        return self._opaque(state) if found is None else found

    def _compared(
        self, state: State, steps: list[Step] | None, two: tuple[State, State, int, bool] | None
    ) -> Moves | None:
        """The rows of what is sorted; None if they would not fit."""
        if steps is not None:
            (parent,) = state.parents
            at, whole = self.values[parent.node][0], self.walker.bound_of(parent).value
            wide = math.sqrt(2.0) * whole * _OUTWARD
            return self._exchanged(self.moves[parent.node], at, self.off(parent), wide, steps)
        a, b, place, shared = cast(tuple[State, State, int, bool], two)
        key = (a.node, b.node)
        found = self.sorted.pop(key, None)
        if found is None:
            at = torch.stack([self.values[n][0] for n in key])
            moves = [self.space.dense(self.moves[n]) for n in key]
            moves = Moves(
                torch.stack([self.space.padded(m.known) for m in moves], 1),
                torch.stack([m.error for m in moves]),
                torch.stack([m.sizes for m in moves]),
            )
            wide = sum(self.walker.bound_of(s).value for s in (a, b)) * _OUTWARD
            both = self.walker.pieces.side_by_side([a, b])
            if both is not None:
                wide = min(wide, math.sqrt(2.0) * both.value * _OUTWARD)
            count = math.prod(state.shape)
            steps = [Step(torch.arange(count), torch.arange(count, 2 * count))]
            found = self._exchanged(moves, at, max(self.off(a), self.off(b)), wide, steps)
            if found is None:
                return None
            if shared:
                self.sorted[key] = found
        return found.each(lambda x, lead: x[:, place] if lead else x[place])

    def _exchanged(
        self, moves: Moves, value: Tensor, off: float, wide: float, steps: Sequence[Step]
    ) -> Moves | None:
        r"""Sort the entries of pairs, step by step; None if the rows would not fit.

        A pair (a, b) becomes $(b + s (a - b), a - s (a - b))$, with a slope s of relu at a - b. Its
        mean m makes $(m a + (1 - m) b, (1 - m) a + m b)$, a copy where s is known, and the rest of
        it is one unknown factor of both. `wide` bounds how far all gaps of a step move together:
        no step moves entries farther than before.
        """
        if not bool(value.isfinite().all()):
            return None
        shape, before = value.shape, len(self.unknown.blocks)
        value = value.flatten()
        flat = self.space.dense(moves).each(lambda x, lead: x.reshape(*x.shape[:lead], -1))
        error, sizes, unit = flat.error.clone(), flat.sizes.clone(), self.unknown.unit
        rows = flat.known.clone()
        for first, second in steps:
            places = (first, second)
            (a, b), (e, f), (p, q) = ([t[..., i] for i in places] for t in (rows, error, sizes))
            gap = self.space.sum(Moves(a, e, p), Moves(b, f, q), -1.0)
            at = [value[i] for i in places]
            try:
                self.space.check(value.numel())
                opened = self._opened(gap, at[0] - at[1], 2.0 * off, _POSITIVE, None, wide, wide)
            except TooLargeError:
                del self.unknown.blocks[before:]  # nothing has read them
                return None
            _, reach, mean, half, index = opened
            rows, own = self.space.padded(rows), half[index] * (1.0 + 4 * unit)
            number = torch.arange(len(rows) - len(index), len(rows))
            for i, x, y, sign in ((first, mean, 1.0 - mean, 1.0), (second, 1.0 - mean, mean, -1.0)):
                rows[: len(a), i] = a * x.to(a.dtype) + b * y.to(b.dtype)
                rows[number, i[index]] = (sign * own).to(rows.dtype)
                sizes[i] = (x * p + y * q + half * reach) * _OUTWARD
                # Both factors and products and their sum are rounded, but where they are 0 and 1.
                lost = torch.where(half > 0, 8 * unit * (x * p + y * q) + self.unknown.lost, 0.0)
                error[i] = (x * e + y * f + lost) * _OUTWARD
            value = value.clone()
            value[first], value[second] = torch.maximum(*at), torch.minimum(*at)
        return Moves(rows.reshape(-1, *shape), error.reshape(shape), sizes.reshape(shape))

    def _replaced(self, moves: Moves, most: Tensor, whole: float) -> Moves:
        """Units of which less is known by their rows than by `most` become units of their own."""
        moves, reach = self.space.measured(moves)
        loose = most < 0.99 * reach
        index = loose.flatten().nonzero()[:, 0]
        if not len(index):
            return moves
        kept = (~loose).to(most.dtype)
        rows = self.space.padded(moves.known) * kept.to(moves.known.dtype)
        self.unknown.add(most.flatten()[index], whole)
        ones = torch.ones(len(index), dtype=torch.float64)
        sizes = torch.where(loose, most, moves.sizes)
        return Moves(rows, moves.error * kept, sizes, index=index, own=ones)

    def split(
        self,
        moves: Moves,
        value: Tensor,
        off: float,
        act: Activation,
        dim: int | None,
        each: float,
        together: float,
    ) -> Moves:
        """Split the slopes of units into what is known of them and an unknown rest.

        Each unit moves at most `each`, all of them `together` times as far as the input.
        """
        moves, reach, mean, half, index = self._opened(moves, value, off, act, dim, each, together)
        rows = moves.known.mul_(mean.to(self.unknown.dtype))
        # The mean was rounded, and so is its product with each row.
        error = (moves.error + 4 * self.unknown.unit * moves.sizes) * mean.abs()
        error = error + self.unknown.lost
        sizes = moves.sizes * mean.abs() + half * reach
        own = half.flatten()[index] * (1.0 + 4 * self.unknown.unit)
        return Moves(rows, error * _OUTWARD, sizes * _OUTWARD, index=index, own=own)

    def _opened(
        self,
        moves: Moves,
        value: Tensor,
        off: float,
        act: Activation,
        dim: int | None,
        each: float,
        together: float,
    ) -> tuple[Moves, Tensor, Tensor, Tensor, Tensor]:
        """Make units of the slopes that are not known.

        Return the rows of their own, how far entries move, the means and what is unknown of their
        slopes, and the flat places of the units.
        """
        moves, reach = self.space.measured(moves, copy=True)
        reach = reach.clamp(max=each)
        far = (self.radius * reach + off) * _OUTWARD
        low, high = _slopes(act, value, off, far, dim, self.chords)
        loose = low != high
        mean = ((low + high) / 2).to(self.unknown.dtype).double()
        half = torch.maximum(high - mean, mean - low)
        half = torch.where(loose, half * _OUTWARD + 4 * UNIT_ROUNDOFF * mean.abs(), 0.0)
        index = loose.flatten().nonzero()[:, 0]
        self.space.check(value.numel(), len(index))
        columns = self.space.padded(moves.known).reshape(self.space.total, value.numel())
        columns = columns.index_select(1, index)
        reached, unknown, off_by, loose_by = (
            t.flatten()[index] for t in (reach, half, moves.error, cast(Tensor, moves.loose))
        )
        self.unknown.add(reached, together, unknown, (columns, off_by), loose_by)
        return moves, reach, mean, half, index

    def _has_gain(self, state: State) -> bool:
        """Whether an operation has a constant."""
        return all(math.isfinite(gain.value) for gain in self.walker.step_of(state).gains)

    def _opaque(self, state: State) -> Moves:
        """Let every entry move as far as the gain of the operation allows."""
        step, call = self.walker.step_of(state), state.call
        whole = self.walker.bound_of(state).value
        terms = []
        for gain, operand in zip(step.gains, call.operands, strict=True):
            source = operand._state
            known = source.node in self.moves
            terms.append(gain.value * (self.norm(source) if known else operand.bound.value))
        total = math.hypot(*terms) if step.combine == "hypot" else math.fsum(terms)
        whole = min(whole, total * (1.0 + 2.0**-50 * (len(terms) + 2)))
        value = self.values[state.node]
        shape = (value if isinstance(value, Tensor) else value[0]).shape[1:]
        return self._own(torch.full(shape, whole, dtype=torch.float64), whole)

    def _own(self, reach: Tensor, whole: float) -> Moves:
        """Units of their own, of which no more is known than how far they move."""
        rows = torch.zeros(self.space.total, *reach.shape, dtype=self.unknown.dtype)
        self.unknown.add(reach.flatten(), whole)
        index, ones = torch.arange(reach.numel()), torch.ones(reach.numel(), dtype=torch.float64)
        return Moves(rows, torch.zeros_like(reach), reach.clone(), index=index, own=ones)

    # activations ------------------------------------------------------------------------------

    def _activation(self, state: State) -> tuple[Activation, int | None] | None:
        """The slopes of a node, and the dim of its basis; None for any other operation."""
        parent, shape, mark = state.parents[0], state.shape, mark_of(state.node)
        if shape != parent.shape or not shape:
            return None
        target: Any = state.node.target
        if mark is not None:
            target = self.walker.program.calls[mark[0]].target
        if mark is not None and mark[1] >= 0:
            return None
        if isinstance(target, nn.Module):
            given, slopes = getattr(target, "dim", 1), partial(activation_of, target)
        else:
            record = record_of(target)
            if record is None or record.slopes is None:
                return None
            record.check(state.call)
            given, slopes = state.call.given("dim"), partial(record.slopes, state.call)
            if given is None:  # entry by entry
                return slopes(math.prod(shape)), None
        dim = given - 1 if given > 0 else len(shape) + given
        if mark is None or not 0 <= dim < len(shape):
            return slopes(math.prod(shape)), None  # type: ignore[return-value]
        found = slopes(shape[dim])
        if found is not None and found.basis is None:
            return slopes(math.prod(shape)), None  # type: ignore[return-value]
        return None if found is None or found.groups is not None else (found, dim)

    def _turned(self, moves: Moves, act: Activation, dim: int | None, back: bool = False) -> Moves:
        """The rows in the basis of an activation, or back in that of the node."""
        basis = act.basis
        if basis is None:
            return moves
        basis = basis.mT if back else basis
        moves = self.space.dense(moves)
        both = _turn(torch.stack([moves.error, moves.sizes]), basis.abs(), dim)
        error = both[0] + self.unknown.lost
        error = error + self.unknown.gamma(len(basis) + 8) * (both[1] + both[0])
        error = error + mul_up(act.basis_error, frobenius_up(moves.sizes))
        rows = _turn(moves.known, basis.to(self.unknown.dtype), dim)
        return Moves(rows, error * _OUTWARD, both[1] * _OUTWARD)


def _turn(x: Tensor, basis: Tensor | None, dim: int | None) -> Tensor:
    """A basis along one dim of samples."""
    if basis is None or dim is None:
        return x
    return ((x.movedim(dim + 1, -1)) @ basis.mT).movedim(-1, dim + 1)


def _slopes(
    act: Activation, value: Tensor, off: float, far: Tensor, dim: int | None, chords: bool
) -> tuple[Tensor, Tensor]:
    """The slopes of one sample's units that move by `far` at most, and are off by `off`."""
    slack = 4 * UNIT_ROUNDOFF * value.abs()
    ends = (value - off - slack, value + off + slack, value - far - slack, value + far + slack)
    place = (lambda x: x.flatten()) if dim is None else (lambda x: x.movedim(dim, -1))
    ends = tuple(map(place, ends))
    if chords and act.chords is not None:
        low, high = act.chords(*ends)
    elif act.narrow is not None:
        low, high = act.narrow(*ends[2:])
    else:
        low, high = act.lower.expand_as(ends[0]), act.upper.expand_as(ends[0])
    if dim is None:
        return low.reshape(value.shape), high.reshape(value.shape)
    return low.movedim(-1, dim), high.movedim(-1, dim)
