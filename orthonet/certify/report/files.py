"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from orthonet import _checks

__all__ = ["replacing", "write_atomically"]


class _Raw(io.FileIO):
    """A file that remembers its error: torch raises one of its own instead."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`, and move it there when the block has succeeded.

    A reader of `path` sees the old file or the new one, never a part. After an error the old file
    stays and the temporary one goes. The folder must exist, so that a wrong one is told before the
    work begins.

    Raises:
        OSError: The file cannot be made, or the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    _checks.require(
        not path.is_dir(),
        "orthonet",
        "the file must not be a folder",
        "Name a file in it",
        IsADirectoryError,
        file=str(path),
    )
    try:
        raw = _Raw(part, "w")
    except OSError as error:
        _fail(
            path,
            error,
            "the folder of the file must exist and be writable",
            "Make it, or choose another",
        )
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(raw.fileno())
        part.replace(path)
    except (OSError, RuntimeError):
        if raw.error is None:
            raise
        advice = "Free some space, or choose another folder; an older file of that name is whole"
        _fail(path, raw.error, "the file must fit on its disk", advice)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a file as `replacing` does; make its folder.

    Returns:
        The path.

    Raises:
        OSError: The file or its folder cannot be made, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write(file)
    return path


def _fail(path: Path, error: OSError, requirement: str, advice: str) -> NoReturn:
    reason = error.strerror or str(error)
    text = _checks.message("orthonet", requirement, advice, file=str(path), reason=reason)
    wrapped = type(error)(text)
    wrapped.errno = error.errno
    raise wrapped from None
