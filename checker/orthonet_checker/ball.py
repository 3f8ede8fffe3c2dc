r"""How the values of nodes move in a ball around one sample, as linear maps of bounded unknowns.

For |a - x| <= r the change of every entry from x to a is a row of numbers times (a - x, u_1, u_2,
...) up to an error times |a - x|. A block u_k holds what is not known of the units of one
activation: of each |u_kj| <= L_j |a - x|, and |u_k / S| <= kappa |a - x| for some scales S. All
roundings are counted: by gamma_k and absolute values in rows, centers and errors, and by factors
above 1 in sums of numbers that are not negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from orthonet_checker import norms
from orthonet_checker.operations import Operation, Shape
from orthonet_checker.schema import SIZE, need

OUT = 1 + 2.0**-20
"""Covers sums of up to 2^30 numbers that are not negative, where the sum is an error itself."""
TIGHT = 1 + 2.0**-28
"""The same for up to 2^22 numbers and some more products."""
TINY = 2.0**-500
"""Above what underflow takes from the root of a sum of 2^22 squares."""
LOST = 2.0**-1000
"""Above what underflow takes from sums of 2^24 products of any floats."""
ENTRIES = 2**25
"""The most numbers in the rows of one node."""
FEW = 2.0**-40
"""What is not known of a slope counts as an error up to here."""
SMALL = 2**27
"""Products of a factorization that costs little."""


class Block(NamedTuple):
    """Unknowns of one activation: their first row, bounds of each, scales with bounds of all."""

    first: int
    reach: np.ndarray
    scales: list[tuple[np.ndarray, float]]


@dataclass
class Form:
    """A node in the ball.

    Attributes:
        center: Its value at the sample, in floats.
        off: How far the exact value may be from it, entry by entry.
        rows: (unknowns, *shape); later unknowns have no part in it.
        error: How far the change may be from what the rows say, entry by entry, over |a - x|.
        most: A bound of the change of all entries together, over |a - x|.
    """

    center: np.ndarray
    off: np.ndarray
    rows: np.ndarray
    error: np.ndarray
    most: float

    @property
    def shape(self) -> Shape:
        """Of a sample."""
        return self.center.shape

    def is_finite(self) -> bool:
        """Whether all its numbers are finite."""
        return all(
            bool(np.isfinite(x).all()) for x in (self.center, self.off, self.rows, self.error)
        )


def up(number: Fraction) -> float:
    """A float that is not below."""
    if number >= 2**1000:
        return math.inf
    return float(np.nextafter(float(number), math.inf))


class Ball:
    """The unknowns that were met, the input first."""

    def __init__(self, size: int) -> None:
        self.size = self.count = size
        self.blocks: list[Block] = []

    def inputs(self, values: Sequence[np.ndarray]) -> list[Form]:
        """The inputs: each entry is an unknown of its own."""
        found, first = [], 0
        for x in values:
            need(
                self.size * x.size <= ENTRIES and self.size <= 2**20,
                "too large an input for bounds in balls",
            )
            rows = np.eye(self.size, x.size, -first).reshape(self.size, *x.shape)
            none = np.zeros(x.shape)
            found.append(Form(x, none, rows, none, 1.0))
            first += x.size
        return found

    def _parts(self, rows: np.ndarray) -> list[tuple[Block, np.ndarray]]:
        flat = rows.reshape(len(rows), -1)
        return [
            (b, flat[b.first : b.first + len(b.reach)]) for b in self.blocks if b.first < len(rows)
        ]

    def sizes(self, form: Form) -> np.ndarray:
        """Bounds of the sums of the moduli of what rows are times, over |a - x|."""
        linear = form.rows[: self.size].reshape(min(self.size, len(form.rows)), -1)
        total = np.sqrt(np.sum(linear * linear, axis=0)) + TINY
        for block, part in self._parts(form.rows):
            total = total + block.reach @ np.abs(part)
        return (total * OUT + TINY).reshape(form.shape)

    def lost(self) -> float:
        """What underflow takes from an entry of all rows together."""
        return LOST * (self.size + sum(float(np.sum(b.reach)) for b in self.blocks)) * OUT

    def reach(self, rows: np.ndarray, error: np.ndarray, most: float) -> np.ndarray:
        """Bounds of the changes of entries over |a - x|, each at most `most`."""
        linear = rows[: self.size].reshape(min(self.size, len(rows)), -1)
        total = np.sqrt(np.sum(linear * linear, axis=0)) + TINY
        for block, part in self._parts(rows):
            best = block.reach @ np.abs(part) + TINY
            square = part * part
            for scale, kappa in block.scales:
                best = np.minimum(best, (np.sqrt((scale * scale) @ square) + TINY) * kappa)
            total = total + best
        return np.minimum((total + error.reshape(-1)) * TIGHT + TINY, most)

    def norm(self, rows: np.ndarray, error: np.ndarray, inverse: np.ndarray, most: float) -> float:
        """A bound of the length of the change of all entries times `inverse`, over |a - x|.

        With |u_k / S_k| <= kappa_k, this is at most |[w_0 R_0, w_1 kappa_1 S_1 R_1, ...]| times the
        root of 1 / w_0^2 + 1 / w_1^2 + ..., for any w.
        """
        flat = rows.reshape(len(rows), -1) * inverse
        parts = [flat[: self.size]]
        for block, part in self._parts(flat):
            given = [part * (scale * kappa)[:, None] for scale, kappa in block.scales]
            squares = [float(np.sum(g * g)) for g in given]
            parts.append(given[int(np.argmin(squares))])
        lengths = [_estimate(p) for p in parts]
        largest, total = max(lengths), 0.0
        need(math.isfinite(largest), "a unit moves without a bound")
        for part, length in zip(parts, lengths, strict=True):
            share = max(length / largest, 1e-12) if largest else 1.0
            part *= share**-0.5  # its inverse square is the share, up to a few roundings
            total += share
        matrix = np.concatenate(parts)
        found, frobenius = norms.spectral(matrix)
        found = (up(found) + up(norms.gamma(32) * frobenius) + TINY) * math.sqrt(total) * TIGHT
        length = math.sqrt(float(np.sum((error.reshape(-1) * inverse) ** 2))) + TINY
        return min(most, (found + length) * TIGHT)

    def open(
        self, rows: np.ndarray, error: np.ndarray, reach: np.ndarray, half: np.ndarray, most: float
    ) -> int:
        """New unknowns for units with these rows (unknowns, units); the first one.

        `half` only guides: it says how much a unit counts.
        """
        need(bool(np.isfinite(reach).all()), "a unit moves without a bound")
        top = max(float(reach.max()), TINY)
        shares = np.maximum(reach / top, 2.0**-14)
        part = np.maximum(half / half.max(), 2.0**-10)
        reach = np.maximum(reach, top * 2.0**-14)
        small = rows.size * min(rows.shape) < SMALL
        scales = []
        options = [np.ones(len(reach)), np.sqrt(shares / part), shares]
        for place, scale in enumerate(options):
            kappa = math.sqrt(float(np.sum((reach / scale) ** 2))) * TIGHT + TINY
            if place == 0:
                kappa = min(kappa, most)
            if small or place == 1:
                kappa = min(kappa, self.norm(rows, error, 1.0 / scale, math.inf) * TIGHT)
            scales.append((scale, kappa))
        first, self.count = self.count, self.count + len(reach)
        self.blocks.append(Block(first, reach, scales))
        return first

    # --- operations --------------------------------------------------------------------------

    def affine(self, op: Operation, forms: Sequence[Form], most: float) -> Form:
        """An affine operation: its rows, run on the rows of its operands."""
        need(op.is_moderate(), "numbers too large or too small to be multiplied in floats")
        count = op.terms + 8
        need(count <= 2**24, "too many roundings")
        relative = up(norms.gamma(count))
        center = op.apply(*(f.center[None] for f in forms))
        size = op.apply(*(np.abs(f.center)[None] for f in forms), size=True)
        spread = op.apply(*(f.off[None] for f in forms), linear=True, size=True)
        off = (spread + relative * (size + spread)) * OUT + LOST
        error = op.apply(*(f.error[None] for f in forms), linear=True, size=True)
        size = op.apply(*(self.sizes(f)[None] for f in forms), linear=True, size=True)
        error = (error + relative * (size + error)) * OUT + self.lost()
        total, shape = max(len(f.rows) for f in forms), center.shape[1:]
        need(total * math.prod(shape) <= ENTRIES, "too many rows for bounds in balls")
        rows = np.empty((total, *shape))
        step = max(1, SIZE // (4 * math.prod(shape) * max(1, min(op.terms, 1024))))
        for first in range(0, total, step):
            last = min(first + step, total)
            rows[first:last] = op.apply(*(_some(f.rows, first, last) for f in forms), linear=True)
        return Form(center[0], off[0], rows, error[0], most)

    def slopes(
        self, form: Form, low: np.ndarray, high: np.ndarray, reach: np.ndarray, whole: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, error) of units that change by a slope in [low, high] times the change of a form.

        The middle is kept, and of the rest each unit becomes an unknown. `whole` bounds the change
        of all units together before, over |a - x|.
        """
        middle = (low + high) / 2
        half = np.where(low == high, 0.0, np.maximum(high - middle, middle - low) * TIGHT + LOST)
        middle, half, error = (x.reshape(-1) for x in (middle, half, form.error))
        flat, at = form.rows.reshape(len(form.rows), -1), half > FEW
        rows = flat * middle
        error = np.abs(middle) * (error + 2.0**-50 * self.sizes(form).reshape(-1))
        error = (error + np.where(at, 0.0, half * reach)) * OUT + self.lost()
        at = np.flatnonzero(at)
        if len(at):
            half = half[at]
            first = self.open(flat[:, at], form.error.reshape(-1)[at], reach[at], half, whole)
            need(
                self.count * rows.shape[1] <= ENTRIES and self.count <= 2**20,
                "too many rows for bounds in balls",
            )
            both = np.zeros((self.count, rows.shape[1]))
            both[: len(rows)] = rows
            both[first + np.arange(len(at)), at] = half
            rows = both
        return rows.reshape(len(rows), *form.shape), error.reshape(form.shape)

    def sum(self, a: Form, b: Form, factor: float) -> Form:
        """The sum of a and b times 1 or -1; whoever asks knows what bounds all of it."""
        total = max(len(a.rows), len(b.rows))
        size = self.sizes(a) + self.sizes(b)
        center = a.center + factor * b.center
        return Form(
            center,
            (a.off + b.off + 2.0**-50 * (np.abs(a.center) + np.abs(b.center))) * OUT,
            _some(a.rows, 0, total) + factor * _some(b.rows, 0, total),
            (a.error + b.error + 2.0**-50 * size) * OUT,
            math.inf,
        )


def _some(rows: np.ndarray, first: int, last: int) -> np.ndarray:
    """The rows first, ..., last - 1; what is missing is zero."""
    part = rows[first:last]
    if len(part) == last - first:
        return part
    return np.concatenate([part, np.zeros((last - first - len(part), *rows.shape[1:]))])


def _estimate(part: np.ndarray) -> float:
    """About the norm of a matrix; nothing rests on it."""
    v = np.ones(part.shape[1])
    for _ in range(3):
        v = (part @ v) @ part
        length = float(np.linalg.norm(v))
        if not 0 < length < math.inf:
            return float(np.linalg.norm(part))
        v = v / length
    return float(np.linalg.norm(part @ v))
