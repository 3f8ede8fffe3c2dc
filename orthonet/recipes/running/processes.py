"""Several processes, as `torchrun` starts them: who this one is, and what all of them sum up."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["joined", "launched", "part_of", "rank_and_size", "replica_of", "totals"]


def launched() -> int:
    """The number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the processes of `torchrun`, if there are others, and yield the rank of this one."""
    if launched() == 1 or dist.is_initialized():
        yield rank_and_size()[0]
        return
    kind = torch.device(device)
    if kind.type != "cpu" and kind.index is None:  # each process its own device
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo" if kind.type == "cpu" else "nccl")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(0, 1) where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def replica_of(model: nn.Module) -> nn.Module:
    """The model with gradients that are averaged over the processes; itself where there is one.

    Buffers are the same everywhere and stay so; they are not sent.
    """
    if rank_and_size()[1] == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **options)


def part_of(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Every `size`-th entry along `dim`, from that of the rank on: of a batch that all have drawn.

    All of `x` where the number of processes does not divide its size: the mean over the processes
    of the means of their parts is that of the whole batch in any case.
    """
    rank, size = rank_and_size()
    if size == 1 or x.shape[dim] % size:
        return x
    index = torch.arange(rank, x.shape[dim], size, device=x.device)
    return x.index_select(dim, index)


def totals(*values: float, device: str = "cpu") -> list[float]:
    """The sum over the processes of each value."""
    if rank_and_size()[1] == 1:
        return list(values)
    summed = torch.tensor(values, device=device)
    dist.all_reduce(summed)
    return summed.tolist()
