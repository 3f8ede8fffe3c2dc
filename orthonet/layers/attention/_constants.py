"""The constants of attention, rounded upward: their proofs stand in the layers' docstrings."""

from __future__ import annotations

import math

from orthonet.layers._declared import SAFE
from orthonet.linalg.bounds.rounding import up

__all__ = ["clipped_scores", "column_sum", "mean_shift", "row_moment"]

_PEAK = 0.21781170571980126
"""Where q log((1 - q) / q) is largest: its derivative vanishes at (1 - q) / q = 3.59112147667."""
_LARGEST = up(0.2784645427610738)
"""Its largest value, W(1 / e)."""


def _lambert(x: float) -> float:
    """Not less than the w >= 0 with w exp(w) = x, for x >= 0."""
    w = math.log1p(x)
    for _ in range(40):  # Newton steps descend from here, the function being convex
        w -= (w * math.exp(w) - x) / (math.exp(w) * (1.0 + w))
    w = max(w, 0.0) * SAFE
    while w * math.exp(w) < x * (1.0 + 2.0**-40):
        w = w * SAFE + 1e-300
    return w


def row_moment(length: int) -> float:
    """M of `DistanceAttention`, step 1: it bounds the second moment of a row."""
    return _lambert((length - 1) / math.e)


def _mean_weight(terms: int, twice: int) -> float:
    """The root q of terms q^2 = twice (1 - q), rounded up."""
    return min(1.0, 2.0 / (1.0 + math.sqrt(1.0 + 4.0 * terms / twice)) * SAFE)


def column_sum(length: int, causal: bool) -> float:
    """The bound c of `DistanceAttention`, step 4: it bounds the columns of its weights."""
    n, twice = length - 1, 2 if causal else 1
    others = n * min(0.5, _mean_weight(n, twice)) if n else 0.0
    return min(math.sqrt(twice * length), 1.0 + others) * SAFE


def _column_moment(length: int, causal: bool) -> float:
    """The bound s of `DistanceAttention`, step 5: it bounds the second moment of a column."""
    n = length - 1
    q = _mean_weight(n, 2 if causal else 1) if n else 0.0
    if q >= _PEAK or not n:
        return n * _LARGEST * SAFE
    return n * q * math.log((1.0 - q) / q) * SAFE


def mean_shift(length: int, causal: bool = False) -> float:
    """C(N) of `DistanceAttention`: it grows with the length, so that padding does not raise it."""
    moment = row_moment(length)
    mixed = math.sqrt(moment * _column_moment(length, causal))
    return (math.sqrt(column_sum(length, causal)) + 2.0 * (moment + mixed)) * SAFE


def clipped_scores(length: int, temperature: float, causal: bool = False) -> float:
    """The root of c of `CosineAttention`, which bounds the columns of its weights."""
    ratio = math.exp(-2.0 * temperature) / SAFE
    if causal:
        columns = math.fsum(1.0 / (1.0 + m * ratio) for m in range(length))
    else:
        columns = length / (1.0 + (length - 1) * ratio)
    return math.sqrt(columns) * SAFE
