r"""Matrices through their singular value decomposition, with no decomposition in forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthonet.linalg.matrix import high
from orthonet.manifolds._base import Manifold
from orthonet.manifolds._log_volume import frame_log_volume, gaps
from orthonet.manifolds._parametrization import Parametrization
from orthonet.manifolds._stiefel import Stiefel
from orthonet.manifolds.scalar import log_derivative
from orthonet.manifolds.trivialization import FrameTrivialization, Triv

__all__ = ["EigenParametrization", "SingularParametrization", "raised"]


def raised(values: Tensor, eps: float) -> Tensor:
    """Raise values at rounding level or below to a thousandth of the largest.

    An open set has no nearest point for what lies outside of it; this one is clearly inside.
    """
    largest = values.amax(-1, keepdim=True) if values.shape[-1] else values
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(values > 8.0 * eps * largest, values, 1e-3 * largest)


class _Factorized(Parametrization):
    """What the two factorizations share: coordinates of frames and of values, side by side.

    Args:
        space: The space.
        shape: (*batch, n, k).
        rank: Number of values that are not zero.
        values: The map from the last coordinates to the values.
        inverse: Its inverse.
        triv: See [`FrameTrivialization`][orthonet.manifolds.FrameTrivialization].
    """

    frames: tuple[str, ...]
    rank: int
    values: Callable[[Tensor], Tensor]
    values_inverse: Callable[[Tensor], Tensor]

    def __init__(
        self,
        space: Manifold,
        shape: Sequence[int],
        rank: int,
        values: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor],
        triv: Triv = "exponential",
    ) -> None:
        super().__init__(space, shape)
        self.rank, self.values, self.values_inverse = rank, values, inverse
        *batch, n, k = self.shape
        for name, side in zip(self.frames, (n, k), strict=False):
            self.add_module(name, FrameTrivialization(Stiefel(), (*batch, side, rank), triv))

    def _parts(self) -> list[FrameTrivialization]:
        return [getattr(self, name) for name in self.frames]

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """(*batch, d): those of the frames, then `rank` values."""
        sizes = [part.coordinate_shape[-1] for part in self._parts()]
        return (*self.batch_shape, sum(sizes) + self.rank)

    def split(self, coordinates: Tensor) -> list[Tensor]:
        """Return coordinates of each frame, then of the values."""
        sizes = [part.coordinate_shape[-1] for part in self._parts()]
        return list(coordinates.split([*sizes, self.rank], -1))

    @torch.no_grad()
    def update_base(self, coordinates: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Move the bases of the frames to the present point."""
        split = [self.split(tensor) for tensor in (coordinates, *vectors)]
        moved = [
            part.update_base(*columns)
            for part, *columns in zip(self._parts(), *(s[:-1] for s in split), strict=True)
        ]
        return [
            torch.cat([*(m[i] for m in moved), pieces[-1]], -1) for i, pieces in enumerate(split)
        ]


class SingularParametrization(_Factorized):
    r"""\(X = U \operatorname{diag}(\sigma) V^\top\) with trivialized frames U and V.

    Nothing is decomposed in forward, so repeated and zero singular values are ordinary points.
    Coordinates: as many as the dimension, if all singular values are free.
    """

    frames = ("left", "right")
    left: FrameTrivialization
    right: FrameTrivialization

    def singular_values(self, coordinates: Tensor) -> Tensor:
        """Return the singular values (of any sign where the space lets them be), not sorted."""
        return self.values(self.split(coordinates)[-1])

    def _point(self, coordinates: Tensor) -> Tensor:
        left, right, s = self.split(coordinates)
        return (self.left(left) * self.values(s)[..., None, :]) @ self.right(right).mT

    def _coordinates(self, x: Tensor) -> Tensor:
        u, sigma, vh = torch.linalg.svd(high(x), full_matrices=False)
        r = self.rank
        parts = [
            self.left._coordinates(u[..., :r].to(x.dtype)),
            self.right._coordinates(vh[..., :r, :].mT.to(x.dtype)),
        ]
        return torch.cat([*parts, self.values_inverse(sigma[..., :r]).to(x.dtype)], -1)

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        r"""Return the log-volume in closed form, from the singular values in the coordinates.

        \(\sum_{i<j} \log|\sigma_i^2 - \sigma_j^2| + (n + k - 2r) \sum_i \log|\sigma_i|
        + \sum_i \log|f'(s_i)|\) and the terms of the two frames. Minus infinity where singular
        values coincide.
        """
        left, right, s = self.split(coordinates)
        sigma = self.values(s)
        n, k = self.shape[-2:]
        result = gaps(sigma.square()) + self._log_slope(s)
        if n + k > 2 * self.rank:
            result = result + (n + k - 2 * self.rank) * sigma.abs().log().sum(-1)
        return result + frame_log_volume(self.left, left) + frame_log_volume(self.right, right)

    def _log_slope(self, s: Tensor) -> Tensor:
        return log_derivative(self.values, s).sum(-1)


class EigenParametrization(_Factorized):
    r"""\(X = Q \operatorname{diag}(\lambda) Q^\top\) with a trivialized frame Q."""

    frames = ("frame",)
    frame: FrameTrivialization

    def eigenvalues(self, coordinates: Tensor) -> Tensor:
        """Return the eigenvalues, not sorted."""
        return self.values(self.split(coordinates)[-1])

    def _point(self, coordinates: Tensor) -> Tensor:
        frame, s = self.split(coordinates)
        q = self.frame(frame)
        x = (q * self.values(s)[..., None, :]) @ q.mT
        return 0.5 * (x + x.mT)

    def _coordinates(self, x: Tensor) -> Tensor:
        values, q = torch.linalg.eigh(high(0.5 * (x + x.mT)))
        largest = slice(values.shape[-1] - self.rank, None)
        frame = self.frame._coordinates(q[..., largest].to(x.dtype))
        return torch.cat([frame, self.values_inverse(values[..., largest]).to(x.dtype)], -1)

    def log_abs_det(self, coordinates: Tensor) -> Tensor:
        r"""Return the log-volume in closed form, from the eigenvalues in the coordinates.

        \(\sum_{i<j} \log(\sqrt2\,|\lambda_i - \lambda_j|) + (n - r) \sum_i
        \log(\sqrt2\,|\lambda_i|) + \sum_i \log|f'(s_i)|\) and the term of the frame.
        """
        frame, s = self.split(coordinates)
        values = self.values(s)
        n, r = self.shape[-1], self.rank
        twice = 0.5 * torch.log(torch.tensor(2.0, dtype=s.dtype, device=s.device))
        result = gaps(values) + r * (r - 1) // 2 * twice + log_derivative(self.values, s).sum(-1)
        if n > r:
            result = result + (n - r) * (values.abs().log().sum(-1) + r * twice)
        return result + frame_log_volume(self.frame, frame)
