r"""Block-diagonal rotations: the maximal torus of SO(n) and the initializations that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks

__all__ = ["Distribution", "block_rotation", "rotation_angles"]

Distribution = Literal["haar", "uniform", "torus", "henaff", "cayley", "identity"]
_INTERVALS = {
    "torus": (-math.pi, math.pi),
    "henaff": (-math.pi, math.pi),
    "cayley": (0.0, math.pi / 2),
    "identity": (0.0, 0.0),
}


def rotation_angles(
    owner: object,
    shape: Sequence[int],
    distribution: str,
    init_: Callable[[Tensor], object] | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Angles of the given distribution, or as `init_` fills them."""
    _checks.one_of(owner, ("haar", "uniform", *_INTERVALS), distribution=distribution)
    angles = torch.empty(tuple(shape), dtype=dtype, device=device)
    if init_ is not None:
        with torch.no_grad():
            init_(angles)
        return angles
    return angles.uniform_(*_INTERVALS[distribution], generator=generator)


def block_rotation(angles: Tensor, n: int) -> Tensor:
    """Rotations of the planes (0, 1), (2, 3), ... by `angles` (*batch, n // 2), as n x n."""
    ones = angles.new_ones(*angles.shape[:-1], n - 2 * angles.shape[-1])
    diagonal = torch.cat([angles.cos().repeat_interleave(2, -1), ones], -1)
    x = torch.diag_embed(diagonal)
    if n > 1:
        sine = torch.stack([angles.sin(), torch.zeros_like(angles)], -1).flatten(-2)[..., : n - 1]
        sine = F.pad(sine, (0, n - 1 - sine.shape[-1]))
        x = x + torch.diag_embed(sine, offset=-1) - torch.diag_embed(sine, offset=1)
    return x
