"""What the code of a forward pass reads from outside of its model: names, closures, classes.

Data are written as texts that are equal for equal data. What cannot be compared, as a clock or a
generator, is never equal, not even to itself.
"""

from __future__ import annotations

import array
import enum
import functools
import hashlib
import itertools
import os
import pickle
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orthonet.certify.graph.memory import digest

__all__ = ["Reader", "is_library"]

_LIBRARIES = ("torch", "orthonet", "numpy", "math", "builtins", "einops")

_PLAIN = (
    int, float, complex, str, bytes, bytearray, bool, type(None), type(...), torch.dtype,
    torch.device, torch.Size, torch.memory_format, torch.layout, range, slice, enum.Enum,
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property)
_LARGEST_DEPTH = 12
_QUIET = ("_thread", "weakref", "_weakref", "_weakrefset", "logging", "typing", "abc", "_abc",
          "inspect", "types", "re", "threading", "ast", "functools", "builtins")  # fmt: skip
"""Modules whose objects say nothing to a forward pass, or were read before."""
_RESTLESS = {
    "os": {"environ", "environb", "getenv", "getenvb", "urandom", "times", "getpid", "getcwd",
           "getloadavg", "stat", "listdir"},
    "time": {"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns",
             "process_time", "process_time_ns", "thread_time", "localtime", "gmtime", "ctime",
             "strftime"},
    "datetime": {"now", "today", "utcnow"},
    "uuid": {"uuid1", "uuid4"},
    "secrets": {"randbelow", "choice", "token_bytes", "token_hex", "randbits"},
}  # fmt: skip
"""What other calls find otherwise, by the modules that have it."""
_NUMBERS = itertools.count()


def is_library(module: str | None) -> bool:
    """Whether a module is part of PyTorch, of this library, or of what they rest on."""
    return (module or "").split(".")[0] in _LIBRARIES


def _is_known(module: str | None) -> bool:
    """Whether it is one of these, or of Python."""
    return is_library(module) or (module or "").split(".")[0] in sys.stdlib_module_names


class Reader:
    """Writes texts of data, and finds the data that functions read; each object once."""

    def __init__(self, module_text: Callable[[nn.Module], str]) -> None:
        self.module_text = module_text
        self.paths: dict[int, str] = {}
        self.running: list[tuple[Any, type]] = []
        self.texts: dict[int, str] = {}
        self.kept: list[Any] = []
        self.read: set[int] = set()
        self.classes: dict[type, None] = {}

    def know(self, model: nn.Module) -> None:
        """Take the modules of a model as known: others say their path only."""
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)

    def runs(self, function: Any, cls: type = object) -> None:
        """Note that a forward pass may run a function, of the methods of a class."""
        self.running.append((function, cls))

    def restless(self) -> Iterator[tuple[str, str]]:
        """The clocks, the environment and the like that the forward pass may read; never equal."""
        seen: set[int] = set()
        for function, cls in self.running:
            for name in _restless(function, cls, seen):
                yield name, f"{next(_NUMBERS)}"

    def of_class(self, cls: type) -> Iterator[tuple[str, str]]:
        """The attributes of a class of the user's, and what its methods read."""
        if cls in self.classes:
            return
        self.classes[cls] = None
        for base in cls.__mro__:
            if _is_known(base.__module__):
                continue
            for name, value in list(vars(base).items()):
                label = f"{base.__qualname__}.{name}"
                if isinstance(value, _FUNCTIONS):
                    yield from self.of_function(label, value)
                elif not name.startswith("__") and name not in ("_abc_impl",):
                    yield label, self.text(value)

    def of_function(self, name: str, function: Any) -> Iterator[tuple[str, str]]:
        """What a function is, and what it reads: globals, cells, defaults, and its helpers'."""
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None or id(function) in self.read:
            return
        self.read.add(id(function))
        self.kept.append(function)
        yield f"{name}()", _code_text(code)
        names, values = names_in(code), _values_of(function)
        for key, value in values.items():
            label = f"{name} > {key}"
            if isinstance(value, types.ModuleType):
                yield from self._of_module(label, value, names)
            elif isinstance(value, (types.FunctionType, types.MethodType)):
                if not is_library(value.__module__):
                    yield from self.of_function(label, value)
            elif isinstance(value, type):
                yield from self.of_class(value)
            else:
                yield label, self.text(value)

    def _of_module(
        self, label: str, module: types.ModuleType, names: set[str]
    ) -> Iterator[tuple[str, str]]:
        """What code with these names may read of a module."""
        root = module.__name__.split(".")[0]
        if root == "random":
            yield label, _hash(repr(random.getstate()))
        elif root == "numpy":
            yield label, _of_numpy(sys.modules["numpy"].random.get_state())
        elif not _is_known(root):
            for key in names & vars(module).keys():
                value = vars(module)[key]
                if isinstance(value, (types.FunctionType, types.MethodType)):
                    yield from self.of_function(f"{label}.{key}", value)
                elif isinstance(value, type):
                    yield from self.of_class(value)
                elif not isinstance(value, types.ModuleType):
                    yield f"{label}.{key}", self.text(value)

    def text(self, value: Any, depth: int = 0) -> str:
        """Equal for equal data."""
        if isinstance(value, Tensor):
            return _tensor_text(value)
        if type(value) in (float, int, str, bool, type(None)) or isinstance(value, _PLAIN):
            return repr(value)
        if id(value) not in self.texts:
            if id(value) in self.paths:
                return f"module {self.paths[id(value)]}"
            self.texts[id(value)] = f"{type(value).__qualname__} around"  # where it holds itself
            self.kept.append(value)
            if depth > _LARGEST_DEPTH:
                return type(value).__qualname__
            self.texts[id(value)] = self._text(value, depth)
        return self.texts[id(value)]

    def _text(self, value: Any, depth: int) -> str:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"

        def text(value: Any) -> str:
            return self.text(value, depth + 1)

        if isinstance(value, nn.Module):
            return self.module_text(value)
        if isinstance(value, type):
            inside = [] if _is_known(value.__module__) else [*self.of_class(value)]
            return f"class {value.__qualname__} {inside}"
        if isinstance(value, _FUNCTIONS):
            owner = getattr(value, "__self__", None)
            known = is_library(getattr(value, "__module__", None))
            self.runs(value)
            inside = [] if known else [*self.of_function(kind.__name__, value)]
            own = "" if owner is None or isinstance(owner, type) else text(owner)
            return f"{name} {getattr(value, '__qualname__', '')} {own} {inside}"
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            module = owner is None or isinstance(owner, (types.ModuleType, type))
            return value.__qualname__ if module else f"{value.__qualname__} {text(owner)}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if kind.__module__.startswith("numpy"):
            return name + _of_numpy(value)
        if isinstance(value, torch.Generator):
            return digest(value.get_state())
        inside = ""
        if isinstance(value, dict):
            inside = f"{{{','.join(f'{text(k)}:{text(v)}' for k, v in list(value.items()))}}}"
        elif isinstance(value, (tuple, list, deque)):
            inside = f"[{','.join(map(text, list(value)))}]"
        elif isinstance(value, (set, frozenset)):
            inside = f"{{{','.join(sorted(map(text, value)))}}}"
        elif isinstance(value, array.array):
            inside = _hash(repr(value.tobytes()))
        if kind.__module__ == "builtins" and inside:
            return inside
        return f"{name}{inside}{self._object(value, kind, text)}"

    def _object(self, value: Any, kind: type, text: Callable[[Any], str]) -> str:
        """The rest of an object: its attributes, those of its class, or what would be pickled."""
        if is_library(kind.__module__) and kind.__module__ != "builtins":
            return ""
        found = ""
        slots = [s for c in kind.__mro__ for s in _slots(c)]
        if hasattr(value, "__dict__") or slots:
            held = {**{s: getattr(value, s, None) for s in slots}, **getattr(value, "__dict__", {})}
            found = text(held)
            if not _is_known(kind.__module__):
                return f"{found}{sorted(self.of_class(kind))}"
        if isinstance(value, (dict, tuple, list, deque, set, frozenset, array.array)):
            return found
        if isinstance(value, random.Random):
            return _hash(repr(value.getstate()))
        if isinstance(value, functools.partial):
            return text((value.func, value.args, value.keywords))
        if kind.__module__.split(".")[0] in _QUIET and not hasattr(kind, "__next__"):
            return found
        try:
            reduced = value.__reduce_ex__(2)
        except (TypeError, ValueError, AttributeError, RuntimeError, pickle.PickleError):
            return found + f"{next(_NUMBERS)} is never equal"
        if isinstance(reduced, str):
            return found + reduced
        return found + text([list(r) if hasattr(r, "__next__") else r for r in reduced[1:]])


def _restless(function: Any, cls: type, seen: set[int]) -> Iterator[str]:
    """The clocks, the environment and the like that a method or what it calls may read."""
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or id(function) in seen or _is_known(getattr(function, "__module__", "")):
        return
    seen.add(id(function))
    names, values = names_in(code), _values_of(function)
    for name in sorted(names - values.keys()):
        yield from _restless(getattr(cls, name, None), cls, seen)  # a method
    for value in values.values():
        if isinstance(value, types.ModuleType):
            found = names & _RESTLESS.get(value.__name__, set())
            yield from (f"{value.__name__}.{name}" for name in sorted(found))
        elif isinstance(value, type(os.environ)):
            yield "os.environ"
        elif isinstance(value, type) and value.__module__ in ("datetime", "uuid"):
            found = names & _RESTLESS[value.__module__]
            yield from (f"{value.__module__}.{name}" for name in sorted(found))
        elif getattr(value, "__name__", "") in _RESTLESS.get(_home(value), ()):
            yield f"{_home(value)}.{value.__name__}"
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            yield from _restless(value, cls, seen)


def _home(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def _values_of(function: Any) -> dict[str, Any]:
    """What a function finds outside of itself, by name: globals, cells, defaults, attributes."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    values = dict(_filled(cells))
    values |= {n: function.__globals__[n] for n in names_in(code) if n in function.__globals__}
    values |= {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
    values |= {f"default {n}": v for n, v in (function.__kwdefaults__ or {}).items()}
    return values | vars(function)


def _filled(cells: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:  # empty
            continue


def names_in(code: types.CodeType) -> set[str]:
    """The names that a code object and those inside of it look up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
    return found


def _code_text(code: types.CodeType) -> str:
    """Equal for equal code."""
    constants = [
        _code_text(c) if isinstance(c, types.CodeType)
        else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]  # fmt: skip
    return _hash(f"{code.co_code.hex()}{constants}{code.co_names}{code.co_varnames}")


def _of_numpy(value: Any) -> str:
    """The data of an array, a number, or a source of random numbers of NumPy."""
    if hasattr(value, "tobytes"):
        data = value.tolist() if value.dtype.hasobject else value.tobytes()
        return f"{value.dtype}{value.shape}{_hash(repr(data))}"
    if hasattr(value, "bit_generator"):
        return _hash(repr(value.bit_generator.state))
    if hasattr(value, "get_state"):
        value = value.get_state()
    if isinstance(value, (tuple, list)):
        return ",".join(map(_of_numpy, value))
    return repr(value)


def _tensor_text(value: Tensor) -> str:
    if nn.parameter.is_lazy(value) or value.is_meta:
        return type(value).__name__
    try:
        return f"{value.dtype}{tuple(value.shape)}{digest(value)}"
    except RuntimeError:  # of a trace, or of a class without data
        return f"{type(value).__qualname__}{value.dtype}{tuple(value.shape)}"


def _slots(cls: type) -> tuple[str, ...]:
    found = vars(cls).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
