"""Where a piecewise linear network is affine: points inside of regions, and proofs that none is.

A region is the set of inputs at which every unit that has been looked at lies on a given side of
its knots. Its rows (g, h) say g x > h. A point inside is found, or multipliers that prove by
integer arithmetic that the open region is empty (Gordan's theorem): floats have binary fractions,
so that the rows of the network with its weights as they are stored are known without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dyadic", "empty", "nearest_point", "non_negative"]

_ITERATIONS = 200
_SMALL = 1e-9


def non_negative(matrix: Tensor, target: Tensor) -> Tensor:
    """The u >= 0 that minimizes |matrix u - target|: the method of Lawson and Hanson."""
    count = matrix.shape[1]
    u = torch.zeros(count, dtype=torch.float64)
    passive = torch.zeros(count, dtype=torch.bool)
    for _ in range(_ITERATIONS):
        slope = matrix.mT @ (target - matrix @ u)
        slope[passive] = -1.0
        best = int(slope.argmax())
        if float(slope[best]) <= 1e-12:
            break
        passive[best] = True
        for _ in range(count):
            place = passive.nonzero()[:, 0]
            found = torch.linalg.lstsq(matrix[:, place], target[:, None], driver="gelsd")
            trial = found.solution[:, 0]
            if bool((trial > 0).all()):
                break
            bad = trial <= 0
            before = u[place]
            step = (before[bad] / (before[bad] - trial[bad]).clamp_min(1e-300)).min()
            u[place] = before + step * (trial - before)
            passive[place[(u[place] <= 1e-14) & bad]] = False
            u[~passive] = 0.0
            if not bool(passive.any()):
                return u
        u[:] = 0.0
        u[passive] = trial
    return u


def nearest_point(rows: Tensor, levels: Tensor) -> tuple[Tensor | None, Tensor]:
    """A point with rows x > levels, or None, and the multipliers that stand against one.

    Of the cone of all (x s, s) with s > 0 over the region, the one is taken that lies deepest
    inside: least in length where every side is at least at distance 1.
    """
    count, width = rows.shape
    cone = torch.cat([rows, -levels[:, None]], 1)
    last = torch.zeros(1, width + 1, dtype=torch.float64)
    last[0, width] = 1.0
    cone = torch.cat([cone, last])
    cone = cone / torch.linalg.vector_norm(cone, dim=1, keepdim=True).clamp_min(1e-300)
    system = torch.cat([cone.mT, torch.ones(1, count + 1, dtype=torch.float64)])
    target = torch.zeros(width + 2, dtype=torch.float64)
    target[-1] = 1.0
    u = non_negative(system, target)
    rest = system @ u - target
    if float(torch.linalg.vector_norm(rest)) < _SMALL or not float(rest[-1]):
        return None, u
    point = -rest[:-1] / rest[-1]
    if not float(point[-1]) > 0.0:
        return None, u
    return point[:-1] / point[-1], u


class Dyadic(NamedTuple):
    """An integer matrix times a power of two: sums and products of floats without rounding."""

    rows: list[list[int]]
    exponent: int

    @classmethod
    def of(cls, matrix: Tensor) -> Dyadic:
        """A float64 matrix as it is."""
        ratios = [[float(v).as_integer_ratio() for v in row] for row in matrix.tolist()]
        bits = max((d.bit_length() - 1 for row in ratios for _, d in row), default=0)
        return cls([[n << (bits - d.bit_length() + 1) for n, d in row] for row in ratios], -bits)

    def times(self, other: Dyadic) -> Dyadic:
        """The product of two matrices."""
        columns = list(zip(*other.rows, strict=True))
        product = [
            [sum(a * b for a, b in zip(row, column, strict=True) if a) for column in columns]
            for row in self.rows
        ]
        return Dyadic(product, self.exponent + other.exponent)

    def plus(self, other: Dyadic) -> Dyadic:
        """The sum of two matrices."""
        low = min(self.exponent, other.exponent)
        first, second = self.exponent - low, other.exponent - low
        return Dyadic(
            [
                [(a << first) + (b << second) for a, b in zip(x, y, strict=True)]
                for x, y in zip(self.rows, other.rows, strict=True)
            ],
            low,
        )


def empty(rows: Sequence[Sequence[int]], guess: Tensor) -> bool:
    """Whether multipliers prove that no point has g x > h, for integer rows (g, -h).

    With lambda >= 0, not all zero, and sum lambda_i (g_i, -h_i) = (0, -s) with s >= 0, a point
    inside would have 0 < sum lambda_i (g_i x - h_i) = -s. `guess` are floats close to them; the
    last one belongs to s.
    """
    chosen = [i for i, value in enumerate(guess.tolist()) if value > 1e-12]
    width = len(rows[0])
    last = len(rows)
    columns = [list(rows[i]) if i < last else [0] * (width - 1) + [1] for i in chosen]
    if not any(i < last for i in chosen):
        return False
    weights = _kernel(columns)
    if weights is None:
        return False
    if all(w <= 0 for w in weights):
        weights = [-w for w in weights]
    used = any(w > 0 for w, i in zip(weights, chosen, strict=True) if i < last)
    return used and all(w >= 0 for w in weights)


def _kernel(columns: list[list[int]]) -> list[int] | None:
    """The integers that combine the vectors to zero, if there is one such line (Bareiss)."""
    count, width = len(columns), len(columns[0])
    table = [[columns[j][i] for j in range(count)] for i in range(width)]
    pivots: list[int] = []
    row, before = 0, 1
    for column in range(count):
        place = next((i for i in range(row, width) if table[i][column]), None)
        if place is None:
            continue
        table[row], table[place] = table[place], table[row]
        pivot = table[row][column]
        for i in range(width):
            if i != row:
                factor = table[i][column]
                table[i] = [
                    (pivot * a - factor * b) // before
                    for a, b in zip(table[i], table[row], strict=True)
                ]
        before = pivot
        pivots.append(column)
        row += 1
        if row == width:
            break
    free = [j for j in range(count) if j not in pivots]
    if len(free) != 1:
        return None
    (last,) = free
    result = [0] * count
    result[last] = before
    for i, column in enumerate(pivots):
        result[column] = -table[i][last]
    return result
