"""Models by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.models._pretrained import PRETRAINED, read_pretrained

__all__ = ["arguments_for", "create", "list_models", "register"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Builder) -> Builder:
    """Decorator: make `builder` known to [`create`][orthonet.models.create] by its own name.

    Args:
        builder: A function that returns a new model.

    Raises:
        ValueError: The name is taken by another function.
    """
    name = getattr(builder, "__name__", "")
    _checks.require(
        callable(builder) and name.isidentifier(),
        "register",
        "builder must be a function with a name",
        "Define it with def, not as a lambda",
        builder=builder,
    )
    known = _MODELS.setdefault(name, builder)
    _checks.require(
        known is builder, "register", "every model needs its own name", "Rename it", name=name
    )
    return builder


def create(name: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Build the model `name` with the arguments of its builder, or read a trained network.

    Args:
        name: One of [`list_models`][orthonet.models.list_models]; with `pretrained` one of
            `list_models(pretrained=True)`.
        pretrained: Whether to read a trained network that is part of the package. It is the
            deployed copy in eval mode, of `nn.Conv2d`, `nn.Linear` and this library's activations,
            and [`certificate_path`][orthonet.models.certificate_path] names its certificate. The
            SHA-256 of the certificate and of each weight are checked.
        arguments: Passed on to the builder; none with `pretrained`.

    Returns:
        A new model.

    Raises:
        ValueError: An unknown name, an argument that the builder refuses, or a damaged file.

    Examples:
        >>> model = create("convnet_digits", hidden=(32,))
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> create("fashion", pretrained=True)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    _checks.boolean("create", pretrained=pretrained)
    if pretrained:
        _checks.one_of("create", list_models(pretrained=True), name=name)
        _checks.require(
            not arguments,
            "create",
            "a pretrained network takes no arguments",
            "Leave them out, or build an untrained one",
            arguments=arguments,
        )
        known = PRETRAINED[name]
        model: Any = create(known.builder, **known.arguments)
        return read_pretrained(name, model)
    _checks.one_of("create", list_models(), name=name)
    builder = _MODELS[name]
    try:
        inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        _refuse(name, arguments, error)
    try:
        return builder(**arguments)
    except TypeError as error:
        if not _passes_on(builder):
            raise
        _refuse(name, arguments, error)


def _refuse(name: str, arguments: dict[str, Any], error: TypeError) -> NoReturn:
    _checks.fail(
        "create",
        f"arguments must be those of orthonet.models.{name}",
        f"Write them as keywords, {error}",
        arguments=arguments,
    )


def _passes_on(builder: Callable[..., nn.Module]) -> bool:
    """Whether a builder hands keywords on to another one, which its signature does not name."""
    kinds = (parameter.kind for parameter in inspect.signature(builder).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def arguments_for(name: str, in_shape: Sequence[int], num_classes: int) -> dict[str, Any]:
    """Return the arguments with which the model `name` takes such inputs.

    These are `in_shape`, `in_features` and `num_classes`, as far as its builder names them. A model
    for inputs of one size, such as `convnet_digits`, names none.

    Args:
        name: One of [`list_models`][orthonet.models.list_models].
        in_shape: Shape of one input.
        num_classes: Number of logits.

    Returns:
        Keywords for [`create`][orthonet.models.create].

    Raises:
        ValueError: An unknown name.

    Examples:
        >>> arguments_for("mlp", (1, 8, 8), 10)
        {'in_features': 64, 'num_classes': 10}
        >>> arguments_for("convnet_digits", (1, 8, 8), 10)
        {}
    """
    _checks.one_of("arguments_for", list_models(), name=name)
    shape = tuple(in_shape)
    known = {"in_shape": shape, "in_features": math.prod(shape), "num_classes": num_classes}
    named = inspect.signature(_MODELS[name]).parameters
    return {argument: value for argument, value in known.items() if argument in named}


def list_models(*, pretrained: bool = False) -> list[str]:
    """Return the names that [`create`][orthonet.models.create] knows, sorted.

    Args:
        pretrained: Whether to list the trained networks that are part of the package instead.

    Examples:
        >>> list_models(pretrained=True)
        ['fashion', 'italy_power_demand', 'japanese_vowels']
    """
    _checks.boolean("list_models", pretrained=pretrained)
    return sorted(PRETRAINED if pretrained else _MODELS)
