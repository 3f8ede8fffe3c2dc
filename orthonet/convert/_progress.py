"""Saying how far a long conversion has come: to a callback, a bar on stderr, and the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from orthonet import _checks

__all__ = ["Progress", "reporter"]

Progress = Callable[[int, int, str], None]

_LOG = logging.getLogger("orthonet.convert")
_PAUSE = 5.0  # seconds between two lines of the log
_WIDTH = 30


def _bar(done: int, total: int, what: str) -> None:
    full = _WIDTH * done // max(total, 1)
    line = f"\r{'#' * full}{'.' * (_WIDTH - full)} {done}/{total} {what}"
    sys.stderr.write(f"{line[:79]:<79}" + "\n" * (done == total))
    sys.stderr.flush()


def reporter(progress: bool | Progress | None) -> Progress:
    """The function that is told `(done, total, what is next)`.

    Args:
        progress: A function that is called so; True for a bar on stderr; False or None for neither.
            A line every few seconds goes to the logger `"orthonet.convert"` at level INFO anyway.
    """
    _checks.require(
        progress is None or isinstance(progress, bool) or callable(progress),
        "orthogonalize",
        "progress must be True, False, or a function of (done, total, what)",
        "Pass progress=True for a bar on stderr",
        progress=progress,
    )
    told = _bar if progress is True else progress or None
    last = time.monotonic()

    def tell(done: int, total: int, what: str) -> None:
        nonlocal last
        if told is not None:
            told(done, total, what)
        if time.monotonic() - last > _PAUSE:
            last = time.monotonic()
            _LOG.info("orthogonalize: %s, %d of %d", what, done, total)

    return tell
