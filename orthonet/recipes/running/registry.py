"""The recipes by name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orthonet import _checks
from orthonet.recipes.running.options import Option, Parsed, parsed_options, plain_text

__all__ = ["Recipe", "register", "registered"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe: the command line derives its options, defaults and help from this.

    Attributes:
        config: A frozen dataclass of plain values, documented field by field under "Attributes:".
        build: Returns a configuration; takes fields to set differently as keywords. Its docstring
            is the help of the recipe.
        run: Takes the configuration, the folder of the results and the keyword `progress`, and
            `resume` and `tensorboard` if it can do so. Returns a report with a `summary()`, or
            None in all processes but the first.
        options: Fields without an option on the command line (None) or with another one, and
            options that set an entry of a mapping field.
        folder: Returns the folder in `runs` that a configuration is written to; the name of the
            recipe by default.
    """

    config: type
    build: Callable[..., Any]
    run: Callable[..., Any]
    options: Mapping[str, Option | None] = dataclasses.field(default_factory=dict)
    folder: Callable[[Any], str] | None = None

    @property
    def summary(self) -> str:
        """The first sentence of the documentation of `build`."""
        return plain_text(" ".join((inspect.getdoc(self.build) or "").split("\n\n")[0].split()))

    def parsed(self) -> list[Parsed]:
        """The options of the command line that set fields of the configuration."""
        return parsed_options(self.config, self.build(), self.options)

    def takes(self, switch: str) -> bool:
        """Whether `run` has a keyword of that name."""
        return switch in inspect.signature(self.run).parameters

    def configured(self, changes: Mapping[str, Any]) -> Any:
        """Return the configuration with the values of some options.

        Raises:
            ValueError: A value out of range.
        """
        values: dict[str, Any] = {}
        for name, value in changes.items():
            value = tuple(value) if isinstance(value, list) else value
            chosen = self.options.get(name)
            if chosen is not None and chosen.into:
                values.setdefault(chosen.into, {})[name] = value
            else:
                values[name] = value
        return self.build(**values)

    def default_folder(self, name: str, config: Any) -> Path:
        """Where the results of a configuration go if no folder is named."""
        return Path("runs") / (name if self.folder is None else self.folder(config))


_RECIPES: dict[tuple[str, str], Recipe] = {}


def register(name: str, recipe: Recipe, *, command: str = "train") -> Recipe:
    """Make a recipe known to the command line. Call it in the file of the recipe.

    Args:
        name: Its name: `orthonet train NAME`.
        recipe: The recipe.
        command: The command that runs it, "train" or "bench".

    Returns:
        The recipe.

    Raises:
        ValueError: The name is taken.
    """
    _checks.one_of("register", ("train", "bench"), command=command)
    _checks.require(
        isinstance(recipe, Recipe),
        "register",
        "recipe must be a Recipe",
        "Pass Recipe(Config, Config, train)",
        recipe=recipe,
    )
    _checks.require(
        (command, name) not in _RECIPES,
        "register",
        "every recipe needs its own name",
        "Rename it",
        name=name,
    )
    _RECIPES[command, name] = recipe
    return recipe


def registered(command: str = "train") -> dict[str, Recipe]:
    """Return the recipes of a command by name, sorted.

    Every file of the package `orthonet.recipes` is imported, so that a recipe is known as soon as
    its file is there.

    Args:
        command: "train" or "bench".

    Examples:
        >>> sorted(registered("bench"))
        ['zoo']
        >>> registered()["digits"].build().epochs
        30
    """
    package = importlib.import_module("orthonet.recipes")
    for info in pkgutil.walk_packages(package.__path__, "orthonet.recipes."):
        importlib.import_module(info.name)
    return {name: recipe for (of, name), recipe in sorted(_RECIPES.items()) if of == command}
