r"""Rotations by coordinates: the maximal torus of SO(n), and maps around the identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks
from orthonet.linalg import cayley, polar
from orthonet.linalg.logarithm import rotation_logarithm
from orthonet.linalg.packing import pack_skew, unpack_skew
from orthonet.linalg.rotation import polished, skew_exponential

__all__ = ["AroundIdentity", "Distribution", "block_rotation", "rotation_angles"]

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
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return angles of the given distribution, or as `init_` fills them."""
    _checks.one_of(owner, ("haar", "uniform", *_INTERVALS), distribution=distribution)
    angles = torch.empty(tuple(shape), dtype=dtype, device=device)
    if init_ is not None:
        with torch.no_grad():
            init_(angles)
        return angles
    return angles.uniform_(*_INTERVALS[distribution], generator=generator)


def block_rotation(angles: Tensor, n: int) -> Tensor:
    """Return rotations of the planes (0, 1), (2, 3), ... by `angles` (*batch, n // 2), as n x n."""
    ones = angles.new_ones(*angles.shape[:-1], n - 2 * angles.shape[-1])
    diagonal = torch.cat([angles.cos().repeat_interleave(2, -1), ones], -1)
    x = torch.diag_embed(diagonal)
    if n > 1:
        sine = torch.stack([angles.sin(), torch.zeros_like(angles)], -1).flatten(-2)[..., : n - 1]
        sine = F.pad(sine, (0, n - 1 - sine.shape[-1]))
        x = x + torch.diag_embed(sine, offset=-1) - torch.diag_embed(sine, offset=1)
    return x


@dataclass(frozen=True)
class AroundIdentity:
    """The map from skew-symmetric matrices to rotations, without a base, and its inverse."""

    n: int
    triv: str | Callable[[Tensor], Tensor]

    def value(self, coordinates: Tensor) -> Tensor:
        """Return the rotation with these coordinates, the packed skew-symmetric matrix."""
        a = unpack_skew(coordinates, self.n)
        if callable(self.triv):
            return polished(self.triv(a))
        return polished(cayley(0.5 * a)) if self.triv == "cayley" else skew_exponential(a)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the shortest skew-symmetric matrix that is mapped to `x`, packed."""
        x = polar(x)
        if self.triv == "exponential":
            return pack_skew(rotation_logarithm(x))
        identity = torch.eye(self.n, dtype=x.dtype, device=x.device)
        least = torch.linalg.svdvals(identity + x).amin(-1) if self.n else x.new_ones(())
        _checks.require(
            self.triv == "cayley" and bool((least > torch.finfo(x.dtype).eps ** 0.5).all()),
            "orthogonal",
            "without a base, the Cayley map reaches no rotation by 180 degrees, and a map of your "
            "own has no known inverse",
            "Use triv='exponential', or leave use_trivialization at True",
            triv=self.triv,
        )
        return pack_skew(2.0 * torch.linalg.solve(identity + x, x - identity))
