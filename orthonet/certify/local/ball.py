r"""How a graph moves in an l2 ball around one input, node by node.

Every difference $h(a) - h(x)$, for a in the ball, is a matrix J times $a - x$. Affine operations
are run on the rows of J; at an activation every unit has a slope in an interval, which follows
from how far its input can move: the mean of the interval is kept, and the rest becomes an unknown
factor. With slopes of chords that start at x the rows of J bound $|h_i(a) - h_i(x)| / \|a - x\|$,
which is all that a radius needs; with the slopes of all chords in the ball, the Lipschitz
constants of the units. Any other operation is known by its gain alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from orthonet.certify.graph.marks import mark_of
from orthonet.certify.graph.replay import replay
from orthonet.certify.local.unknown import Unknown
from orthonet.certify.mlp.chain import frobenius_up
from orthonet.certify.mlp.slopes import Activation, Kinks
from orthonet.certify.ops.activations import activation_of
from orthonet.certify.rounding.forward import Errors
from orthonet.certify.rules import record_of
from orthonet.certify.walk.islands import action_of, linear_action, roundings_of
from orthonet.certify.walk.state import State
from orthonet.certify.walk.walker import Walker
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up

__all__ = ["Ball", "Moves", "TooLargeError"]

_ENTRIES = 2**27  # of the rows of one node: a gigabyte
_CHUNK = 2**24  # entries of a node in a batch of directions that is run at once
_OUTWARD = 1.0 + 2.0**-45  # covers the roundings of a few entrywise operations and a short sum
_RELU = Kinks((0.0,), (0.0, 1.0))
_ENDS = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


class TooLargeError(Exception):
    """The rows of a node would not fit into memory."""


@dataclass(frozen=True)
class Moves:
    """The rows of a node: its dependence on the input and on the units with unknown slopes.

    Attributes:
        linear: (inputs, *shape).
        noise: (units so far, *shape).
        error: What the rows may be off, each with the reach of its unit, (*shape).
    """

    linear: Tensor
    noise: Tensor
    error: Tensor

    def with_units(self, count: int) -> Moves:
        """The same among more units."""
        if len(self.noise) == count:
            return self
        more = self.noise.new_zeros(count - len(self.noise), *self.noise.shape[1:])
        return replace(self, noise=torch.cat([self.noise, more]))


class Ball:
    """The rows of all nodes of a graph in the ball around one sample.

    Args:
        walker: The graph of the model, with its global bounds.
        inputs: One sample of each input, (1, *shape).
        radius: The radius of the ball, in the l2 norm of all inputs together.
        chords: Take the slopes of chords that start at the sample: the rows bound how far units
            move from it, and are no Lipschitz constants.
        proved: Bound norms and roundings; without, estimate norms and leave roundings out.
        joint: Take activations of several entries together and largest entries of windows by
            their gain: better in large balls, where few of their slopes are known.

    Attributes:
        choices: How many operations `joint` makes a difference to.

    Raises:
        UncertifiableError: The rounding of an operation is not known.
        TooLargeError: The rows would not fit into memory.
    """

    def __init__(
        self,
        walker: Walker,
        inputs: Sequence[Tensor],
        radius: float,
        *,
        chords: bool = True,
        proved: bool = True,
        joint: bool = False,
    ) -> None:
        self.walker, self.radius, self.chords = walker, radius, chords
        self.unknown = Unknown(proved)
        self.moves: dict[fx.Node, Moves] = {}
        self.joint, self.choices = joint, 0
        inputs = [x.detach().cpu().double() for x in inputs]
        self.size = sum(x.numel() for x in inputs)
        with torch.no_grad():
            self.values = replay(walker.program, inputs)
            none = torch.zeros(1, dtype=torch.float64)
            self.errors = Errors(walker, self.values, none, torch.float64, None)
            first = 0
            for node in walker.program.inputs:
                shape = self.values[node].shape[1:]
                rows = torch.zeros(self.size, shape.numel(), dtype=torch.float64)
                rows[first : first + shape.numel()] = torch.eye(shape.numel(), dtype=torch.float64)
                first += shape.numel()
                zero = torch.zeros(shape, dtype=torch.float64)
                self.moves[node] = Moves(rows.reshape(-1, *shape), zero[None][:0], zero)
            left = Counter(p.node for s in walker.states.values() for p in {*s.parents})
            left.update(walker.program.outputs)
            for state in walker.states.values():
                if state.node not in self.moves:
                    self._visit(state)
                for node in {p.node for p in state.parents}:
                    left[node] -= 1
                    if not left[node]:  # its rows are read no more
                        self.moves.pop(node, None)

    def rows(self, moves: Moves, most: float = math.inf) -> Tensor:
        """Bounds of the rows of a node, each at most `most`."""
        found = self.unknown.rows(moves.linear, moves.noise) + moves.error
        return (found * _OUTWARD).clamp(max=most)

    def differences(self, node: fx.Node, top: int, most: Tensor) -> Tensor:
        """Bounds of the rows of entry `top` less every entry of a vector, each at most `most`."""
        moves = self.moves[node]
        sizes = self.unknown.sizes(moves.linear, moves.noise)
        error = moves.error[top] + moves.error + 2 * UNIT_ROUNDOFF * (sizes[top] + sizes)
        linear, noise = (m[:, top, None] - m for m in (moves.linear, moves.noise))
        return torch.minimum(self.rows(Moves(linear, noise, error)), most)

    def norm(self, state: State) -> float:
        """A bound of the norm of all rows of a node together."""
        moves, whole = self.moves[state.node], self.walker.bound_of(state).value
        rows = self.rows(moves, whole).flatten()
        if not len(rows):
            return 0.0
        found = self.unknown.spectral(
            moves.linear.flatten(1),
            moves.noise.flatten(1),
            torch.ones_like(rows),
            moves.error.flatten(),
        )
        return min(whole, found, frobenius_up(rows))

    # operations -------------------------------------------------------------------------------

    def _visit(self, state: State) -> None:
        value = self.values[state.node]
        if not isinstance(value, Tensor):
            return  # the parts are seen where they are read
        if value.numel() * (self.size + self.unknown.count) > _ENTRIES:
            raise TooLargeError
        known = all(p.node in self.moves for p in state.parents)
        action = action_of(state) if known else None
        if action is not None:
            self.moves[state.node] = self._affine(state)
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

    def _affine(self, state: State) -> Moves:
        """Run the linear part of an operation on the rows of its operands."""
        count = self.unknown.count
        parents = {p.node: self.moves[p.node].with_units(count) for p in state.parents}
        rows = {n: torch.cat([m.linear, m.noise]) for n, m in parents.items()}
        size = self.size + count
        step = max(
            1,
            _CHUNK // max(1, math.prod(state.shape), *(m.error.numel() for m in parents.values())),
        )
        image = torch.cat(
            [
                linear_action(
                    state, {n: r[i : i + step] for n, r in rows.items()}, min(step, size - i)
                )
                for i in range(0, size, step)
            ]
        )
        if not self.unknown.proved:
            error = torch.zeros(image.shape[1:], dtype=torch.float64)
            return Moves(image[: self.size], image[self.size :], error)
        both = {
            n: torch.stack([m.error, self.unknown.sizes(m.linear, m.noise)])
            for n, m in parents.items()
        }
        error, sizes = linear_action(state, both, 2, True)
        rounding = gamma(roundings_of([state]) + 4)
        moving = not action_of(state).moves  # type: ignore[union-attr]
        error = (error + (rounding * (sizes + error) if moving else 0.0)) * _OUTWARD
        return Moves(image[: self.size], image[self.size :], error)

    def _activated(self, state: State, act: Activation, dim: int | None) -> Moves:
        """Bring an activation into its basis, and back."""
        parent = state.parents[0]
        moves = self._turned(self.moves[parent.node], act, dim)
        value = _turn(self.values[parent.node], act.basis, dim)[0]
        off = self._off(parent)
        if act.basis is not None:
            lost = add_up(mul_up(2.0, gamma(len(act.basis) + 4)), act.basis_error)
            off = add_up(off, mul_up(lost, frobenius_up(value)))
        whole = self.walker.bound_of(parent).value * (1.0 + 2.0**-40)  # also in the basis
        found = self._split(moves, value, off, act, dim, whole, whole)
        return self._turned(found, act, dim, back=True)

    def _largest(self, state: State, windows: Tensor) -> Moves:
        """Follow the largest entry of windows: m becomes m + relu(x - m), one place at a time."""
        parent = state.parents[0]
        source, value = self.moves[parent.node], self.values[parent.node][0]
        whole, off = self.walker.bound_of(parent).value, self._off(parent)
        places = math.prod(value.shape[1:])

        def at(x: Tensor, tap: int, lead: int) -> Tensor:
            rest = x.reshape(*x.shape[:lead], len(value), places)
            return rest[..., windows[:, tap]].reshape(*x.shape[:lead], *state.shape)

        largest, best = _each(source, lambda x, lead: at(x, 0, lead)), at(value, 0, 0)
        relu = Activation(torch.relu, *_ENDS, narrow=_RELU, chords=_RELU.chords)
        for tap in range(1, windows.shape[1]):
            other, here = _each(source, lambda x, lead, t=tap: at(x, t, lead)), at(value, tap, 0)
            largest = largest.with_units(self.unknown.count)
            other = other.with_units(self.unknown.count)
            gap = self._sum(other, largest, -1.0)
            # Windows share entries, so that all gaps together may move farther than the image.
            rise = self._split(gap, here - best, 2.0 * off, relu, None, 2.0 * whole, math.inf)
            largest = self._sum(rise, largest.with_units(self.unknown.count), 1.0)
            best = torch.maximum(best, here)
        # An entry moves no farther than one of its window; what its row says may be worse.
        reach = self.rows(source, whole)
        most = torch.stack([at(reach, tap, 0) for tap in range(windows.shape[1])]).amax(0)
        together = self.walker.bound_of(state).value
        return self._replaced(largest.with_units(self.unknown.count), most, together)

    def _replaced(self, moves: Moves, most: Tensor, whole: float) -> Moves:
        """Units of which less is known by their rows than by `most` become units of their own."""
        loose = most < 0.99 * self.rows(moves)
        index = loose.flatten().nonzero()[:, 0]
        if not len(index):
            return moves
        self.unknown.add(most.flatten()[index], whole)
        kept = (~loose).to(most.dtype)
        noise = torch.cat([moves.noise * kept, _one_hot(torch.ones_like(most), index)])
        return Moves(moves.linear * kept, noise, moves.error * kept)

    def _sum(self, first: Moves, second: Moves, sign: float) -> Moves:
        """The sum or the difference of two nodes with as many units."""
        sizes = (self.unknown.sizes(m.linear, m.noise) for m in (first, second))
        error = first.error + second.error + 2 * UNIT_ROUNDOFF * sum(sizes)
        linear = torch.add(first.linear, second.linear, alpha=sign)
        noise = torch.add(first.noise, second.noise, alpha=sign)
        return Moves(linear, noise, error * _OUTWARD)

    def _off(self, state: State) -> float:
        """What the value of an entry at the sample may be off."""
        return mul_up(float(self.errors.of(state)), 1.0 + 2.0**-40)

    def _split(
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
        moves = moves.with_units(self.unknown.count)
        reach = self.rows(moves, each)
        far = (self.radius * reach + off) * _OUTWARD
        low, high = _slopes(act, value, off, far, dim, self.chords)
        mean, half = (low + high) / 2, (high - low) / 2 * _OUTWARD
        loose = low != high
        half = torch.where(loose, half + 2 * UNIT_ROUNDOFF * mean.abs(), 0.0)
        index = loose.flatten().nonzero()[:, 0]
        if value.numel() * (self.size + self.unknown.count + len(index)) > _ENTRIES:
            raise TooLargeError
        sizes = self.unknown.sizes(moves.linear, moves.noise)
        linear, noise = (m.flatten(1)[:, index] for m in (moves.linear, moves.noise))
        self.unknown.add(
            reach.flatten()[index], together, (linear, noise, moves.error.flatten()[index])
        )
        noise = torch.cat([moves.noise * mean, _one_hot(half, index)])
        error = (moves.error + 2 * UNIT_ROUNDOFF * sizes) * mean.abs() * _OUTWARD
        return Moves(moves.linear * mean, noise, error)

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
        shape = self.values[state.node].shape[1:]
        reach = torch.full(shape, whole, dtype=torch.float64)
        before = self.unknown.count
        self.unknown.add(reach.flatten(), whole)
        zero = torch.zeros(shape, dtype=torch.float64)
        noise = zero.new_zeros(before, *shape)
        ones = _one_hot(torch.ones_like(zero), torch.arange(zero.numel()))
        return Moves(zero.new_zeros(self.size, *shape), torch.cat([noise, ones]), zero)

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
            given, slopes = state.call.given("dim", 1), partial(record.slopes, state.call)
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
        sizes = self.unknown.sizes(moves.linear, moves.noise)
        both = _turn(torch.stack([moves.error, sizes]), basis.abs(), dim)
        lost = mul_up(act.basis_error, frobenius_up(sizes))
        error = both[0] + gamma(len(basis) + 4) * (both[1] + both[0]) + lost
        linear, noise = (_turn(m, basis, dim) for m in (moves.linear, moves.noise))
        return Moves(linear, noise, error * _OUTWARD)


def _each(moves: Moves, change: Callable[[Tensor, int], Tensor]) -> Moves:
    """The same change of all rows and of their error; given how many dims come first."""
    return Moves(change(moves.linear, 1), change(moves.noise, 1), change(moves.error, 0))


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


def _one_hot(values: Tensor, index: Tensor) -> Tensor:
    """A row for each entry of `index`, which holds its value alone."""
    rows = values.new_zeros(len(index), values.numel())
    rows[torch.arange(len(index)), index] = values.flatten()[index]
    return rows.reshape(-1, *values.shape)
