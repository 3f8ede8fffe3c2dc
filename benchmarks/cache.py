"""What the cache saves: evaluation, accumulation, recurrence, and batches of small layers.

python -m benchmarks.cache [--seconds S]

CPU time of one thread, the least of interleaved rounds, as ratios to the row named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

import orthonet
from benchmarks import _harness as harness

Steps = dict[str, Callable[[], object]]


def least(steps: Steps, seconds: float) -> dict[str, float]:
    """Least CPU seconds of each step over interleaved rounds."""
    best = dict.fromkeys(steps, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            begin = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - begin)
        rounds += 1
    return best


def evaluation(n: int, batch: int) -> Steps:
    """Forward of one layer in eval, compared with the plain one."""
    layer, plain = orthonet.OrthoLinear(n, n).eval(), nn.Linear(n, n)
    x = torch.randn(batch, n)

    def step(module: nn.Module, enabled: bool = True) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad(), orthonet.caching(enabled):
                for _ in range(10 if enabled else 1):
                    module(x)

        return run

    return {
        "plain x 10": step(plain),
        "cached x 10": step(layer),
        "uncached x 1": step(layer, False),
    }


def accumulation(n: int, micro: int = 8) -> Steps:
    """Forward and backward of some micro-batches, as after an optimizer step."""
    layer, plain = orthonet.OrthoLinear(n, n), nn.Linear(n, n)
    xs = torch.randn(micro, 32, n)

    def passes(module: nn.Module) -> None:
        orthonet.invalidate(module)
        for x in xs:
            module(x).square().mean().backward()

    def uncached() -> None:
        with orthonet.caching(False):
            passes(layer)

    def deferred() -> None:
        with orthonet.defer_pullback():
            passes(layer)

    return {
        "plain": lambda: passes(plain),
        "uncached": uncached,
        "cached": lambda: passes(layer),
        "deferred": deferred,
    }


def recurrence(n: int, steps: int = 20) -> Steps:
    """A loop over time that reads the weight at each step."""
    layer, plain = orthonet.OrthoLinear(n, n), nn.Linear(n, n)
    x = torch.randn(32, n)

    def loop(module: nn.Module) -> None:
        orthonet.invalidate(module)
        h = x
        for _ in range(steps):
            h = torch.tanh(module(h))
        h.sum().backward()

    def uncached() -> None:
        with orthonet.caching(False):
            loop(layer)

    return {"plain": lambda: loop(plain), "uncached": uncached, "cached": lambda: loop(layer)}


def batches(count: int, n: int, params: orthonet.OrthoParams) -> Steps:
    """Weights of many layers and their gradients after a step: in one call, and layer by layer."""
    model = nn.Sequential(*(orthonet.OrthoLinear(n, n, ortho_params=params) for _ in range(count)))
    raw = [layer.parametrization.original for layer in model]
    optimizer = torch.optim.SGD(raw, lr=1e-4, foreach=True)
    grads = [torch.randn(n, n) for _ in range(count)]

    def step(together: bool) -> None:
        with orthonet.caching(together):
            for p, grad in zip(raw, grads, strict=True):
                p.grad = grad
            optimizer.step()
            torch.autograd.grad([layer.weight for layer in model], raw, grads)

    return {"one call": lambda: step(True), "layer by layer": lambda: step(False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="per table")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = {
        "eval forward, 512, batch 256": evaluation(512, 256),
        "accumulation of 8, 256": accumulation(256),
        "loop of 20 steps, 256": recurrence(256),
    }
    for count, n in ((16, 64), (32, 16)):
        for name in ("DEFAULT", "QR"):
            params = getattr(orthonet, f"{name}_ORTHO_PARAMS")
            tables[f"{count} x {n}x{n}, {name}"] = batches(count, n, params)
    for title, steps in tables.items():
        best = least(steps, seconds)
        base = next(iter(best.values()))
        rows = [[name, f"{s * 1e3:.3f}", f"{s / base:.2f}"] for name, s in best.items()]
        print(harness.table([title, "ms", "ratio"], rows), end="\n\n")
    layer = orthonet.OrthoLinear(64, 64).eval()

    def reads() -> None:
        for _ in range(1000):
            layer.weight  # noqa: B018

    print(f"a kept weight is read in {least({'': reads}, 1.0)[''] * 1e3:.1f} microseconds")


if __name__ == "__main__":
    main()
