"""Matrices, convolutions and averages, each from its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np

from orthonet_checker import norms, slopes
from orthonet_checker.operations import Operation, Shape, pairs, steps
from orthonet_checker.schema import SIDE, SIZE, boolean, many, need, one_of, real, text, whole


class Affine(Operation, name="affine"):
    """W x + b for the last dim, at each place of the others."""

    constants = ("weight", "bias")
    keys: ClassVar = {"weight": text}
    optional: ClassVar = {"bias": text}
    rules = ("gram", "cholesky")
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        need(len(shapes[0]) >= 1 and self.weight.ndim == 2, "a matrix and a vector")
        need(self.weight.size and self.weight.shape[1] == shapes[0][-1], "the size of a matrix")
        need(self.bias is None or self.bias.shape == self.weight.shape[:1], "the size of a bias")
        self.terms = self.weight.shape[1] + 4
        return (*shapes[0][:-1], self.weight.shape[0])

    def square(self, *shapes: Shape) -> Fraction:
        return norms.gram(self.weight) if self.rule == "gram" else norms.matrix(self.weight, self.t)

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        y = xs[0] @ (np.abs(self.weight) if size else self.weight).T
        return y if linear or self.bias is None else y + (np.abs(self.bias) if size else self.bias)


class Convolution(Operation, name="convolution"):
    """sum_t K_t x_(stride i + dilation t - before) + b; outside of x are zeros, or x again."""

    constants = ("weight", "bias")
    keys: ClassVar = {
        "weight": text,
        "stride": steps,
        "padding": pairs,
        "dilation": steps,
        "groups": whole(1),
        "circular": boolean,
    }
    optional: ClassVar = {"bias": text}
    rules = ("gram", "gram2", "torus")
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        shape, dims, w = shapes[0], self.weight.ndim - 2, self.weight
        need(dims >= 1 and len(shape) == dims + 1 and w.size, "dims of a convolution")
        need(len(self.stride) == len(self.padding) == len(self.dilation) == dims, "dims")
        need(shape[0] == w.shape[1] * self.groups and w.shape[0] % self.groups == 0, "channels")
        need(self.bias is None or self.bias.shape == w.shape[:1], "the size of a bias")
        self.terms = math.prod(w.shape[1:]) + 4
        out = []
        for n, k, s, (a, b), d in zip(
            shape[1:], w.shape[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            need(n + a + b >= d * (k - 1) + 1, "a kernel larger than its image")
            out.append((n + a + b - d * (k - 1) - 1) // s + 1)
            need(not self.circular or max(a, b) <= n, "circular padding copies the image once")
        need(math.prod(out) * math.prod(w.shape[1:]) <= 8 * SIZE, "too large a convolution")
        return (w.shape[0], *out)

    def square(self, *shapes: Shape) -> Fraction:
        return self.bound(self.weight, shapes[0], self.shape(*shapes))

    def bound(self, w: np.ndarray, shape: Shape, out: Shape) -> Fraction:
        """The squared norm with a kernel, by the rule of the node."""
        groups = self.groups
        axes = zip(w.shape[2:], self.dilation, self.stride, strict=True)
        taps = [-(-(d * (k - 1) + 1) // s) * s for k, d, s in axes]
        need(math.prod(w.shape[:2]) * math.prod(taps) <= SIZE, "too many zeros between the taps")
        kernel = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        for axis, d in enumerate(self.dilation, 3):  # zeros between the taps
            wide = list(kernel.shape)
            wide[axis] = d * (wide[axis] - 1) + 1
            spread = np.zeros(wide)
            spread[(slice(None),) * axis + (slice(None, None, d),)] = kernel
            kernel = spread
        image, out = shape[1:], out[1:]
        if self.circular:  # the outputs are then different rows of a convolution on the torus
            fits = [
                n % s == 0 and o * s <= n for n, s, o in zip(image, self.stride, out, strict=True)
            ]
            need(all(fits), "circular outputs must not repeat, and strides divide the image")
        if self.rule != "torus":
            return norms.gram_convolution(kernel, self.stride, self.rule == "gram2")
        # Zeros between the last pixel and the first: no tap then reaches around the torus.
        circle = [
            n // s if self.circular else max(-(-(n + max(pads)) // s), o)
            for n, s, o, pads in zip(image, self.stride, out, self.padding, strict=True)
        ]
        return norms.torus(kernel, self.stride, circle, self.t)

    def apply(self, *xs: np.ndarray, linear: bool = False, size: bool = False) -> np.ndarray:
        dims, groups = self.weight.ndim - 2, self.groups
        w = np.abs(self.weight) if size else self.weight
        mode = "wrap" if self.circular else "constant"
        x = np.pad(xs[0], [(0, 0), (0, 0), *self.padding], mode=mode)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, w.shape[2:], strict=True)]
        axes = tuple(range(2, 2 + dims))
        x = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        steps = [slice(None, None, s) for s in self.stride]
        taps = [slice(None, None, d) for d in self.dilation]
        x = x[(slice(None), slice(None), *steps, *taps)]
        parts = [
            np.tensordot(
                part, kernel, [[1, *range(2 + dims, 2 + 2 * dims)], [1, *range(2, 2 + dims)]]
            )
            for part, kernel in zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True)
        ]
        y = np.moveaxis(np.concatenate(parts, -1), -1, 1)
        if linear or self.bias is None:
            return y
        bias = np.abs(self.bias) if size else self.bias
        return y + bias[(slice(None), *[None] * dims)]


class Descent(Convolution, name="descent"):
    """x - J* S f(J x + b): J a convolution that keeps the size, S diagonal, f of slopes in [0, 1].

    Between any two points this is I - J* S D J with a diagonal D in [0, 1], a symmetric matrix with
    eigenvalues in [1 - n, 1] for n = |S^(1/2) J|^2: the constant is at most max(1, n - 1).
    """

    constants = (*Convolution.constants, "scales")
    keys: ClassVar = {
        **Convolution.keys,
        "scales": text,
        "function": one_of(*slopes.NAMES),
        "parameters": many(real),
    }
    linear = False

    def shape(self, *shapes: Shape) -> Shape:
        hidden = super().shape(*shapes)
        need(set(self.stride) == {1} and hidden[1:] == shapes[0][1:], "J must keep the size")
        need(self.scales.shape == hidden[:1] and bool(np.all(self.scales >= 0)), "scales")
        return shapes[0]

    def square(self, *shapes: Shape) -> Fraction:
        low, high = slopes.interval(self.function, self.parameters)
        need(low >= 0 and high <= 1, "the slopes must lie in [0, 1]")
        column = (slice(None), *[None] * (self.weight.ndim - 1))
        kernel = self.weight * np.sqrt(self.scales)[column]  # two roundings
        s = norms.scale_of(kernel)
        taps = math.prod(kernel.shape[2:])
        lost = norms.gamma(4) * taps * norms.root_up(norms.square_up(kernel / s)) * Fraction(s)
        found = self.bound(kernel, shapes[0], Convolution.shape(self, *shapes))
        norm = (norms.root_up(found) + lost) ** 2
        return max(Fraction(1), norm - 1) ** 2

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        inside = slopes.apply(self.function, super().apply(*xs), self.parameters)
        dims, g, w = self.weight.ndim - 2, self.groups, self.weight
        back = w.reshape(g, len(w) // g, *w.shape[1:]).swapaxes(1, 2)
        back = np.flip(back, tuple(range(3, 3 + dims))).reshape(-1, len(w) // g, *w.shape[2:])
        adjoint = Convolution(
            {
                "weight": back,
                "stride": self.stride,
                "dilation": self.dilation,
                "groups": g,
                "padding": tuple((b, a) for a, b in self.padding),
                "circular": self.circular,
            }
        )
        scales = self.scales[(slice(None), *[None] * dims)]
        return xs[0] - adjoint.apply(inside * scales)


class Fourier(Operation, name="fourier"):
    """A complex matrix for each frequency of `rfft2` and group of channels, then `irfft2`.

    The transforms are isometries up to one factor that cancels. The inverse one takes the Hermitian
    part of what belongs to a frequency and its opposite, which is no longer than the longest of
    them: the norm is at most that of the largest matrix.
    """

    constants = ("real", "imag")
    keys: ClassVar = {"real": text, "imag": text}
    rules = ("cholesky",)

    def shape(self, *shapes: Shape) -> Shape:
        need(len(shapes[0]) == 3 and self.real.ndim == 4, "an image and its blocks")
        need(self.real.shape == self.imag.shape and self.real.size, "the shapes of the blocks")
        (c, h, w), (groups, count, rows, columns) = shapes[0], self.real.shape
        need(c == groups * columns and count == h * (w // 2 + 1), "the number of blocks")
        return (groups * rows, h, w)

    def square(self, *shapes: Shape) -> Fraction:
        s = max(norms.scale_of(self.real), norms.scale_of(self.imag))
        blocks = [x.reshape(-1, *x.shape[2:]) / s for x in (self.real, self.imag)]
        if blocks[0].shape[1] > blocks[0].shape[2]:
            blocks = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in blocks]
        step = max(1, norms.TERMS // blocks[0][0].size)
        shift, square = norms.scaled(self.t, s), Fraction(0)
        for first in range(0, len(blocks[0]), step):
            re, im = (x[first : first + step] for x in blocks)
            square = max(square, norms.cholesky(re, im, shift))
        return square * Fraction(s) ** 2

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        n, _c, h, w = xs[0].shape
        groups, count, rows, columns = self.real.shape
        spectrum = np.fft.rfft2(xs[0]).reshape(n, groups, columns, count)
        y = np.einsum("gfrc,ngcf->ngrf", self.real + 1j * self.imag, spectrum, optimize=True)
        return np.fft.irfft2(y.reshape(n, groups * rows, h, w // 2 + 1), s=(h, w))


def windows(
    shape: Shape, window: Shape, stride: Shape, padding: Sequence[tuple[int, int]], dilation: Shape
) -> list[list[list[int]]]:
    """For each of the last dims, for each output, the places of its window that exist."""
    dims = len(window)
    need(1 <= dims <= min(3, len(shape)), "dims of a window")
    need(len(stride) == len(padding) == len(dilation) == dims, "dims of a window")
    found = []
    for n, k, s, (a, b), d in zip(shape[-dims:], window, stride, padding, dilation, strict=True):
        count = (n + a + b - d * (k - 1) - 1) // s + 1
        need(count >= 1 and max(a, b) <= d * (k - 1) and n <= SIDE, "windows that hold nothing")
        need(count * k <= 2**20, "too many places in windows")
        rows = [
            [s * i - a + d * t for t in range(k) if 0 <= s * i - a + d * t < n]
            for i in range(count)
        ]
        need(all(rows), "a window that holds nothing")
        found.append(rows)
    return found


class AveragePool(Operation, name="average_pool"):
    """The mean of each window; zeros around the image count, or do not (`count_padding`).

    A Kronecker product: the norm along an axis is at most the root of the largest row sum times
    the largest column sum.
    """

    keys: ClassVar = {
        "window": steps,
        "stride": steps,
        "padding": pairs,
        "count_padding": boolean,
    }
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        ones = (1,) * len(self.window)
        self.rows = windows(shapes[0], self.window, self.stride, self.padding, ones)
        self.terms = 4 * len(self.rows) + sum(self.window)
        return (*shapes[0][: -len(self.rows)], *map(len, self.rows))

    def _weights(self) -> list[list[tuple[list[int], Fraction]]]:
        return [
            [(row, Fraction(1, k if self.count_padding else len(row))) for row in rows]
            for rows, k in zip(self.rows, self.window, strict=True)
        ]

    def square(self, *shapes: Shape) -> Fraction:
        return _kronecker(self._weights())

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return _averages(xs[0], self._weights())


class AdaptivePool(Operation, name="adaptive_average_pool"):
    """The means over floor(i n / m) <= j < ceil((i + 1) n / m) for the m outputs of an axis."""

    keys: ClassVar = {"outputs": steps}
    linear = True

    def shape(self, *shapes: Shape) -> Shape:
        dims = len(self.outputs)
        need(
            1 <= dims <= min(3, len(shapes[0])) and max(shapes[0][-dims:]) <= SIDE, "dims of a pool"
        )
        self.terms = 4 * dims + sum(shapes[0][-dims:])
        self.weights = []
        for n, m in zip(shapes[0][-dims:], self.outputs, strict=True):
            rows = [list(range(i * n // m, -(-(i + 1) * n // m))) for i in range(m)]
            self.weights.append([(row, Fraction(1, len(row))) for row in rows])
        return (*shapes[0][:-dims], *self.outputs)

    def square(self, *shapes: Shape) -> Fraction:
        return _kronecker(self.weights)

    def apply(self, *xs: np.ndarray, **_: bool) -> np.ndarray:
        return _averages(xs[0], self.weights)


def _kronecker(axes: list[list[tuple[list[int], Fraction]]]) -> Fraction:
    """Row sum times column sum of each axis: |A|_2^2 <= |A|_1 |A|_inf."""
    value = Fraction(1)
    for rows in axes:
        columns: dict[int, Fraction] = {}
        for row, weight in rows:
            for place in row:
                columns[place] = columns.get(place, Fraction(0)) + weight
        value *= max(columns.values()) * max(len(row) * weight for row, weight in rows)
    return value


def _averages(x: np.ndarray, axes: list[list[tuple[list[int], Fraction]]]) -> np.ndarray:
    for axis, rows in enumerate(axes, -len(axes)):
        x = np.stack([np.take(x, row, axis).sum(axis) * float(w) for row, w in rows], axis)
    return x
