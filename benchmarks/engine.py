"""Whole training steps with orthogonal weights over the same step of the plain network, on the CPU.

python -m benchmarks.engine [--quick] [--threads N] [--seconds S] [--nets MLP ...] [--out DIR]

A step is zero_grad, forward, backward and fused Adam. All candidates of a network run interleaved;
shown are the median of the ratio to the plain network in the same round and its quartiles. With one
thread (the default) the time is the processor's, which other processes disturb little. The last
table compares compiled forwards with the compiled plain one, with the bytes that a
forward pass right after a step keeps for its backward pass, and max |sigma - 1| of all weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import _harness as harness
from benchmarks import _nets as nets
from benchmarks._candidates import MATRICES_ONLY, OURS, PEER, PLAIN, TORCH, Candidate

OUR_PRESETS = ("DEFAULT", "POLAR_WARM", "QR", "CHOLESKY", "EXP")
CANDIDATES = (
    *(Candidate(OURS, preset) for preset in OUR_PRESETS),
    Candidate(PEER, "QR"),
    Candidate(PEER, "DEFAULT"),
    Candidate(TORCH, "cayley"),
)


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    eager: tuple[nets.Net, ...] = (nets.linear(), nets.mlp(), nets.cnn(), nets.mixed())
    candidates: tuple[Candidate, ...] = CANDIDATES
    compiled: tuple[nets.Net, ...] = (nets.linear(),)
    compiled_candidates: tuple[Candidate, ...] = (
        Candidate(OURS, "DEFAULT"),
        Candidate(OURS, "POLAR_WARM"),
        Candidate(PEER, "QR"),
    )
    backend: str = "inductor"  # of torch.compile
    warm_up: int = 8
    seconds: float = 20.0  # per table
    rounds: tuple[int, int] = (7, 60)


QUICK = Settings(
    eager=(nets.linear(8, 4), nets.cnn(2, 4, 2, 6)),
    candidates=(Candidate(OURS, "DEFAULT"), Candidate(PEER, "QR"), Candidate(TORCH, "cayley")),
    compiled=(nets.linear(8, 4),),
    compiled_candidates=(Candidate(OURS, "DEFAULT"),),
    backend="aot_eager",
    warm_up=2,
    seconds=0.0,
    rounds=(4, 4),
)


@dataclass
class Trained:
    """A network in training: its step and what stands next to the time."""

    model: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]  # the model, or its compiled form
    x: torch.Tensor
    step: harness.Step

    def beside(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Residual and memory after the steps taken so far."""
        self.step()
        return {
            "saved_bytes": harness.saved_bytes(partial(self.forward, self.x), self.model),
            "peak_bytes": harness.peak_bytes(self.step, device),
            "residual": nets.residual(self.model),
        }


def train(
    net: nets.Net,
    candidate: Candidate,
    *,
    warm_up: int,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """The network of a candidate after some steps; compiled if a `backend` is named.

    A network without convolutions gets an input that requires its gradient, as in the middle of a
    larger one.
    """
    torch.manual_seed(0)
    model = net.build(candidate).to(device)
    x = torch.randn(net.shape).to(device).requires_grad_(not net.convolutions)
    forward = model if backend is None else torch.compile(model, backend=backend)
    step = nets.training_step(model, x, forward=forward)
    for _ in range(warm_up):
        step()
    return Trained(model, forward, x, step)


def offers(candidate: Candidate, net: nets.Net) -> bool:
    """Whether the library of a candidate has the layers of a network."""
    return candidate.row == PLAIN or not (net.convolutions and candidate.library in MATRICES_ONLY)


def measure(net: nets.Net, settings: Settings, compiled: bool) -> list[dict[str, Any]]:
    """One row a candidate, the plain network last."""
    row = {"net": net.name, "compiled": compiled}
    candidates = settings.compiled_candidates if compiled else settings.candidates
    candidates = [c for c in candidates if offers(c, net)]
    missing = [{**row, **c.row, "error": "not installed"} for c in candidates if not c.installed]
    candidates = [*(c for c in candidates if c.installed), nets.PLAIN_LAYERS]
    backend = settings.backend if compiled else None
    trained = {c: train(net, c, warm_up=settings.warm_up, backend=backend) for c in candidates}
    timings = harness.interleaved(
        {c.name: t.step for c, t in trained.items()},
        nets.PLAIN_LAYERS.name,
        seconds=settings.seconds,
        rounds=settings.rounds,
        clock=time.process_time if torch.get_num_threads() == 1 else None,
    )
    rows = [{**row, **c.row, **asdict(timings[c.name]), **t.beside()} for c, t in trained.items()]
    rows[-1]["residual"] = None  # nothing constrains the plain network
    return [*rows[:-1], *missing, rows[-1]]


def run(settings: Settings) -> dict[str, Any]:
    """Every network, then the compiled ones."""
    rows = []
    for compiled, measured in ((False, settings.eager), (True, settings.compiled)):
        for net in measured:
            rows += measure(net, settings, compiled)
            torch.compiler.reset()
    return {"rows": rows, "environment": harness.environment("cpu", [PEER])}


HEADER = ("step over plain", "quartiles", "ms", "saved MB", "max abs(sigma - 1)")


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row."""
    saved = f"{row['saved_bytes'] / 2**20:.1f}"
    return [*harness.ratio_cells(row), saved, harness.residual_cell(row)]


def summary(result: dict[str, Any]) -> str:
    """One table a network, eager ones first."""
    return "\n\n".join(harness.network_tables(result["rows"], HEADER, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, help="per table")
    parser.add_argument(
        "--nets", nargs="+", metavar="WORD", help="networks whose title contains it"
    )
    parser.add_argument("--out", type=Path, help=f"directory of the JSON ({harness.RESULTS.name})")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = QUICK if arguments.quick else Settings()
    if arguments.seconds is not None:
        settings = replace(settings, seconds=arguments.seconds)
    if arguments.nets:
        settings = replace(
            settings,
            eager=nets.named(settings.eager, arguments.nets),
            compiled=nets.named(settings.compiled, arguments.nets),
        )
    result = run(settings)
    print(summary(result))
    if arguments.out or not (arguments.nets or arguments.quick):
        print(f"\nwritten to {harness.write('engine', result, arguments.out or harness.RESULTS)}")


if __name__ == "__main__":
    main()
