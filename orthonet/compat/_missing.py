"""One sentence for names of another library that have no counterpart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["missing"]


def missing(module: str, library: str, absent: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module: what to use instead of each name in `absent`."""

    def find(name: str) -> Any:
        error = f"module {module!r} has no attribute {name!r}"
        if name in absent:
            error = f"{library}'s {name} has no counterpart here: {absent[name]}"
        raise AttributeError(error, name=name, obj=sys.modules[module])

    return find
