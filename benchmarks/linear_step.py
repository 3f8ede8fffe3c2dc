"""Whole training step of a square linear layer over `nn.Linear`: forward, backward, Adam.

python -m benchmarks.linear_step [--quick] [--threads N] [--seconds S] [--out DIR]

The input needs its gradient, as in the middle of a network, and the gradient of the output is
fixed, so that Adam moves every entry by its learning rate: the largest move it makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import _harness as harness
from benchmarks._candidates import OURS, PEER, TORCH, Candidate
from orthonet.testing import orthogonality_error

PLAIN = f"{TORCH} plain"
CASES = ((256, 8192), (256, 2048), (256, 256), (512, 256), (512, 512), (1024, 1024))
ROWS = [Candidate(OURS, name) for name in ("DEFAULT", "QR", "CHOLESKY")]
ROWS += [Candidate(PEER, name) for name in ("QR", "CHOLESKY", "DEFAULT")]


def training_step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, lr: float) -> harness.Step:
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).backward(grad)
        optimizer.step()

    return step


def run(cases: tuple[tuple[int, int], ...], seconds: float, lr: float = 1e-4) -> dict[str, Any]:
    """One row a layer and case."""
    torch.manual_seed(0)
    rows = []
    for n, batch in cases:
        x, grad = torch.randn(batch, n, requires_grad=True), torch.randn(batch, n)
        layers = {c: c.linear(n, n) for c in ROWS if c.installed}
        steps = {c.name: training_step(layer, x, grad, lr) for c, layer in layers.items()}
        steps[PLAIN] = training_step(nn.Linear(n, n), x, grad, lr)
        timings = harness.interleaved(steps, PLAIN, seconds=seconds, rounds=(3, 40))
        rows += [
            {
                "case": f"{n}, batch {batch}",
                **candidate.row,
                "ratio": timings[candidate.name].ratio,
                "residual": orthogonality_error(layer.weight.detach()),
            }
            for candidate, layer in layers.items()
        ]
    return {"lr": lr, "rows": rows, "environment": harness.environment("cpu", [PEER])}


def summary(result: dict[str, Any]) -> str:
    """Ratios to the plain layer, and the worst residual."""
    rows = result["rows"]
    lines = []
    for name in dict.fromkeys((row["library"], row["preset"]) for row in rows):
        mine = [row for row in rows if (row["library"], row["preset"]) == name]
        worst = max(row["residual"] for row in mine)
        lines.append([" ".join(name), *(f"{row['ratio']:.2f}" for row in mine), f"{worst:.0e}"])
    return harness.table(["", *dict.fromkeys(row["case"] for row in rows), "residual"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=10.0, help="per case")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    result = run(((8, 16),) if quick else CASES, 0.0 if quick else arguments.seconds)
    path = harness.write("linear_step", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
