"""Reading a certificate strictly: known keys only, and for every value one type.

JSON integers are integers (`true` is none), real numbers are strings as `float.hex` writes them,
and nothing else is a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Check = Callable[[Any, str], Any]


class Rejected(Exception):  # noqa: N818 (a verdict)
    """The certificate does not prove what it claims, or is not one."""


def need(condition: Any, message: str) -> None:
    """Reject the certificate unless the condition holds."""
    if not condition:
        raise Rejected(message)


def _no_number(text: str) -> Any:
    raise Rejected(f"a real number must be float.hex() in quotes, found {text[:40]}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len({key for key, _ in pairs}) == len(pairs), "a key stands twice in one object")
    return dict(pairs)


def _integer(text: str) -> int:
    need(len(text) <= 20, "an integer has too many digits")
    return int(text)


def parse(data: bytes | str, what: str = "the certificate") -> Any:
    """The JSON value of a text without decimal floats, NaN, infinities and repeated keys."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(
            text,
            parse_float=_no_number,
            parse_constant=_no_number,
            parse_int=_integer,
            object_pairs_hook=_no_duplicates,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Rejected(f"{what} is no JSON: {error}") from None


def record(value: Any, where: str, required: dict[str, Check], optional: dict[str, Check] = {}):  # noqa: B006
    """The checked entries of an object; missing and unknown keys are rejected."""
    need(type(value) is dict, f"{where} must be an object")
    unknown = sorted(value.keys() - required.keys() - optional.keys())
    missing = sorted(required.keys() - value.keys())
    need(not unknown, f"{where} has unknown keys {unknown}")
    need(not missing, f"{where} lacks the keys {missing}")
    checks = {**required, **optional}
    return {key: checks[key](entry, f"{where}: {key}") for key, entry in value.items()}


def text(value: Any, where: str) -> str:
    """A string."""
    need(type(value) is str, f"{where} must be a string")
    return value


def sha256(value: Any, where: str) -> str:
    """64 hexadecimal digits."""
    need(
        type(value) is str and len(value) == 64 and not set(value) - set("0123456789abcdef"),
        f"{where} must be a SHA-256",
    )
    return value


def one_of(*choices: str) -> Check:
    """One of some strings."""

    def check(value: Any, where: str) -> str:
        need(type(value) is str and value in choices, f"{where} must be one of {choices}")
        return value

    return check


def boolean(value: Any, where: str) -> bool:
    """`true` or `false`."""
    need(type(value) is bool, f"{where} must be true or false")
    return value


SIDE = 2**16
"""The largest stride, dilation, window or padding."""
SIZE = 2**24
"""The most numbers in one value, and the largest of other integers."""


def whole(low: int, high: int = SIZE) -> Check:
    """An integer in [low, high]."""

    def check(value: Any, where: str) -> int:
        need(type(value) is int, f"{where} must be an integer")
        need(low <= value <= high, f"{where} must lie in [{low}, {high}]")
        return value

    return check


def many(check: Check, least: int = 0) -> Check:
    """A list, as a tuple."""

    def checked(value: Any, where: str) -> tuple[Any, ...]:
        need(type(value) is list and len(value) >= least, f"{where} must be a list")
        return tuple(check(entry, where) for entry in value)

    return checked


def pair(value: Any, where: str) -> tuple[int, int]:
    """Two non-negative integers."""
    found = many(whole(0, SIDE))(value, where)
    need(len(found) == 2, f"{where} must be pairs")
    return found


def real(value: Any, where: str) -> Fraction:
    """A finite binary64 number in the only spelling that `float.hex` gives it."""
    need(type(value) is str, f"{where} must be a string of float.hex()")
    try:
        number = float.fromhex(value)
    except (ValueError, OverflowError):
        number = math.nan
    need(math.isfinite(number) and number.hex() == value, f"{where} must be float.hex(): {value!r}")
    return Fraction(number)


def magnitude(value: Any, where: str) -> Fraction:
    """A real number that is not negative."""
    number = real(value, where)
    need(number >= 0, f"{where} must not be negative")
    return number


def optional_real(value: Any, where: str) -> Fraction | None:
    """A real number, or null."""
    return None if value is None else real(value, where)


def anything(value: Any, where: str) -> Any:
    """Whatever is there: information that no claim rests on."""
    return value
