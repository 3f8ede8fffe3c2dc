"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["versions", "write_atomically", "write_csv", "write_json"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Whoever reads `path` sees the old file or the new one, never a part; if `write` fails, the old
    file stays and the temporary one goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[dict[str, float]]) -> Path:
    """Write rows of the same keys as comma-separated values, atomically."""
    lines = [",".join(rows[0]), *(",".join(map(repr, row.values())) for row in rows)]
    return write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def versions() -> dict[str, Any]:
    """Return what writes a file: the versions of the libraries, the machine and its threads."""
    return {
        "orthonet": version("orthonet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
