"""Work on a list of matrices distributed across processes: who takes what, and the exchange.

Plain functions on tensors and a process group; without one, every process does everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orthonet._torch import is_shard

__all__ = ["assign", "collect", "exchange", "hand_out", "put_", "rank_and_size", "whole"]


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
                    received[owner, : sum(sizes[owner])],
                    dist.get_global_rank(group, owner),
                    group=group,
                    async_op=True,
                )
                for owner in range(size)
                if shares[owner]
            ]
            for pending in works:
                if pending is not None:
                    pending.wait()
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
    for taken in _shares(shards, owners, size):
        sent = [[shards[i].to_local() for i in share] for share in taken]
        shapes = {i: _shapes(shards[i], size) for i in taken[rank]}
        expected = [[shapes[i][other] for i in taken[rank]] for other in range(size)]
        received = _all_to_all(sent, expected, group, _of(shards, taken))
        for place, i in enumerate(taken[rank]):
            parts = [received[other][place] for other in range(size)]
            result[i] = torch.cat(parts, shards[i].placements[0].dim)
    return result


def hand_out(
    wholes: dict[int, Tensor], shards: Sequence[Any], owners: Sequence[int], group: Any
) -> list[Any]:
    """The shards of whole tensors that their owners hold, laid out as `shards` are.

    The inverse of `collect`: one all-to-all for each dtype of `shards`, which the results take.
    """
    rank, size = rank_and_size(group)
    if not all(_in_rows(t, size) for t in shards):
        pieces = [
            wholes[i].to(t.dtype) if i in wholes else t.to_local().new_empty(t.shape)
            for i, t in enumerate(shards)
        ]
        received = exchange(pieces, owners, group)
        return [_cut(value, t) for value, t in zip(received, shards, strict=True)]
    result = list(shards)
    for taken in _shares(shards, owners, size):
        sent: list[list[Tensor]] = [[] for _ in range(size)]
        for i in taken[rank]:
            lengths = [shape[shards[i].placements[0].dim] for shape in _shapes(shards[i], size)]
            pieces = wholes[i].to(shards[i].dtype).split(lengths, shards[i].placements[0].dim)
            for other, piece in enumerate(pieces):
                sent[other].append(piece)
        shapes = [[shards[i].to_local().shape for i in share] for share in taken]
        received = _all_to_all(sent, shapes, group, _of(shards, taken))
        for share, pieces in zip(taken, received, strict=True):
            for i, piece in zip(share, pieces, strict=True):
                result[i] = _laid_out(piece, shards[i])
    return result


def _shares(shards: Sequence[Tensor], owners: Sequence[int], size: int) -> list[list[list[int]]]:
    """For each dtype, what falls to each rank."""
    return [
        [
            [i for i, owner in enumerate(owners) if owner == rank and shards[i].dtype == dtype]
            for rank in range(size)
        ]
        for dtype in dict.fromkeys(t.dtype for t in shards)
    ]


def _of(shards: Sequence[Any], taken: list[list[int]]) -> Tensor:
    """One of these shards, for its dtype and device."""
    return shards[next(i for share in taken for i in share)].to_local()


def _all_to_all(
    sent: list[list[Tensor]], shapes: list[list[torch.Size]], group: Any, like: Tensor
) -> list[list[Tensor]]:
    """Lists of tensors for each rank; those of the given shapes from each, all of one kind."""
    outgoing = torch.cat([like.new_empty(0), *(t.reshape(-1) for row in sent for t in row)])
    lengths = [[shape.numel() for shape in row] for row in shapes]
    incoming = like.new_empty(sum(map(sum, lengths)))
    counts = [sum(row) for row in lengths], [sum(t.numel() for t in row) for row in sent]
    dist.all_to_all_single(incoming, outgoing, *counts, group=group)
    pieces = iter(incoming.split([n for row in lengths for n in row]))
    return [[next(pieces).view(shape) for shape in row] for row in shapes]


def _laid_out(local: Tensor, like: Any) -> Any:
    """A DTensor of this shard, with the layout of another one."""
    return type(like).from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _cut(value: Tensor, like: Any) -> Any:
    """The shard of this process of a tensor that all hold, with the layout of a DTensor."""
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    everywhere = type(like).from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements)


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
    if not is_shard(tensor):
        return tensor
    gather = tensor.full_tensor
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return gather()
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    gathered = gather(grad_placements=[Partial()] * mesh.ndim)
    return _Divided.apply(gathered, float(mesh.size()))


class _Divided(torch.autograd.Function):
    """The identity, whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.by, None


def put_(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, which all processes hold, into `tensor` or its shard of this process."""
    if value is tensor:  # changed in place
        return
    if not is_shard(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    # every process has the value: nothing is sent
    tensor.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
