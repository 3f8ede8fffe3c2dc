"""Work on a list of matrices distributed across processes: who takes what, and the exchange.

Plain functions on tensors and a process group; without one, every process does everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orthonet._torch import is_shard

__all__ = [
    "assign",
    "by_ranks",
    "collect",
    "cost",
    "hand_out",
    "in_rows",
    "put_",
    "rank_and_size",
    "whole",
]


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


def cost(matrices: Tensor) -> float:
    """Multiplications of one product of the size of the matrices."""
    return float(matrices.numel() * min(matrices.shape[-2:]))


def rank_and_size(group: Any) -> tuple[int, int]:
    """The place of this process in `group`; (0, 1) for None."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _shares(owners: Sequence[int], size: int) -> list[list[int]]:
    """What falls to each rank."""
    return [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(size)]


# ------------------------------------------------------------------ what all processes hold


def by_ranks(
    pieces: Sequence[Sequence[Tensor]],
    owners: Sequence[int],
    work: Callable[[list[int]], Sequence[Sequence[Tensor]]],
    group: Any,
) -> list[Sequence[Tensor]]:
    """What `work` makes of every piece: at its owner, from whom all receive it.

    One all-gather, of as many bytes from each rank as the largest share has. With gloo, whose
    all-gather takes four times the CPU time, a broadcast from each rank, all at once.

    Args:
        pieces: Lists of tensors; of those of others only shapes and dtypes are looked at.
        owners: The rank that takes each piece.
        work: Called with the indices of the pieces of this process; returns one list for each, of
            tensors of the same shapes and dtypes.
        group: The processes.
    """
    rank, size = rank_and_size(group)
    made, shares = list(pieces), _shares(owners, size)
    for i, tensors in zip(shares[rank], work(shares[rank]), strict=True):
        made[i] = tensors
    if group is None or not made:
        return made
    held = [[t for i in share for t in made[i]] for share in shares]
    lengths = [sum(map(_room, tensors)) for tensors in held]
    device = made[0][0].device
    received = torch.empty(size, max(lengths), dtype=torch.uint8, device=device)
    received[rank, : lengths[rank]] = _packed(held[rank], device)
    if dist.get_backend(group) == "gloo":
        works = [
            dist.broadcast(
                received[owner, :length],
                dist.get_global_rank(group, owner),
                group=group,
                async_op=True,
            )
            for owner, length in enumerate(lengths)
            if length
        ]
        for pending in works:
            if pending is not None:
                pending.wait()
    else:
        dist.all_gather(list(received.unbind()), received[rank], group=group)
    for other, share in enumerate(shares):
        if other != rank:
            told = iter(_unpacked(received[other, : lengths[other]], held[other]))
            for i in share:
                made[i] = [next(told) for _ in made[i]]
    return made


# ------------------------------------------------------------------ shards


def in_rows(tensor: Any) -> Any:
    """A DTensor that is cut once, along the last dimension of its mesh, as those of FSDP2 are."""
    *others, last = tensor.placements
    if last.is_shard() and all(way.is_replicate() for way in others):
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    return tensor.redistribute(placements=[*[Replicate()] * len(others), Shard(0)])


def collect(shards: Sequence[Any], owners: Sequence[int], group: Any) -> dict[int, Tensor]:
    """The whole tensors that this process owns, of DTensors `in_rows` that all processes share.

    One all-to-all: every process sends each of its shards to the owner only.
    """
    rank, size = rank_and_size(group)
    shares = _shares(owners, size)
    sent = [[shards[i].to_local() for i in share] for share in shares]
    wholes = {
        i: torch.empty(shards[i].shape, dtype=shards[i].dtype, device="meta") for i in shares[rank]
    }
    received = _all_to_all(sent, _cut(wholes, shards, size), group)
    return {
        i: torch.cat(rows, _dim(shards[i]))
        for i, *rows in zip(shares[rank], *received, strict=True)
    }


def hand_out(
    wholes: dict[int, Tensor], shards: Sequence[Any], owners: Sequence[int], group: Any
) -> list[Any]:
    """The whole tensors that their owners hold, laid out as `shards` are: undoes `collect`."""
    shares = _shares(owners, rank_and_size(group)[1])
    like = [[shards[i].to_local() for i in share] for share in shares]
    received = _all_to_all(_cut(wholes, shards, len(shares)), like, group)
    found = dict(zip(itertools.chain(*shares), itertools.chain(*received), strict=True))
    return [
        type(t).from_local(
            found[i], t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        )
        for i, t in enumerate(shards)
    ]


def _dim(shard: Any) -> int:
    return shard.placements[-1].dim


def _cut(wholes: dict[int, Tensor], shards: Sequence[Any], size: int) -> list[list[Tensor]]:
    """The rows of each rank: equal shares, as far as they go."""
    cuts = []
    for i, tensor in wholes.items():
        rows = tensor.chunk(size, _dim(shards[i]))
        nothing = tensor.narrow(_dim(shards[i]), 0, 0)
        cuts.append([*rows, *[nothing] * (size - len(rows))])
    return [[cut[rank] for cut in cuts] for rank in range(size)]


def _all_to_all(
    sent: list[list[Tensor]], like: list[list[Tensor]], group: Any
) -> list[list[Tensor]]:
    """Lists of tensors for each rank; those from each have the shapes and dtypes of `like`."""
    device = next(t.device for t in itertools.chain(*sent, *like) if not t.is_meta)
    lengths, counts = ([sum(map(_room, row)) for row in rows] for rows in (like, sent))
    incoming = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    outgoing = _packed(list(itertools.chain(*sent)), device)
    dist.all_to_all_single(incoming, outgoing, lengths, counts, group=group)
    return [_unpacked(row, t) for row, t in zip(incoming.split(lengths), like, strict=True)]


# ------------------------------------------------------------------ tensors of any dtypes, as bytes


def _room(tensor: Tensor) -> int:
    """Its bytes, up to a multiple of 16, where a number of any dtype may begin."""
    return -(-tensor.nbytes // 16) * 16


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    parts = [torch.empty(0, dtype=torch.uint8, device=device)]
    for tensor in tensors:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts += [flat, flat.new_empty(_room(tensor) - len(flat))]
    return torch.cat(parts)


def _unpacked(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that were packed, of which those in `like` have the shapes and dtypes."""
    parts = zip(row.split([_room(t) for t in like]), like, strict=True)
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in parts]


# ------------------------------------------------------------------ gathered by all


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
    # not Partial("avg"), which sums on gloo with PyTorch 2.6
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
    if not is_shard(tensor):
        tensor.copy_(value)  # nothing happens where that is the same memory
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    # every process has the value: nothing is sent
    tensor.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
