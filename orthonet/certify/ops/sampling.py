"""Samples of an image at the places of a constant grid."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify.norms import limits, matrix_norm
from orthonet.certify.ops.registry import op
from orthonet.certify.rules import BatchDependent, Call, Operand, Rounding, Step, upper
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, add_up, mul_up, sqrt_up
from orthonet.linalg.bounds.sizes import absolute_matrix

__all__ = ["sampling_matrix"]

_MODES, _PADDINGS = (0, "bilinear"), {0: "zeros", 1: "border"}


def sampling_matrix(grid: Tensor, size: tuple[int, int], *, border: bool, corners: bool) -> Tensor:
    r"""Return the matrix (places, pixels) of bilinear samples, in float64.

    A pixel at p counts with the product of the hats $\max(0, 1 - |c - p|)$ of both coordinates c,
    which are continuous in c: what rounding moves c by moves an entry by no more.

    Args:
        grid: (rows, columns, 2), the coordinates (x, y) of each place, -1 to 1.
        size: Height and width of the image.
        border: Places outside are moved to the border; else what lies outside is zero.
        corners: -1 and 1 are the centers of the outermost pixels instead of their edges.
    """
    hats = []
    for axis, count in ((1, size[0]), (0, size[1])):
        at = grid[..., axis].flatten().to(torch.float64)
        at = (at + 1.0) / 2.0 * (count - 1) if corners else ((at + 1.0) * count - 1.0) / 2.0
        at = at.clamp(0.0, count - 1.0) if border else at
        hats.append((1.0 - (at[:, None] - torch.arange(count)).abs()).clamp_min(0.0))
    return (hats[0][:, :, None] * hats[1][:, None, :]).flatten(1)


def _samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if len(shape) != 3:
        return None
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    grid = draw.choice([0.5, 1.5, 4.0]) * torch.randn(1, 3, 4, 2, generator=generator)
    mode, corners = draw.choice(["zeros", "border"]), draw.choice([True, False])
    return lambda x, y: F.grid_sample(
        x, grid.to(x.dtype).expand(x.shape[0], -1, -1, -1), "bilinear", mode, corners
    )


@op(
    "grid_sampler.default",
    "grid_sampler_2d.default",
    reads=("grid", "interpolation_mode", "padding_mode", "align_corners"),
    samples=_samples,
)
def _sample(call: Call) -> Step:
    """All channels have the same matrix, whose rows are averages."""
    grid = call["grid"]
    if isinstance(grid, (Operand, BatchDependent)) and not getattr(grid, "rows", False):
        call.refuse(
            "the grid must be a constant, and the same for every sample",
            "Store it in a buffer and pass grid.expand(x.shape[0], -1, -1, -1)",
        )
    places = call.fixed("grid")
    if places.ndim != 4 or len(places) != 1 or len(call.operand.shape) != 3:
        call.refuse(
            "samples must be of images, at one grid for all of them",
            "Pass x of (N, C, H, W) and grid.expand(x.shape[0], -1, -1, -1)",
        )
    if call["interpolation_mode"] not in _MODES or call["padding_mode"] not in _PADDINGS:
        call.refuse(
            "samples must be bilinear, padded with zeros or the border",
            "Use mode='bilinear' and padding_mode='zeros' or 'border': the nearest pixel jumps",
        )
    height, width = call.operand.shape[1:]
    border, corners = call["padding_mode"] == 1, call.flag("align_corners")
    matrix = sampling_matrix(places[0], (height, width), border=border, corners=corners)
    # A coordinate sees 8 roundings at most of numbers up to (|c| + 2) times the size; up to eight
    # pixels of a row move, each by no more than both coordinates do.
    far = float(places.abs().max()) + 2.0 if places.numel() else 2.0
    reach = far * (height + width) * 8.0
    spread = sqrt_up(8 * len(matrix))
    lost = mul_up(spread, reach, 2.0 * UNIT_ROUNDOFF)
    small = min(matrix.shape) <= limits().side and matrix.numel() <= limits().entries
    value = matrix_norm(matrix) if small else absolute_matrix(matrix)
    rounding = Rounding(16.0, math.fsum((1.0, value, spread * reach)))
    return upper(add_up(value, lost), "bilinear samples at a constant grid", rounding)
