"""One thread for many small factorizations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["one_thread"]


class _OneThread:
    """Counts who asks for it.

    torch keeps one number for each thread that has computed already, and one for those to come.
    """

    def __init__(self) -> None:
        self.lock, self.running, self.before = threading.Lock(), 0, 1
        self.own = threading.local()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        if getattr(self.own, "inside", False):
            yield
            return
        with self.lock:
            if self.running == 0:
                self.before = torch.get_num_threads()
            self.running += 1
            self._set(1)
        self.own.inside = True
        try:
            yield
        finally:
            self.own.inside = False
            with self.lock:
                self.running -= 1
                self._set(self.before)

    @staticmethod
    def _set(count: int) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)


_STATE = _OneThread()


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Let torch compute with one thread on the CPU inside of it, and give back all behind it.

    The threads of small factorizations wait for each other: on two cores that others use, fitting
    an orthogonal kernel of 128 channels took 7 s of wall time with two threads and .2 s with one.

    Examples:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    return _STATE.hold()
