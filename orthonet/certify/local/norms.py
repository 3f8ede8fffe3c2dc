r"""Spectral norms of the rows of a node: proved, in single precision too, or estimated.

In single precision the proof is that of [`spectral_norm_bound`][orthonet.linalg]: of
$\tau I - B^\top B = R R^\top + E$ with a computed Cholesky factor R. The errors of the products are
at most $\gamma_k |B|^\top |B|$ and $\gamma_k |R| |R|^\top$, entry by entry; the norms of these
non-negative matrices follow from Schur's test with one vector. They make the bound a few tenths of
a percent larger, and it takes a quarter of the time. Columns are ordered so that those with rows in
common are near each other: R is zero outside of that band, and is computed and compared tile by
tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from orthonet.certify.mlp.chain import frobenius_up
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import (
    UNIT_ROUNDOFF,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    up,
)

__all__ = ["SIDE", "estimated_norm", "proved_norm", "unit_of"]

SIDE = 3072  # of Gram matrices that are proved
_STEPS = 10  # of the iteration for the vectors of Schur's test
_FEW = 1  # of those for a test of what is small already
_KRYLOV = 20  # products with a Gram matrix for the estimate of its largest eigenvalue
_MARGIN = 1.01  # of what it finds
_PIECE = 2048  # products that are summed in single precision
_LARGE = 512  # the side from which on it pays to sort columns
_TILE = 192  # columns that are factored at once
_SHIFTS = (3e-3, 1e-2, 5e-2, 0.3)  # of the estimate, until a factorization succeeds
_SINGLE = 2.0**-24
_OUTWARD = 1.0 + 2.0**-40  # covers the float64 roundings of the bookkeeping


def unit_of(dtype: torch.dtype) -> float:
    """The unit roundoff of rows in float32 or float64."""
    return _SINGLE if dtype == torch.float32 else UNIT_ROUNDOFF


def proved_norm(matrix: Tensor, place: Tensor | None = None) -> float:
    """A bound of the spectral norm of a matrix of these floats, in float32 or float64.

    Args:
        matrix: (rows, columns).
        place: A number for each column: if near ones have near numbers, products of what is zero
            are left out.
    """
    if not matrix.numel():
        return 0.0
    scale = power_of_two_scale(matrix)
    if not math.isfinite(scale) or bool(matrix.isnan().any()):
        raise OverflowError("a row is not finite")
    if min(matrix.shape) > SIDE:
        return _schur(matrix.double())
    if matrix.dtype == torch.float64:
        return spectral_norm_bound(matrix)
    if not scale:
        return 0.0
    if not 2.0**-100 < scale < 2.0**100:  # where division by it is exact
        return spectral_norm_bound(matrix)
    if place is not None and len(matrix) >= matrix.shape[1] >= _LARGE:
        found = _by_factorization(matrix.index_select(1, place.argsort()).div_(scale))
    else:
        found = _by_factorization(matrix / scale)
    return frobenius_up(matrix.double()) if found is None else mul_up(found, scale)


def _by_factorization(matrix: Tensor) -> float | None:
    """The bound in single precision, for entries of modulus below 2; None if it fails.

    Overwrites the matrix.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mT.contiguous()
    rows, size = matrix.shape
    if (rows + size) * _SINGLE > 0.01:
        return None
    tiles = _tiles(size)
    matrix, seen = _sorted(matrix, tiles)
    # Where two tiles see no row in common, their products are zero, and so is the factor.
    near = ((seen.mT.float() @ seen.float()) > 0).fill_diagonal_(True)
    begins = [tiles[int(row.nonzero()[0])][0] for row in near]
    gram = _gram(matrix, seen, tiles, begins)
    lost = 2.0**-100 * rows * size  # more than products below 2^-126 take from the sums here
    pieces = -(-rows // _PIECE)
    share = _gamma(_PIECE + 4) + gamma(pieces + 4)
    moduli = matrix.abs_()
    slack = 1.0 + 4.0 * _gamma(rows + size + 8)
    missing = share * slack * _largest(lambda v: moduli.mT @ (moduli @ v), size) + lost
    estimate = _top(gram)
    for shift in _SHIFTS:
        tau = float(torch.tensor(estimate * (1.0 + shift)).float())
        found = _factor(gram, tau, tiles, begins)
        if found is None:
            continue
        factor, residual = found
        # tau - g was rounded once, and the differences of the residual in float64.
        moved = 2.0 * _SINGLE * (tau + float(gram.diagonal().abs().max()))
        moduli = factor.abs_()
        reach = _largest(lambda v, m=moduli: m @ (m.mT @ v), size)
        rounded = _gamma(size + _TILE + 8) * slack * reach + lost
        total = _OUTWARD * (tau + residual + rounded + missing + moved)
        return sqrt_up(total) if math.isfinite(total) else None
    return None


def _tiles(size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of columns."""
    return [(first, min(size, first + _TILE)) for first in range(0, size, _TILE)]


def _sorted(matrix: Tensor, tiles: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Bring rows that reach near tiles together; and which row reaches which tile."""
    seen = torch.stack([(matrix[:, first:last] != 0).any(1) for first, last in tiles], 1)
    if bool(seen.all()):
        return matrix, seen
    weight = seen.float()
    order = (weight @ torch.arange(len(tiles)).float() / weight.sum(1).clamp_min(1.0)).argsort()
    return matrix.index_select(0, order), seen[order]


def _gram(matrix: Tensor, seen: Tensor, tiles: list[tuple[int, int]], begins: list[int]) -> Tensor:
    """The products of all columns, symmetric."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1])
    for i, (first, last) in enumerate(tiles):
        used = seen[:, i].nonzero()[:, 0]
        if not len(used):
            continue
        begin = begins[i]
        mine = matrix[int(used[0]) : int(used[-1]) + 1, begin:last]
        block = torch.zeros(last - first, last - begin, dtype=torch.float64)
        for part in mine.split(_PIECE):
            block += part[:, first - begin :].mT @ part
        gram[first:last, begin:last] = block
        square = gram[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).mT)
        gram[begin:first, first:last] = gram[first:last, begin:first].mT
    return gram


def _factor(
    gram: Tensor, tau: float, tiles: list[tuple[int, int]], begins: list[int]
) -> tuple[Tensor, float] | None:
    """The factor R of tau - G, and the Frobenius norm of tau - G - R R^T as computed.

    Nothing but products of R is trusted: any R is a proof. None where tau is too small.
    """
    factor, total = torch.zeros_like(gram), 0.0
    for (first, last), begin in zip(tiles, begins, strict=True):
        end = max(t[1] for t, b in zip(tiles, begins, strict=True) if b < last)
        before = factor[first:end, begin:first] @ factor[first:last, begin:first].mT
        wanted = -gram[first:end, first:last]
        wanted.diagonal().add_(tau)
        rest = wanted - before
        top = last - first
        square, info = torch.linalg.cholesky_ex(rest[:top])
        if int(info) != 0:
            return None
        square = square.tril()
        below = torch.linalg.solve_triangular(square.mT, rest[top:], upper=True, left=False)
        mine = factor[first:end, first:last]
        mine[:top], mine[top:] = square, below
        left = (wanted.double() - before - mine @ square.mT).square()
        total += float(left[:top].sum() + 2.0 * left[top:].sum()) * _OUTWARD
    return (factor, math.sqrt(total) * _OUTWARD) if math.isfinite(total) else None


def _largest(apply: Callable[[Tensor], Tensor], size: int) -> float:
    r"""The norm of a symmetric non-negative matrix is at most \(\max_i (M v)_i / v_i\), v > 0.

    The sums in `apply` are rounded: the caller adds what they may be off.
    """
    vector = torch.ones(size)
    for _ in range(_FEW):
        image = apply(vector)
        vector = image / image.max().clamp_min(1e-30) + 1e-3
    return float((apply(vector).double() / vector.double()).max()) * _OUTWARD


def _top(gram: Tensor) -> float:
    """An estimate of the largest eigenvalue by Lanczos' method: nothing is proved."""
    noise = torch.randn(len(gram), generator=torch.Generator().manual_seed(0))
    vector = gram.diagonal() + 0.1 * gram.diagonal().max() * noise
    basis = [vector / vector.norm()]
    small = torch.zeros(_KRYLOV, _KRYLOV)
    for step in range(_KRYLOV):
        image = gram @ basis[-1]
        before = torch.stack(basis)
        for _ in range(2):
            parts = before @ image
            small[step, : step + 1] += parts
            image = image - parts @ before
        length = float(image.norm())
        if step + 1 == _KRYLOV or length < 1e-6 * float(small[0, 0]):
            break
        basis.append(image / length)
    size = len(basis)
    return float(torch.linalg.eigvalsh(small[:size, :size])[-1])


def _gamma(count: int) -> float:
    """The error of so many roundings in single precision, relative to the moduli."""
    return count * _SINGLE / (1.0 - count * _SINGLE) * _OUTWARD


def _schur(matrix: Tensor) -> float:
    r"""A bound by Schur's test, for matrices that are too large to be factored.

    $\|A\|_2^2 \le \max_i (|A| q)_i / p_i \cdot \max_j (|A|^\top p)_j / q_j$ for positive p, q.
    """
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


def estimated_norm(matrix: Tensor, steps: int = 8) -> float:
    """About the spectral norm, for a search: nothing is proved."""
    if not matrix.numel():
        return 0.0
    matrix = matrix.float()
    noise = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    start = matrix.mT @ matrix.sum(1) + 1e-3 * noise
    size = torch.zeros(())
    for _ in range(steps):
        start = start / start.norm().clamp_min(1e-30)
        image = matrix @ start
        size = image.norm()
        start = matrix.mT @ image
    return _MARGIN * float(size)
