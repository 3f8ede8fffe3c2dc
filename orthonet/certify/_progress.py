"""Saying how far a long proof has come: to a callback, and to the log of this package."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Progress", "report", "reporting"]

Progress = Callable[[int, int, str], None]

_LOG = logging.getLogger("orthonet.certify")
_PAUSE = 5.0  # seconds between two lines of the log
_ACTIVE: ContextVar[_Reporter | None] = ContextVar("orthonet_certify_progress", default=None)


class _Reporter:
    """Counts what is done, and tells it to a callback and every few seconds to the log."""

    def __init__(self, callback: Progress | None) -> None:
        self.callback, self.last = callback, time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.callback is not None:
            self.callback(done, total, what)
        if time.monotonic() - self.last > _PAUSE:
            self.last = time.monotonic()
            _LOG.info("certify: %s, %d of %d", what, done, total)


@contextmanager
def reporting(callback: Progress | None) -> Iterator[None]:
    """Within it, `report` goes to this callback and to the log."""
    token = _ACTIVE.set(_Reporter(callback))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def report(done: int, total: int, what: str) -> None:
    """Say that `done` of `total` steps are behind, and what is next."""
    active = _ACTIVE.get()
    if active is not None:
        active(done, total, what)
