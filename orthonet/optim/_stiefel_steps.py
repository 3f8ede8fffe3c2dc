r"""Steps on the Stiefel manifold, for batches of tall matrices.

The tangent space at X is \(\{D : X^\top D + D^\top X = 0\}\), the projection onto it
\(P_X(V) = V - X\,\mathrm{sym}(X^\top V)\), and the retraction of a step D the polar factor of
\(X + D\), which for tangent D is the nearest orthogonal matrix and agrees with the geodesic up to
terms of third order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.linalg import polar, retraction
from orthonet.linalg.distributed import assign, by_ranks, cost, put_, rank_and_size, whole
from orthonet.linalg.matrix import add_identity, batches, split, stacked

__all__ = [
    "Block",
    "blocks",
    "move_by_ranks",
    "newton_schulz_sign",
    "parts",
    "retract",
    "retracted",
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


def retracted(ys: list[Tensor]) -> list[Tensor]:
    r"""The polar factor of every matrix, by `orthonet.linalg.retraction`; the host reads once.

    For \(Y = X + D\) with tangent D, \(Y^\top Y - I = D^\top D\) is of second order: two products
    in all reach rounding for \(\|D\|_2 \le 0.036\), three up to 0.12, four up to 0.33; longer steps
    take further passes. What earlier steps have left is seen too, so nothing accumulates.
    """
    if torch.compiler.is_compiling():
        return [polar(y) for y in ys]
    batches = [(y, retraction.POLAR) for y in ys]
    found = retraction.retract(batches, squares=[False] * len(ys), unit=True)
    # Zero matrices have no direction to go, and what is not finite is refused.
    return [m.point if all(m.good) else polar(m.point) for m in found]


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
    """Some parameters whose matrices have one shape, dtype and device: one batched call for all.

    Attributes:
        params: The parameters.
        x: Their matrices, (m, n) or (count, m, n), with m >= n.
        kept: The state of each parameter in its optimizer.
        state: What the optimizer keeps besides the number of steps, shaped like `x`, by name.
        steps: The number of the present step of each matrix, (1, 1) or (count, 1, 1).
        grad: The gradients, shaped like `x`.
    """

    steps: Tensor
    grad: Tensor

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.x = self.gather(params)
        self.kept: list[dict[str, Tensor]] = []
        self.state: dict[str, Tensor] = {}

    def gather(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensors that belong to the parameters, as `x` is."""
        x = stacked([whole(t) for t in tensors])
        return x.mT if x.shape[-2] < x.shape[-1] else x

    def put(self, tensors: Iterable[Tensor], x: Tensor) -> None:
        """Back, into tensors of the parameters' shapes, or of one number a matrix."""
        wide = self.params[0].shape[-2] < self.params[0].shape[-1]
        for tensor, piece in zip(tensors, split(x.mT if wide else x, self.params), strict=True):
            put_(tensor, piece)

    def write(self, x: Tensor, state: dict[str, Tensor]) -> None:
        """End a step: new points and states."""
        self.put(self.params, x)
        for name, value in state.items():
            self.put([kept[name] for kept in self.kept], value)
        for kept in self.kept:
            kept["step"] += 1


def blocks(params: Iterable[Tensor]) -> list[Block]:
    """The parameters in blocks: by all processes, since shards are gathered."""
    return list(map(Block, batches([p for p in params if p.numel()], lambda p: p)))


def parts(found: Sequence[Block]) -> list[list[Block]]:
    """What is moved together: on an accelerator all blocks, since the host reads once for all.

    On the CPU, where reading is free, each block alone, so that it is finished while it is near.
    """
    far = [block for block in found if not block.x.is_cpu]
    return [[block] for block in found if block.x.is_cpu] + ([far] if far else [])


def retract(found: Sequence[Block], step: Callable[[Block], Tensor]) -> None:
    """Move every block to the polar factor of where `step` takes it."""
    for part in parts(found):
        for block, x in zip(part, retracted([step(block) for block in part]), strict=True):
            block.x = x


def move_by_ranks(found: Sequence[Block], move: Callable[[list[Block]], None], group: Any) -> None:
    """Let each process of a group, or this one, `move` its share of the blocks for all; write."""

    def moved(mine: list[int]) -> list[list[Tensor]]:
        move([found[i] for i in mine])
        return [[found[i].x, *found[i].state.values()] for i in mine]

    here = [[block.x, *block.state.values()] for block in found]
    owners = assign([cost(block.x) for block in found], rank_and_size(group)[1])
    told = by_ranks(here, owners, moved, group)
    for block, (x, *values) in zip(found, told, strict=True):
        block.write(x, dict(zip(block.state, values, strict=True)))
