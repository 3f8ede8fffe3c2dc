"""Activations near a value: proved slopes of chords, and the value with a bound of its error.

A chord starts at a point within `off` of `center` and is at most `move` long. All slopes of chords
lie between the extreme slopes of the function on the whole range. Values and slopes of smooth
functions are enclosed by Arb.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import flint
import numpy as np

from orthonet_checker import slopes
from orthonet_checker.ball import LOST, OUT, TIGHT, up

PIECES = 8
"""Parts of a range on which slopes without a known order are enclosed."""
CURVED = {"sin": 1.0, "cos": 1.0, "silu": 0.5078125, "gelu": 0.8, "gelu_tanh": 0.8125, "mish": 0.75}
"""Bounds of |f''|: in an interval of width w a slope is off the middle's by these times w / 2."""
NEAR = 2.0**-50


class Near(NamedTuple):
    """The slopes of chords, and the value at the center within `off`."""

    low: np.ndarray
    high: np.ndarray
    value: np.ndarray
    off: np.ndarray


def bent(below: Any, center: np.ndarray, off: np.ndarray, move: np.ndarray) -> Near:
    """For x > 0: x, and `below` x elsewhere.

    The share of a chord behind the kink is at most 1 - |z| / move, for a start z on this side.
    """
    side = np.abs(center) - (off * TIGHT + NEAR * np.abs(center) + LOST)
    sure = (side >= move) & (side > 0)
    share = np.where(side > 0, np.clip(1.0 - side / move + NEAR, 0.0, 1.0), 1.0)
    here, there = np.where(center > 0, 1.0, below), np.where(center > 0, below, 1.0)
    end = here + share * (there - here)
    pad = NEAR * 4 * (np.abs(here) + np.abs(there))
    least, most = np.minimum(here, there), np.maximum(here, there)
    low = np.where(sure, here, np.clip(np.minimum(here, end - pad), least, most))
    high = np.where(sure, here, np.clip(np.maximum(here, end + pad), least, most))
    open_ = ~(side > 0)
    low, high = np.where(open_, least, low), np.where(open_, most, high)
    value = here * center
    size = np.maximum(1.0, np.abs(below))
    return Near(low, high, value, (size * off + NEAR * np.abs(value)) * OUT + LOST)


def activation(
    name: str,
    parameters: tuple[Fraction, ...],
    gain: Fraction,
    center: np.ndarray,
    off: np.ndarray,
    move: np.ndarray,
) -> Near:
    """The same for an activation by its name, with a proved bound of its slopes."""
    numbers = [float(p) for p in parameters]
    if name in ("relu", "abs", "leaky_relu"):
        (below,) = numbers or ({"relu": 0.0, "abs": -1.0}[name],)
        return bent(np.float64(below), center, off, move)
    wide = (off + move) * TIGHT + NEAR * np.abs(center) + LOST
    first, last, steep = center - wide, center + wide, up(gain)
    least, most = -steep, steep
    if name in slopes.FIXED:
        ends = slopes.interval(name, parameters)
        least, most = -up(-ends[0]), up(ends[1])
        least = 0.0 if not ends[0] else least
    if name in _KINKS:
        value = slopes.apply(name, center, parameters)
        lost = 2.0**-48 * (np.abs(value) + np.abs(center) + max(map(abs, numbers), default=0.0) + 8)
        low, high = _straight(*_KINKS[name](*numbers), first, last)
    else:
        flint.ctx.prec = 80
        flat = [x.reshape(-1).tolist() for x in (center, first, last)]
        found = [_values(name, parameters, *z, least, most) for z in zip(*flat, strict=True)]
        low, high, value, lost = np.array(found).T.reshape(4, *center.shape)
    low, high = np.clip(low, least, most), np.clip(high, least, most)
    return Near(low, high, value, (steep * off + lost) * OUT + LOST)


_SIXTH = math.nextafter(1 / 6, 0.0), math.nextafter(1 / 6, 1.0)
_KINKS: dict[str, Callable[..., tuple[list[float], list[tuple[float, float]]]]] = {
    "clamp": lambda a, b: ([a, b], [(0.0, 0.0), (1.0, 1.0), (0.0, 0.0)]),
    "clamp_min": lambda a: ([a], [(0.0, 0.0), (1.0, 1.0)]),
    "clamp_max": lambda a: ([a], [(1.0, 1.0), (0.0, 0.0)]),
    "softshrink": lambda a: ([-a, a], [(1.0, 1.0), (0.0, 0.0), (1.0, 1.0)]),
    "hardsigmoid": lambda: ([-3.0, 3.0], [(0.0, 0.0), _SIXTH, (0.0, 0.0)]),
    "hardswish": lambda: ([-3.0, 3.0], [(0.0, 0.0), (-0.5, 1.5), (1.0, 1.0)]),
}
"""Where the formula changes, and the extreme slopes of each part."""


def _straight(
    kinks: list[float], parts: list[tuple[float, float]], first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extreme slopes of all parts that a range touches."""
    edges = [-math.inf, *kinks, math.inf]
    low, high = np.full(first.shape, math.inf), np.full(first.shape, -math.inf)
    for a, b, (least, most) in zip(edges, edges[1:], parts, strict=False):
        inside = ~((last < a) | (first > b))
        low = np.where(inside, np.minimum(low, least), low)
        high = np.where(inside, np.maximum(high, most), high)
    return low, high


# --- smooth functions, in balls ------------------------------------------------------------------


def _sigmoid(x: flint.arb) -> flint.arb:
    return 1 / (1 + (-x).exp())


def _mish(x: flint.arb) -> flint.arb:
    return x * (1 + x.exp()).log().tanh()


def _gelu_tanh(x: flint.arb) -> flint.arb:
    a = flint.arb(flint.fmpq(44715, 1000000))
    return x / 2 * (1 + ((2 / flint.arb.pi()).sqrt() * (x + a * x**3)).tanh())


def _exact(number: Fraction) -> flint.arb:
    return flint.arb(flint.fmpq(number.numerator, number.denominator))


_VALUES: dict[str, Callable[[flint.arb], flint.arb]] = {
    "tanh": lambda x: x.tanh(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "atan": lambda x: x.atan(),
    "asinh": lambda x: x.asinh(),
    "sigmoid": _sigmoid,
    "log_sigmoid": lambda x: -(1 + (-x).exp()).log(),
    "softsign": lambda x: x / (1 + abs(x)),
    "tanhshrink": lambda x: x - x.tanh(),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x / 2 * (1 + (x / flint.arb(2).sqrt()).erf()),
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
}
_FALLING: dict[str, Callable[[flint.arb], flint.arb]] = {
    "tanh": lambda x: 1 - x.tanh() ** 2,
    "sigmoid": lambda x: _sigmoid(x) * _sigmoid(-x),
    "atan": lambda x: 1 / (1 + x * x),
    "asinh": lambda x: 1 / (1 + x * x).sqrt(),
    "softsign": lambda x: 1 / (1 + abs(x)) ** 2,
    "tanhshrink": lambda x: -(x.tanh() ** 2),
}
"""Slopes that are even and fall as |x| grows; of tanhshrink the negative."""

_TURNING: dict[str, Callable[[flint.arb], flint.arb]] = {
    "sin": lambda x: x.cos(),
    "cos": lambda x: -x.sin(),
}


def _ends(x: flint.arb) -> tuple[float, float]:
    """Floats around a ball; infinite where it has no ends."""
    if not x.is_finite():
        return -math.inf, math.inf
    low, high = float(x.lower()), float(x.upper())
    return math.nextafter(low, -math.inf), math.nextafter(high, math.inf)


def _values(
    name: str,
    parameters: tuple[Fraction, ...],
    center: float,
    first: float,
    last: float,
    least: float,
    most: float,
) -> tuple[float, float, float, float]:
    """(lowest slope, highest slope, value, error) of one unit."""
    x = flint.arb(center)
    if name in ("elu", "selu"):
        outer, inner = (1, *parameters) if name == "elu" else slopes._SELU
        steep = _exact(Fraction(outer) * inner)
        below, above = steep * x.expm1(), _exact(Fraction(outer)) * x
        value = above if center > 0 else below
        ends = [steep * flint.arb(min(z, 0.0)).exp() for z in (first, last)] if first <= 0 else []
        ends += [_exact(Fraction(outer))] if last >= 0 else []
        found = [_ends(e) for e in ends]
    elif name in _FALLING:
        value = _VALUES[name](x)
        near = 0.0 if first <= 0 <= last else min(abs(first), abs(last))
        found = [_ends(_FALLING[name](flint.arb(z))) for z in (near, max(abs(first), abs(last)))]
        if name == "tanhshrink":
            found = [(-b, -a) for a, b in found]
    elif name == "log_sigmoid":
        value = _VALUES[name](x)
        found = [_ends(_sigmoid(-flint.arb(z))) for z in (first, last)]
    else:
        value = _VALUES[name](x)
        slope = _TURNING.get(name) or slopes.ENCLOSED[name][1]
        middles = [first + (last - first) * ((2 * i + 1) / (2 * PIECES)) for i in range(PIECES)]
        spread = CURVED[name] * ((last - first) * (0.5 / PIECES + NEAR) + NEAR * abs(center))
        found = [_ends(slope(flint.arb(m)) + flint.arb(0, spread)) for m in middles]
    low, high = min(a for a, _ in found), max(b for _, b in found)
    if math.isnan(low + high):
        low, high = least, most
    a, b = _ends(value)
    return low, high, float(value.mid()), b - a
