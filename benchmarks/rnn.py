"""A training step of a recurrent layer, with an orthogonal kernel and with a plain one.

    python -m benchmarks.rnn [--quick] [--threads N] [--seconds S] [--out DIR]

Every candidate runs the same task in shuffled rounds: a sequence of random inputs, the mean square
of all states as loss, a backward pass, and a step of SGD. The ratio to the baseline is taken within
the round, of the CPU time of the process. The baseline, "plain kernel", is the time loop of
`OrthoRNN` with an ordinary parameter for the kernel; "plain loop" is the loop one writes by hand,
with `unbind`. The peers run in that loop within `cached()`, as their documentation tells.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from benchmarks import _harness as harness
from orthonet import layers, reparametrizers
from orthonet.functional import recurrence
from orthonet.functional.recurrence import recurrence_loop
from orthonet.testing import orthogonality_error

BASELINE = "plain kernel"
PRESETS = ("DEFAULT", "QR", "CHOLESKY", "POLAR_WARM", "EXP")
TRIVS = ("cayley", "exponential")
TORCH_MAPS = ("householder", "cayley", "matrix_exp")


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    inputs: int = 64
    hidden: int = 256
    batch: int = 64
    times: tuple[int, ...] = (200,)
    nonlinearities: tuple[str, ...] = ("tanh", "modrelu", "max_min", "abs")
    seconds: float = 60.0  # for the kernels
    rounds: tuple[int, int] = (3, 25)
    lr: float = 1e-3


QUICK = Settings(inputs=3, hidden=8, batch=2, times=(5,), nonlinearities=("tanh",), seconds=0.0)


class Plain(nn.Module):
    """A recurrent layer with an ordinary kernel, by the fused loop or the one written by hand."""

    def __init__(self, settings: Settings, run: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.run, hidden = run, settings.hidden
        self.linear = nn.Linear(settings.inputs, hidden)
        self.kernel = nn.Linear(hidden, hidden, bias=False)
        nn.init.orthogonal_(self.kernel.weight)

    def forward(self, x: Tensor) -> Tensor:
        h0 = x.new_zeros(x.shape[1], self.kernel.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        return self.run(x, h0, weight, self.kernel.weight, bias, "tanh", None)[0]


class Cached(nn.Module):
    """The usual way to a parametrized kernel: read in every step, within `cached()`."""

    def __init__(self, inner: Plain) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(x.shape[1], self.inner.kernel.out_features), []
        with parametrize.cached():
            for u in self.inner.linear(x).unbind(0):
                h = torch.tanh(torch.addmm(u, h, self.inner.kernel.weight.mT))
                states.append(h)
        return torch.stack(states)


class First(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def kernels(settings: Settings) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Each candidate and how to read its kernel."""
    plain, loop = Plain(settings, recurrence), Plain(settings, recurrence_loop)
    found: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        BASELINE: (plain, lambda: plain.kernel.weight),
        "plain loop": (loop, lambda: loop.kernel.weight),
    }
    stock = nn.RNN(settings.inputs, settings.hidden)
    found["torch nn.RNN, plain kernel"] = (First(stock), lambda: stock.weight_hh_l0)
    options: list[tuple[str, dict[str, Any]]] = [
        (name, {"ortho_params": getattr(reparametrizers, f"{name}_ORTHO_PARAMS")})
        for name in PRESETS
    ]
    options += [(f"triv {name}", {"triv": name}) for name in TRIVS]
    for name, keywords in options:
        layer = layers.OrthoRNN(settings.inputs, settings.hidden, **keywords)
        found[f"orthonet {name}"] = (First(layer), lambda layer=layer: layer.weight_hh_l0)
    for name in TORCH_MAPS:
        inner = Plain(settings, recurrence_loop)
        orthogonal(inner.kernel, "weight", orthogonal_map=name)
        found[f"torch {name}, cached()"] = (Cached(inner), lambda inner=inner: inner.kernel.weight)
    with contextlib.suppress(ModuleNotFoundError):
        geotorch = importlib.import_module("geotorch")
        for name in ("expm", "cayley"):
            inner = Plain(settings, recurrence_loop)
            geotorch.orthogonal(inner.kernel, "weight", triv=name)
            read = lambda inner=inner: inner.kernel.weight  # noqa: E731
            found[f"geotorch {name}, cached()"] = (Cached(inner), read)
    return found


def training_step(model: nn.Module, x: Tensor, lr: float) -> harness.Step:
    """Forward, backward, and a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def interleaved(
    steps: dict[str, harness.Step], baseline: str, settings: Settings, seconds: float
) -> dict[str, dict[str, float]]:
    """Least CPU time of every step, and the median over the rounds of its ratio to the baseline."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for step in steps.values():
        step()
    gc.collect()
    start, done = time.perf_counter(), 0
    low, high = settings.rounds
    while done < low or (done < high and time.perf_counter() - start < seconds):
        shuffle(order)
        for name in order:
            before = time.process_time()
            steps[name]()
            taken[name].append(time.process_time() - before)
        done += 1
    base = taken[baseline]
    return {
        name: {
            "seconds": min(samples),
            "ratio": statistics.median(
                a / max(b, 1e-9) for a, b in zip(samples, base, strict=True)
            ),
            "ratio_of_least": min(samples) / max(min(base), 1e-9),
            "rounds": done,
        }
        for name, samples in taken.items()
    }


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    torch.manual_seed(0)
    rows, loops = [], []
    for steps in settings.times:
        x = torch.randn(steps, settings.batch, settings.inputs)
        built = kernels(settings)
        runs = {name: training_step(model, x, settings.lr) for name, (model, _) in built.items()}
        timings = interleaved(runs, BASELINE, settings, settings.seconds)
        for name, (model, read) in built.items():
            rows.append(
                {
                    "time_steps": steps,
                    "name": name,
                    **timings[name],
                    "saved_bytes": harness.saved_bytes(lambda model=model, x=x: model(x), model),
                    "residual": orthogonality_error(read()),
                }
            )
        for nonlinearity in settings.nonlinearities:
            loops.append({"time_steps": steps, **_loops(nonlinearity, x, settings)})
    return {
        "settings": {"inputs": settings.inputs, "hidden": settings.hidden, "batch": settings.batch},
        "kernels": rows,
        "loops": loops,
        "environment": harness.environment("cpu", ["geotorch"]),
    }


def _loops(nonlinearity: str, x: Tensor, settings: Settings) -> dict[str, Any]:
    """The fused loop compared with the plain one, for one nonlinearity and a plain kernel."""
    hidden = settings.hidden
    weight_ih = torch.randn(hidden, settings.inputs, requires_grad=True)
    weight_hh = nn.init.orthogonal_(torch.empty(hidden, hidden)).requires_grad_()
    bias = torch.zeros(hidden, requires_grad=True)
    threshold = torch.zeros(hidden, requires_grad=True) if nonlinearity == "modrelu" else None
    leaves = [t for t in (weight_ih, weight_hh, bias, threshold) if t is not None]
    arguments = (
        x.new_zeros(x.shape[1], hidden),
        weight_ih,
        weight_hh,
        bias,
        nonlinearity,
        threshold,
    )

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> harness.Step:
        return lambda: torch.autograd.grad(function(x, *arguments)[0].square().mean(), leaves)

    found = interleaved(
        {"fused": step(recurrence), "plain": step(recurrence_loop)}, "plain", settings, 5.0
    )
    return {
        "nonlinearity": nonlinearity,
        "fused_over_plain": found["fused"]["ratio"],
        "fused_seconds": found["fused"]["seconds"],
    }


def summary(result: dict[str, Any]) -> str:
    """The tables."""
    settings = result["settings"]
    lines = [f"hidden {settings['hidden']}, batch {settings['batch']}, inputs {settings['inputs']}"]
    many = sorted({row["time_steps"] for row in result["kernels"]})
    for steps in many:
        rows = [
            [
                row["name"],
                f"{row['ratio']:.2f}",
                f"{row['ratio_of_least']:.2f}",
                f"{1e3 * row['seconds']:.1f}",
                f"{row['saved_bytes'] / 2**20:.1f}",
                f"{row['residual']:.0e}",
            ]
            for row in result["kernels"]
            if row["time_steps"] == steps
        ]
        header = [
            f"training step, T = {steps}",
            "ratio",
            "of the least",
            "ms",
            "saved MiB",
            "residual",
        ]
        lines += ["", harness.table(header, rows)]
        rows = [
            [
                row["nonlinearity"],
                f"{row['fused_over_plain']:.2f}",
                f"{1e3 * row['fused_seconds']:.1f}",
            ]
            for row in result["loops"]
            if row["time_steps"] == steps
        ]
        lines += ["", harness.table(["fused loop over the plain one", "ratio", "ms"], rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="for the kernels")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run(QUICK if arguments.quick else Settings(seconds=arguments.seconds))
    path = harness.write("rnn", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
