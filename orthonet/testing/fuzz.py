"""`python -m orthonet.testing.fuzz --seconds 3600`: try the bounds of random graphs for hours."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from orthonet.testing._fuzz import FuzzReport, fuzz_certificates

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the fuzzer and return 1 if a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m orthonet.testing.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long to try")
    parser.add_argument("--graphs", type=int, help="how many graphs to try")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first graph")
    parser.add_argument("--operations", nargs="+", help="draw from these only, such as relu mul")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument(
        "--direct", action="store_true", help="trace without torch.export: ten times as many graphs"
    )
    options = parser.parse_args(arguments)
    if options.seconds is None and options.graphs is None:
        options.seconds = 120.0
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    shown = 0.0

    def progress(report: FuzzReport) -> None:
        nonlocal shown
        if time.monotonic() - shown > 60.0:
            shown = time.monotonic()
            sys.stderr.write(f"{report}\n")

    try:
        report = fuzz_certificates(
            options.graphs,
            seconds=options.seconds,
            seed=options.seed,
            operations=options.operations,
            direct=options.direct,
            progress=progress,
        )
    finally:
        torch.set_num_threads(before)
    sys.stdout.write(f"{report}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
