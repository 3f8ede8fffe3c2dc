"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks

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
    name = builder.__name__
    known = _MODELS.setdefault(name, builder)
    _checks.require(
        known is builder, "register", "every model needs its own name", "Rename it", name=name
    )
    return builder


def create(name: str, **arguments: Any) -> nn.Module:
    """Build the model `name` with the arguments of its builder.

    Args:
        name: One of [`list_models`][orthonet.models.list_models].
        arguments: Passed on to the builder.

    Returns:
        A new model.

    Raises:
        ValueError: An unknown name, or an argument that the builder refuses.

    Examples:
        >>> model = create("convnet_digits", hidden=(32,))
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
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


def list_models() -> list[str]:
    """The names that [`create`][orthonet.models.create] knows, sorted."""
    return sorted(_MODELS)
