"""Orthogonalization shared out among two processes: its share of a step beside that of one.

python -m benchmarks.shared_out [--layers 8] [--sizes 512 1024] [--seconds 10]

Two processes on this machine (gloo), one thread each. Printed is the CPU time of one process, the
least of interleaved rounds, alone and shared out: of reading all weights after an optimizer step
and pulling gradients back through them, and with FSDP2 of a forward and a backward pass of one
sample, with the traffic that FSDP2 has in both. Below it the model of `docs/guide/caching.md` for
more ranks: what one computes and sends in a step.
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
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import orthonet
from benchmarks import _harness as harness
from orthonet.linalg._ranks import assign


def build(layers: int, size: int, preset: str, sharded: bool) -> nn.Sequential:
    """Square layers as after some training, the same in all processes."""
    torch.manual_seed(0)
    params = getattr(orthonet, f"{preset}_ORTHO_PARAMS")
    model = nn.Sequential(
        *(orthonet.OrthoLinear(size, size, ortho_params=params) for _ in range(layers))
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 * size**-0.5)  # singular values 0.7 to 1.3
    for part in (*model, model) if sharded else ():
        fully_shard(part)
    return model


def once(model: nn.Sequential, sharded: bool, x: Tensor, grads: list[Tensor]) -> None:
    """Every weight once, forward and backward; of a model in shards with one sample."""
    if sharded:
        model(x).sum().backward()
    else:
        torch.autograd.backward([layer.weight for layer in model], grads)


def work(rank: int, path: str, options: argparse.Namespace, result: dict) -> None:
    """One process: the least CPU seconds of every way."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        rows = itertools.product((False, True), options.presets, options.sizes)
        for sharded, preset, size in rows:
            models = {kind: build(options.layers, size, preset, sharded) for kind in ("one", "two")}
            orthonet.share_among_ranks(models["two"])
            x, grads = (
                torch.randn(1, size),
                [torch.randn(size, size) for _ in range(options.layers)],
            )
            best = {kind: [float("inf"), float("inf")] for kind in models}
            start, rounds = time.perf_counter(), 0
            while rounds < 3 or _go_on(start, options.seconds):
                for kind, model in models.items():
                    orthonet.invalidate(model)
                    distributed.barrier()
                    begin, wall = time.process_time(), time.perf_counter()
                    once(model, sharded, x, grads)
                    spent = time.process_time() - begin, time.perf_counter() - wall
                    best[kind] = [min(a, b) for a, b in zip(best[kind], spent, strict=True)]
                rounds += 1
            if rank == 0:
                result[f"{preset}, {size}{', FSDP2' if sharded else ''}"] = best
    finally:
        distributed.destroy_process_group()


def _go_on(start: float, seconds: float) -> bool:
    """Whether there is time left, as rank 0 sees it."""
    flag = torch.tensor([float(time.perf_counter() - start < seconds)])
    distributed.broadcast(flag, 0)
    return bool(flag.item())


def model_of(layers: int, size: int, ranks: int, products: float) -> tuple[float, float]:
    """Floating-point operations of the busiest rank and bytes that each sends, in a step.

    An all-gather or a reduction in a ring sends (R - 1) / R of the whole from each rank.
    """
    owners = assign([float(size**3)] * layers, ranks)
    busiest = max(owners.count(rank) for rank in range(ranks))
    whole = 4.0 * layers * size**2
    return 2.0 * products * busiest * size**3, 2.0 * whole * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--seconds", type=float, default=10.0, help="per row")
    parser.add_argument("--presets", nargs="+", default=["DEFAULT", "POLAR", "POLAR_WARM"])
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        shared = manager.dict()
        multiprocessing.spawn(work, args=(f"{folder}/store", options, shared), nprocs=2)
        best = dict(shared)
    kept = {
        preset: {"one": one, "two": two, "one_wall": one_wall, "two_wall": two_wall}
        for preset, ((one, one_wall), (two, two_wall)) in (
            (p, (b["one"], b["two"])) for p, b in best.items()
        )
    }
    chosen = {name: getattr(options, name) for name in ("layers", "sizes", "seconds", "presets")}
    result = {"environment": harness.environment(), "options": chosen, "presets": kept}
    path = harness.write("shared_out", result, options.out)
    print(f"{summary(result)}\n\nwritten to {path}")


def summary(result: dict[str, Any]) -> str:
    """Two Markdown tables: what was measured, and the model for more ranks."""
    rows = [
        [
            preset,
            f"{r['one'] * 1e3:.1f}",
            f"{r['two'] * 1e3:.1f}",
            f"{r['two'] / r['one']:.2f}",
            f"{r['two_wall'] / r['one_wall']:.2f}",
        ]
        for preset, r in result["presets"].items()
    ]
    header = ["preset, features", "one, ms", "two, ms", "ratio of CPU", "ratio of wall"]
    measured = harness.table(header, rows)
    layers, size = 64, 1024
    rows = []
    for ranks in (1, 2, 8, 32, 64, 512):
        flops, sent = model_of(layers, size, ranks, 10.0)
        rows.append([ranks, f"{flops / 1e9:.0f}", f"{sent / 2**20:.0f}"])
    modelled = harness.table(["ranks", "GFLOP of the busiest", "MiB sent by each"], rows)
    return (
        f"{result['options']['layers']} layers, one process "
        f"beside one of two:\n\n{measured}\n\n{layers} layers of {size} features, 10 "
        f"products forward and backward, modelled:\n\n{modelled}"
    )


if __name__ == "__main__":
    main()
