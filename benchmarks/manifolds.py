"""Constrained weights compared with geotorch and torch: constraint error after training, and time.

python -m benchmarks.manifolds [--quick] [--threads N] [--steps N] [--out DIR]

The error is max |sigma - 1| after Adam steps of 1e-3 toward a random linear functional. Time is
the CPU time of forward + backward, interleaved, the minimum over the rounds, as a ratio to geotorch
with the same map: near the start, where an occasional `update_base` keeps the coordinates, and
after the steps, where ours removes the rounding of large coordinates. Ours is measured without its
cache: every read computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

import orthonet
from benchmarks import _harness as harness
from orthonet.reparametrizers import caching

SHAPES = ((64, 64), (256, 256), (1024, 1024), (256, 64), (1024, 64))
TRIVS = ("expm", "cayley")


def candidates(n: int, k: int, triv: str) -> dict[str, nn.Module]:
    """One constrained linear layer a library that is installed."""
    found: dict[str, nn.Module] = {"orthonet": orthonet.orthogonal(_layer(n, k), triv=triv)}
    name = {"expm": "matrix_exp", "cayley": "cayley"}[triv]
    found["torch"] = parametrizations.orthogonal(_layer(n, k), orthogonal_map=name)
    try:
        import geotorch
    except ModuleNotFoundError:
        return found
    layer = _layer(n, k)
    geotorch.orthogonal(layer, "weight", triv=triv)
    return {**found, "geotorch": layer}


def _layer(n: int, k: int) -> nn.Module:
    return nn.Linear(k, n, bias=False)


def drift(layer: nn.Module, steps: int) -> float:
    """max |sigma - 1| after Adam steps."""
    direction = torch.randn(layer.weight.shape)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer.weight * direction).sum().backward()
        optimizer.step()
    sigma = torch.linalg.svdvals(layer.weight.detach().double())
    return float((sigma - 1.0).abs().max())


def seconds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, the least over interleaved rounds."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - start)
    return best


def measure(n: int, k: int, triv: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a library."""
    layers = candidates(n, k, triv)
    direction = torch.randn(n, k)
    # One step of the peers' exponential takes two seconds there.
    taken = {name: min(steps, 3) if n >= 1024 and name != "orthonet" else steps for name in layers}

    def step(layer: nn.Module) -> Callable[[], object]:
        return lambda: (layer.weight * direction).sum().backward()

    def times() -> dict[str, float]:
        with caching(False):
            return seconds({name: step(layer) for name, layer in layers.items()}, rounds)

    for layer in layers.values():
        drift(layer, 1)
    near = times()
    errors = {name: drift(layer, taken[name]) for name, layer in layers.items()}
    far = times()
    base = "geotorch" if "geotorch" in layers else "torch"
    return [
        {
            "shape": f"{n}x{k}",
            "triv": triv,
            "library": name,
            "ratio": near[name] / near[base],
            "ratio_after": far[name] / far[base],
            "seconds": near[name],
            "residual": errors[name],
            "steps": taken[name],
            "coordinates": sum(p.numel() for p in layer.parameters()),
        }
        for name, layer in layers.items()
    ]


def run(shapes: tuple[tuple[int, int], ...], steps: int, rounds: int) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    torch.manual_seed(0)
    rows = []
    for n, k in shapes:
        for triv in TRIVS:
            rows += measure(n, k, triv, steps, max(rounds * 64**2 // (n * n), min(rounds, 3)))
    environment = harness.environment("cpu", ["geotorch"])
    return {"steps": steps, "rows": rows, "environment": environment}


def summary(result: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = [
        [
            f"{r['shape']} {r['triv']}",
            r["library"],
            f"{r['ratio']:.2f}",
            f"{r['ratio_after']:.2f}",
            f"{1e3 * r['seconds']:.2f}",
            f"{r['residual']:.1e}",
            r["steps"],
            r["coordinates"],
        ]
        for r in result["rows"]
    ]
    header = ["", "library", "ratio", "after", "ms", "residual", "steps", "coordinates"]
    return harness.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=200, help="(3 of the peers from n = 1024 on)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        result = run(((6, 6), (8, 3)), 2, 2)
    else:
        result = run(SHAPES, arguments.steps, 400)
    path = harness.write("manifolds", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
