"""A step of an optimizer on the Stiefel manifold compared with geoopt, and torch on plain ones.

python -m benchmarks.optim [--layers 8] [--size 512] [--seconds 60] [--steps 1000]

CPU time of one thread, the least of interleaved rounds, of one `step()` with given gradients that
change from round to round. Next to it the residual max |sigma - 1| after `--steps` steps of Adam
(0: not measured) and the bytes that the optimizer keeps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from orthonet.linalg import haar
from orthonet.optim import StiefelAdam, StiefelMuon, StiefelSGD, retract_after_step

Candidate = tuple[torch.optim.Optimizer, list[nn.Parameter]]


def hooked(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch's fused Adam with a retraction."""
    optimizer = torch.optim.Adam(params, lr=lr, fused=True)
    retract_after_step(optimizer)
    return optimizer


def candidates(start: list[Tensor], lr: float) -> dict[str, Candidate]:
    """Every optimizer on copies of the same matrices."""

    def plain() -> list[nn.Parameter]:
        return [nn.Parameter(x.clone()) for x in start]

    found: dict[str, Candidate] = {}

    def add(name: str, params: list[nn.Parameter], make: Callable[..., Any], **kwargs: Any) -> None:
        found[name] = (make(params, **kwargs), params)

    add("torch Adam, plain parameters", plain(), torch.optim.Adam, lr=lr)
    add("StiefelSGD, momentum", plain(), StiefelSGD, lr=lr, momentum=0.9)
    add("StiefelAdam", plain(), StiefelAdam, lr=lr)
    add("StiefelMuon", plain(), StiefelMuon, lr=lr)
    add("torch Adam fused + retract_after_step", plain(), hooked, lr=lr)
    if hasattr(torch.optim, "Muon"):
        add("torch Muon, plain parameters", plain(), torch.optim.Muon, lr=lr)
    if harness.version("geoopt") is not None:
        import geoopt

        for manifold in (geoopt.EuclideanStiefel(), geoopt.CanonicalStiefel()):
            params: list[nn.Parameter] = [
                geoopt.ManifoldParameter(x.clone(), manifold=manifold) for x in start
            ]
            name = f"geoopt RiemannianAdam, {type(manifold).__name__}"
            add(name, params, geoopt.optim.RiemannianAdam, lr=lr)
    return found


def residual(params: list[nn.Parameter]) -> float:
    """Largest |sigma - 1|."""
    with torch.no_grad():
        return max(float((torch.linalg.svdvals(p.double()) - 1).abs().max()) for p in params)


def kept(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states."""
    tensors = (t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(found: dict[str, Candidate], seconds: float) -> dict[str, float]:
    """Least CPU seconds of a step."""
    best = dict.fromkeys(found, float("inf"))
    generator, start, rounds = torch.Generator().manual_seed(0), time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - start < seconds:
        shapes = [p.shape for p in next(iter(found.values()))[1]]
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for name, (optimizer, params) in found.items():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            begin = time.process_time()
            optimizer.step()
            if rounds:  # the first one makes the states
                best[name] = min(best[name], time.process_time() - begin)
        rounds += 1
    return best


def drift(start: list[Tensor], steps: int, lr: float) -> float:
    """Residual after `steps` steps of StiefelAdam with gradients of a fixed and a random part."""
    params = [nn.Parameter(x.clone()) for x in start]
    optimizer = StiefelAdam(params, lr=lr)
    generator = torch.Generator().manual_seed(1)
    fixed = [torch.randn(x.shape, generator=generator) for x in start]
    for _ in range(steps):
        for p, part in zip(params, fixed, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).add_(part)
        optimizer.step()
    return residual(params)


def summary(result: dict[str, Any]) -> str:
    """A Markdown table, and the drift."""
    header = ["optimizer", "ms a step", "products a matrix", "over StiefelAdam", "residual", "MiB"]
    cells = [
        (
            r["optimizer"],
            f"{r['milliseconds']:.1f}",
            f"{r['products']:.1f}",
            f"{r['over_StiefelAdam']:.2f}",
            f"{r['residual']:.1e}",
            f"{r['state_bytes'] / 2**20:.1f}",
        )
        for r in result["rows"]
    ]
    text = (
        f"{result['layers']} matrices of {result['size']}x{result['size']}, "
        f"lr {result['lr']:g}, CPU time of one step:\n\n{harness.table(header, cells)}"
    )
    if "drift" in result:
        drifted = result["drift"]
        text += (
            f"\n\nStiefelAdam after {drifted['steps']} steps: max |sigma - 1| "
            f"{drifted['residual']:.1e}."
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=50, help="of the residual; 1000 in full")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = [haar((arguments.size, arguments.size)) for _ in range(arguments.layers)]
    found = candidates(start, arguments.lr)
    best = measure(found, arguments.seconds)
    size = arguments.size
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = float("inf")
    for _ in range(20):
        begin = time.process_time()
        a @ b
        product = min(product, time.process_time() - begin)
    ours = best["StiefelAdam"]
    rows = []
    for name, seconds in best.items():
        optimizer, params = found[name]
        row = {
            "optimizer": name,
            "milliseconds": seconds * 1e3,
            "products": seconds / arguments.layers / product,
            "over_StiefelAdam": seconds / ours,
            "residual": residual(params),
            "state_bytes": kept(optimizer),
        }
        rows.append(row)
    result: dict[str, Any] = {
        "environment": harness.environment(packages=("geoopt",)),
        "layers": arguments.layers,
        "size": size,
        "lr": arguments.lr,
        "rows": rows,
    }
    if arguments.steps:
        result["drift"] = {
            "steps": arguments.steps,
            "residual": drift(start, arguments.steps, arguments.lr),
        }
    path = harness.write("optim", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
