r"""Polynomials that bring a nearly orthogonal matrix home: approximations of \((1 + e)^{-1/2}\).

With \(E = X^\top X - I\), the product \(X p(E)\) has the singular values
\(\sqrt{1 + e}\, p(e)\). Near the manifold \(p\) is a truncated Chebyshev series whose error is
bounded by its tail; far from it, the best polynomial of relative error on an interval that is only
estimated. All have even degree (or are linear and near): they are positive for every \(e > -1\),
so no singular value changes its sign, whatever an estimate said.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator

import torch

__all__ = ["near", "reach", "tolerance", "wide"]

Polynomial = tuple[float, ...]  # coefficients of e^0, e^1, ...

# Minimax |x p(x^2) - 1| on [1 / ratio, 1], in powers of x^2 (Remez): ratio, error, coefficients.
_BEST = (
    (3.0, 0.0172, (4.317787046, -15.5603514, 32.54987364, -31.96661435, 11.67642536)),
    (4.0, 0.0451, (5.021278682, -22.33475379, 53.22491319, -56.92392714, 22.05756268)),
    (6.0, 0.1179, (6.199212574, -35.19745424, 95.31367593, -109.9971213, 44.79956718)),
    (10.0, 0.2610, (7.934440812, -55.99975002, 166.6380005, -202.4733102, 85.16152837)),
)
_GRID = tuple(itertools.accumulate(itertools.repeat(0.98, 1020), operator.mul, initial=0.9))


def tolerance(dtype: torch.dtype) -> float:
    """Truncation error of a singular value that is left at the end."""
    return 5.0 * torch.finfo(dtype).eps


@functools.lru_cache(maxsize=512)
def near(degree: int, b: float) -> tuple[Polynomial, float]:
    r"""Truncated Chebyshev series on |e| <= b < 1, and a bound of its relative error there.

    The coefficients of \(f(b x)\) are sums of terms of one sign, from
    \(x^m = 2^{1-m} \sum_j \binom{m}{j} T_{m-2j}\); they alternate and fall at least by the factor
    \(1/\rho\) with \(\rho = 1/b + \sqrt{1/b^2 - 1}\), which bounds the tail.
    """
    terms = 8 + math.ceil(40.0 / -math.log10(b)) if b > 1e-8 else 8
    binomial, taylor = 1.0, []
    for m in range(terms + degree + 2):
        taylor.append(binomial)  # |binom(-1/2, m)|
        binomial *= (2 * m + 1) / (2 * m + 2)

    def chebyshev(k: int) -> float:
        inner = (
            taylor[m] * (b / 2) ** m * math.comb(m, (m - k) // 2)
            for m in range(k, terms + degree + 2, 2)
        )
        return (-1) ** k * math.fsum(inner) * (2.0 if k else 1.0)

    power, previous = [0.0, 1.0 / b], [1.0]  # T_1(e / b), T_0
    total = [0.0] * (degree + 1)
    total[0] = chebyshev(0)
    for k in range(1, degree + 1):
        a = chebyshev(k)
        for i, c in enumerate(power):
            total[i] += a * c
        following = [0.0, *(2.0 * c / b for c in power)]
        for i, c in enumerate(previous):
            following[i] -= c
        power, previous = following, power
    decay = b / (1.0 + math.sqrt(1.0 - b * b))
    tail = abs(chebyshev(degree + 1)) / (1.0 - decay)
    return tuple(total), tail * math.sqrt(1.0 + b)


@functools.lru_cache(maxsize=64)
def reach(degree: int, error: float) -> float:
    """The largest b (to two per cent) on which `near` of this degree is within `error`."""
    return _GRID[
        bisect.bisect_left(
            _GRID, True, 0, len(_GRID) - 1, key=lambda b: near(degree, b)[1] <= error
        )
    ]


@functools.lru_cache(maxsize=64)
def wide(top: float) -> Polynomial:
    """A quartic for 1 + e in about [top / ratio^2, top], of the ratio that goes with such a top.

    For singular values spread evenly about their mean, 1 + e being their squares over the mean
    square: then top 1.9, 2.2, 2.5 belong to condition numbers 2.5, 3.5, 5.7.
    """
    choice = 0 if top <= 2.05 else 1 if top <= 2.3 else 2 if top <= 2.6 else 3
    powers = [c * top ** (-0.5 - k) for k, c in enumerate(_BEST[choice][2])]
    # powers of 1 + e, re-expanded at e
    return tuple(
        math.fsum(c * math.comb(k, i) for k, c in enumerate(powers) if k >= i) for i in range(5)
    )
