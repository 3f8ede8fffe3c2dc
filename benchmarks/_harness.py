"""Measure relative to a baseline on a noisy machine.

Repetitions of all candidates are interleaved and shuffled, so that a slow second of the machine
falls on all of them; the figure is the median over the rounds of the ratio to the baseline in the
same round. Time never stands alone: memory and the residual max |sigma - 1| stand next to it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports a missing GPU otherwise

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One candidate compared with the baseline: medians over the rounds, quartiles of the ratio."""

    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _time(
    step: Step,
    loops: int,
    device: torch.device,
    clock: Callable[[], float] | None = None,
) -> float:
    clock = clock or time.perf_counter
    _synchronize(device)
    start = clock()
    for _ in range(loops):
        step()
    _synchronize(device)
    return (clock() - start) / loops


def interleaved(
    steps: Mapping[str, Step],
    baseline: str,
    *,
    seconds: float = 6.0,
    rounds: tuple[int, int] = (5, 40),
    device: torch.device | str = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every step in shuffled rounds; `seconds` bounds the whole, within `rounds`.

    The clock is the wall's unless another is given; `time.process_time` with one thread is
    disturbed least by other processes.
    """
    device = torch.device(device)
    loops = {}
    for name, step in steps.items():
        _time(step, 1, device)  # warm-up: allocations, lazily built state
        once = _time(step, 1, device)
        loops[name] = max(1, min(200, int(4e-3 / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
            shuffle(order)
            for name in order:
                taken[name].append(_time(steps[name], loops[name], device, clock))
            done += 1
    finally:
        gc.enable()
    timings = {}
    for name, samples in taken.items():
        ratios = [mine / base for mine, base in zip(samples, taken[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(statistics.median(samples), middle, low, high, done)
    return timings


def fastest(
    steps: Mapping[str, Step], *, seconds: float = 6.0, rounds: tuple[int, int] = (5, 200)
) -> dict[str, float]:
    """Seconds of every step, the least over shuffled rounds: what it takes undisturbed.

    CPU time with one thread, which other processes disturb little, and wall time with several.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    device, loops = torch.device("cpu"), {}
    for name, step in steps.items():
        _time(step, 1, device)
        loops[name] = max(1, min(50, int(1e-3 / max(_time(step, 1, device), 1e-6))))
    best, order = dict.fromkeys(steps, float("inf")), list(steps)
    start, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
        random.Random(done).shuffle(order)
        for name in order:
            best[name] = min(best[name], _time(steps[name], loops[name], device, clock))
        done += 1
    return best


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that one forward keeps for its backward, the module's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def peak_bytes(step: Step, device: torch.device | str = "cpu") -> int:
    """Most memory that one step holds at a time, beyond what was allocated before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def circular_operator(kernel: Tensor, stride: int = 1, size: int = 4) -> Tensor:
    """Dense matrix, in float64, of the circular convolution by `kernel` on a size x size map."""
    kernel = kernel.detach().to("cpu", torch.float64)
    channels, k = kernel.shape[1], kernel.shape[-1]
    basis = torch.eye(channels * size**2, dtype=torch.float64)
    maps = basis.reshape(-1, channels, size, size)
    left, right = k // 2, k - 1 - k // 2
    maps = nn.functional.pad(maps, (left, right, left, right), mode="circular")
    return nn.functional.conv2d(maps, kernel, stride=stride).flatten(1).T


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    kind = torch.device(device).type
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if kind == "cuda" else kind,
        "python": platform.python_version(),
        **{name: version(name) or "not installed" for name in ("torch", "orthonet", *packages)},
    }


def write(name: str, result: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write a result as JSON; a number that is not finite becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, float):
            return float(f"{value:.4g}") if abs(value) < float("inf") else None
        return value

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(clean(result), indent=1, allow_nan=False) + "\n")
    return path


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, numbers flush right."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def network_tables(
    rows: Iterable[Mapping[str, Any]],
    header: Sequence[str],
    cells: Callable[[Mapping[str, Any]], list[str]],
) -> list[str]:
    """One Markdown table a network, of the rows of all libraries and presets."""
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        title = f"{row['net']}, compiled" if row["compiled"] else row["net"]
        failed = [row["error"], *[""] * (len(header) - 1)] if "error" in row else None
        line = [f"{row['library']} {row['preset']}", *(failed or cells(row))]
        groups.setdefault(title, []).append(line)
    return [table([title, *header], lines) for title, lines in groups.items()]


def ratio_cells(row: Mapping[str, Any]) -> list[str]:
    """The time of a row relative to the plain network, its quartiles, and milliseconds."""
    quartiles = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
    return [f"{row['ratio']:.2f}", quartiles, f"{1e3 * row['seconds']:.2f}"]


def residual_cell(row: Mapping[str, Any]) -> str:
    """The residual of a row; empty where nothing is constrained."""
    return "" if row["residual"] is None else f"{row['residual']:.0e}"
