"""Operations that are not affine: activations, sorts, extrema, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np

from orthonet_checker import norms, slopes
from orthonet_checker.maps import windows
from orthonet_checker.operations import Operation, Shape, a_dim, pairs, reals, sizes, steps
from orthonet_checker.schema import boolean, many, need, one_of, text, whole


class Activation(Operation, name="activation"):
    """A function of each entry."""

    keys: ClassVar = {"function": one_of(*slopes.NAMES), "parameters": reals}

    def square(self, *shapes: Shape) -> Fraction:
        return slopes.prove(self.function, self.parameters, self.gain) ** 2

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return slopes.apply(self.function, xs[0], self.parameters)


class PReLU(Operation, name="prelu"):
    """x or a slope of the channel times x, for negative x; the channels are dim 0 of a sample."""

    constants = ("slopes",)
    keys: ClassVar = {"slopes": text}

    def shape(self, *shapes: Shape) -> Shape:
        need(len(shapes[0]) >= 1, "channels of slopes")
        need(self.slopes.shape in ((1,), shapes[0][:1]), "one slope, or one for each channel")
        return shapes[0]

    def square(self, *shapes: Shape) -> Fraction:
        return max(Fraction(1), Fraction(float(np.abs(self.slopes).max())) ** 2)

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        column = self.slopes[(slice(None), *[None] * (xs[0].ndim - 2))]
        return np.where(xs[0] > 0, xs[0], column * xs[0])


class Sort(Operation, name="sort"):
    """Sort the entries of each group along a dim, ascending or descending: 1-Lipschitz.

    A group is `size` neighbors, or (`halves`) the entries c, c + n / size, c + 2 n / size, ...
    """

    keys: ClassVar = {
        "dim": whole(0),
        "size": whole(1),
        "halves": boolean,
        "descending": boolean,
    }

    def shape(self, *shapes: Shape) -> Shape:
        n = shapes[0][a_dim(self.dim, shapes[0])]
        need(n % self.size == 0, "groups must divide the dim that is sorted")
        return shapes[0]

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        x, axis = xs[0], self.dim + 1
        split = (self.size, -1) if self.halves else (-1, self.size)
        y = x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])
        inside = axis if self.halves else axis + 1
        y = np.sort(y, inside)
        return (np.flip(y, inside) if self.descending else y).reshape(x.shape)


class Opaque(Operation, name="opaque"):
    """What this checker does not know: its gains are assumed, and listed as such."""

    keys: ClassVar = {"into": sizes, "gains": reals, "hypot": boolean, "reason": text}
    rules = ("assumed",)
    operands = 0

    def shape(self, *shapes: Shape) -> Shape:
        need(len(self.gains) == len(shapes) and min(self.gains) >= 0, "a gain for each operand")
        return self.into

    def combine(self, squares: Sequence[Fraction]) -> Fraction:
        terms = [g**2 * s for g, s in zip(self.gains, squares, strict=True)]
        if self.hypot or len(terms) == 1:
            return sum(terms, Fraction(0))
        return sum(map(norms.root_up, terms), Fraction(0)) ** 2


class Center(Operation, name="center"):
    """Minus its mean over some dims: an orthogonal projection."""

    keys: ClassVar = {"dims": many(whole(0), 1)}

    def shape(self, *shapes: Shape) -> Shape:
        need(len(set(self.dims)) == len(self.dims), "a dim stands twice")
        need(all(a_dim(d, shapes[0]) >= 0 for d in self.dims), "dims")
        return shapes[0]

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return xs[0] - np.mean(xs[0], tuple(d + 1 for d in self.dims), keepdims=True)


class Extremum(Operation, name="extremum"):
    """The largest or the smallest of the operands, entry by entry."""

    keys: ClassVar = {"largest": boolean}
    operands = 0

    def shape(self, *shapes: Shape) -> Shape:
        need(len(set(shapes)) == 1, "operands of different shapes")
        return shapes[0]

    def combine(self, squares: Sequence[Fraction]) -> Fraction:
        return sum(squares, Fraction(0))

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return (np.max if self.largest else np.min)(np.stack(xs), 0)


class MaxPool(Operation, name="max_pool"):
    """The largest entry of each window: what many windows share counts as often."""

    keys: ClassVar = {
        "window": steps,
        "stride": steps,
        "padding": pairs,
        "dilation": steps,
    }

    def shape(self, *shapes: Shape) -> Shape:
        self.rows = windows(shapes[0], self.window, self.stride, self.padding, self.dilation)
        return (*shapes[0][: -len(self.rows)], *map(len, self.rows))

    def square(self, *shapes: Shape) -> Fraction:
        shared = (np.bincount(np.concatenate(rows)).max() for rows in self.rows)
        return Fraction(math.prod(map(int, shared)))

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        y = xs[0]
        for axis, rows in enumerate(self.rows, -len(self.rows)):
            y = np.stack([np.take(y, row, axis).max(axis) for row in rows], axis)
        return y
