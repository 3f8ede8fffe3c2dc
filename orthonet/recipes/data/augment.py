"""Random changes of images, reproducible from a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_affine", "random_crop", "random_noise"]


def random_affine(
    x: Tensor,
    generator: torch.Generator,
    *,
    shift: float,
    rotation: float,
    zoom: float,
    shear: float,
) -> Tensor:
    r"""Move, turn, stretch and shear every image by its own random amount, with bilinear sampling.

    Args:
        x: Images.
        generator: Source of the randomness, on the CPU.
        shift: Largest translation in pixels, in each direction.
        rotation: Largest angle in degrees.
        zoom: Largest relative change of the width, and of the height.
        shear: Largest horizontal shear.

    Shape:
        `x`: (batch, channels, height, width). Output: the same; outside is 0.
    """
    if shift == rotation == zoom == shear == 0:
        return x
    draw = (torch.rand(6, x.shape[0], generator=generator) * 2 - 1).to(x)
    angle, slope = draw[0] * math.radians(rotation), draw[1] * shear
    wide, high = 1 + draw[2] * zoom, 1 + draw[3] * zoom
    right, down = draw[4] * shift * 2 / x.shape[-1], draw[5] * shift * 2 / x.shape[-2]
    cos, sin = angle.cos(), angle.sin()
    rows = [wide * cos, wide * (slope - sin), right, high * sin, high * cos, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_crop(x: Tensor, generator: torch.Generator, *, crop: int, flip: bool) -> Tensor:
    """Cut every image at a random place out of its own with zeros around, and mirror half of them.

    Args:
        x: Images.
        generator: Source of the randomness, on the CPU.
        crop: Zeros at each side.
        flip: Whether to mirror.

    Shape:
        `x`: (batch, channels, height, width). Output: the same.
    """
    number, _, height, width = x.shape
    if crop:
        place = torch.randint(2 * crop + 1, (2, number, 1), generator=generator).to(x.device)
        rows = place[0] + torch.arange(height, device=x.device)
        columns = place[1] + torch.arange(width, device=x.device)
        padded = F.pad(x, (crop,) * 4)
        index = torch.arange(number, device=x.device)[:, None, None]
        x = padded[index, :, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    if flip:
        chosen = (torch.rand(number, generator=generator) < 0.5).to(x.device)
        x = torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)
    return x


def random_noise(x: Tensor, generator: torch.Generator, *, deviation: float) -> Tensor:
    """Add Gaussian noise to every pixel and keep it in [0, 1]; without a deviation do nothing.

    Args:
        x: Images.
        generator: Source of the randomness, on the CPU.
        deviation: Standard deviation.

    Shape:
        `x`: (batch, channels, height, width). Output: the same.
    """
    if not deviation:
        return x
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (x + deviation * noise).clamp(0.0, 1.0)
