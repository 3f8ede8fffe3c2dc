"""Recipes whose `run` only records its call."""

import dataclasses
from typing import Any

from orthonet.recipes import registered
from orthonet.recipes.running import registry


@dataclasses.dataclass
class Printed:
    """A report."""

    text: str = "the summary"

    def summary(self, *, certificate: bool = True) -> str:
        return self.text


def recorded(monkeypatch, *names: str, command: str = "train") -> list[tuple[Any, ...]]:
    """Replace the `run` of some recipes; what they were called with is appended to the result."""
    made: list[tuple[Any, ...]] = []

    def record(config, out, *, progress, resume=False, tensorboard=False):
        switches = {"resume": resume, "tensorboard": tensorboard}
        made.append(
            (config, out, {"progress": progress} | {k: v for k, v in switches.items() if v})
        )
        return Printed()

    known = registered(command)
    for name in names:
        changed = dataclasses.replace(known[name], run=record)
        monkeypatch.setitem(registry._RECIPES, (command, name), changed)
    return made
