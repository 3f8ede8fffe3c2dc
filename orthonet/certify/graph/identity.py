"""What a model is made of: SHA-256 of its tensors, and all other data that its forward may read.

A certificate is bound to these, and a forward pass that changes any of them is refused.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orthonet._torch import MODULE_ATTRIBUTES, forward_hooks

__all__ = ["data_hashes", "digest", "fingerprint", "hashes", "is_library"]

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_LARGEST_DEPTH = 6
_LIBRARIES = ("torch", "orthonet", "numpy", "math", "builtins", "einops")


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor: little-endian, in row-major order."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def hashes(model: nn.Module) -> dict[str, str]:
    """The `digest` of every parameter and buffer of a model, by its name."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: digest(tensor) for name, tensor in tensors}


def data_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of everything else that a model is made of: classes, hooks, plain attributes."""
    found = _attributes(model, objects=False)
    return {n: hashlib.sha256(text.encode()).hexdigest() for n, text in found.items()}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A text for everything that the forward pass of a model may read, by its name.

    Besides tensors and attributes these are the globals, closures and class attributes that the
    methods of the user's classes name.
    """
    found = {**hashes(model), **_attributes(model, objects=True)}
    classes: dict[type, None] = {}
    for path, module in model.named_modules():
        classes |= dict.fromkeys(c for c in type(module).__mro__ if not is_library(c.__module__))
        for name, value in vars(module).items():
            if isinstance(value, (types.FunctionType, types.MethodType)):
                found.update(_read_by(f"{path}.{name}", value, set()))
    for cls in classes:
        for name, value in vars(cls).items():
            if isinstance(value, (types.FunctionType, staticmethod, classmethod, property)):
                found.update(_read_by(f"{cls.__qualname__}.{name}", value, set()))
            elif not name.startswith("__") and name != "_abc_impl":
                found[f"{cls.__qualname__}.{name}"] = _text(value)
    return found


def is_library(module: str | None) -> bool:
    """Whether a module is part of PyTorch, of this library, or of what they rest on."""
    return (module or "").split(".")[0] in _LIBRARIES


def _attributes(model: nn.Module, objects: bool) -> dict[str, str]:
    """The plain attributes of the modules; with `objects` also of the objects that they hold.

    Attributes that start with an underscore are left out where the module is of this library or
    of PyTorch: they keep what is computed from the others.
    """
    found = {}
    for path, module in model.named_modules():
        kind = type(module)
        prefix = f"{path}." if path else ""
        found[f"{prefix}__class__"] = f"{kind.__module__}.{kind.__qualname__}"
        for hook in forward_hooks(module):
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            found[f"{prefix}hook {name}"] = found.get(f"{prefix}hook {name}", "") + "1"
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES and not (
                name.startswith("_") and is_library(kind.__module__)
            ):
                found[prefix + name] = _text(value, objects=objects)
    return found


def _read_by(name: str, function: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    """The data that a function reads from outside: globals, cells, defaults, and its helpers'."""
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or id(function) in seen:
        return
    seen.add(id(function))
    outside = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))
    values = {n: getattr(cell, "cell_contents", None) for n, cell in _filled(outside)}
    values |= {n: function.__globals__[n] for n in _names(code) if n in function.__globals__}
    values |= {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
    values |= vars(function)
    for key, value in values.items():
        if isinstance(value, (types.FunctionType, types.MethodType)):
            if not is_library(value.__module__):
                yield from _read_by(f"{name} > {key}", value, seen)
        elif not isinstance(value, (types.ModuleType, nn.Module)):
            yield f"{name} > {key}", _text(value)


def _filled(cells: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, cell in cells.items():
        try:
            cell.cell_contents  # noqa: B018 (an empty cell raises)
        except ValueError:
            continue
        yield name, cell


def _names(code: types.CodeType) -> set[str]:
    """The names that a code object and those inside of it look up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _text(value: Any, *, objects: bool = True, seen: frozenset[int] = frozenset()) -> str:
    """Equal for equal data; of what is no data only the class."""
    if isinstance(value, Tensor):
        if nn.parameter.is_lazy(value) or value.is_meta:
            return type(value).__name__
        return f"{value.dtype}{tuple(value.shape)}{digest(value)}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (nn.Module, types.FunctionType, types.MethodType, types.ModuleType, type)):
        return f"{type(value).__name__} {getattr(value, '__qualname__', '')}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in seen or len(seen) > _LARGEST_DEPTH:
        return name
    seen = seen | {id(value)}
    text = functools.partial(_text, objects=objects, seen=seen)
    if isinstance(value, dict):
        return f"{name}{{{','.join(f'{text(k)}:{text(v)}' for k, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"{name}[{','.join(map(text, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{name}{{{','.join(sorted(map(text, value)))}}}"
    if objects and type(value).__module__ == "itertools":
        return repr(value)  # a counter says where it stands
    if objects and hasattr(value, "__dict__") and not is_library(type(value).__module__):
        return f"{name}{text(vars(value))}"
    return name
