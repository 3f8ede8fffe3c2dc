r"""What slopes that are known to lie in an interval only can do to a map.

With unknown factors $|e| \le 1$ a map is written $J = C + \sum_k N_k\,\mathrm{diag}(e_k)\,J_k$,
where $J_k$ are the rows that lead to the units of block k. Of a row n of $N_k$ at most

$$ \|n\,\mathrm{diag}(e)\,J_k\|_2 \le \min\Big(\sum_j |n_j| L_j,\;
   \kappa_{k,S} \|n \circ S\|_2\Big), \qquad \kappa_{k,S} \ge \|\mathrm{diag}(1/S)\,J_k\|_2, $$

counts, with bounds $L_j$ of the rows of $J_k$ and scales $S = L^p$: one spectral norm serves all
rows of all later layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthonet.certify.mlp.chain import frobenius_up
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import (
    UNIT_ROUNDOFF,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    up,
)

__all__ = ["Unknown"]

_POWERS = (0.0, 0.5, 1.0)  # of L in the scales
_FACTORED = 0.5  # the one whose norm is worth a factorization; the others gain 1 % more
_TINY = 1e-150
_SIDE = 3072  # of Gram matrices that are proved
_STEPS = 10  # of a power iteration
_MARGIN = 1.01  # of what it finds


def _proved_norm(matrix: Tensor) -> float:
    r"""A bound of the spectral norm: by a factorization, of larger matrices by Schur's test.

    $\|A\|_2^2 \le \max_i (|A| q)_i / p_i \cdot \max_j (|A|^\top p)_j / q_j$ for positive p, q.
    """
    if not matrix.numel():
        return 0.0
    if min(matrix.shape) <= _SIDE:
        return spectral_norm_bound(matrix)
    whole, size = frobenius_up(matrix), matrix.abs()
    scale = power_of_two_scale(matrix)
    if not scale:
        return 0.0
    size = size / scale
    right = torch.ones(size.shape[1], dtype=torch.float64)
    for _ in range(_STEPS):
        left = size @ right
        left = left / left.max() + 1e-9
        right = size.mT @ left
        right = right / right.max() + 1e-9
    left = (size @ right).clamp_min(1e-12)
    slack = up(1.0 + 4.0 * gamma(sum(size.shape) + 8))
    rows = float((size @ right / left).max())
    columns = float((size.mT @ left / right).max())
    return min(whole, mul_up(sqrt_up(mul_up(rows, columns, slack)), scale, up(1.0 + 2.0**-40)))


def _estimated_norm(matrix: Tensor) -> float:
    """About the spectral norm, for a search: nothing is proved."""
    if not matrix.numel():
        return 0.0
    matrix = matrix.float()
    noise = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    start = matrix.mT @ matrix.sum(1) + 1e-3 * noise
    size = torch.zeros(())
    for _ in range(_STEPS // 2):
        start = start / start.norm().clamp_min(1e-30)
        image = matrix @ start
        size = image.norm()
        start = matrix.mT @ image
    return _MARGIN * float(size)


@dataclass
class Unknown:
    """The blocks of units with unknown slopes, in the order in which they were met.

    Attributes:
        proved: Bound norms and roundings; without, estimate norms and leave roundings out.
        reach: The bounds L of the rows that lead to the units of each block.
        kappa: For each block the norms of its rows over a power of L.
    """

    proved: bool = True
    reach: list[Tensor] = field(default_factory=list)
    kappa: list[dict[float, float]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of units in all blocks."""
        return sum(map(len, self.reach))

    def sizes(self, linear: Tensor, noise: Tensor) -> Tensor:
        """The sum of the moduli in each row, every unit weighted with its bound: what rounds."""
        if not self.proved:
            return linear.new_zeros(linear.shape[1:])
        total = _lengths(linear)
        for part, reach, _ in self._split(noise):
            total = total + torch.tensordot(reach, part.abs(), 1)
        return total * _slack(linear, noise)

    def rows(self, linear: Tensor, noise: Tensor) -> Tensor:
        """Bounds of the rows of J, from (n, *shape) and (units, *shape) to (*shape)."""
        total = _lengths(linear)
        for part, reach, kappa in self._split(noise):
            best = torch.tensordot(reach, part.abs(), 1)
            for power, value in kappa.items():
                scaled = part * reach.pow(power).reshape(-1, *[1] * (part.ndim - 1))
                best = torch.minimum(best, value * _lengths(scaled))
            total = total + best
        return total * _slack(linear, noise)

    def spectral(self, linear: Tensor, noise: Tensor, scale: Tensor, error: Tensor) -> float:
        """A bound of the norm of diag(scale) J, for (n, rows) and (units, rows).

        `error` bounds what each row may be off.
        """
        total = self._scaled(linear, scale)
        for part, reach, kappa in self._split(noise):
            best = min(
                mul_up(self._scaled(part * reach.pow(power)[:, None], scale), value)
                for power, value in kappa.items()
            )
            total = add_up(total, best)
        return add_up(total, frobenius_up(error * scale))

    def add(
        self, reach: Tensor, whole: float, rows: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        """Open a block of units with the bounds `reach` of each and `whole` of all together.

        With the rows that lead to them, (n, units) and (earlier units, units), and what each may
        be off, their norm over a scale is bounded by that of a matrix, too.
        """
        if not bool(reach.isfinite().all()):
            raise OverflowError("a unit moves without a bound")
        reach = reach.clamp_min(_TINY)  # so that scales have an inverse
        kappa: dict[float, float] = {}
        for power in _POWERS if len(reach) else ():
            scale = reach.pow(-power)
            found = frobenius_up(reach * scale) * (1.0 + 16 * UNIT_ROUNDOFF)
            if power == 0.0:
                found = min(found, whole)
            if rows is not None and power == _FACTORED:
                linear, noise, error = rows
                found = min(found, self.spectral(linear, noise, scale, error))
            kappa[power] = found
        self.reach.append(reach)
        self.kappa.append(kappa)

    def _split(self, noise: Tensor) -> list[tuple[Tensor, Tensor, dict[float, float]]]:
        """The rows of each block with its bounds; of later blocks there may be none."""
        found, first = [], 0
        for reach, kappa in zip(self.reach, self.kappa, strict=True):
            if first < len(noise) and len(reach):
                found.append((noise[first : first + len(reach)], reach, kappa))
            first += len(reach)
        return found

    def _scaled(self, matrix: Tensor, scale: Tensor) -> float:
        scaled = matrix * scale
        if not scaled.numel():
            return 0.0
        if not self.proved:
            return _estimated_norm(scaled)
        # a product of three factors is rounded a few times, entry by entry
        return add_up(_proved_norm(scaled), mul_up(16 * UNIT_ROUNDOFF, frobenius_up(scaled)))


def _lengths(x: Tensor) -> Tensor:
    """The l2 norm over dim 0."""
    return torch.linalg.vector_norm(x, dim=0)


def _slack(linear: Tensor, noise: Tensor) -> float:
    """Covers the roundings of sums over both."""
    return up(1.0 + 4.0 * gamma(len(linear) + len(noise) + 16))
