"""Activations: what they are, and proofs of the largest absolute slope.

Most suprema are read off the definition. Those of silu, gelu and mish are proved in ball
arithmetic: the derivative is enclosed on intervals that are halved until each enclosure is below
the claim, and beyond [-40, 40] by |f'| <= 1 + 2 x^2 exp(-|x|) < 1 + 2^-40.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flint
import numpy as np

from orthonet_checker.schema import need

EDGE = 40
_SELU = (Fraction(1.0507009873554805), Fraction(1.6732632423543772))
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _tanh_gelu(x: Any) -> Any:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x: Any, alpha: float, scale: float = 1.0, inner: float = 1.0) -> Any:
    return scale * np.where(x > 0, x, alpha * np.expm1(inner * np.minimum(x, 0.0)))


# name: (numbers of parameters, definition, largest slope from the parameters)
FIXED: dict[str, tuple[int, Callable[..., Any], Callable[..., Fraction]]] = {
    "relu": (0, lambda x: np.maximum(x, 0.0), lambda: Fraction(1)),
    "abs": (0, np.abs, lambda: Fraction(1)),
    "tanh": (0, np.tanh, lambda: Fraction(1)),
    "sin": (0, np.sin, lambda: Fraction(1)),
    "cos": (0, np.cos, lambda: Fraction(1)),
    "atan": (0, np.arctan, lambda: Fraction(1)),
    "asinh": (0, np.arcsinh, lambda: Fraction(1)),
    "sigmoid": (0, _sigmoid, lambda: Fraction(1, 4)),
    "log_sigmoid": (0, lambda x: -_softplus(-x), lambda: Fraction(1)),
    "softsign": (0, lambda x: x / (1.0 + np.abs(x)), lambda: Fraction(1)),
    "tanhshrink": (0, lambda x: x - np.tanh(x), lambda: Fraction(1)),
    "softshrink": (
        1,
        lambda x, a: np.sign(x) * np.maximum(np.abs(x) - a, 0.0),
        lambda a: Fraction(1),
    ),
    "clamp": (2, np.clip, lambda low, high: Fraction(1)),
    "clamp_min": (1, np.maximum, lambda low: Fraction(1)),
    "clamp_max": (1, np.minimum, lambda high: Fraction(1)),
    "hardswish": (0, lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0, lambda: Fraction(3, 2)),
    "hardsigmoid": (0, lambda x: np.clip(x + 3.0, 0.0, 6.0) / 6.0, lambda: Fraction(1, 6)),
    "leaky_relu": (1, lambda x, a: np.where(x > 0, x, a * x), lambda a: max(Fraction(1), abs(a))),
    # between the slopes at 0 and at minus infinity: alpha and 0 for x < 0, and 1
    "elu": (1, _elu, lambda alpha: max(Fraction(1), abs(alpha))),
    "selu": (0, lambda x: _elu(x, float(_SELU[1]), float(_SELU[0])), lambda: _SELU[0] * _SELU[1]),
}


def _silu_slope(x: flint.arb) -> flint.arb:
    s = 1 / (1 + (-x).exp())
    return s * (1 + x * (1 - s))


def _gelu_slope(x: flint.arb) -> flint.arb:
    density = (-x * x / 2).exp() / (2 * flint.arb.pi()).sqrt()
    return (1 + (x / flint.arb(2).sqrt()).erf()) / 2 + x * density


def _tanh_gelu_slope(x: flint.arb) -> flint.arb:
    c, a = (2 / flint.arb.pi()).sqrt(), flint.arb(flint.fmpq(44715, 1000000))
    th = (c * (x + a * x**3)).tanh()
    return (1 + th) / 2 + x / 2 * (1 - th * th) * c * (1 + 3 * a * x * x)


def _mish_slope(x: flint.arb) -> flint.arb:
    th = (1 + x.exp()).log().tanh()
    return th + x * (1 - th * th) / (1 + (-x).exp())


ENCLOSED: dict[str, tuple[Callable[[Any], Any], Callable[[flint.arb], flint.arb]]] = {
    "silu": (lambda x: x * _sigmoid(x), _silu_slope),
    "gelu": (lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))), _gelu_slope),
    "gelu_tanh": (_tanh_gelu, _tanh_gelu_slope),
    "mish": (lambda x: x * np.tanh(_softplus(x)), _mish_slope),
}
NAMES = (*FIXED, *ENCLOSED)


_RISING = (
    "relu",
    "tanh",
    "sigmoid",
    "atan",
    "asinh",
    "log_sigmoid",
    "softsign",
    "tanhshrink",
    "softshrink",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardsigmoid",
    "selu",
)


def interval(name: str, parameters: tuple[Fraction, ...]) -> tuple[Fraction, Fraction]:
    """The smallest and the largest slope of a chord."""
    need(name in FIXED, f"the smallest slope of {name} is not known")
    largest = prove(name, parameters, Fraction(0))
    if name == "leaky_relu":
        return min(Fraction(1), parameters[0]), max(Fraction(1), parameters[0])
    rising = name in _RISING or (name == "elu" and parameters[0] >= 0)
    return Fraction(0) if rising else -largest, largest


def apply(name: str, x: np.ndarray, parameters: tuple[Fraction, ...]) -> np.ndarray:
    """The function of its definition, entry by entry."""
    if name in ENCLOSED:
        return ENCLOSED[name][0](x)
    return FIXED[name][1](x, *map(float, parameters))


def prove(name: str, parameters: tuple[Fraction, ...], claim: Fraction) -> Fraction:
    """A proved supremum of the absolute slope: the claim itself where it had to be enclosed."""
    wanted = 0 if name in ENCLOSED else FIXED[name][0]
    need(len(parameters) == wanted, f"{name} takes {wanted} numbers")
    if name in FIXED:
        if name == "softshrink":
            need(parameters[0] >= 0, "softshrink needs a threshold of at least 0")
        return FIXED[name][2](*parameters)
    need(claim > 1 + Fraction(1, 2**40), f"{name}: the largest slope is above 1")
    need(_below(name, claim), f"{name}: the largest slope is above the claim, or too near to it")
    return claim


@functools.cache
def _below(name: str, claim: Fraction) -> bool:
    """Whether the absolute slope is enclosed below the claim on [-EDGE, EDGE]."""
    flint.ctx.prec = 80
    top = flint.arb(flint.fmpq(claim.numerator, claim.denominator))
    stack, steps = [(Fraction(-EDGE), Fraction(EDGE))], 0
    while stack:
        low, high = stack.pop()
        steps += 1
        if steps > 20000:
            return False
        middle, radius = (low + high) / 2, (high - low) / 2
        ball = flint.arb(
            flint.fmpq(middle.numerator, middle.denominator),
            flint.arb(flint.fmpq(radius.numerator, radius.denominator)),
        )
        if not abs(ENCLOSED[name][1](ball)) < top:
            stack += [(low, middle), (middle, high)]
    return True
