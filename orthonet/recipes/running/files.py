"""JSON and comma-separated values, and who wrote them."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthonet.certify.report.files import replacing, write_atomically

__all__ = ["replacing", "versions", "write_atomically", "write_csv", "write_json"]


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
