"""The retraction of a step distributed across two processes: its share next to that of one.

python -m benchmarks.across_processes [--layers 8] [--sizes 512 1024] [--seconds 10]

Two processes on this machine (gloo), one thread each. Printed is the time of one process, the least
of interleaved rounds, of what follows an optimizer step that has moved every matrix: alone,
distributed, and with FSDP2, where it always is (collect, retract, hand out). Below it the model
of `docs/guide/caching.md` for more ranks: what one computes and sends in a step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import orthonet
from benchmarks import _harness as harness
from orthonet.linalg.distributed import assign


def build(layers: int, size: int, preset: str, sharded: bool) -> nn.Sequential:
    """Square layers, the same in all processes."""
    torch.manual_seed(0)
    params = getattr(orthonet, f"{preset}_ORTHO_PARAMS")
    model = nn.Sequential(
        *(orthonet.OrthoLinear(size, size, False, ortho_params=params) for _ in range(layers))
    )
    for part in (*model, model) if sharded else ():
        fully_shard(part)
    return model


def stepper(model: nn.Module, step: float = 0.01) -> torch.optim.SGD:
    """An optimizer with gradients of which a step moves every matrix by `step` of its norm."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * p.shape[-1] ** -0.5
    return torch.optim.SGD(model.parameters(), lr=step)


def work(rank: int, path: str, options: argparse.Namespace, result: dict) -> None:
    """One process: the least CPU seconds of every way."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for preset, size in itertools.product(options.presets, options.sizes):
            models = {
                kind: build(options.layers, size, preset, kind == "sharded")
                for kind in ("one", "two", "sharded")
            }
            orthonet.share_among_ranks(models["two"])
            steps = {kind: stepper(model) for kind, model in models.items()}
            best = {kind: [float("inf"), float("inf")] for kind in models}
            start, rounds = time.perf_counter(), 0
            while rounds < 3 or _go_on(start, options.seconds):
                for kind, step in steps.items():
                    distributed.barrier()
                    begin, wall = time.process_time(), time.perf_counter()
                    step.step()
                    spent = time.process_time() - begin, time.perf_counter() - wall
                    best[kind] = [min(a, b) for a, b in zip(best[kind], spent, strict=True)]
                rounds += 1
            if rank == 0:
                result[f"{preset}, {size}"] = best
    finally:
        distributed.destroy_process_group()


def _go_on(start: float, seconds: float) -> bool:
    """Whether there is time left, as rank 0 sees it."""
    flag = torch.tensor([float(time.perf_counter() - start < seconds)])
    distributed.broadcast(flag, 0)
    return bool(flag.item())


def model_of(layers: int, size: int, ranks: int, products: float) -> tuple[float, float, float]:
    """Operations of the busiest rank, and bytes that each sends in a step: replicas and shards.

    An all-gather in a ring sends (R - 1) / R of the whole from each rank. Of its shards, a rank
    sends (R - 1) / R to the owners, and the owners send as much back.
    """
    owners = assign([float(size**3)] * layers, ranks)
    busiest = max(owners.count(rank) for rank in range(ranks))
    whole, others = 4.0 * layers * size**2, (ranks - 1) / ranks
    return 2.0 * products * busiest * size**3, whole * others, 2.0 * whole * others / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--seconds", type=float, default=10.0, help="per row")
    parser.add_argument("--presets", nargs="+", default=["DEFAULT", "CHOLESKY"])
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        shared = manager.dict()
        multiprocessing.spawn(work, args=(f"{folder}/store", options, shared), nprocs=2)
        best = dict(shared)
    kept = {
        row: {
            name: value
            for kind, (cpu, wall) in times.items()
            for name, value in ((kind, cpu), (f"{kind}_wall", wall))
        }
        for row, times in best.items()
    }
    chosen = {name: getattr(options, name) for name in ("layers", "sizes", "seconds", "presets")}
    result = {"environment": harness.environment(), "options": chosen, "presets": kept}
    path = harness.write("across_processes", result, options.out)
    print(f"{summary(result)}\n\nwritten to {path}")


def summary(result: dict[str, Any]) -> str:
    """Two Markdown tables: what was measured, and the model for more ranks."""
    rows = [
        [
            row,
            *(f"{r[kind] * 1e3:.1f}" for kind in ("one", "two", "sharded")),
            f"{r['two'] / r['one']:.2f}",
            f"{r['two_wall'] / r['one_wall']:.2f}",
        ]
        for row, r in result["presets"].items()
    ]
    header = ["preset, features", "one, ms", "two, ms", "FSDP2, ms", "two, CPU", "two, wall"]
    measured = harness.table(header, rows)
    layers, size, products = 64, 1024, 3.0
    rows = []
    for ranks in (1, 2, 8, 32, 64, 512):
        flops, sent, shards = model_of(layers, size, ranks, products)
        rows.append([ranks, f"{flops / 1e9:.0f}", f"{sent / 2**20:.0f}", f"{shards / 2**20:.0f}"])
    header = ["ranks", "GFLOP of the busiest", "MiB sent by each", "MiB with FSDP2"]
    modeled = harness.table(header, rows)
    return (
        f"{result['options']['layers']} layers, an optimizer step of one process and of one of "
        f"two, and its ratios to one:\n\n{measured}\n\n{layers} layers of {size} features, "
        f"{products:.0f} products, modeled:\n\n{modeled}"
    )


if __name__ == "__main__":
    main()
