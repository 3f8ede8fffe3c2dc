"""Several processes, as `torchrun` starts them: who this one is, and what all of them sum up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import distributed as dist

__all__ = ["joined", "launched", "rank_and_size", "totals"]


def launched() -> int:
    """The number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the processes of `torchrun`, if there are others, and yield the rank of this one."""
    if launched() == 1 or dist.is_initialized():
        yield rank_and_size()[0]
        return
    dist.init_process_group("gloo" if torch.device(device).type == "cpu" else "nccl")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(0, 1) where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def totals(*values: float, device: str = "cpu") -> list[float]:
    """The sum over the processes of each value."""
    if rank_and_size()[1] == 1:
        return list(values)
    summed = torch.tensor(values, device=device)
    dist.all_reduce(summed)
    return summed.tolist()
