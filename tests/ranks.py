"""Two processes of one group, forked from a server that has imported what they need.

A process that is spawned imports PyTorch by itself, which takes longer than most tests.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import start_processes

_IMPORTED = (
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.export",
    "orthonet.layers",
    "orthonet.recipes",
)


def two_processes(work: Callable[..., None], folder: Path, *arguments) -> None:
    """Call `work(rank, *arguments)` in two processes that talk through gloo.

    What one of them raises is raised here.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.set_forkserver_preload(list(_IMPORTED))
    store = f"file://{folder / 'store'}"
    start_processes(_member, (store, work, arguments), nprocs=2, start_method=method)


def _member(rank: int, store: str, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        work(rank, *arguments)
        distributed.barrier()  # nobody leaves while another still talks
    finally:
        distributed.destroy_process_group()
