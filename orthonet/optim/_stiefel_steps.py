r"""Steps on the Stiefel manifold, for batches of tall matrices.

The tangent space at X is \(\{D : X^\top D + D^\top X = 0\}\), the projection onto it
\(P_X(V) = V - X\,\mathrm{sym}(X^\top V)\), and the retraction of a step D the polar factor of
\(X + D\), which for tangent D is the nearest orthogonal matrix and agrees with the geodesic up to
terms of third order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orthonet.linalg import polar, retraction
from orthonet.linalg.distributed import put_, whole
from orthonet.linalg.matrix import add_identity, batches, split, stacked

__all__ = [
    "Block",
    "blocks",
    "newton_schulz_sign",
    "residual",
    "retract",
    "symmetric_part",
    "tangent",
]

# The odd quintic of Muon: maps (0, 1] into about [0.7, 1.2] in five steps and keeps zeros.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def symmetric_part(s: Tensor) -> Tensor:
    """(S + S^T) / 2."""
    return (s + s.mT).mul_(0.5)


def tangent(x: Tensor, v: Tensor) -> Tensor:
    """P_X(V): two products of the size of X."""
    return v - x @ symmetric_part(x.mT @ v)


def retract(ys: list[Tensor]) -> list[Tensor]:
    r"""The polar factor of every matrix, by `orthonet.linalg.retraction`.

    For \(Y = X + D\) with tangent D, \(Y^\top Y - I = D^\top D\) is of second order: two products
    in all reach rounding for \(\|D\|_2 \le 0.036\), three up to 0.12, four up to 0.33; longer steps
    take further passes. What earlier steps have left is seen too, so nothing accumulates. On an
    accelerator the host reads once for all batches; on the CPU, where reading is free, each batch
    is finished while it is near.
    """
    if torch.compiler.is_compiling():
        return [polar(y) for y in ys]
    parts = [[y] for y in ys] if all(y.is_cpu for y in ys) else [ys]
    found = [
        moved
        for part in parts
        for moved in retraction.retract(
            [(y, retraction.POLAR) for y in part], squares=[False] * len(part), unit=True
        )
    ]
    # Zero matrices have no direction to go, and what is not finite is refused.
    return [m.point if all(m.good) else polar(m.point) for m in found]


def residual(x: Tensor) -> Tensor:
    r"""\(\|X^\top X - I\|_F\) of each tall matrix, computed in float64.

    It bounds \(\max|\sigma - 1|\), since \(|\sigma - 1| \le |\sigma^2 - 1|\).
    """
    x = x.double()
    return torch.linalg.matrix_norm(add_identity(x.mT @ x, -1.0))


def newton_schulz_sign(d: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """D with its singular values brought near 1, zeros staying zero; three products a step.

    The products are of `dtype`. A pass contracts errors, so that half precision costs no more than
    its own rounding.
    """
    a, b, c = _QUINTIC
    tiny = torch.finfo(d.dtype).tiny
    x = (d / torch.linalg.matrix_norm(d, keepdim=True).clamp_min(tiny)).to(dtype)
    for _ in range(steps):
        gram = x.mT @ x
        x = x @ add_identity(gram * b + (gram @ gram) * c, a)
    return x.to(d.dtype)


class Block:
    """Some parameters whose matrices have one shape, dtype and device."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.shape = params[0].shape[-2:]
        self.count = sum(math.prod(p.shape[:-2]) for p in params)

    @property
    def cost(self) -> float:
        """Multiplications of one product, up to a factor."""
        n, k = max(self.shape), min(self.shape)
        return float(self.count * n * k * k)

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors that belong to the parameters, (m, n) or (count, m, n), with m >= n."""
        x = stacked([whole(t) for t in tensors])
        return x.mT if x.shape[-2] < x.shape[-1] else x

    def put(self, tensors: Sequence[Tensor], x: Tensor) -> None:
        """Back, into tensors of the parameters' shapes, or of one number a matrix."""
        wide = self.shape[0] < self.shape[1]
        for tensor, piece in zip(tensors, split(x.mT if wide else x, self.params), strict=True):
            put_(tensor, piece)


def blocks(params: Sequence[Tensor]) -> Iterator[Block]:
    """The parameters in blocks: one batched call for each."""
    return map(Block, batches(params, lambda p: p))
