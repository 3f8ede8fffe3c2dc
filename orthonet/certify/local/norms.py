r"""Spectral norms of the rows of a node: proved, in single precision too, or estimated.

In single precision the proof is that of [`spectral_norm_bound`][orthonet.linalg]: of
$\tau I - B^\top B = R R^\top + E$ with a computed Cholesky factor R. The errors of the products are
at most $\gamma_k |B|^\top |B|$ and $\gamma_k |R| |R|^\top$, entry by entry; the norms of these
non-negative matrices follow from Schur's test with one vector. They make the bound a few tenths of
a percent larger, and it takes a quarter of the time.
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
_FEW = 3  # of those for a test of what is small already
_KRYLOV = 16  # products with a Gram matrix for the estimate of its largest eigenvalue
_MARGIN = 1.01  # of what it finds
_PIECE = 2048  # products that are summed in single precision
_LARGE = 512  # the side from which on it pays to sort columns
_BLOCKS = 8  # into which the columns of a symmetric product are cut
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
        matrix = matrix.index_select(1, place.argsort())
    found = _by_factorization(matrix / scale)
    return frobenius_up(matrix.double()) if found is None else mul_up(found, scale)


def _by_factorization(matrix: Tensor) -> float | None:
    """The bound in single precision, for entries of modulus below 2; None if it fails."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mT.contiguous()
    rows, size = matrix.shape
    if (rows + size) * _SINGLE > 0.01:
        return None
    single = torch.zeros(size, size)
    for first, last in _blocks(size):
        used = (matrix[:, first:last] != 0).any(1).nonzero()[:, 0]
        mine = matrix if len(used) > 0.9 * rows else matrix.index_select(0, used)
        block = torch.zeros(last - first, last, dtype=torch.float64)
        for part in mine.split(_PIECE):
            block += part[:, first:last].mT @ part[:, :last]
        single[first:last, :last] = block
        single[:first, first:last] = single[first:last, :first].mT
        square = single[first:last, first:last]
        square.copy_(square.tril() + square.tril(-1).mT)
    lost = 2.0**-100 * rows * size  # more than products below 2^-126 take from the sums here
    pieces = -(-rows // _PIECE)
    share = _gamma(_PIECE + 4) + gamma(pieces + 4)
    moduli = matrix.abs()
    slack = 1.0 + 4.0 * _gamma(rows + size + 8)
    missing = share * slack * _largest(lambda v: moduli.mT @ (moduli @ v), size) + lost
    estimate = _top(single)
    for shift in _SHIFTS:
        tau = float(torch.tensor(estimate * (1.0 + shift)).float())
        shifted = -single
        shifted.diagonal().add_(tau)
        factor, info = torch.linalg.cholesky_ex(shifted)
        factor = factor.tril()
        if int(info) != 0:
            continue
        # tau - g was rounded once; what is left is compared in float64.
        moved = 2.0 * _SINGLE * (tau + float(single.diagonal().abs().max()))
        residual = 0.0
        for first, last in _blocks(size):
            used = (factor[first:last, :last] != 0).any(0).nonzero()[:, 0]
            begin = int(used[0]) if len(used) else last  # what is left of it is zero
            product = factor[first:last, begin:last] @ factor[:last, begin:last].mT
            rest = (shifted[first:last, :last].double() - product).square()
            residual += float(rest.sum() + rest[:, :first].sum()) * _OUTWARD
        moduli = factor.abs()
        reach = _largest(lambda v, m=moduli: m @ (m.mT @ v), size)
        rounded = _gamma(size + 4) * slack * reach + lost
        found = _OUTWARD * (tau + math.sqrt(residual) + rounded + missing + moved)
        return sqrt_up(found) if math.isfinite(found) else None
    return None


def _blocks(size: int) -> list[tuple[int, int]]:
    """Blocks of rows, of which only what is left of the diagonal is computed."""
    step = max(1, -(-size // _BLOCKS))
    return [(first, min(size, first + step)) for first in range(0, size, step)]


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
