r"""What slopes that are known to lie in an interval only can do to a map.

With unknown factors $|e| \le 1$ a map is written $J = C + \sum_k N_k\,\mathrm{diag}(e_k)\,J_k$,
where $J_k$ are the rows that lead to the units of block k. Of a row n of $N_k$ at most

$$ \|n\,\mathrm{diag}(e)\,J_k\|_2 \le \min\Big(\sum_j |n_j| L_j,\;
   \kappa_{k,S} \|n \circ S\|_2\Big), \qquad \kappa_{k,S} \ge \|\mathrm{diag}(1/S)\,J_k\|_2, $$

counts, with bounds $L_j$ of the rows of $J_k$ and any scales $S > 0$: one spectral norm serves all
rows of all later layers. Scales are 1, L, and the root of L over what is not known of the slope,
which leaves units out that are known almost. Of all rows together, with any weights $w_k > 0$,

$$ \|J\|_2 \le \big\|[w_0 C, w_1 \kappa_1 N_1 S_1, \dots]\big\|_2
   \sqrt{1/w_0^2 + 1/w_1^2 + \dots}, $$

because $J$ is the product of this matrix and of one whose blocks have norm $1 / w_k$ at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthonet.certify.local.norms import estimated_norm, proved_norm, unit_of
from orthonet.certify.mlp.chain import frobenius_up
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, add_up, mul_up

__all__ = ["Unknown"]

_BEST = 1  # of the scales, whose norm is worth a large factorization; the others gain 1 % more
_SMALL = 2**27  # products of a factorization that is small
_NEAR = 1e-9  # of the largest L of a block: no L is taken to be smaller
_KNOWN = 1e-3  # of the largest unknown part of a slope, likewise
_TINY = 1e-150
_ANGLES = 2**26  # products for the angles between rows
_OUTWARD = 1.0 + 2.0**-40  # covers the float64 roundings of the bookkeeping


@dataclass(frozen=True)
class _Block:
    """Units with unknown slopes.

    Attributes:
        reach: The bounds L of the rows that lead to them.
        scales: Scales S, each with a bound of the norm of these rows over S.
        weights: The squares of the scales, in the dtype of the rows.
        shares: L / max L.
        top: The largest L.
        known: What is known of these rows, (inputs, units), and the length of the rest of each;
            None for units of which nothing is known.
    """

    reach: Tensor
    scales: list[tuple[Tensor, float]]
    weights: Tensor
    shares: Tensor
    top: float
    known: tuple[Tensor, Tensor] | None = None


@dataclass
class Unknown:
    """The blocks of units with unknown slopes, in the order in which they were met.

    Attributes:
        size: The entries of the input, to which the first rows belong.
        dtype: Of the rows, float32 or float64.
        proved: Bound norms and roundings; without, estimate norms and leave roundings out.
        blocks: One for each operation that made units.
    """

    size: int
    dtype: torch.dtype = torch.float64
    proved: bool = True
    blocks: list[_Block] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of units in all blocks."""
        return sum(len(b.reach) for b in self.blocks)

    @property
    def unit(self) -> float:
        """The unit roundoff of the rows."""
        return unit_of(self.dtype)

    @property
    def lost(self) -> float:
        """What underflow takes from an entry of all rows together, each with its reach."""
        tiny = 2.0**-120 if self.dtype == torch.float32 else 2.0**-1000
        return tiny * (self.size + sum(len(b.reach) * b.top for b in self.blocks))

    def gamma(self, count: float) -> float:
        """The error of so many roundings of rows, relative to the moduli.

        Raises:
            OverflowError: It has no bound.
        """
        share = count * self.unit
        if share >= 0.5:
            raise OverflowError("too many roundings")
        return share / (1.0 - share) * _OUTWARD

    def ranges(self, most: int, step: int) -> list[tuple[int, int]]:
        """Consecutive ranges of the first `most` rows, each in one block, of `step` at most."""
        ends, first = [self.size], 0
        for block in self.blocks:
            ends.append(ends[-1] + len(block.reach))
        found = []
        for end in ends:
            while first < min(end, most):
                last = min(first + step, end, most)
                found.append((first, last))
                first = last
        return found

    def measure(
        self, parts: Iterable[tuple[int, Tensor]], entries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds (entries,) of the rows of J, of their unknown parts, and of sums of their moduli.

        For a row c + u with the unknown part u, |c + u|^2 = |c|^2 + 2 c u + |u|^2, and c u is less
        than the product of the lengths where units move across c.

        Args:
            parts: The first row of each of the `ranges`, and (rows, entries).
            entries: How many entries the node has.
        """
        total, sizes = (torch.zeros(entries, dtype=torch.float64) for _ in range(2))
        rest, across = (torch.zeros(entries, dtype=torch.float64) for _ in range(2))
        linear: list[Tensor] = []
        start, longest, rows, queue = 0, 0, 0, iter(parts)
        part = next(queue, None)
        for block in (None, *self.blocks):
            end = start + (self.size if block is None else len(block.reach))
            if part is None:
                break
            squares = torch.zeros(1 if block is None else len(block.scales), entries).double()
            sums, crossed = (torch.zeros(entries, dtype=torch.float64) for _ in range(2))
            angles = None if block is None else self._angles(block, linear, entries)
            while part is not None and part[0] < end:
                first, x = part
                longest, rows = max(longest, len(x)), rows + len(x)
                here = slice(first - start, first - start + len(x))
                if block is None:
                    squares += x.square().sum(0)
                    linear.append(x)
                else:
                    squares += block.weights[:, here] @ x.square()
                    sums += block.shares[here] @ x.abs()
                    if angles is not None:
                        crossed += (angles[here] * x.abs()).sum(0)
                part = next(queue, None)
            start = end
            lengths = squares.sqrt()
            if self.proved:
                lengths = lengths + self._tiny(rows)
                sums = sums + self._tiny(rows)
            if block is None:
                total, sizes = total + lengths[0], sizes + lengths[0]
                if not self._small(entries, max((len(b.reach) for b in self.blocks), default=0)):
                    linear.clear()
                continue
            sizes = sizes + sums * block.top
            best = sums * block.top
            for (_, kappa), row in zip(block.scales, lengths, strict=True):
                best = torch.minimum(best, row * kappa)
            rest = rest + best
            cross = best * total
            if angles is not None:
                cross = torch.minimum(cross, crossed + self._tiny(rows) * (1.0 + total))
            across = across + cross
        total = (total.square() + 2.0 * across + rest.square()).sqrt()
        if not self.proved:
            return total, rest, sizes
        # Sums of one range at a time, of squares with a weight; then in float64.
        slack = (
            1.0 + 2.0 * self.gamma(longest + 12) + 8.0 * UNIT_ROUNDOFF * (rows + 16)
        ) * _OUTWARD
        return total * slack, rest * slack, sizes * slack

    def _small(self, entries: int, units: int) -> bool:
        """Whether the angles between rows cost little."""
        return entries * self.size * units < _ANGLES

    def _angles(self, block: _Block, linear: list[Tensor], entries: int) -> Tensor | None:
        """Bounds of the products of the rows of units with what is known of rows."""
        if block.known is None or not linear or not self._small(entries, len(block.reach)):
            return None
        known, loose = block.known
        rows = torch.cat(linear)
        share = 2.0 * self.gamma(self.size + 8)  # of sums over the input
        length, each = (
            torch.linalg.vector_norm(t, dim=0).double() * (1.0 + share) + self._tiny(self.size)
            for t in (rows, known)
        )
        found = (known.mT @ rows).double().abs() + share * each[:, None] * length
        found = found + loose[:, None] * length + self._tiny(self.size)
        return torch.minimum(found, block.reach[:, None] * length).to(self.dtype)

    def norm(self, rows: Tensor, scale: Tensor, error: Tensor) -> float:
        """A bound of the norm of diag(scale) J, for rows (n, entries).

        `error` bounds what each entry may be off.
        """
        if not rows.numel():
            return frobenius_up(error * scale)
        parts, norms, matrix = [], [], rows * scale.to(self.dtype)
        squares = _lengths(matrix).square()
        start = self.size
        weights = [torch.ones(min(self.size, len(rows)), dtype=torch.float64)]
        for block in self.blocks:
            end = start + len(block.reach)
            if start < len(rows) and len(block.reach):
                given = [scale * kappa for scale, kappa in block.scales]
                sizes = [float((w.square() * squares[start:end]).sum()) for w in given]
                weights.append(given[sizes.index(min(sizes))])
            start = end
        first, entry = 0, float(matrix.abs().max())
        for weight in weights:
            part = matrix[first : first + len(weight)]
            part *= weight[:, None].to(self.dtype)
            parts.append(part)
            norms.append(estimated_norm(part, steps=1))
            first += len(weight)
        largest = max(norms)
        if not math.isfinite(largest):
            raise OverflowError("a unit moves without a bound")
        total = 0.0
        for part, size in zip(parts, norms, strict=True):
            # With weights 1 / sqrt(a) of parts of norm a, the bound is the sum of a at most.
            if not size and not bool(part.any()):
                continue
            share = max(size / largest, 1e-12) if largest else 1.0
            factor = share**-0.5
            part *= factor
            total += factor**-2
        if not self.proved:
            return estimated_norm(matrix) * math.sqrt(total)
        # Units that see near entries of the input are near each other.
        seen = (matrix[: self.size] != 0).to(self.dtype)
        place = torch.arange(len(seen), dtype=self.dtype) @ seen / seen.sum(0).clamp_min(1.0)
        found = proved_norm(matrix, place)
        # An entry is a product of four factors that were rounded themselves.
        length = float(_lengths(matrix).norm()) * _OUTWARD
        off = mul_up(self.gamma(16 + 2 * matrix.shape[1]), length)
        lost = self.lost * matrix.numel() * 1e6  # each factor may be as small as that
        for tensor in (scale, *weights):
            lost *= 1.0 + float(tensor.max())
        found = (found + off + lost * (1.0 + entry)) * _OUTWARD * math.sqrt(total * _OUTWARD)
        return add_up(found, frobenius_up(error * scale))

    def add(
        self,
        reach: Tensor,
        whole: float,
        half: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
        rest: Tensor | None = None,
    ) -> None:
        """Open a block of units with the bounds `reach` of each and `whole` of all together.

        `half` is what is not known of their slopes; it only guides. With the rows (n, units) that
        lead to them and what each entry may be off, their norm over a scale is bounded by that of
        a matrix, too. `rest` bounds what is not known of these rows.
        """
        if not bool(reach.isfinite().all()):
            raise OverflowError("a unit moves without a bound")
        top = max(float(reach.max()), _TINY) if len(reach) else 1.0
        reach = reach.clamp_min(_NEAR * top)  # so that scales have an inverse
        shares = reach / top
        part = torch.ones_like(reach) if half is None or not len(half) else half / half.max()
        options = [torch.ones_like(reach), (shares / part.clamp_min(_KNOWN)).sqrt(), shares]
        small = rows is not None and _products(rows[0]) < _SMALL
        scales = []
        for index, scale in enumerate(options if len(reach) else ()):
            found = frobenius_up(reach / scale) * _OUTWARD
            if index == 0:
                found = min(found, whole)
            if rows is not None and (index == _BEST or small):
                found = min(found, self.norm(rows[0], 1.0 / scale, rows[1]) * _OUTWARD)
            scales.append((scale, found))
        weights = torch.stack([scale.square() for scale, _ in scales]) if scales else shares[None]
        known = None
        if rows is not None and rest is not None and self._small(1, len(reach)):
            known = rows[0][: self.size], rest
        found = _Block(reach, scales, weights.to(self.dtype), shares.to(self.dtype), top, known)
        self.blocks.append(found)

    def _tiny(self, rows: int) -> float:
        """What underflow takes from the root of a sum of squares."""
        return (2.0**-60 if self.dtype == torch.float32 else 2.0**-500) * math.sqrt(rows + 1.0)


def _products(matrix: Tensor) -> int:
    """How many products a Gram matrix takes."""
    return matrix.numel() * min(matrix.shape)


def _lengths(matrix: Tensor) -> Tensor:
    """The l2 norm of each row, summed in the dtype of the matrix."""
    return torch.linalg.vector_norm(matrix, dim=1).double()
