"""Batch sizes that say what Python asks of them.

A trace guards the comparisons of its symbolic sizes, but forward can tell these from numbers by
their class, and turn them into text. Here the batch size is a number that notes such questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from orthonet.certify.graph.outside import is_library

__all__ = ["counted", "symbolic_places"]

Note = Callable[[str], None]


def symbolic_places(found: Any) -> tuple[int, ...]:
    """Which of the sizes that a trace found depend on the batch size; -1 for a single one."""
    if isinstance(found, torch.SymInt):
        return (-1,)
    sizes = found if isinstance(found, torch.Size) else ()
    return tuple(i for i, n in enumerate(sizes) if isinstance(n, torch.SymInt))


def counted(found: Any, places: tuple[int, ...], note: Note) -> Any:
    """The same sizes, with those in these places counted."""
    if places == (-1,) and type(found) is int:
        return _Count.of(found, note)
    if isinstance(found, torch.Size) and places:
        sizes = (_Count.of(n, note) if i in places else n for i, n in enumerate(found))
        shape = _Shape(sizes)
        shape.note = note
        return shape
    return found


class _Shape(tuple[int, ...]):
    """A shape, as `torch.Size`, that notes when it becomes text."""

    note: Note

    def numel(self) -> int:
        total: Any = 1
        for n in self:
            total = total * n
        return total

    def __repr__(self) -> str:
        _ask(self.note, "str")
        return repr(torch.Size(self))

    def __hash__(self) -> int:
        _ask(self.note, "hash")
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)


class _Count(int):
    """A number of samples: it may be computed with, and compared with 0, 1 and other counts."""

    note: Note

    @classmethod
    def of(cls, value: int, note: Note) -> _Count:
        count = cls(value)
        count.note = note
        return count

    def __hash__(self) -> int:
        _ask(self.note, "hash")
        return super().__hash__()


def _ask(note: Note, name: str) -> None:
    if not is_library(sys._getframe(2).f_globals.get("__name__", "")):
        note(name)


def _comparison(name: str) -> Any:
    plain = getattr(int, name)

    def compare(self: _Count, other: Any) -> Any:
        if not isinstance(other, _Count) and not (isinstance(other, (int, float)) and other <= 1):
            _ask(self.note, name)
        return plain(self, other)

    return compare


def _question(name: str) -> Any:
    plain = getattr(int, name)

    def ask(self: _Count, *args: Any) -> Any:
        _ask(self.note, name)
        return plain(self, *args)

    return ask


def _arithmetic(name: str) -> Any:
    plain = getattr(int, name)

    def compute(self: _Count, *args: Any) -> Any:
        found = plain(self, *args)
        return _Count.of(found, self.note) if type(found) is int else found

    return compute


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(_Count, _name, _comparison(_name))
for _name in (
    "__repr__",
    "__str__",
    "__format__",
    "__int__",
    "__index__",
    "__float__",
    "__bool__",
    "__mod__",
    "__rmod__",
    "__divmod__",
    "__rfloordiv__",
    "__truediv__",
    "__rtruediv__",
    "__and__",
    "__or__",
    "__xor__",
    "__lshift__",
    "__rshift__",
    "__pow__",
    "__rpow__",
    "bit_length",
    "to_bytes",
):
    setattr(_Count, _name, _question(_name))
for _name in (
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__neg__",
    "__pos__",
    "__floordiv__",
    "__abs__",
):
    setattr(_Count, _name, _arithmetic(_name))
