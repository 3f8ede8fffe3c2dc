"""Deterministic counts of a block: launches, host waits, files of the library.

On the CPU the counts come from the profiler, which records what PyTorch dispatches and changes
nothing of it. A `TorchDispatchMode` could: the library may compute weights differently while one
is active. On a CUDA device the profiler counts kernels and PyTorch's own debug mode the
synchronizations.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import _harness as harness  # first: it silences the profiler

import torch  # isort: skip
from torch import Tensor
from torch.profiler import ProfilerActivity

import orthonet

LIBRARY = str(Path(orthonet.__file__).parent)

# Operators whose result the host needs before it can go on. On an accelerator each is a
# synchronization. `_linalg_check_errors` looks at the `info` of a factorization.
WAITING = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
# Those that a launched operator may call inside: an index by a mask, `where` with one argument.
WAITING_INSIDE = WAITING - {"_local_scalar_dense", "_linalg_check_errors", "repeat_interleave"}
# Views whose schema does not say so, allocations, and bookkeeping: no kernel.
FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "detach",
    "detach_",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "is_pinned",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
}
# Methods that copy a tensor to the host without an operator of their own on the CPU.
TO_HOST = {"cpu", "numpy", "tolist"}


@dataclass
class Counts:
    """What one block did.

    Attributes:
        launches: Operators that run a kernel: no views, no allocations, none inside another.
        waits: Times that the host needs a value from the device.
        names: How often each operator was launched.
    """

    launches: int = 0
    waits: int = 0
    names: Counter[str] = field(default_factory=Counter)


@functools.cache
def _kind(operator: str) -> str:
    """Class of the ATen operator: "wait", "free", "composite", "mixed" or "launch".

    Of a mixed one, some overloads are composite: `where` with a number makes a tensor of it first.
    """
    if operator in WAITING:
        return "wait"
    if operator in FREE:
        return "free"
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{operator}")
    composite = {_composite(s) for s in schemas if not s.overload_name.endswith("out")} - {None}
    if composite == {True}:
        return "composite"
    if any(_returns_view(schema) for schema in schemas):
        return "free"
    return "mixed" if True in composite else "launch"


def _returns_view(schema: Any) -> bool:
    infos = [value.alias_info for value in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _composite(schema: Any) -> bool | None:
    """Whether the overload is only a sequence of other operators; None if it is not dispatched."""
    name = f"{schema.name}.{schema.overload_name}".removesuffix(".")
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:  # TorchScript's own, such as aten::sum.int
        return None


def _collect(events: Iterable[Any], counts: Counts, inside: bool = False) -> None:
    """Add what the events and their children did to `counts`.

    Inside a launched operator only what waits on every device counts: the CPU kernel of fused Adam
    reads its step count from memory, the CUDA one does not.
    """
    for event in events:
        space, _, operator = event.name.partition("::")
        kind = _kind(operator) if space == "aten" else "composite"
        if kind == "mixed":
            same = any(child.name == event.name for child in event.cpu_children)
            kind = "composite" if same else "launch"
        if inside:
            counts.waits += space == "aten" and operator in WAITING_INSIDE
        elif kind == "wait":
            counts.waits += 1
            if operator != "_local_scalar_dense":
                counts.launches += 1
                counts.names[operator] += 1
            continue
        elif kind == "launch":
            counts.launches += 1
            counts.names[operator] += 1
        elif kind == "free":
            continue
        _collect(event.cpu_children, counts, inside or kind == "launch")


def _on_cpu(step: harness.Step) -> Counts:
    counts = Counts()

    def watch(_: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", None) in TO_HOST:
            counts.waits += isinstance(called.__self__, Tensor)

    before = sys.getprofile()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        sys.setprofile(watch)
        try:
            step()
        finally:
            sys.setprofile(before)
    _collect((e for e in profile.events() if e.cpu_parent is None), counts)
    return counts


def _on_cuda(step: harness.Step) -> Counts:
    counts = Counts()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    for event in profile.events():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device and not (event.is_user_annotation or "#" in event.name):
            counts.names[event.name] += 1
    counts.launches = sum(counts.names.values())
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    counts.waits = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
    return counts


def count(step: harness.Step, device: torch.device | str = "cpu") -> Counts:
    """Run `step` and count what it launches and how often the host waits for the device.

    On a CUDA device `step` runs twice.
    """
    return _on_cuda(step) if torch.device(device).type == "cuda" else _on_cpu(step)


def files(read: Callable[[], object]) -> list[str]:
    """Run `read` and return the files of the library of which it executes a function."""
    seen: set[str] = set()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            seen.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        read()
    finally:
        sys.setprofile(before)
    return sorted(str(Path(name).relative_to(LIBRARY)) for name in seen)
