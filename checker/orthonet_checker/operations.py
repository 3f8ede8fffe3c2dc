"""The operations of a certificate, each from its definition: shape, constant, and function.

An operation acts on one sample; `apply` takes a batch of them, the batch first. The constant of an
operation of one operand is proved as a rational bound of its square. Operations with
`linear = True` are affine: `apply(..., linear=True)` leaves out what is added, and
`apply(..., size=True)` takes absolute values of everything that is multiplied or added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from orthonet_checker import norms
from orthonet_checker.schema import (
    SIDE,
    Check,
    boolean,
    many,
    need,
    one_of,
    pair,
    real,
    text,
    whole,
)

Shape = tuple[int, ...]
steps = many(whole(1, SIDE))
OPERATIONS: dict[str, type[Operation]] = {}
sizes, pairs, reals = many(whole(1)), many(pair), many(real)


class Operation:
    """One node; its entries of the file are attributes, arrays in place of names of constants."""

    keys: ClassVar[dict[str, Check]] = {}
    optional: ClassVar[dict[str, Check]] = {}
    constants: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[tuple[str, ...]] = ("definition",)
    operands: ClassVar[int] = 1  # 0 for any number
    linear: ClassVar[bool] = False
    terms: int = 0
    """How many roundings an entry sees, with a margin for the products with constants."""

    rule: str
    t: Fraction | None
    gain: Fraction | None
    """The claimed gain of an operation of one operand."""

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            OPERATIONS[name] = cls

    def __init__(self, entries: dict[str, Any]) -> None:
        for key in (*self.optional, *self.constants, "t", "gain"):
            setattr(self, key, None)
        vars(self).update(entries)

    def shape(self, *shapes: Shape) -> Shape:
        """The shape of a sample of the output; rejects what does not fit."""
        return shapes[0]

    def square(self, *shapes: Shape) -> Fraction:
        """A proved bound of the squared constant, of an operation of one operand."""
        return Fraction(1)

    def combine(self, squares: Sequence[Fraction]) -> Fraction:
        """The squared constant of the output from those of the operands, and the claimed gain."""
        return squares[0] * self.gain**2

    def is_moderate(self) -> bool:
        """Whether a product of one of its numbers and of 2^-400 to 2^300 stays in range.

        The smallest factors are those of `batch_norm`, above 2^-351; pools divide by 2^48 at most.
        """
        numbers = [getattr(self, name, None) for name in ("factor", "factors", "eps")]
        return all(norms.moderate(x, -300, 300) for x in numbers if x is not None)

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        """The function."""
        raise NotImplementedError


def a_dim(dim: int, shape: Shape) -> int:
    """The dim, if a value has it."""
    need(dim < len(shape), "a dim that the value does not have")
    return dim


# --- moves ---------------------------------------------------------------------------------------


class Reshape(Operation, name="reshape"):
    """The same entries in the same order."""

    keys: ClassVar = {"into": sizes}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(math.prod(shapes[0]) == math.prod(self.into), "a reshape must keep all entries")
        return self.into

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return xs[0].reshape(len(xs[0]), *self.into)


class Permute(Operation, name="permute"):
    """Dims in another order: dim i of the output is dim `dims[i]` of the input."""

    keys: ClassVar = {"dims": many(whole(0))}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(sorted(self.dims) == list(range(len(shapes[0]))), "dims must be a permutation")
        return tuple(shapes[0][d] for d in self.dims)

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return xs[0].transpose(0, *(d + 1 for d in self.dims))


class Flip(Operation, name="flip"):
    """The entries along one dim in reverse order."""

    keys: ClassVar = {"dim": whole(0)}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        a_dim(self.dim, shapes[0])
        return shapes[0]

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return np.flip(xs[0], self.dim + 1)


class Roll(Operation, name="roll"):
    """Entry i along a dim moves to i + shift, around the end."""

    keys: ClassVar = {"dim": whole(0), "shift": whole(0)}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        a_dim(self.dim, shapes[0])
        return shapes[0]

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return np.roll(xs[0], self.shift, self.dim + 1)


class Slice(Operation, name="slice"):
    """The entries start, start + step, ... below stop of one dim."""

    keys: ClassVar = {"dim": whole(0), "start": whole(0), "stop": whole(1), "step": whole(1)}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        n = shapes[0][a_dim(self.dim, shapes[0])]
        need(self.start < self.stop <= n, "a slice must lie inside, and have entries")
        count = len(range(self.start, self.stop, self.step))
        return (*shapes[0][: self.dim], count, *shapes[0][self.dim + 1 :])

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        where = [slice(None)] * xs[0].ndim
        where[self.dim + 1] = slice(self.start, self.stop, self.step)
        return xs[0][tuple(where)]


class Pad(Operation, name="pad"):
    """Entries before and behind those of each dim: zeros, another constant, or copies."""

    keys: ClassVar = {"amounts": pairs, "mode": one_of("constant", "wrap", "reflect", "edge")}
    optional: ClassVar = {"value": real}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(len(self.amounts) == len(shapes[0]), "a pad needs two amounts for each dim")
        need((self.value is None) == (self.mode != "constant"), "constant pads have a value")
        for n, (a, b) in zip(shapes[0], self.amounts, strict=True):
            most = {"wrap": n, "reflect": n - 1}.get(self.mode, SIDE)
            need(max(a, b) <= most, "a pad must not be longer than what it copies")
        return tuple(n + a + b for n, (a, b) in zip(shapes[0], self.amounts, strict=True))

    def square(self, *shapes: Shape) -> Fraction:
        """How often the most repeated entry is copied."""
        if self.mode == "constant":
            return Fraction(1)
        counts = (
            np.bincount(np.pad(np.arange(n), amounts, mode=self.mode)).max()
            for n, amounts in zip(shapes[0], self.amounts, strict=True)
        )
        return Fraction(math.prod(map(int, counts)))

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        amounts = [(0, 0), *self.amounts]
        if self.mode != "constant":
            return np.pad(xs[0], amounts, mode=self.mode)
        value = abs(float(self.value)) if size else float(self.value)
        return np.pad(xs[0], amounts, constant_values=0.0 if linear else value)


class Concatenate(Operation, name="concatenate"):
    """Side by side along one dim: the squares of the constants add up."""

    keys: ClassVar = {"dim": whole(0)}
    operands = 0
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        dim = a_dim(self.dim, shapes[0])
        rest = {(len(s), s[:dim], s[dim + 1 :]) for s in shapes}
        need(len(rest) == 1, "shapes to concatenate must agree in all other dims")
        return (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])

    def combine(self, squares: Sequence[Fraction]) -> Fraction:
        return sum(squares, Fraction(0))

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return np.concatenate(xs, self.dim + 1)


# --- sums and factors ----------------------------------------------------------------------------


class Add(Operation, name="add"):
    """The sum of the operands, each times a number."""

    keys: ClassVar = {"factors": reals}
    operands = 0
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(len(set(shapes)) == 1 and len(shapes) == len(self.factors), "terms of a sum")
        self.terms = len(shapes) + 4
        return shapes[0]

    def combine(self, squares: Sequence[Fraction]) -> Fraction:
        pairs = zip(self.factors, squares, strict=True)
        return sum((abs(f) * norms.root_up(s) for f, s in pairs), Fraction(0)) ** 2

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        factors = [abs(float(f)) if size else float(f) for f in self.factors]
        return sum(f * x for f, x in zip(factors, xs, strict=True))


class Scale(Operation, name="scale"):
    """Times a number."""

    keys: ClassVar = {"factor": real}
    linear = True
    terms = 4

    def square(self, *shapes: Shape) -> Fraction:
        return self.factor**2

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        return xs[0] * (abs(float(self.factor)) if size else float(self.factor))


def _fits(constant: np.ndarray, shape: Shape) -> None:
    """The constant is repeated along dims, and the value is not."""
    tail = (1,) * (len(shape) - constant.ndim) + constant.shape
    need(
        len(tail) == len(shape) and all(c in (1, n) for c, n in zip(tail, shape, strict=True)),
        "the shape of a constant",
    )


class Shift(Operation, name="shift"):
    """Plus a constant."""

    constants = ("offset",)
    keys: ClassVar = {"offset": text}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        _fits(self.offset, shapes[0])
        return shapes[0]

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        return xs[0] if linear else xs[0] + (np.abs(self.offset) if size else self.offset)


class Diagonal(Operation, name="diagonal"):
    """Times a constant, or divided by it, entry by entry."""

    constants = ("factors",)
    keys: ClassVar = {"factors": text, "divide": boolean}
    linear = True
    terms = 4

    def shape(self, *shapes: Shape) -> Shape:
        _fits(self.factors, shapes[0])
        need(not self.divide or bool(np.all(self.factors != 0)), "a division by zero")
        return shapes[0]

    def square(self, *shapes: Shape) -> Fraction:
        sizes = np.abs(self.factors)
        if self.divide:
            return 1 / Fraction(float(sizes.min())) ** 2
        return Fraction(float(sizes.max(initial=0.0))) ** 2

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        factors = np.abs(self.factors) if size else self.factors
        return xs[0] / factors if self.divide else xs[0] * factors


class BatchNorm(Operation, name="batch_norm"):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel, dim 0 of a sample."""

    constants = ("mean", "variance", "weight", "bias")
    keys: ClassVar = {"mean": text, "variance": text, "eps": real}
    optional: ClassVar = {"weight": text, "bias": text}
    linear = True
    terms = 16

    def shape(self, *shapes: Shape) -> Shape:
        need(len(shapes[0]) >= 1, "channels of a norm")
        for name in self.constants:
            found = getattr(self, name)
            need(found is None or found.shape == shapes[0][:1], f"the shape of {name}")
        need(self.eps >= 0 and bool(np.all(self.variance >= 0)), "a variance below 0")
        need(self.eps > 0 or bool(np.all(self.variance > 0)), "a variance of 0")
        return shapes[0]

    def square(self, *shapes: Shape) -> Fraction:
        weights = np.ones(len(self.mean)) if self.weight is None else self.weight
        pairs = zip(weights.tolist(), self.variance.tolist(), strict=True)
        return max(Fraction(w) ** 2 / (Fraction(v) + self.eps) for w, v in pairs)

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        column = (slice(None), *[None] * (xs[0].ndim - 2))
        factor = 1.0 / np.sqrt(self.variance + float(self.eps))
        factor = factor if self.weight is None else factor * self.weight
        if size:
            factor = np.abs(factor)
        if linear:
            return xs[0] * factor[column]
        mean = -np.abs(self.mean) if size else self.mean
        y = (xs[0] - mean[column]) * factor[column]
        if self.bias is None:
            return y
        return y + (np.abs(self.bias) if size else self.bias)[column]


class Mean(Operation, name="mean"):
    """The mean over some dims, which go; or the sum."""

    keys: ClassVar = {"dims": many(whole(0), 1), "sum": boolean}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(len(set(self.dims)) == len(self.dims), "a dim stands twice")
        need(all(a_dim(d, shapes[0]) >= 0 for d in self.dims), "dims")
        self.terms = math.prod(shapes[0][d] for d in self.dims) + 4
        return tuple(n for d, n in enumerate(shapes[0]) if d not in self.dims)

    def square(self, *shapes: Shape) -> Fraction:
        count = math.prod(shapes[0][d] for d in self.dims)
        return Fraction(count) if self.sum else Fraction(1, count)

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return (np.sum if self.sum else np.mean)(xs[0], tuple(d + 1 for d in self.dims))
