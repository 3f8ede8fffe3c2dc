r"""Correlation matrices: positive semidefinite, with a diagonal of ones (the elliptope)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthonet.linalg.matrix import high
from orthonet.linalg.packing import pack_triangle, unpack_triangle
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._curved.sphere import unit
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._semidefinite import PSSD
from orthonet.manifolds.maps import MappedParametrization

__all__ = ["Correlation"]


@dataclass(frozen=True)
class Correlation(Manifold):
    """Positive semidefinite matrices with ones on the diagonal.

    Samples are Gram matrices of n uniform unit vectors of length n.

    Examples:
        >>> x = Correlation().sample((4, 4))
        >>> x.diagonal().allclose(torch.ones(4))
        True
    """

    square = True

    def dimension(self, shape: Sequence[int]) -> int:
        """Return n (n - 1) / 2."""
        return shape[-1] * (shape[-1] - 1) // 2

    def _violations(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from PSSD()._violations(x)
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        yield "the diagonal must be 1", (diagonal - 1.0).abs()

    def project(self, x: Tensor) -> Tensor:
        """Set negative eigenvalues to 0, then scale the diagonal to 1: near, not nearest.

        The nearest one is a minimization over this space; see the example in the guide.
        """
        x = PSSD().project(x)
        scale = x.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        zero = scale == 0
        safe = torch.where(zero, torch.ones_like(scale), scale)
        x = x / safe[..., :, None] / safe[..., None, :]
        off = x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
        return off + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the symmetric part with zeros on the diagonal (in the interior)."""
        s = 0.5 * (v + v.mT)
        return s - torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))

    def _draw(self, shape: tuple[int, ...], made: dict[str, Any]) -> Tensor:
        y = unit(torch.randn(shape, **made))
        return self.project(y @ y.mT)

    def parametrization(self, shape: Sequence[int]) -> Parametrization:
        r"""Return \(L L^\top\) with L lower triangular and rows of norm 1; some are singular.

        The n (n + 1) / 2 coordinates are the triangle before the rows are normalized.
        """
        n = self.check_shape(shape)[-1]
        function, inverse = _FromTriangle(n), _to_triangle
        return MappedParametrization(self, shape, function, inverse, n * (n + 1) // 2)


@dataclass(frozen=True)
class _FromTriangle:
    n: int

    def __call__(self, packed: Tensor) -> Tensor:
        lower = unit(unpack_triangle(packed, self.n)) if self.n else unpack_triangle(packed, 0)
        x = lower @ lower.mT
        return x - torch.diag_embed((x.diagonal(dim1=-2, dim2=-1) - 1.0).detach())


def _to_triangle(x: Tensor) -> Tensor:
    values, v = torch.linalg.eigh(high(0.5 * (x + x.mT)))
    root = v * values.clamp_min(0.0).sqrt()[..., None, :]
    r = torch.linalg.qr(root.mT).R  # x = R^T R
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return pack_triangle((r * signs[..., :, None]).mT.contiguous()).to(x.dtype)
