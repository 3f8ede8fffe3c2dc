"""Options of the command line, read from the dataclass that configures a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orthonet import _checks

__all__ = [
    "Option",
    "Parsed",
    "check_choices",
    "option",
    "parsed_arguments",
    "parsed_options",
    "plain_text",
    "training_fields",
]

Choices = Sequence[str] | Callable[[], Sequence[str]]
_PLAIN = (int, float, str, bool)


@dataclasses.dataclass(frozen=True)
class Option:
    """What the command line does with a field, beyond its type, default and documentation.

    Attributes:
        choices: The values that are allowed, or a function that lists them.
        flags: Other flags of the field, such as `--data` of `data_root`.
        trains: Whether training depends on the field; `--resume` does not compare the others.
        into: A mapping field. The option sets one entry of it instead of a field.
        help: The text, for options that are no fields; fields have it in their docstring.
    """

    choices: Choices = ()
    flags: tuple[str, ...] = ()
    trains: bool = True
    into: str = ""
    help: str = ""

    def allowed(self) -> tuple[str, ...]:
        """The choices as a tuple, empty if everything is allowed."""
        return tuple(self.choices() if callable(self.choices) else self.choices)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """An option as a parser needs it.

    Attributes:
        name: The field, or the entry of the mapping `into`.
        kind: `int`, `float`, `str` or `bool`, or a function that reads a text.
        many: Whether the option takes several values.
        default: The value without the option; None where it is unknown.
        help: What the option sets, in a clause.
        option: The choices and flags.
    """

    name: str
    kind: Callable[..., Any]
    many: bool
    default: Any
    help: str
    option: Option


def option(
    default: Any = dataclasses.MISSING,
    *,
    choices: Choices = (),
    flags: tuple[str, ...] = (),
    trains: bool = True,
) -> Any:
    """Make a dataclass field with an [`Option`][orthonet.recipes.Option].

    Args:
        default: The default of the field; it has none if left out.
        choices: See `Option`.
        flags: See `Option`.
        trains: See `Option`.
    """
    metadata = {"option": Option(choices, flags, trains)}
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(config: Any) -> None:
    """Require a list in every field of several values, and choices in every field that has them.

    Raises:
        ValueError: A field has another value.
    """
    for field in dataclasses.fields(config):
        allowed, value = _option_of(field).allowed(), getattr(config, field.name)
        _checks.require(
            isinstance(value, (tuple, list)) or not str(field.type).startswith("tuple"),
            config,
            f"{field.name} must be a tuple or a list",
            f"Pass {field.name}=({value!r},)",
            **{field.name: value},
        )
        if allowed:
            for each in value if isinstance(value, (tuple, list)) else (value,):
                _checks.one_of(config, allowed, **{field.name: each})


def training_fields(config: Any) -> dict[str, Any]:
    """Return the fields that training depends on, as plain values."""
    values = dataclasses.asdict(config)
    names = [field.name for field in dataclasses.fields(config) if _option_of(field).trains]
    return {name: values[name] for name in names}


def parsed_options(
    config: type, example: Any, changes: Mapping[str, Option | None]
) -> list[Parsed]:
    """List the options that set the fields of a configuration.

    Args:
        config: The dataclass. Fields that are numbers, strings, truth values, or tuples of them
            have an option each.
        example: A configuration, whose values are the defaults.
        changes: Fields that have no option (None) or another one, and further options.
    """
    hints, texts, found = typing.get_type_hints(config), _documented(config), []
    for field in dataclasses.fields(config):
        chosen = changes.get(field.name, _option_of(field))
        kind, many = _kind(hints[field.name])
        if chosen is None or kind not in _PLAIN:
            continue
        text, default = texts.get(field.name, ""), getattr(example, field.name)
        found.append(Parsed(field.name, kind, many, default, text, chosen))
    known = set(hints)
    for name, chosen in changes.items():
        if chosen is not None and name not in known:
            found.append(Parsed(name, str, False, None, chosen.help, chosen))
    return found


def parsed_arguments(function: Callable[..., Any]) -> list[Parsed]:
    """List the options that set the keywords of a function: those that are numbers or texts.

    A text that may be None is one that may be left out; `Literal` gives the choices.
    """
    hints, found = typing.get_type_hints(function), []
    texts = _entries(function.__doc__, "Args", r"\.(?:\s|$)")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        parts = [part for part in _members(hints[name]) if part is not type(None)]
        choices = tuple(c for part in parts for c in typing.get_args(part) if isinstance(c, str))
        kind = str if choices else parts[0]
        if kind is str and len(parts) < len(_members(hints[name])):
            kind = _text_or_none
        if kind in (int, float, str, _text_or_none) and (choices or len(parts) == 1):
            option = Option(choices)
            found.append(Parsed(name, kind, False, parameter.default, texts.get(name, ""), option))
    return found


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _option_of(field: dataclasses.Field[Any]) -> Option:
    return field.metadata.get("option", Option())


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of a value, and whether there are several."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _documented(config: type) -> dict[str, str]:
    """The first clause of what the docstrings of a class and its bases say of each attribute."""
    texts: dict[str, str] = {}
    for each in reversed(config.__mro__):
        texts |= _entries(each.__doc__, "Attributes", r"[.;](?:\s|$)")
    return texts


def _entries(doc: str | None, section: str, end: str) -> dict[str, str]:
    """What a section of a docstring says of each name, up to the first match of `end`."""
    doc = inspect.cleandoc(doc or "")
    part = re.search(rf"(?:^|\n){section}:\n(.*?)(?:\n\S|\Z)", doc, re.S)
    entries = re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", part[1] if part else "", re.S | re.M
    )
    texts = {name: re.split(end, " ".join(text.split()))[0] for name, text in entries}
    return {name: plain_text(text) for name, text in texts.items()}


def plain_text(text: str) -> str:
    """Return a docstring's text without code marks, mathematics marks and links."""
    text = re.sub(r"\[([^]]*)\]\[[^]]*\]", r"\1", text)
    return text.replace("`", "").replace(r"\(", "").replace(r"\)", "")
