"""Every preset of orthonet against orthogonium's preset of that name and torch's own maps.

    python -m benchmarks.presets [--quick] [--only accuracy|speed] [--threads N] [--device cuda]

prints two tables, how orthogonal the weights are and what a layer costs over its plain `nn` twin,
and writes them to benchmarks/results/presets.json. `python -m benchmarks.page` makes the page of
the documentation from that file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks._candidates import (
    OURS,
    PEER,
    PLAIN,
    PRESETS,
    Candidate,
    candidates,
    conditioned,
    disturbed,
    gaussian,
    write_raw,
)
from benchmarks.linear_step import training_step
from benchmarks.page import tables
from orthonet.testing import orthogonality_error

# What a foreign layer may raise where it cannot go (a dtype, a factorization that fails).
FAILURES = (RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class Case:
    """A layer and an input to time; `kernel_size` 0 means a linear layer."""

    name: str
    inputs: int
    outputs: int
    batch: int
    kernel_size: int = 0
    stride: int = 1
    size: int = 0

    def build(self, candidate: Candidate | None) -> nn.Module:
        """The layer of a candidate, or the plain twin."""
        if candidate is None:
            if not self.kernel_size:
                return nn.Linear(self.inputs, self.outputs)
            padding = self.kernel_size // 2
            return nn.Conv2d(self.inputs, self.outputs, self.kernel_size, self.stride, padding)
        if not self.kernel_size:
            return candidate.linear(self.inputs, self.outputs)
        return candidate.conv(self.inputs, self.outputs, self.kernel_size, self.stride)

    def example(self) -> Tensor:
        return torch.randn(self.batch, self.inputs, *[self.size] * (2 if self.kernel_size else 0))

    def residual(self, layer: nn.Module) -> float:
        """max |sigma - 1| of the weight, or of the convolution on a small torus."""
        weight = layer.weight
        if self.kernel_size:
            weight = harness.circular_operator(weight, self.stride)
        return orthogonality_error(weight)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    shapes: tuple[tuple[int, int], ...] = (
        (64, 64),
        (512, 512),
        (10, 512),
        (512, 10),
        (256, 1024),
    )
    peer_training: tuple[tuple[int, int], ...] = ((64, 64), (10, 512), (512, 10))
    training_steps: int = 200
    cases: tuple[Case, ...] = (
        Case("Linear 64, batch 32", 64, 64, 32),
        Case("Linear 512, batch 32", 512, 512, 32),
        Case("Linear 512, batch 256", 512, 512, 256),
        Case("Linear 512 to 10, batch 32", 512, 10, 32),
        Case("conv 64 k3, 16x16, batch 32", 64, 64, 32, 3, 1, 16),
        Case("conv 64 to 128 k3 s2, 16x16, batch 32", 64, 128, 32, 3, 2, 16),
    )
    presets: tuple[str, ...] = PRESETS
    seconds: float = 6.0
    rounds: tuple[int, int] = (4, 40)
    lr: float = 1e-4  # of Adam in the timed steps


QUICK = Settings(
    shapes=((8, 8), (4, 12)),
    peer_training=((8, 8),),
    training_steps=3,
    cases=(Case("Linear 8", 8, 8, 4), Case("conv 4 k3", 4, 4, 2, 3, 1, 6)),
    seconds=0.0,
    rounds=(2, 2),
)


def train(layer: nn.Module, features: int, outputs: int, dtype: torch.dtype, steps: int) -> None:
    """Adam toward random targets."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    x, y = torch.randn(32, features, dtype=dtype), torch.randn(32, outputs, dtype=dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()


def replace(fill: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """Write the free parameter, then let one training forward see it."""

    def act(layer: nn.Module, features: int, outputs: int, dtype: torch.dtype, steps: int) -> None:
        write_raw(layer, fill)
        layer(torch.zeros(1, features, dtype=dtype))

    return act


STATES: dict[str, Callable[..., None]] = {
    "init": lambda *_: None,
    "trained": train,
    "gaussian": replace(gaussian),
    "kappa 1e3": replace(conditioned),
}


def accuracy(settings: Settings) -> list[dict[str, Any]]:
    """max |sigma - 1| of linear weights, for every candidate, shape, dtype and state."""
    rows: list[dict[str, Any]] = []
    for candidate in candidates(settings.presets):
        if not candidate.installed:
            rows.append({**candidate.row, "error": "not installed"})
            continue
        for dtype in (torch.float32, torch.float64):
            for outputs, inputs in settings.shapes:
                for state, act in STATES.items():
                    skip = candidate.library != OURS and state == "trained"
                    if skip and (outputs, inputs) not in settings.peer_training:
                        continue
                    row = {
                        **candidate.row,
                        "dtype": str(dtype).removeprefix("torch."),
                        "shape": [outputs, inputs],
                        "state": state,
                    }
                    torch.manual_seed(0)
                    try:
                        layer = candidate.linear(inputs, outputs, dtype)
                        act(layer, inputs, outputs, dtype, settings.training_steps)
                        row["residual"] = orthogonality_error(layer.eval().weight)
                    except FAILURES as error:
                        row["error"] = type(error).__name__
                    rows.append(row)
    return rows


def speed(settings: Settings, device: str) -> list[dict[str, Any]]:
    """Time, memory and residual of every candidate and the plain layer."""
    rows: list[dict[str, Any]] = []
    for case in settings.cases:
        layers: dict[str, tuple[Candidate | None, nn.Module]] = {"plain": (None, case.build(None))}
        for candidate in candidates(settings.presets, conv=case.kernel_size > 0):
            if not candidate.installed:
                rows.append({"case": case.name, **candidate.row, "error": "not installed"})
            else:
                layers[candidate.name] = candidate, case.build(candidate)
                write_raw(layers[candidate.name][1], disturbed)
        x = case.example().to(device).requires_grad_()
        grad = torch.randn_like(layers["plain"][1].to(device)(x))
        modes = {"train": {}, "eval": {}}
        for name, (_, layer) in layers.items():
            layer.to(device)
            modes["train"][name] = training_step(layer, x, grad, settings.lr)
            modes["eval"][name] = evaluation(layer, x)
        timings = {}
        for mode, steps in modes.items():
            for _, layer in layers.values():
                layer.train(mode == "train")
            timings[mode] = harness.interleaved(
                steps, "plain", seconds=settings.seconds, rounds=settings.rounds, device=device
            )
        for name, (candidate, layer) in layers.items():
            layer.train()
            weight = layer.weight
            rows.append(
                {
                    "case": case.name,
                    **(candidate.row if candidate else PLAIN),
                    "train": asdict(timings["train"][name]),
                    "eval": asdict(timings["eval"][name]),
                    "weight_bytes": weight.numel() * weight.element_size(),
                    "saved_bytes": harness.saved_bytes(partial(layer, x), layer),
                    "peak_bytes": harness.peak_bytes(modes["train"][name], device),
                    "residual": case.residual(layer.eval()) if candidate else None,
                }
            )
    return rows


def evaluation(layer: nn.Module, x: Tensor) -> harness.Step:
    """Forward without a graph."""

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


PARTS = ("accuracy", "speed")


def run(settings: Settings, device: str = "cpu", parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    result: dict[str, Any] = {
        "training_steps": settings.training_steps,
        "peer_training": settings.peer_training,
        "shapes": settings.shapes,
    }
    for part, measure in (("accuracy", accuracy), ("speed", partial(speed, device=device))):
        if part in parts:
            start = time.perf_counter()
            result[part] = measure(settings)
            result[f"{part}_environment"] = harness.environment(device, [PEER])
            result[f"{part}_minutes"] = (time.perf_counter() - start) / 60
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--only", choices=PARTS, help="measure this part, keep the other")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--device", default="cpu", help="where the speed is measured")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    parts = (arguments.only,) if arguments.only else PARTS
    result = run(settings, arguments.device, parts)
    path = arguments.out / "presets.json"
    if path.exists():  # the part that was not measured now is kept
        result = json.loads(path.read_text()) | result
    harness.write("presets", result, arguments.out)
    for title, text in tables(result).items():
        print(f"### {title}\n\n{text}\n")
    for part in parts:
        print(f"{part}: {result[f'{part}_minutes']:.1f} minutes")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
