"""Shapes whose signed distance is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SHAPES", "Shape", "polygon", "star", "torus"]


class Shape(NamedTuple):
    """A closed shape inside the box [-1, 1]^d; its signed distance is negative inside."""

    dimension: int
    distance: Callable[[Tensor], Tensor]


def star(points: Tensor) -> Tensor:
    """Signed distance (N,) of points (N, 2) to a star with five tips."""
    turn = math.pi / 2 + torch.arange(10, dtype=points.dtype) * (math.pi / 5)
    radius = torch.where(torch.arange(10) % 2 == 0, 0.8, 0.36).to(points.dtype)
    corners = torch.stack((radius * turn.cos(), radius * turn.sin()), 1)
    return polygon(points, corners)


def polygon(points: Tensor, corners: Tensor) -> Tensor:
    """Signed distance to a simple polygon, its corners (M, 2) in order.

    The distance is that to the nearest edge; a ray upward crosses the outline an odd number of
    times from inside.
    """
    start, end = corners, corners.roll(-1, 0)
    edge = end - start
    offset = points[:, None] - start
    share = ((offset * edge).sum(-1) / edge.square().sum(-1)).clamp(0.0, 1.0)
    away = torch.linalg.vector_norm(offset - share[..., None] * edge, dim=-1).amin(1)
    x = points[:, :1]
    spans = (start[:, 0] > x) != (end[:, 0] > x)
    slope = edge[:, 1] / torch.where(edge[:, 0] == 0, 1.0, edge[:, 0])
    above = start[:, 1] + (x - start[:, 0]) * slope > points[:, 1:]
    inside = (spans & above).sum(1) % 2 == 1
    return torch.where(inside, -away, away)


def torus(points: Tensor) -> Tensor:
    """Signed distance (N,) of points (N, 3) to a torus around the third axis."""
    ring = torch.linalg.vector_norm(points[:, :2], dim=1) - 0.55
    return torch.hypot(ring, points[:, 2]) - 0.25


SHAPES = {"star": Shape(2, star), "torus": Shape(3, torus)}
