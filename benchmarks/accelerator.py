"""Everything that needs a GPU, in one command of at most 8 minutes.

python -m benchmarks.accelerator [--minutes 8] [--device cpu] [--small] [--skip-tests] [--out DIR]

First run the tests marked `gpu`; then, for networks of 64 to 4096 units a layer, eager and
compiled, count kernels and synchronizations of one training step and time it next to the plain
network. A worker process measures one row after the other. A row that takes longer than its share
is given up with its worker, and rows for which no time is left are listed as such, so the whole
ends in time whatever a library does. With `--device cpu` dispatched operators stand for kernels.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _counts as counts
from benchmarks import _harness as harness
from benchmarks import _nets as nets
from benchmarks import engine
from benchmarks._candidates import OURS, PEER, PLAIN, TORCH, Candidate

ROOT = Path(__file__).parents[1]
TESTS_SHARE = 0.3  # of the time, at most
START_UP = 60.0  # seconds at most until a worker has imported torch and opened the device


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long it may take."""

    eager: tuple[nets.Net, ...] = (
        nets.mlp(12, 256, 512),
        nets.cnn(10, 64, 64, 16),
        nets.resnet(2, 64, 64, 16),
        nets.mlp(12, 1024, 512),
        nets.mlp(12, 64, 512),
        nets.cnn(10, 256, 64, 16),
        nets.resnet(2, 128, 64, 32),
        nets.mlp(6, 4096, 512),
    )
    compiled: tuple[nets.Net, ...] = (
        nets.mlp(12, 256, 512),
        nets.cnn(10, 64, 64, 16),
        nets.resnet(2, 64, 64, 16),
        nets.mlp(12, 1024, 512),
    )
    candidates: tuple[Candidate, ...] = (
        nets.PLAIN_LAYERS,
        Candidate(OURS, "DEFAULT"),
        Candidate(OURS, "QR"),
        Candidate(PEER, "QR"),
        Candidate(PEER, "DEFAULT"),
        Candidate(TORCH, "cayley"),
    )
    backend: str = "inductor"
    warm_up: int = 8
    seconds: float = 1.5  # of timing a row
    rounds: tuple[int, int] = (5, 30)
    row_seconds: tuple[float, float] = (20.0, 60.0)  # at most, eager and compiled
    tests: tuple[str, ...] = ()  # files; none: all in which the mark occurs


SMALL = Settings(
    eager=(nets.mlp(2, 8, 4), nets.cnn(2, 4, 2, 6), nets.resnet(1, 4, 2, 6)),
    compiled=(nets.mlp(2, 8, 4),),
    candidates=(
        nets.PLAIN_LAYERS,
        Candidate(OURS, "DEFAULT"),
        Candidate(OURS, "QR"),
        Candidate(PEER, "QR"),
    ),
    backend="aot_eager",
    warm_up=2,
    seconds=0.0,
    rounds=(4, 4),
    row_seconds=(120.0, 240.0),
    tests=("tests/reparametrizers/test_engine_gpu.py",),
)


@dataclass(frozen=True)
class Row:
    """A row to measure: indices into the settings, so that a worker can be told by JSON."""

    net: int
    candidate: int
    compiled: bool

    def named(self, settings: Settings) -> tuple[nets.Net, Candidate, dict[str, Any]]:
        """The network, the candidate, and what identifies the row in the result."""
        net = (settings.compiled if self.compiled else settings.eager)[self.net]
        candidate = settings.candidates[self.candidate]
        return net, candidate, {"net": net.name, "compiled": self.compiled, **candidate.row}


def plan(settings: Settings) -> Iterator[Row]:
    """All rows, the most telling first: eager before compiled, small before large."""
    for compiled, measured in ((False, settings.eager), (True, settings.compiled)):
        for i, net in enumerate(measured):
            for j, candidate in enumerate(settings.candidates):
                if engine.offers(candidate, net):
                    yield Row(i, j, compiled)


def measure(row: Row, settings: Settings, device: str) -> dict[str, Any]:
    """One row: counts of a steady step, its time next to the plain network, memory, residual."""
    net, candidate, result = row.named(settings)
    if not candidate.installed:
        return {**result, "error": "not installed"}
    backend = settings.backend if row.compiled else None
    start = time.perf_counter()
    trained = {
        c.name: engine.train(net, c, warm_up=settings.warm_up, backend=backend, device=device)
        for c in dict.fromkeys((candidate, nets.PLAIN_LAYERS))
    }
    mine = trained[candidate.name]
    timings = harness.interleaved(
        {name: t.step for name, t in trained.items()},
        nets.PLAIN_LAYERS.name,
        seconds=settings.seconds,
        rounds=settings.rounds,
        device=device,
    )
    result |= asdict(timings[candidate.name]) | mine.beside(device)
    if not (row.compiled and torch.device(device).type == "cpu"):  # fused loops are not dispatched
        counted = counts.count(mine.step, device)
        result |= {"launches": counted.launches, "waits": counted.waits}
    if candidate.row == PLAIN:
        result["residual"] = None
    return result | {"row_seconds": time.perf_counter() - start}


def work(rows: Sequence[Row], settings: Settings, device: str) -> None:
    """Measure rows and print each as a line of JSON: the main function of a worker.

    After a failure it ends: a device that has reported an error, or run out of memory, would spoil
    what follows. Its last line says so.
    """
    failures = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
    for row in rows:
        failed = False
        try:
            result = measure(row, settings, device)
        except failures as error:  # of a foreign library, of a compiler, for lack of memory
            text, failed = (str(error).strip().splitlines() or [""])[0], True
            result = row.named(settings)[2] | {"error": f"{type(error).__name__}: {text[:120]}"}
        print(json.dumps([result, failed]), flush=True)
        if failed:
            return
        torch.compiler.reset()


class Worker:
    """A process that measures rows; its results are read without blocking for good."""

    def __init__(self, rows: Sequence[Row], arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.accelerator", *arguments, "--worker"]
        self.process = subprocess.Popen(
            [*command, json.dumps([asdict(row) for row in rows])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("[{"):
                self.lines.put(line)
        self.lines.put(None)

    def next(self, seconds: float) -> tuple[dict[str, Any], bool]:
        """The next result, and whether the worker has ended, on its own or after `seconds`."""
        try:
            line = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return {"error": f"stopped after {seconds:.0f} s"}, True
        if line is None:
            return {"error": "the process ended"}, True
        result, ended = json.loads(line)
        return result, ended

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


def measure_all(
    settings: Settings,
    arguments: Sequence[str],
    deadline: float,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Every row of the plan, or why it is missing; ends at the deadline of `time.monotonic`."""
    rows, done = list(plan(settings)), []
    worker: Worker | None = None
    try:
        while len(done) < len(rows):
            row = rows[len(done)]
            result, left = row.named(settings)[2], deadline - time.monotonic()
            if left <= 0:
                result |= {"error": "no time left"}
            else:
                allowed = settings.row_seconds[row.compiled]
                if worker is None:
                    worker = Worker(rows[len(done) :], arguments)
                    allowed += START_UP
                got, ended = worker.next(min(allowed, left))
                result |= got
                if ended:
                    worker.close()
                    worker = None
            done.append(result)
            report(result)
    finally:
        if worker is not None:
            worker.close()
    return done


def marked_tests() -> list[str]:
    """The test files in which something is marked `gpu`."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]


def run_tests(files: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu` and count outcomes; those that failed are named."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *(files or marked_tests())],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {seconds:.0f} s"}
    taken = time.perf_counter() - start
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    found = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last[0])
    }
    bad = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1, 5) or not found:
        return {"error": last[0], "seconds": taken}
    return {**found, "names_failed": bad, "seconds": taken}


def run(
    settings: Settings,
    device: str,
    minutes: float,
    arguments: Sequence[str],
    tests: bool = True,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Tests, then rows, as one JSON-able result."""
    start = time.monotonic()
    result: dict[str, Any] = {"minutes_allowed": minutes}
    if tests:
        result["tests"] = run_tests(settings.tests, 60 * minutes * TESTS_SHARE)
        report(result["tests"])
    result["rows"] = measure_all(settings, arguments, start + 60 * minutes - 5, report)
    result["minutes"] = (time.monotonic() - start) / 60
    result["environment"] = harness.environment(device, [PEER])
    return result


HEADER = (
    "launches",
    "waits",
    "step over plain",
    "quartiles",
    "ms",
    "peak MB",
    "max abs(sigma - 1)",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    counts = [str(row.get("launches", "")), str(row.get("waits", ""))]
    peak = f"{row['peak_bytes'] / 2**20:.1f}"
    return [*counts, *harness.ratio_cells(row), peak, harness.residual_cell(row)]


def summary(result: dict[str, Any]) -> str:
    """What the tests said, then one table a network."""
    tests = result.get("tests", {})
    parts = (
        ["tests marked gpu: " + ", ".join(f"{k} {v}" for k, v in tests.items())] if tests else []
    )
    return "\n\n".join(parts + harness.network_tables(result["rows"], HEADER, _cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where everything is measured")
    parser.add_argument("--small", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the command ends")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = SMALL if arguments.small else Settings()
    if arguments.worker:
        rows = [Row(**row) for row in json.loads(arguments.worker)]
        return work(rows, settings, arguments.device)
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu --small runs everything else")

    def report(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=sys.stderr, flush=True)

    passed = ["--device", arguments.device, *(["--small"] if arguments.small else [])]
    result = run(
        settings, arguments.device, arguments.minutes, passed, not arguments.skip_tests, report
    )
    print(summary(result))
    print(f"\nwritten to {harness.write('accelerator', result, arguments.out)}")
    return None


if __name__ == "__main__":
    main()
