"""What a model is made of: SHA-256 of its tensors, and all other data that its forward may read.

A certificate is bound to these, and a forward pass that changes any of them is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from orthonet._torch import MODULE_ATTRIBUTES, forward_hooks
from orthonet.certify.graph.outside import Reader, digest, is_library

__all__ = ["data_hashes", "fingerprint", "hashes"]


def hashes(model: nn.Module) -> dict[str, str]:
    """The `digest` of every parameter and buffer of a model, by its name."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: digest(tensor) for name, tensor in tensors}


def data_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of everything else that a model is made of, and that its forward may read."""
    return {n: hashlib.sha256(t.encode()).hexdigest() for n, t in _surroundings(model).items()}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A text for everything that the forward pass of a model may read, by its name.

    Besides tensors and attributes these are the hooks, and the globals, closures and class
    attributes that the methods of the user's classes name, with all that these hold.
    """
    return {**hashes(model), **_surroundings(model)}


def _surroundings(model: nn.Module) -> dict[str, str]:
    """All but the parameters and buffers of the model and its modules."""
    reader = Reader(lambda module: repr(_hidden(reader, module)))
    found = dict(_hooks(reader, "global ", None)) | _of_modules(reader, model)
    found |= reader.rest()
    return found | {f"reads {name}": text for name, text in reader.restless()}


def _hidden(reader: Reader, module: nn.Module) -> dict[str, str]:
    """All of a module that is no child of the model, but held by an object or a function."""
    modes = {path: str(m.training) for path, m in module.named_modules()}
    return {**modes, **hashes(module), **_of_modules(reader, module)}


def _of_modules(reader: Reader, model: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    reader.know(model)
    for path, module in model.named_modules():
        cls, prefix = type(module), f"{path}." if path else ""
        found[f"{prefix}__class__"] = f"{cls.__module__}.{cls.__qualname__}"
        found |= dict(_hooks(reader, prefix, module))
        reader.add(cls)
        reader.runs(getattr(cls, "forward", None), cls)
        for name, value in vars(module).items():
            if name in MODULE_ATTRIBUTES or (name.startswith("_") and is_library(cls.__module__)):
                continue  # the latter keep what is computed from the others
            found[prefix + name] = reader.text(value)
    return found


def _hooks(reader: Reader, prefix: str, module: nn.Module | None) -> Iterator[tuple[str, str]]:
    """The hooks around the forward pass of a module, or of every module, and what they read."""
    for place, hook in enumerate(forward_hooks(module)):
        name: Any = getattr(hook, "__qualname__", type(hook).__qualname__)
        yield f"{prefix}hook {place} {name}", reader.text(hook)
