"""What a step cannot be faster than: its products and factorizations alone, compared with the step.

python -m benchmarks.floor [--quick] [--threads N] [--seconds S] [--out DIR]

One step (an optimizer moves the parameter, the weight is retracted and read, a gradient is pulled
back) is run once under a recorder that notes every matrix product, factorization and triangular
solve with its operands. The floor is the time that these calls alone take, in their order, each
once (all times are the least over interleaved rounds); what the step takes beyond is passes over
memory, looking at the residual, autograd and Python. "least" is two products
there and two back: no map onto orthogonal matrices that looks at its residual takes fewer.
Units as in benchmarks/orthogonalizers.py. For the Cayley map, step and floor are compared with
those of geotorch: the ratio of the floors is what remains when all else costs nothing. Last, the
kernels of convolutions: what a whole training step of the layer over that of the plain one cannot
fall below, with zero padding and with our circular one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _harness as harness
from benchmarks._candidates import GEOTORCH, disturbed
from benchmarks.convolutions import OWN_PAD, PLAIN, moving, plain_steps
from benchmarks.manifolds import candidates
from benchmarks.orthogonalizers import UNIT, training_step
from orthonet import _torch, caching, reparametrizers
from orthonet.layers import OrthoConv2d

# Operators that count as arithmetic, and what the table calls them.
NAMES = {
    "mm": "product",
    "bmm": "product",
    "addmm": "product",
    "baddbmm": "product",
    "linalg_cholesky_ex": "Cholesky",
    "cholesky_inverse": "inverse",
    "linalg_inv_ex": "inverse",
    "linalg_solve_triangular": "triangular solve",
    "_linalg_eigh": "eigh",
    "linalg_qr": "QR",
    "linalg_lu_factor_ex": "LU",
    "linalg_lu_solve": "LU solve",
    "_linalg_solve_ex": "solve",
}
PRESETS = ("DEFAULT", "QR")
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    shapes: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (256, 256),
        (512, 512),
        (2048, 256),
        (16, 64, 64),
    )
    cayley: tuple[int, ...] = (64, 256, 1024)
    kernels: tuple[tuple[int, int, int, int], ...] = (  # in, out, kernel, stride
        (64, 64, 3, 1),
        (256, 256, 3, 1),
        (64, 128, 3, 2),
    )
    inputs: tuple[int, int] = (32, 16)  # batch, pixels on a side
    seconds: float = 8.0  # per shape
    rounds: tuple[int, int] = (3, 300)
    lr: float = 1e-4


QUICK = Settings(
    shapes=((8, 8), (2, 6, 4)),
    cayley=(6,),
    kernels=((4, 4, 3, 1),),
    inputs=(2, 4),
    seconds=0.0,
    rounds=(3, 3),
)


class Recorder(TorchDispatchMode):
    """Notes the calls of the operators in `NAMES`, with copies of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        # A product with a column is a pass over memory, not what is counted here.
        columns = name in ("mm", "bmm") and args[1].shape[-1] == 1
        if name in NAMES and not columns:
            self.names[NAMES[name]] += 1
            self.calls.append(
                (func, tuple(map(_copy, args)), {k: _copy(v) for k, v in kwargs.items()})
            )
        return func(*args, **kwargs)

    def replay(self) -> None:
        """The same calls again, and nothing else."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)

    def summary(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.names.items())


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def record(step: harness.Step) -> Recorder:
    """What one step calls, after one that brings it into its steady state."""
    step()
    recorder = Recorder()
    # The recorder changes nothing, so weights may be kept under it as they are without it.
    with mock.patch.object(_torch, "_dispatch_modes", return_value=0), recorder:
        step()
    return recorder


def measure(shape: tuple[int, ...], settings: Settings) -> list[dict[str, Any]]:
    """One row a preset: floor and step in units."""
    small = min(shape[-2:])
    left, right = torch.randn(*shape[:-2], max(shape[-2:]), small), torch.randn(small, small)
    right = right.expand(*shape[:-2], -1, -1).contiguous()
    direction, steps, recorders = torch.randn(shape), {UNIT: lambda: left @ right}, {}
    for preset in PRESETS:
        weight = reparametrizers.OrthoWeight(
            shape, getattr(reparametrizers, f"{preset}_ORTHO_PARAMS")
        )
        steps[preset] = training_step(weight, weight, direction, settings.lr)
        recorders[preset] = record(steps[preset])
        steps[f"{preset} floor"] = recorders[preset].replay
    x, y = torch.randn(left.shape), torch.randn(left.shape)

    def least() -> None:
        y @ (x.mT @ x)
        x @ (x.mT @ y)

    steps["least"] = least
    best = harness.fastest(steps, seconds=settings.seconds, rounds=settings.rounds)
    return [
        {
            "shape": "x".join(map(str, shape)),
            "preset": preset,
            "calls": recorders[preset].summary(),
            "least": best["least"] / best[UNIT],
            "floor": best[f"{preset} floor"] / best[UNIT],
            "step": best[preset] / best[UNIT],
            "unit_seconds": best[UNIT],
        }
        for preset in PRESETS
    ]


def measure_cayley(n: int, settings: Settings) -> list[dict[str, Any]]:
    """One row a library: step and floor of the square Cayley map, over those of geotorch."""
    direction, steps, recorders = torch.randn(n, n), {}, {}
    for name, layer in candidates(n, n, "cayley").items():
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(disturbed(parameter.view(1, -1)).view_as(parameter))

        def step(layer: nn.Module = layer) -> None:
            (layer.weight * direction).sum().backward()

        steps[name], recorders[name] = step, record(step)
        steps[f"{name} floor"] = recorders[name].replay
    base = GEOTORCH if GEOTORCH in recorders else "torch"
    best = harness.fastest(steps, seconds=settings.seconds, rounds=settings.rounds)
    return [
        {
            "shape": f"{n}x{n}",
            "library": name,
            "calls": recorder.summary(),
            "step": best[name] / best[base],
            "floor": best[f"{name} floor"] / best[f"{base} floor"],
        }
        for name, recorder in recorders.items()
    ]


def measure_kernel(shape: tuple[int, int, int, int], settings: Settings) -> dict[str, Any]:
    """Step and floor of a kernel, and the whole steps of plain layers."""
    inner, out, k, s = shape
    layer = OrthoConv2d(inner, out, k, s, bias=False)
    step = moving(layer, lambda: layer.weight, [], settings.lr)
    recorder = record(step)
    steps = {**plain_steps((*shape, *settings.inputs), settings.lr), "step": step}
    steps["floor"] = recorder.replay
    best = harness.fastest(steps, seconds=settings.seconds, rounds=settings.rounds)
    return {
        "kernel": f"{inner}->{out} k{k} s{s}",
        "calls": recorder.summary(),
        "floor": best["floor"],
        "step": best["step"],
        "zeros": best[PLAIN],
        "circular": best[OWN_PAD],
    }


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    torch.manual_seed(0)
    with caching(False):
        rows = [row for shape in settings.shapes for row in measure(shape, settings)]
        cayley = [row for n in settings.cayley for row in measure_cayley(n, settings)]
        kernels = [measure_kernel(shape, settings) for shape in settings.kernels]
    return {
        "lr": settings.lr,
        "rows": rows,
        "cayley": cayley,
        "kernels": kernels,
        "environment": harness.environment("cpu", [GEOTORCH]),
    }


def summary(result: dict[str, Any]) -> str:
    """Units of the presets, then the Cayley map over geotorch's."""
    lines = [
        [
            f"{r['shape']} {r['preset']}",
            r["calls"],
            f"{r['least']:.1f}",
            f"{r['floor']:.1f}",
            f"{r['step']:.1f}",
            f"{r['step'] / r['floor']:.2f}",
        ]
        for r in result["rows"]
    ]
    first = harness.table(["", "calls", "least", "floor", "step", "step / floor"], lines)
    lines = [
        [f"{r['shape']} {r['library']}", r["calls"], f"{r['floor']:.2f}", f"{r['step']:.2f}"]
        for r in result["cayley"]
    ]
    header = ["Cayley map", "calls", "floor over geotorch's", "step over geotorch's"]
    second = harness.table(header, lines)
    header = [
        "kernel",
        "calls",
        "floor, ms",
        "step, ms",
        "floor over plain zeros",
        "floor over plain, our pad",
    ]
    lines = [
        [
            r["kernel"],
            r["calls"],
            f"{r['floor'] * 1e3:.2f}",
            f"{r['step'] * 1e3:.2f}",
            f"{1 + r['floor'] / r['zeros']:.2f}",
            f"{1 + r['floor'] / r['circular']:.2f}",
        ]
        for r in result["kernels"]
    ]
    return f"{first}\n\n{second}\n\n{harness.table(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="per shape")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run(QUICK if arguments.quick else Settings(seconds=arguments.seconds))
    path = harness.write("floor", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
