"""The rows of the nodes of a graph: kept, or run piece by piece where they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from orthonet.certify.local.unknown import Unknown
from orthonet.certify.walk.islands import linear_action
from orthonet.certify.walk.state import State

__all__ = ["Moves", "Rows", "TooLargeError"]

_ENTRIES = 2**27  # of the rows of one node: half a gigabyte, or one
_CHUNK = 2**18  # entries of the largest node among those that are run at once: what a cache holds
_OUTWARD = 1.0 + 2.0**-45  # covers the roundings of a few entrywise operations and a short sum


class TooLargeError(Exception):
    """The rows of a node would not fit into memory."""


@dataclass(frozen=True, eq=False)
class Moves:
    """The rows of a node: its dependence on the input and on the units with unknown slopes.

    Attributes:
        rows: (inputs and units so far, *shape); None if they follow from `sources`.
        error: What the rows may be off, each with the reach of its unit, (*shape).
        sizes: The sum of the moduli in each row, each with the reach of its unit, (*shape).
        index: The flat places of entries that also have a unit of their own. These units come
            after those of `rows`.
        own: What these units do to their entries.
        sources: The nodes from which affine operations lead here.
        path: These operations, in order.
        loose: Bounds of the rows without their known dependence on the input, once measured.
    """

    rows: Tensor | None
    error: Tensor
    sizes: Tensor
    index: Tensor | None = None
    own: Tensor | None = None
    sources: Mapping[fx.Node, Moves] = field(default_factory=dict)
    path: tuple[State, ...] = ()
    loose: Tensor | None = None

    @property
    def known(self) -> Tensor:
        """The rows of a node that keeps all of them."""
        if self.rows is None or self.index is not None:
            raise ValueError("these rows are not kept")
        return self.rows

    @property
    def length(self) -> int:
        """How many rows there are; all later ones are zero."""
        if self.rows is None:
            return max(m.length for m in self.sources.values())
        return len(self.rows) + (0 if self.index is None else len(self.index))

    @property
    def largest(self) -> int:
        """The entries of the largest node on the way."""
        states = [math.prod(s.shape) for s in self.path]
        return max(1, self.error.numel(), *states, *(m.largest for m in self.sources.values()))

    def each(self, change: Callable[[Tensor, int], Tensor]) -> Moves:
        """The same function of all kept rows, which has one or no leading dim."""
        return Moves(change(self.known, 1), change(self.error, 0), change(self.sizes, 0))


class Rows:
    """What can be done with rows among the same unknown units."""

    def __init__(self, unknown: Unknown) -> None:
        self.unknown = unknown

    @property
    def total(self) -> int:
        """The number of rows now."""
        return self.unknown.size + self.unknown.count

    def check(self, entries: int, more: int = 0) -> None:
        """Refuse a node whose rows do not fit."""
        if entries * (self.total + more) > _ENTRIES:
            raise TooLargeError

    def inputs(self, first: int, shape: torch.Size) -> Moves:
        """The rows of an input, from the place `first` among all inputs on."""
        count = shape.numel()
        rows = torch.zeros(self.unknown.size, count, dtype=self.unknown.dtype)
        rows[first : first + count] = torch.eye(count, dtype=self.unknown.dtype)
        zero = torch.zeros(shape, dtype=torch.float64)
        return Moves(rows.reshape(-1, *shape), zero, torch.ones_like(zero))

    def later(
        self, state: State, parents: Mapping[fx.Node, Moves], error: Tensor, sizes: Tensor
    ) -> Moves:
        """The rows behind an affine operation, which is run where they are needed."""
        sources: dict[fx.Node, Moves] = {}
        path: dict[State, None] = {}
        for node, moves in parents.items():
            sources |= {node: moves} if moves.rows is not None else moves.sources
            path |= dict.fromkeys(moves.path)
        return Moves(None, error, sizes, sources=sources, path=(*path, state))

    def piece(self, moves: Moves, first: int, last: int) -> Tensor:
        """Some of the rows."""
        size, dtype = last - first, self.unknown.dtype
        if moves.rows is None:
            env: dict[fx.Node, Any] = {
                n: self.piece(m, first, last) for n, m in moves.sources.items()
            }
            for state in moves.path:
                try:
                    found = linear_action(state, env, size, dtype=dtype)
                except RuntimeError:  # an operation with matrices of its own, in float64
                    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in env.items()}
                    found = linear_action(state, wide, size)
                env[state.node] = found.to(dtype) if isinstance(found, Tensor) else found
            return env[moves.path[-1].node]
        kept = len(moves.rows)
        if last <= kept:
            return moves.rows[first:last]
        shape = moves.error.shape
        rows = torch.zeros(size, shape.numel(), dtype=dtype)
        if first < kept:
            rows[: kept - first] = moves.rows[first:].reshape(kept - first, shape.numel())
        if moves.index is not None and moves.own is not None:
            begin, end = max(first, kept), min(last, kept + len(moves.index))
            if begin < end:
                place = torch.arange(begin, end)
                rows[place - first, moves.index[place - kept]] = moves.own[place - kept].to(dtype)
        return rows.reshape(size, *shape)

    def pieces(self, moves: Moves) -> Iterator[tuple[int, int, Tensor]]:
        """All rows that are not zero, piece by piece."""
        step = max(1, _CHUNK // moves.largest)
        for first, last in self.unknown.ranges(moves.length, step):
            yield first, last, self.piece(moves, first, last)

    def dense(self, moves: Moves) -> Moves:
        """The same with all rows kept."""
        if moves.rows is not None and moves.index is None:
            return moves
        return self.kept(moves)

    def kept(self, moves: Moves) -> Moves:
        """The same with rows of its own."""
        rows = torch.empty(moves.length, *moves.error.shape, dtype=self.unknown.dtype)
        for first, last, part in self.pieces(moves):
            rows[first:last] = part
        return Moves(rows, moves.error, moves.sizes)

    def padded(self, rows: Tensor) -> Tensor:
        """The same among the units that there are now."""
        if len(rows) == self.total:
            return rows
        return torch.cat([rows, rows.new_zeros(self.total - len(rows), *rows.shape[1:])])

    def measured(self, moves: Moves, copy: bool = False) -> tuple[Moves, Tensor]:
        """Keep all rows, and bound them and the sums of their moduli.

        With `copy`, the caller may write into the rows.
        """
        shape, keep = moves.error.shape, copy or moves.rows is None or moves.index is not None
        length = self.total if copy else moves.length
        rows = moves.rows if not keep else torch.empty(length, *shape, dtype=self.unknown.dtype)

        def parts() -> Iterator[tuple[int, Tensor]]:
            for first, last, part in self.pieces(moves):
                if keep:
                    rows[first:last] = part  # type: ignore[index]
                yield first, part.reshape(len(part), shape.numel())

        found, rest, sizes = self.unknown.measure(parts(), shape.numel())
        if keep:
            rows[moves.length :] = 0.0  # type: ignore[index]
        reach, loose = ((t.reshape(shape) + moves.error) * _OUTWARD for t in (found, rest))
        return Moves(rows, moves.error, sizes.reshape(shape), loose=loose), reach

    def sum(self, first: Moves, second: Moves, sign: float) -> Moves:
        """The sum or the difference of two nodes."""
        both = [self.padded(self.dense(m).known) for m in (first, second)]
        error = first.error + second.error + self.unknown.lost
        error = error + 2 * self.unknown.unit * (first.sizes + second.sizes)
        rows = torch.add(both[0], both[1], alpha=sign)
        return Moves(rows, error * _OUTWARD, (first.sizes + second.sizes) * _OUTWARD)
