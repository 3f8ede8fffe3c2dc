"""Run the tests as other processors and thread counts would: `python -m tests.processors`.

Arguments are handed to pytest. Where a kernel is one that this processor lacks, its setting is left
out; libraries ignore the variables that are not theirs, and MKL ignores its instruction sets on
processors that are not Intel's, where `MKL_CBWR` still exchanges its kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

import torch

OWN: dict[str, str] = {}
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
# the kernels that MKL takes on every processor, in an order that depends on nothing
COMPATIBLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def settings(capability: str) -> dict[str, dict[str, str]]:
    """Return the environments to test under, by name, on a processor of an ATen capability."""
    found = {"own, 1 thread": {**OWN, "OMP_NUM_THREADS": "1"}}
    found["own, 2 threads"] = {**OWN, "OMP_NUM_THREADS": "2"}
    if capability == "AVX512":
        found["avx2, 2 threads"] = {**AVX2, "OMP_NUM_THREADS": "2"}
    if capability in ("AVX512", "AVX2"):
        found["oldest, 1 thread"] = {**OLDEST, "OMP_NUM_THREADS": "1"}
        found["compatible, 2 threads"] = {**COMPATIBLE, "OMP_NUM_THREADS": "2"}
    return found


def run(chosen: Mapping[str, Mapping[str, str]], arguments: Iterable[str]) -> list[str]:
    """Run pytest once a setting and return the names of the settings that failed."""
    failed = []
    for name, environment in chosen.items():
        shown = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"\n{name}: {shown}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        if subprocess.run(command, env={**os.environ, **environment}).returncode:
            failed.append(name)
    return failed


def main() -> int:
    chosen = settings(torch.backends.cpu.get_cpu_capability())
    failed = run(chosen, sys.argv[1:])
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} settings passed")
    if failed:
        print("failed: " + "; ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
