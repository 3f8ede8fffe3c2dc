"""What `import orthonet` costs on top of `import torch`, in CPU seconds.

`python -m benchmarks.import_time [RUNS]` starts a fresh interpreter for every figure, interleaves
the candidates and prints medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

CANDIDATES = (
    "import orthonet",
    "from orthonet import OrthoLinear",
    "from orthonet import certify",
    "from orthonet import *",
)
_CHILD = """
from time import process_time
start = process_time()
import torch
middle = process_time()
{statement}
print(middle - start, process_time() - middle)
"""


def measure(candidates: Sequence[str] = CANDIDATES, runs: int = 7) -> dict[str, float]:
    """Median CPU seconds of `import torch`, and of each statement after it."""
    taken: dict[str, list[float]] = {"import torch": [], **{c: [] for c in candidates}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(runs):
        for statement in candidates:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD.format(statement=statement)],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            torch, ours = map(float, child.stdout.split())
            taken["import torch"].append(torch)
            taken[statement].append(ours)
    return {statement: statistics.median(seconds) for statement, seconds in taken.items()}


def main() -> None:
    """Print one line for each statement."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    for statement, seconds in measure(runs=runs).items():
        after = "" if statement == "import torch" else "after `import torch`"
        print(f"{seconds:7.3f} s  {statement:34} {after}")


if __name__ == "__main__":
    main()
