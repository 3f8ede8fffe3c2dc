r"""Log-volumes of the trivializations of frames, in the canonical metric."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from orthonet.linalg.matrix import add_identity
from orthonet.linalg.packing import pack_skew

__all__ = ["frame_log_volume", "gaps"]


class Frames(Protocol):
    """What the volume depends on: a `FrameTrivialization` has it."""

    triv: Any
    rotate: bool
    transposed: bool

    @property
    def _sizes(self) -> tuple[int, int]: ...

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch."""
        ...

    def split(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks A and C."""
        ...

    def _point(self, coordinates: Tensor) -> Tensor: ...


def gaps(values: Tensor) -> Tensor:
    r"""Return \(\sum_{i<j} \log|v_i - v_j|\)."""
    i, j = torch.triu_indices(values.shape[-1], values.shape[-1], 1, device=values.device)
    return (values[..., i] - values[..., j]).abs().log().sum(-1)


def frame_log_volume(p: Frames, coordinates: Tensor) -> Tensor:
    r"""Return the log-volume of the map from coordinates to frames, canonical metric.

    Square, exponential: \(\sum_{a<b} \log|\operatorname{sinc}((\theta_a + \theta_b)/2)|\) over the
    eigenvalues \(i\theta\) of A. Square, Cayley: \((n - 1) \log|\det (I - A/2)^{-1}|\). Otherwise
    by automatic differentiation.
    """
    n, k = p._sizes
    if n == k and p.rotate and p.triv == "cayley":
        a, _ = p.split(coordinates)
        return -(n - 1) * torch.linalg.slogdet(add_identity(a * -0.5, 1.0)).logabsdet
    if n == k and p.rotate and p.triv == "exponential":
        a, _ = p.split(coordinates)
        theta = torch.linalg.eigvalsh(torch.complex(torch.zeros_like(a), a))
        i, j = torch.triu_indices(n, n, 1, device=a.device)
        return torch.sinc((theta[..., i] + theta[..., j]) / (2.0 * torch.pi)).abs().log().sum(-1)
    return _by_differentiation(p, coordinates)


def _by_differentiation(p: Frames, coordinates: Tensor) -> Tensor:
    batch, d = p.batch_shape, coordinates.shape[-1]
    columns = []
    for i in range(d):
        unit = torch.zeros_like(coordinates)
        unit[..., i] = 1.0
        columns.append(
            torch.autograd.functional.jvp(
                p._point, coordinates, unit, create_graph=coordinates.requires_grad
            )[1]
        )
    q = p._point(coordinates)
    moves = torch.stack(columns) if columns else q.new_zeros(0, *q.shape)
    q, moves = (q.mT, moves.mT) if p.transposed else (q, moves)
    inner = q.mT @ moves
    rows = (moves - q @ inner).flatten(-2)
    if p.rotate:  # otherwise the point is a subspace, which a rotation of the frame leaves
        rows = torch.cat([pack_skew(0.5 * (inner - inner.mT)), rows], -1)  # (d, *batch, rows)
    j = rows.movedim(0, -1)
    return 0.5 * torch.linalg.slogdet(j.mT @ j).logabsdet.reshape(batch)
