"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.models._pretrained import PRETRAINED, read_pretrained

__all__ = ["create", "list_models", "register"]

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
    try:
        inspect.signature(_MODELS[name]).bind(**arguments)
    except TypeError as error:
        _checks.fail(
            "create",
            f"arguments must be those of orthonet.models.{name}",
            f"Write them as keywords, {error}",
            arguments=arguments,
        )
    return _MODELS[name](**arguments)


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
