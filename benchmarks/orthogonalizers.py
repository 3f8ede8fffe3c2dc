"""Forward + backward of every orthogonalizer, in products of the same size on the same machine.

python -m benchmarks.orthogonalizers [--quick] [--threads N] [--seconds S] [--lr LR]
                                     [--out DIR]

One unit is the product of the weight with a square matrix of its smaller side, timed in the same
rounds. Between two steps the parameter moves by +-lr times the sign of its first gradient, as Adam
would move it (this addition is part of every figure), from a start of condition number about 3.
A library that takes no batch of matrices computes the weights of a batch one by one. The maps that
form the square of the larger side are left out where that is above 512: a step takes seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks._candidates import (
    GEOTORCH,
    GEOTORCH_MAPS,
    OURS,
    PEER,
    PRESETS,
    TORCH,
    TORCH_MAPS,
    Candidate,
    disturbed,
    moving_step,
    write_raw,
)
from orthonet import caching, reparametrizers
from orthonet.testing import orthogonality_error

ALONE = {  # maps of which the preset has a normalizer that they do not need
    "QR alone": reparametrizers.OrthoParams(
        reparametrizers.BatchedIdentity, reparametrizers.BatchedQROrthogonalization
    )
}
OUR_PRESETS = (*PRESETS, *ALONE, "POLAR")
UNIT = "unit"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    shapes: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256),
        (512, 512),
        (2048, 256),
        (16, 64, 64),
    )
    seconds: float = 10.0  # per shape
    rounds: tuple[int, int] = (3, 25)
    lr: float = 1e-3


QUICK = Settings(shapes=((8, 8), (2, 6, 4)), seconds=0.0, rounds=(3, 3))


def modules(shape: tuple[int, ...]) -> Iterator[tuple[Candidate, nn.Module, Callable[[], Tensor]]]:
    """Each installed candidate: the module that holds its parameters, and how to read a weight."""
    for preset in OUR_PRESETS:
        params = ALONE.get(preset) or getattr(reparametrizers, f"{preset}_ORTHO_PARAMS")
        weight = reparametrizers.OrthoWeight(shape, params)
        yield Candidate(OURS, preset), weight, weight
    # The peer's pass-through weight is cut from its parameter: there is no backward to time.
    others = [Candidate(PEER, name) for name in PRESETS if name != "BJORCK_PASS_THROUGH"]
    others += [Candidate(TORCH, name) for name in TORCH_MAPS]
    others += [Candidate(GEOTORCH, name) for name in GEOTORCH_MAPS]
    if max(shape) > 512:
        others = [c for c in others if c.library not in (TORCH, GEOTORCH) and c.preset != "EXP"]
    for candidate in filter(lambda candidate: candidate.installed, others):
        *batch, m, n = shape
        layers = nn.ModuleList(candidate.linear(n, m) for _ in range(math.prod(batch)))

        def read(layers: nn.ModuleList = layers) -> Tensor:
            weights = [layer.weight for layer in layers]
            return weights[0] if len(weights) == 1 else torch.stack(weights)

        yield candidate, layers, read


def training_step(
    module: nn.Module, read: Callable[[], Tensor], direction: Tensor, lr: float
) -> harness.Step:
    """Move the parameters a little, compute the weight, pull a fixed gradient back."""
    for part in module if isinstance(module, nn.ModuleList) else [module]:
        write_raw(part, disturbed)
    named = module.named_parameters()
    raw = [p for name, p in named if p.requires_grad and not name.endswith("bias")]
    return moving_step(raw, read, direction, lr)


def measure(shape: tuple[int, ...], settings: Settings) -> list[dict[str, Any]]:
    """One row a candidate for one shape."""
    direction = torch.randn(shape)
    small = min(shape[-2:])
    left, right = torch.randn(*shape[:-2], max(shape[-2:]), small), torch.randn(small, small)
    right = right.expand(*shape[:-2], -1, -1).contiguous()
    built = {c.name: (c, module, read) for c, module, read in modules(shape)}
    forward = {f"{name} forward": read for name, (_, _, read) in built.items()}
    steps: dict[str, harness.Step] = {UNIT: lambda: left @ right, **forward}
    for name, (_, module, read) in built.items():
        steps[name] = training_step(module, read, direction, settings.lr)
    timings = harness.interleaved(steps, UNIT, seconds=settings.seconds, rounds=settings.rounds)
    rows = []
    for name, (candidate, module, read) in built.items():
        weight = read().detach()
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                **candidate.row,
                "step": timings[name].ratio,
                "step_low": timings[name].ratio_low,
                "step_high": timings[name].ratio_high,
                "forward": timings[f"{name} forward"].ratio,
                "seconds": timings[name].seconds,
                "unit_seconds": timings[UNIT].seconds,
                "saved_weights": harness.saved_bytes(read, module)
                / (weight.numel() * weight.element_size()),
                "residual": orthogonality_error(weight),
            }
        )
    return rows


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    torch.manual_seed(0)
    with caching(False):  # the computation is what is measured; benchmarks/cache.py has the rest
        rows = [row for shape in settings.shapes for row in measure(shape, settings)]
    return {
        "lr": settings.lr,
        "rows": rows,
        "environment": harness.environment("cpu", [PEER, GEOTORCH]),
    }


def summary(result: dict[str, Any]) -> str:
    """Units per step (forward alone), then the worst residual and what is kept for backward."""
    rows = result["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    lines = []
    for name in dict.fromkeys((row["library"], row["preset"]) for row in rows):
        mine = {row["shape"]: row for row in rows if (row["library"], row["preset"]) == name}
        cells = [
            f"{mine[s]['step']:.1f} ({mine[s]['forward']:.1f})" if s in mine else "" for s in shapes
        ]
        worst = max(row["residual"] for row in mine.values())
        saved = max(row["saved_weights"] for row in mine.values())
        lines.append([" ".join(name), *cells, f"{worst:.0e}", f"{saved:.1f}"])
    return harness.table(["", *shapes, "residual", "saved (weights)"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="per shape")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="how far a step moves")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(seconds=arguments.seconds, lr=arguments.lr)
    result = run(QUICK if arguments.quick else settings)
    path = harness.write("orthogonalizers", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
