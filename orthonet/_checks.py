"""The wording of every argument error.

One sentence says what is required and what was got, a second one says what to do::

    {Class}: {requirement}, got {name}={value}. {Advice}.

Nothing else in the library words an argument error, so that the messages stay alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "boolean",
    "fail",
    "floating",
    "in_range",
    "lipschitz_constant",
    "message",
    "non_negative_int",
    "one_of",
    "positive_int",
    "require",
    "weight_shape",
]


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype})"
    return repr(value)


def message(owner: object, requirement: str, advice: str, /, **values: Any) -> str:
    """The sentence of an argument error; `owner` is a name, a class or an instance."""
    if not isinstance(owner, str):
        owner = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    got = ", ".join(f"{name}={_show(value)}" for name, value in values.items())
    got = f", got {got}" if got else ""
    return f"{owner}: {requirement}{got}. {advice.rstrip('.')}."


def fail(
    owner: object,
    requirement: str,
    advice: str,
    error: type[Exception] = ValueError,
    /,
    **values: Any,
) -> NoReturn:
    """Raise `error` with the library's wording."""
    raise error(message(owner, requirement, advice, **values)) from None


def require(
    condition: bool,
    owner: object,
    requirement: str,
    advice: str,
    error: type[Exception] = ValueError,
    /,
    **values: Any,
) -> None:
    """Raise `error` with the library's wording unless `condition` holds."""
    if not condition:
        fail(owner, requirement, advice, error, **values)


def positive_int(owner: object, /, **values: Any) -> None:
    """Every value must be an integer >= 1."""
    for name, value in values.items():
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(
            good, owner, f"{name} must be an integer >= 1", f"Pass {name} >= 1", **{name: value}
        )


def non_negative_int(owner: object, /, **values: Any) -> None:
    """Every value must be an integer >= 0."""
    for name, value in values.items():
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        require(
            good, owner, f"{name} must be an integer >= 0", f"Pass {name} >= 0", **{name: value}
        )


def boolean(owner: object, /, **values: Any) -> None:
    """Every value must be True or False (or 1 or 0), not merely something that has a truth."""
    for name, value in values.items():
        require(
            isinstance(value, int) and value in (0, 1),
            owner,
            f"{name} must be True or False",
            f"Pass {name} so, and a preset by its keyword, ortho_params=preset",
            **{name: value},
        )


def in_range(owner: object, low: float, high: float, /, **values: Any) -> None:
    """Every value must be a number in the closed interval [low, high]."""
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = number and not math.isnan(value) and low <= value <= high
        requirement = f"{name} must be a number in [{low:g}, {high:g}]"
        require(good, owner, requirement, f"Choose {name} inside that interval", **{name: value})


def lipschitz_constant(owner: object, lipschitz: Any) -> float:
    """Return the constant K of a layer as a float, positive and far from the ends of float32."""
    in_range(owner, 1e-30, 1e30, lipschitz=lipschitz)
    return float(lipschitz)


def one_of(owner: object, choices: Collection[Any], /, **values: Any) -> None:
    """Every value must be among `choices`."""
    for name, value in values.items():
        listed = ", ".join(repr(choice) for choice in choices)
        require(
            value in choices,
            owner,
            f"{name} must be one of {listed}",
            "Choose one of them",
            **{name: value},
        )


def floating(owner: object, /, **tensors: Tensor) -> None:
    """Every tensor must be real and floating point."""
    for name, tensor in tensors.items():
        require(
            tensor.is_floating_point(),
            owner,
            f"{name} must be a real floating-point tensor",
            f"Convert it, e.g. {name}.to(torch.float32)",
            **{name: tensor},
        )


def weight_shape(owner: object, shape: Any) -> tuple[int, ...]:
    """Return `shape` as a tuple (*batch, m, n) of non-negative integers."""
    try:
        sizes = tuple(int(size) for size in torch.Size(shape))
    except TypeError:
        sizes = ()
    require(
        len(sizes) >= 2 and min(sizes, default=-1) >= 0,
        owner,
        "weight_shape must be (*batch, m, n)",
        "Give at least the two dimensions of the matrix, e.g. tuple(weight.shape)",
        weight_shape=shape,
    )
    return sizes
