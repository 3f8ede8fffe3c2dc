"""What one training step launches beyond the plain network, and how often the host waits.

python -m benchmarks.launches [--quick] [--nets MLP ...] [--presets QR ...] [--operators]

Counted after some steps of Adam: operators that PyTorch dispatches, without views and allocations,
and values that the host reads. On the CPU both are deterministic, and an accelerator launches a
kernel for each such operator. Where the library asks for the device, the CPU's way is counted.
Beside them stand max |sigma - 1| of all weights after these steps and the number of files of the
library that a read of one weight passes, right after a step and once more.
With `--nets` or `--presets` nothing is written unless `--out` is given.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import _counts as counts
from benchmarks import _harness as harness
from benchmarks import _nets as nets
from benchmarks._candidates import OURS, PEER, PLAIN, Candidate

PRESETS = (
    "DEFAULT",
    "DEFAULT_TEST",
    "POLAR",
    "POLAR_WARM",
    "QR",
    "CHOLESKY",
    "CHOLESKY_STABLE",
    "EXP",
    "AUTO",
    "BJORCK_PASS_THROUGH",
)
CANDIDATES = (
    *(Candidate(OURS, p) for p in PRESETS),
    Candidate(PEER, "QR"),
    Candidate(PEER, "DEFAULT"),
)


@dataclass(frozen=True)
class Settings:
    """What is counted."""

    nets: tuple[nets.Net, ...] = (
        *(nets.mlp(depth, batch=64) for depth in (3, 6, 12, 24)),
        *(nets.cnn(depth) for depth in (5, 10, 20)),
        nets.mixed(),
        nets.resnet(),
    )
    candidates: tuple[Candidate, ...] = CANDIDATES
    warm_up: int = 6
    steps: int = 2
    optimizer: str = "fused"


QUICK = Settings(
    nets=(nets.mlp(2, 8, 4), nets.cnn(2, 4, 2, 6)),
    candidates=(Candidate(OURS, "DEFAULT"), Candidate(OURS, "POLAR_WARM"), Candidate(PEER, "QR")),
    warm_up=3,
    steps=2,
)


def measure(net: nets.Net, candidate: Candidate, settings: Settings) -> dict[str, Any]:
    """Counts of some consecutive steps, worst of them first."""
    torch.manual_seed(0)
    model, x = net.build(candidate), torch.randn(net.shape)
    step = nets.training_step(model, x, optimizer=settings.optimizer)
    for _ in range(settings.warm_up):
        step()
    counted = [counts.count(step) for _ in range(settings.steps)]
    worst = max(counted, key=lambda c: c.launches)
    row = {
        "net": net.name,
        **candidate.row,
        "launches": worst.launches,
        "launches_least": min(c.launches for c in counted),
        "waits": max(c.waits for c in counted),
        "operators": dict(worst.names.most_common()),
    }
    if candidate.row != PLAIN:
        row["residual"] = nets.residual(model)
    if candidate.library == OURS:
        layer = nets.constrained(model)[0]
        step()
        row["files_after_step"] = len(counts.files(lambda: layer.weight))
        row["files_again"] = len(counts.files(lambda: layer.weight))
    return row


def run(
    settings: Settings, report: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """One row a network and candidate."""
    rows = []
    for net in settings.nets:
        plain = measure(net, nets.PLAIN_LAYERS, settings)
        for candidate in settings.candidates:
            if not candidate.installed:
                row = {"net": net.name, **candidate.row, "error": "not installed"}
            else:
                row = measure(net, candidate, settings)
                row["over_plain"] = row["launches"] - plain["launches"]
                extra = Counter(row["operators"])
                extra.subtract(plain["operators"])
                row["operators"] = {name: n for name, n in extra.most_common() if n}
            rows.append(row)
            report(row)
        rows.append(plain)
    return {
        "warm_up": settings.warm_up,
        "steps": settings.steps,
        "optimizer": f"{settings.optimizer} Adam",
        "rows": rows,
        "environment": harness.environment("cpu", [PEER]),
    }


def _line(row: dict[str, Any]) -> list[str]:
    name = f"{row['library']} {row['preset']}"
    if "error" in row:
        return [name, row["error"], *[""] * 4]
    files = f"{row['files_after_step']} / {row['files_again']}" if "files_again" in row else ""
    spread = row["launches_least"] - row["launches"]
    launches = f"{row['launches']}" if "over_plain" not in row else f"+{row['over_plain']}"
    error = f"{row['residual']:.0e}" if "residual" in row else ""
    return [name, launches, str(spread or ""), str(row["waits"]), error, files]


HEADER = (
    "launches over plain",
    "fewest",
    "waits",
    "max abs(sigma - 1)",
    "files: first read / next",
)


def summary(result: dict[str, Any]) -> str:
    """One table a network."""
    parts = []
    for net in dict.fromkeys(row["net"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["net"] == net]
        parts.append(harness.table([net, *HEADER], map(_line, rows)))
    return "\n\n".join(parts)


def overview(result: dict[str, Any]) -> str:
    """One table of all networks; presets with the same counts everywhere share a line."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["preset"] != PLAIN["preset"]:
            cell = row.get("error") or f"{row['over_plain']} ({row['waits']})"
            found.setdefault((row["library"], row["preset"]), []).append(cell)
    lines: dict[tuple[str, ...], list[str]] = {}
    for (library, preset), cells in found.items():
        lines.setdefault((library, *cells), []).append(preset)
    networks = dict.fromkeys(row["net"] for row in result["rows"])
    return harness.table(
        ["launches over plain (host waits)", *networks],
        (
            [f"{library} {', '.join(presets)}", *cells]
            for (library, *cells), presets in lines.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument(
        "--nets", nargs="+", metavar="WORD", help="networks whose titles contain it"
    )
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="these presets")
    parser.add_argument("--operators", action="store_true", help="what each row launches, by name")
    parser.add_argument(
        "--optimizer", choices=("fused", "foreach"), default="fused", help="of Adam"
    )
    parser.add_argument("--out", type=Path, help=f"directory of the JSON ({harness.RESULTS.name})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(QUICK if arguments.quick else Settings(), optimizer=arguments.optimizer)
    if arguments.nets:
        settings = replace(settings, nets=nets.named(settings.nets, arguments.nets))
    if arguments.presets:
        chosen = tuple(c for c in settings.candidates if c.preset in arguments.presets)
        settings = replace(settings, candidates=chosen)

    def report(row: dict[str, Any]) -> None:
        print(" | ".join([row["net"], *_line(row)]), file=sys.stderr, flush=True)
        if arguments.operators and "operators" in row:
            print(f"{row['net']}, {row['library']} {row['preset']}: {row['operators']}\n")

    result = run(settings, report)
    print(summary(result))
    if arguments.out or not (arguments.nets or arguments.presets or arguments.quick):
        print(f"\nwritten to {harness.write('launches', result, arguments.out or harness.RESULTS)}")


if __name__ == "__main__":
    main()
