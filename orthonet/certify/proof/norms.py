"""Which rule of the checker proves the norm of a linear map, and the gain that it will reach.

The rules are those of the file format (docs/guide/checking.md). What is computed here is a guess
in float64 with some room: the checker proves it or rejects the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.linalg.bounds.rounding import mul_up, sqrt_up

__all__ = [
    "LARGEST",
    "Witness",
    "blocks_witness",
    "convolution_witness",
    "joint_witness",
    "matrix_witness",
    "square_gain",
]

_ROOM = 1.0 + 2.0**-26
"""Of a squared gain: for sums in another order, and what the checker rounds outward."""
_ABOVE = 1.0 + 2.0**-30
"""How far t lies above the largest eigenvalue, so that a Cholesky factor exists."""
_NEAR = 4e-6
"""A squared norm is taken from row sums if that is at most so much above a row of the matrix."""
_LEAST = 2.0**-380
LARGEST = 2**23
"""Entries of the largest matrix that the checker takes."""


class Witness(NamedTuple):
    """A rule, the gain that it proves, and the number t that `cholesky` and `torus` need."""

    rule: str
    gain: float
    t: float | None = None


def square_gain(square: float) -> float:
    """A gain with room above the root of a square."""
    return sqrt_up(mul_up(max(square, _LEAST), _ROOM))


def matrix_witness(weight: Tensor) -> Witness:
    """The witness of an affine map, from its matrix in float64."""
    a = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    product = a @ a.mT
    rows = float(product.abs().sum(1).max())
    if rows <= (1.0 + _NEAR) * float(product.diagonal().max()):
        return Witness("gram", square_gain(rows))
    t = float(torch.linalg.eigvalsh(product)[-1]) * _ABOVE
    return Witness("cholesky", square_gain(t), t)


def joint_witness(matrix: Tensor, error: float) -> tuple[float, float]:
    """(gain, t) of a matrix that the checker computes again, with errors up to about `error`."""
    a = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    t = max(float(torch.linalg.eigvalsh(a @ a.mT)[-1]), _LEAST) * _ABOVE
    return square_gain(t) + 16.0 * error, t


def blocks_witness(blocks: Tensor) -> Witness:
    """The witness of complex matrices (..., m, n), one for each frequency."""
    blocks = blocks if blocks.shape[-2] <= blocks.shape[-1] else blocks.mT
    t = max(float(torch.linalg.eigvalsh(blocks @ blocks.mH)[..., -1].max()), _LEAST) * _ABOVE
    return Witness("cholesky", square_gain(t), t)


def convolution_witness(
    weight: Tensor,  # (out, in / groups, *kernel), float64
    image: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    circular: bool,
) -> Witness:
    """The witness of a convolution: row sums near an isometry, otherwise the torus."""
    kernel = _polyphase(_spread(weight, dilation).unflatten(0, (groups, -1)), stride)
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)
    c, taps = kernel.shape[1], kernel.shape[3:]
    circle = [
        n // s if circular else max(-(-(n + max(p)) // s), (n + sum(p) - d * (k - 1) - 1) // s + 1)
        for n, s, p, d, k in zip(image, stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    frequencies = math.prod(circle) * 12  # in matrix products of side c, half of them complex
    lags = math.prod(2 * k - 1 for k in taps)
    if lags**2 <= frequencies or c <= 64:
        grid = [4 * (k - 1) + 1 for k in taps]
        symbol = _fourier(kernel, grid)
        product = symbol @ symbol.mH
        first = _kernel(product, grid)  # (grid, groups, c, c)
        size = float(first[0].diagonal(dim1=-2, dim2=-1).max())
        rows = float(first.abs().sum((0, -1)).max())
        if rows <= (1.0 + _NEAR / 4) * size:
            return Witness("gram", square_gain(rows))
        second = product - size * torch.eye(c, dtype=product.dtype)
        square = float(_kernel(second @ second, grid).abs().sum((0, -1)).max())
        found = size + math.sqrt(square * (1.0 + 1e-9))
        if found <= (1.0 + 4 * _NEAR) * size:
            return Witness("gram2", square_gain(found))
    symbol = _fourier(kernel, circle)
    t = max(float(torch.linalg.eigvalsh(symbol @ symbol.mH)[..., -1].max()), _LEAST) * _ABOVE
    return Witness("torus", square_gain(t), t)


def _spread(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel with zeros between its taps."""
    sizes = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    wide = weight.new_zeros(*weight.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = weight
    return wide


def _polyphase(kernel: Tensor, stride: Sequence[int]) -> Tensor:
    """Strides as channels of the input, whose pixels are sorted by their residues."""
    for axis, s in enumerate(stride, 3):
        size = kernel.shape[axis]
        padded = kernel.new_zeros(*kernel.shape[:axis], size + -size % s, *kernel.shape[axis + 1 :])
        padded.narrow(axis, 0, size).copy_(kernel)
        kernel = padded.unflatten(axis, (-1, s)).movedim(axis + 1, 3).flatten(2, 3)
    return kernel


def _fourier(kernel: Tensor, grid: Sequence[int]) -> Tensor:
    """The symbol at all frequencies of a grid that may be smaller than the kernel."""
    for axis, size in enumerate(grid, 3):
        taps = torch.arange(kernel.shape[axis])
        frequency = torch.arange(size)[:, None] * taps % size
        wave = torch.polar(torch.ones(()).double(), -2.0 * math.pi / size * frequency.double())
        kernel = (kernel.to(wave.dtype).movedim(axis, -1) @ wave.mT).movedim(-1, axis)
    return kernel.flatten(3).movedim(-1, 0)  # (frequencies, groups, c, inner)


def _kernel(symbol: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse transform, real, the lags first."""
    dims = tuple(range(len(grid)))
    found = torch.fft.ifftn(symbol.unflatten(0, tuple(grid)), dim=dims)
    return found.real.flatten(0, len(grid) - 1)
