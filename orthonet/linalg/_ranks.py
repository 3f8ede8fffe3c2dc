"""Work on a list of matrices shared out among processes: who takes what, and the exchange.

Plain functions on tensors and a process group; without one, every process does everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["assign", "collect", "exchange", "put_", "rank_and_size", "whole"]


def assign(costs: Sequence[float], size: int) -> list[int]:
    """The rank that takes each piece: the largest first, to the rank that has least to do.

    The largest share is at most 4/3 - 1/(3 size) of the least possible one (Graham, *Bounds on
    multiprocessing timing anomalies*, SIAM J. Appl. Math. 17 (1969), theorem 2). Ties go to the
    lower rank and the earlier piece, so all processes find the same.
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(size), key=lambda rank: (loads[rank], rank))
        owners[piece] = owner
        loads[owner] += costs[piece]
    return owners


def rank_and_size(group: Any) -> tuple[int, int]:
    """The place of this process in `group`; (0, 1) for None."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def exchange(pieces: Sequence[Tensor], owners: Sequence[int], group: Any) -> list[Tensor]:
    """What the owners hold, of every piece; of those of others only shape and dtype are looked at.

    One all-gather for each dtype, of as many elements from each rank as the largest share has. With
    gloo, whose all-gather takes four times the CPU time, a broadcast from each rank, all at once.
    """
    rank, size = rank_and_size(group)
    result = list(pieces)
    for dtype in dict.fromkeys(piece.dtype for piece in pieces):
        shares: list[list[int]] = [[] for _ in range(size)]
        for i, owner in enumerate(owners):
            if pieces[i].dtype == dtype:
                shares[owner].append(i)
        sizes = [[pieces[i].numel() for i in share] for share in shares]
        length = max(map(sum, sizes))
        received = torch.empty(size, length, dtype=dtype, device=pieces[0].device)
        sent = received[rank]
        if shares[rank]:
            own = [pieces[i].reshape(-1) for i in shares[rank]]
            torch.cat(own, out=sent[: sum(sizes[rank])])
        if dist.get_backend(group) == "gloo":
            works = [
                dist.broadcast(
                    received[owner, : sum(sizes[owner])], dist.get_global_rank(group, owner),
                    group=group, async_op=True,
                )
                for owner in range(size) if shares[owner]
            ]  # fmt: skip
            for pending in works:
                pending.wait()  # type: ignore[union-attr]
        else:
            dist.all_gather(list(received.unbind()), sent, group=group)
        for other in range(size):
            if other == rank or not shares[other]:
                continue
            parts = received[other, : sum(sizes[other])].split(sizes[other])
            for i, part in zip(shares[other], parts, strict=True):
                result[i] = part.view(pieces[i].shape)
    return result


def collect(shards: Sequence[Any], owners: Sequence[int], group: Any) -> dict[int, Tensor]:
    """The whole tensors that this process owns, of shards (DTensor) which all processes hold.

    One all-to-all for each dtype: every process sends each of its shards to the owner only. Where
    the mesh has more than one dimension or other processes than `group`, all tensors are gathered
    by all.
    """
    rank, size = rank_and_size(group)
    if not all(_in_rows(t, size) for t in shards):
        gathered = [t.full_tensor() for t in shards]  # a collective: all of them, by all
        return {i: gathered[i] for i, owner in enumerate(owners) if owner == rank}
    result: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in shards):
        taken: list[list[int]] = [[] for _ in range(size)]
        for i, owner in enumerate(owners):
            if shards[i].dtype == dtype:
                taken[owner].append(i)
        local = [[shards[i].to_local().reshape(-1) for i in share] for share in taken]
        sent = torch.cat([piece for share in local for piece in share])
        shapes = {i: _shapes(shards[i], size) for i in taken[rank]}
        lengths = [[shapes[i][other].numel() for i in taken[rank]] for other in range(size)]
        received = sent.new_empty(sum(map(sum, lengths)))
        dist.all_to_all_single(
            received,
            sent,
            [sum(row) for row in lengths],
            [sum(piece.numel() for piece in share) for share in local],
            group=group,
        )
        pieces = iter(received.split([n for row in lengths for n in row]))
        parts: dict[int, list[Tensor]] = {i: [] for i in taken[rank]}
        for other in range(size):
            for i in taken[rank]:
                parts[i].append(next(pieces).view(shapes[i][other]))
        result |= {i: torch.cat(found, shards[i].placements[0].dim) for i, found in parts.items()}
    return result


def _in_rows(tensor: Any, size: int) -> bool:
    """Whether the tensor is cut along one dimension among as many processes."""
    mesh, placement = tensor.device_mesh, tensor.placements[0]
    return mesh.ndim == 1 and mesh.size() == size and placement.is_shard()


def _shapes(tensor: Any, size: int) -> list[torch.Size]:
    """The shapes of the shards: equal ones, as far as the rows go (torch.chunk)."""
    dim, shape = tensor.placements[0].dim, list(tensor.shape)
    rows = -(-shape[dim] // size)
    return [
        torch.Size([*shape[:dim], max(0, min(rows, shape[dim] - r * rows)), *shape[dim + 1 :]])
        for r in range(size)
    ]


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the shards of all processes make; a plain one is that already.

    Its gradient is the mean over the processes, as that of a unit of FSDP2 is: each has seen its
    own part of the batch.
    """
    gather = getattr(tensor, "full_tensor", None)
    if gather is None:
        return tensor
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return gather()
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    gathered = gather(grad_placements=[Partial()] * mesh.ndim)
    return _Divided.apply(gathered, float(mesh.size()))  # type: ignore[return-value]


class _Divided(torch.autograd.Function):
    """The identity, whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.by, None


def put_(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, which all processes hold, into `tensor` or its shard of this process."""
    if value is tensor:  # changed in place
        return
    if not hasattr(tensor, "full_tensor"):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    # every process has the value: nothing is sent
    tensor.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
