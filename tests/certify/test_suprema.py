"""Every slope supremum, proved in ball arithmetic: no rounding, no grid.

The line is cut into intervals. On each, a Taylor polynomial of the derivative with balls for
coefficients encloses it; where that is too wide, the interval is halved. Beyond +-40 (12
for GELU and erf) the derivatives are enclosed at the end, from where on they are monotone.
"""

import itertools
import math

import pytest
import torch

from orthonet.certify.mlp.slopes import PLACE
from orthonet.certify.ops.suprema import DERIVATIVES, SIXTH, SUPREMA, TURNS

flint = pytest.importorskip("flint")
arb, arb_series = flint.arb, flint.arb_series

FAR = {"gelu": 12, "gelu_tanh": 12, "erf": 12}
HALF, ONE = arb("0.5"), arb(1)


def sigmoid(t):
    return 1 / (1 + (-t).exp())


def tanh(t):
    return 1 - 2 / (1 + (2 * t).exp())


def asinh(t):
    return ((t * t + 1).sqrt() + t).log()


def inner(t):
    """sqrt(2 / pi) (t + 0.044715 t^3), of GELU's approximation."""
    return (2 / arb.pi()).sqrt() * (t + arb("0.044715") * t * t * t)


# The functions themselves: their derivatives come from power series.
SMOOTH = {
    "asinh": lambda t: asinh(t) if t[0] > 0 else -asinh(-t),  # without cancellation
    "atan": lambda t: t.atan(),
    "cos": lambda t: t.cos(),
    "erf": lambda t: t.erf(),
    "gelu": lambda t: t * HALF * (1 + (t * HALF.sqrt()).erf()),
    "gelu_tanh": lambda t: t * HALF * (1 + tanh(inner(t))),
    "mish": lambda t: t * tanh((1 + t.exp()).log()),
    "sigmoid": sigmoid,
    "silu": lambda t: t * sigmoid(t),
    "sin": lambda t: t.sin(),
    "tanh": tanh,
    "tanhshrink": lambda t: t - tanh(t),
}
# What the derivative tends to on the left and on the right. Those of asinh and
# atan, 1 / sqrt(1 + x^2) and 1 / (1 + x^2), are monotone, and so are in [0, 1] everywhere.
LIMITS = {
    "erf": (0, 0),
    "gelu": (0, 1),
    "gelu_tanh": (0, 1),
    "mish": (0, 1),
    "sigmoid": (0, 0),
    "silu": (0, 1),
    "tanh": (0, 0),
    "tanhshrink": (1, 1),
}


def derivatives(f, x, count):
    """The Taylor coefficients of f at the ball x, from the first derivative on."""
    series = f(arb_series([x, ONE], count + 2))
    return [series[k + 1] * (k + 1) for k in range(count)]


def enclosure(f, middle, radius):
    """A ball that holds f' on [middle - radius, middle + radius]."""
    whole = arb(middle.mid(), radius)
    at, first = derivatives(f, arb(middle), 2)
    _, _, second = derivatives(f, whole, 3)
    step = arb(0, radius)
    return at + first * step + second * step * step


def is_within(f, middle, radius, low, high, depth=0):
    """Whether low <= f' <= high is proved on an interval."""
    try:
        ball = enclosure(f, middle, radius)
        if ball >= low and ball <= high:
            return True
    except ValueError:  # too wide for a denominator
        pass
    if depth > 60:
        return False
    half = radius / 2
    return all(is_within(f, middle + s * half, half, low, high, depth + 1) for s in (-1, 1))


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_stay_within_their_suprema(name):
    flint.ctx.prec = 120
    low, high = (arb(v) for v in SUPREMA[name])
    # An end that is attained at a point, as 1 of tanh at 0, is proved up to 2^-60.
    tight = ("atan", "asinh", "sin", "cos", "sigmoid", "tanh", "tanhshrink", "erf")
    slack = arb(2) ** -60 if name in tight else arb(0)
    far = FAR.get(name, 40)
    for i in range(-far, far):
        middle, radius = arb(i) + HALF, HALF
        assert is_within(SMOOTH[name], middle, radius, low - slack, high + slack)


@pytest.mark.parametrize("name", SMOOTH)
def test_suprema_are_reached(name):
    """At their places, and no more than 1e-12 is given away."""
    flint.ctx.prec = 120
    for place, end in zip(TURNS[name], SUPREMA[name], strict=True):
        if place is not None:
            slope = derivatives(SMOOTH[name], arb(place), 1)[0]
            assert abs(slope - arb(end)) < arb(10) ** -12


def signs(f, order, low, high, depth=0):
    """The signs that a derivative of this order has on an interval; 0 where that is not proved."""
    middle, radius = (low + high) / 2, (high - low) / 2
    whole = arb(middle, radius)
    try:
        around = derivatives(f, whole, order + 1)
        at = derivatives(f, arb(middle), order)[order - 1]
        ball = at + around[order] * order * arb(0, radius)  # the Taylor coefficients, not scaled
        if ball > 0 or ball < 0:
            return {1 if ball > 0 else -1}
    except ValueError:  # too wide for a denominator
        pass
    if depth > 40:
        return {0}
    parts = ((low, middle), (middle, high))
    return set().union(*(signs(f, order, *part, depth + 1) for part in parts))


MONOTONE = sorted(set(SMOOTH) - {"asinh", "atan", "cos", "sin"})
"""The others are cos, sin, 1 / (1 + x^2) and its root: known where they are monotone."""


@pytest.mark.parametrize("name", MONOTONE)
def test_derivatives_are_monotone_between_their_turns(name):
    """Up to where they are as good as constant; near a turn the second derivative has one zero."""
    flint.ctx.prec = 400
    f, far = SMOOTH[name], FAR.get(name, 40)
    turns = sorted(p for p in TURNS[name] if p is not None)
    near = PLACE / 2  # of a turn
    cuts = [-far, *(c for p in turns for c in (p - near, p + near)), far]
    found = []
    for low, high in zip(cuts[::2], cuts[1::2], strict=True):
        steps = max(1, round(high - low))
        edges = [low + (high - low) * i / steps for i in range(steps)] + [high]
        found.append(set().union(*(signs(f, 2, *e) for e in itertools.pairwise(edges))))
    assert all(len(s) == 1 and 0 not in s for s in found)
    assert all(a != b for a, b in itertools.pairwise(found))
    for p in turns:
        assert len(s := signs(f, 3, p - near, p + near)) == 1 and 0 not in s
    for side, limit in zip((-1, 1), LIMITS[name], strict=True):
        slope = derivatives(f, arb(side * far), 1)[0]
        assert abs(slope - limit) < arb(10) ** -15  # a tenth of what is added


DEFINED = {
    **SMOOTH,
    "log_sigmoid": lambda t: -(1 + (-t).exp()).log(),
    "softplus": lambda t: (1 + t.exp()).log(),
    "softsign": lambda t: t / (1 + t) if t[0] > 0 else t / (1 - t),
}


def test_derivatives_in_float64():
    flint.ctx.prec = 200
    generator = torch.Generator().manual_seed(0)
    for name, f in DEFINED.items():
        for scale in (1e-3, 1.0, 5.0, 30.0):
            x = torch.randn(20, generator=generator, dtype=torch.float64) * scale
            for place, value in zip(x.tolist(), DERIVATIVES[name](x).tolist(), strict=True):
                error = derivatives(f, arb(place), 1)[0] - arb(value)
                assert abs(error) < arb(2.5e-15), name  # observed 3e-16


@pytest.mark.parametrize("name", LIMITS)
def test_tails(name):
    """Far out the derivatives are monotone exponentials: both ends are as good as reached."""
    flint.ctx.prec = 400
    for side, limit in zip((-1, 1), LIMITS[name], strict=True):
        slope = derivatives(SMOOTH[name], arb(side * FAR.get(name, 40)), 1)[0]
        gap = abs(slope - limit)
        assert gap < arb(10) ** -12
        low, high = SUPREMA[name]
        assert low <= limit <= high
        if low == limit or high == limit:  # from inside
            inside = slope - limit if low == limit else limit - slope
            assert inside >= 0 or (low < 0 and gap < -arb(low))


def test_kinks():
    """Functions made of pieces: their slopes are written down, not enclosed."""
    assert SUPREMA["relu"] == (0.0, 1.0) and SUPREMA["abs"] == (-1.0, 1.0)
    assert SUPREMA["neg"] == (-1.0, -1.0) and SUPREMA["softsign"] == (0.0, 1.0)
    sixths = [arb(1) / 6, arb(SIXTH)]
    low, high = (arb(v) for v in SUPREMA["hardsigmoid"])
    assert all(low <= s <= high for s in sixths)
    low, high = (arb(v) for v in SUPREMA["hardswish"])
    for s in sixths:  # (2 x + 3) s at -3 and 3
        assert low <= -3 * s and 9 * s <= high
    # scale alpha e^x at 0, with the constants of torch
    scale, alpha = (
        arb("1.0507009873554804934193349852946"),
        arb("1.6732632423543772848170429916717"),
    )
    product = scale * alpha
    assert product <= arb(SUPREMA["selu"][1]) < product + arb(10) ** -12
    # of values in (0, 1): 1 / (1 + e^x), 1 / (1 + e^(-beta x)) and e^(x / alpha) for x < 0
    assert all(SUPREMA[name] == (0.0, 1.0) for name in ("log_sigmoid", "softplus", "celu"))
    assert set(SMOOTH) | {
        "relu",
        "abs",
        "neg",
        "softsign",
        "hardsigmoid",
        "hardswish",
        "selu",
        "celu",
        "log_sigmoid",
        "softplus",
    } == set(SUPREMA)
    assert math.isfinite(SIXTH)
