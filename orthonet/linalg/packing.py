r"""Triangles packed into rectangles: n (n + 1) / 2 entries, moved by a few block copies.

The rectangular full packed format: the second diagonal block of a lower triangle, transposed,
fills the corner that the first one leaves empty. No index tensor is needed, so that packing
traces, compiles and maps over batches like any arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet._torch import is_traced
from orthonet.linalg.matrix import add_identity

__all__ = [
    "identity_minus_half_skew",
    "pack_difference",
    "pack_skew",
    "pack_symmetric",
    "pack_triangle",
    "unpack_real_skew",
    "unpack_skew",
    "unpack_symmetric",
    "unpack_triangle",
]


def _rectangle(n: int) -> tuple[int, int]:
    """Rows and columns of the rectangle that holds the lower triangle of an n x n matrix."""
    return (n, (n + 1) // 2) if n % 2 else (n + 1, n // 2)


def pack_triangle(a: Tensor) -> Tensor:
    """Lower triangle of (*batch, n, n), diagonal included, as (*batch, n (n + 1) / 2)."""
    n = a.shape[-1]
    if n < 2:
        return a.flatten(-2)
    rows, columns = _rectangle(n)
    shift = rows - n  # the triangle starts one row lower where n is even
    corner = a[..., columns:, columns:].mT.triu()
    below = F.pad(a[..., :, :columns].tril(), (0, 0, shift, 0))
    right = 1 - shift
    corner = F.pad(corner, (right, 0, 0, rows - corner.shape[-2]))
    return (below + corner).flatten(-2)


def unpack_triangle(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_triangle`: zeros above the diagonal."""
    if n < 2:
        return packed.reshape(*packed.shape[:-1], n, n)
    rows, columns = _rectangle(n)
    shift = rows - n
    rectangle = packed.unflatten(-1, (rows, columns))
    left = rectangle[..., shift:, :].tril()
    size = n - columns
    corner = rectangle[..., :size, 1 - shift :].triu().mT
    right = F.pad(corner, (0, 0, columns, 0))
    return torch.cat([left, right], -1)


def pack_skew(a: Tensor) -> Tensor:
    """Coordinates of skew-symmetric (complex: skew-Hermitian) matrices, their lower triangle.

    Real ones have n (n - 1) / 2, the strict triangle; complex ones n (n + 1) / 2, of which those of
    the diagonal count with their imaginary part only.
    """
    if a.is_complex():
        return pack_triangle(a)
    return pack_triangle(a[..., 1:, :-1])


def unpack_skew(packed: Tensor, n: int) -> Tensor:
    """Skew-symmetric (skew-Hermitian) matrices from the coordinates of `pack_skew`."""
    if packed.is_complex():
        lower = unpack_triangle(packed, n)
        strict, diagonal = lower.tril(-1), lower.diagonal(dim1=-2, dim2=-1)
        imaginary = torch.complex(torch.zeros_like(diagonal.real), diagonal.imag)
        return strict - strict.mH + torch.diag_embed(imaginary)
    if n < 2:  # zero, as the sum of no coordinate
        return packed.new_zeros(*packed.shape[:-1], n, n) + packed.sum(-1)[..., None, None]
    if packed.is_meta or is_traced(packed):
        lower = F.pad(unpack_triangle(packed, n - 1), (0, 1, 1, 0))
        return lower - lower.mT
    return _UnpackSkew.apply(packed, n)


_TABLES_TO = 256  # size of a matrix up to which a table of places is faster, and not large


@functools.lru_cache(maxsize=16)
def _places(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the entries of an n x n matrix come from and their signs, and where they go to.

    Indices into the coordinates and signs, one for each entry of the matrix; indices into its
    entries, those below the diagonal and those above, one for each coordinate.
    """
    with torch.inference_mode(False), torch.no_grad():
        count = n * (n - 1) // 2
        numbers = torch.arange(1.0, count + 1.0, dtype=torch.float64, device=device)
        signed = _unpack_by_blocks(numbers, n).flatten()
        source = (signed.abs().long() - 1).clamp_min(0)
        below = torch.empty(count, dtype=torch.long, device=device)
        (places,) = torch.nonzero(signed > 0, as_tuple=True)
        below[source[places]] = places
        above = below % n * n + below // n
        return source, signed.sign().float(), below, above


def unpack_real_skew(packed: Tensor, n: int) -> Tensor:
    """`unpack_skew` of real coordinates without a graph, n >= 2."""
    if n > _TABLES_TO or (packed.dtype != torch.float32 and packed.dtype != torch.float64):
        return _unpack_by_blocks(packed, n)
    source, sign, _, _ = _places(n, packed.device)
    a = packed.index_select(-1, source).mul_(sign)
    return a.view(*packed.shape[:-1], n, n)


def identity_minus_half_skew(packed: Tensor, n: int) -> Tensor:
    r"""\(I - A/2\) for the A of `unpack_real_skew`, without a graph, n >= 2."""
    if n > _TABLES_TO or (packed.dtype != torch.float32 and packed.dtype != torch.float64):
        return add_identity(_unpack_by_blocks(packed * -0.5, n), 1.0)
    source, _, _, _ = _places(n, packed.device)
    identity, half = _identity_and_half(n, packed.device, packed.dtype)
    entries = packed.index_select(-1, source).view(*packed.shape[:-1], n, n)
    return torch.addcmul(identity, entries, half)


@functools.lru_cache(maxsize=8)
def _identity_and_half(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The identity, and -1/2 times the signs of `_places`."""
    with torch.inference_mode(False), torch.no_grad():
        half = _places(n, device)[1].view(n, n).to(dtype) * -0.5
        return torch.eye(n, dtype=dtype, device=device), half


def pack_difference(g: Tensor) -> Tensor:
    """`pack_skew(g - g^T)` without a graph, the adjoint of `unpack_real_skew`."""
    n = g.shape[-1]
    if n > _TABLES_TO:
        return _pack_by_blocks(g)
    _, _, below, above = _places(n, g.device)
    flat = g.flatten(-2)
    return flat.index_select(-1, below).sub_(flat.index_select(-1, above))


def _unpack_by_blocks(packed: Tensor, n: int) -> Tensor:
    """`unpack_real_skew` in copies of blocks."""
    m = n - 1  # the strict triangle is a whole one of this size, a row below the first
    rows, columns = _rectangle(m)
    shift = rows - m
    rectangle = packed.unflatten(-1, (rows, columns))
    lower = packed.new_zeros(*packed.shape[:-1], n, n)
    triangle = lower[..., 1:, :-1]
    triangle[..., :, :columns] = rectangle[..., shift:, :].tril()
    corner = rectangle[..., : m - columns, 1 - shift :]
    triangle[..., columns:, columns:] = corner.triu().mT
    for rows, left in _blocks(n):
        for columns in left:
            torch.neg(lower[..., rows, columns].mT, out=lower[..., columns, rows])
        diagonal = lower[..., rows, rows]
        diagonal.sub_(diagonal.mT.clone())
    return lower


def _pack_by_blocks(g: Tensor) -> Tensor:
    """`pack_difference` in passes over blocks."""
    n = g.shape[-1]
    difference = torch.empty_like(g, memory_format=torch.contiguous_format)
    for rows, left in _blocks(n):
        for columns in (*left, rows):
            block, mirrored = g[..., rows, columns], g[..., columns, rows].mT
            torch.sub(block, mirrored, out=difference[..., rows, columns])
    return pack_skew(difference)  # which does not read what lies above the diagonal


# Side of the blocks in which a matrix is transposed: a quarter of the time of one pass at n = 1024,
# whose rows lie at one place of the processor's cache.
_BLOCK = 256


def _blocks(n: int) -> Iterator[tuple[slice, list[slice]]]:
    """The blocks of a lower triangle: rows, and the columns that lie left of the diagonal one."""
    slices = [slice(start, start + _BLOCK) for start in range(0, n, _BLOCK)]
    for i, rows in enumerate(slices):
        yield rows, slices[:i]


class _UnpackSkew(torch.autograd.Function):
    """`unpack_skew` of real coordinates with few passes over memory, forward and backward."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, n: int) -> Tensor:
        ctx.n = n
        return unpack_real_skew(packed, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        if torch.is_grad_enabled() or is_traced(g):
            return pack_skew(g - g.mT), None
        return pack_difference(g), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        packed, _ = tangents
        return unpack_skew(packed, ctx.n)


def pack_symmetric(a: Tensor) -> Tensor:
    """Lower triangle of symmetric matrices, n (n + 1) / 2 coordinates."""
    return pack_triangle(a)


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Symmetric (Hermitian) matrices with the given lower triangle."""
    lower = unpack_triangle(packed, n)
    if not packed.is_complex():
        return lower + lower.tril(-1).mT
    strict, diagonal = lower.tril(-1), lower.diagonal(dim1=-2, dim2=-1)
    return strict + strict.mH + torch.diag_embed(diagonal.real.to(packed.dtype))
