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

__all__ = ["Reader", "digest", "is_library"]

_LIBRARIES = ("torch", "orthonet", "numpy", "math", "builtins", "einops")

_PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    bool,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
    torch.layout,
    range,
    slice,
    enum.Enum,
)
_FUNCTIONS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property)
_LARGEST_DEPTH = 12
_QUIET = (
    "_thread",
    "weakref",
    "_weakref",
    "_weakrefset",
    "logging",
    "typing",
    "abc",
    "_abc",
    "inspect",
    "types",
    "re",
    "threading",
    "ast",
    "functools",
    "builtins",
)
"""Modules whose objects say nothing to a forward pass, or were read before."""
_RESTLESS = {
    "os": {
        "environ",
        "environb",
        "getenv",
        "getenvb",
        "urandom",
        "times",
        "getpid",
        "getcwd",
        "getloadavg",
        "stat",
        "listdir",
        "exists",  # of its path
        "isfile",
        "isdir",
        "getmtime",
    },
    "time": {
        "time",
        "time_ns",
        "perf_counter",
        "perf_counter_ns",
        "monotonic",
        "monotonic_ns",
        "process_time",
        "process_time_ns",
        "thread_time",
        "localtime",
        "gmtime",
        "ctime",
        "strftime",
    },
    "datetime": {"now", "today", "utcnow"},
    "uuid": {"uuid1", "uuid4"},
    "secrets": {"randbelow", "choice", "token_bytes", "token_hex", "randbits"},
    "torch": {"get_num_threads", "get_num_interop_threads", "initial_seed", "get_rng_state"},
    "gc": {"get_count", "get_stats", "get_objects"},
    "threading": {"active_count", "get_ident", "current_thread"},
}
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
        self.queue: list[Any] = []

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

    def add(self, value: Any) -> None:
        """Take a function or class into what is read, unless it is of a library or of Python."""
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        home = getattr(value, "__module__", None)
        if id(value) not in self.read and not _is_known(home if isinstance(home, str) else ""):
            self.read.add(id(value))
            self.queue.append(value)

    def rest(self) -> dict[str, str]:
        """What the functions and classes are that were met, and what these read, to the last."""
        found: dict[str, str] = {}
        place = 0
        while place < len(self.queue):  # which grows
            value = self.queue[place]
            label = f"{place} {getattr(value, '__qualname__', '')}"
            if isinstance(value, type):
                found |= dict(self._of_class(label, value))
            elif isinstance(value, types.FunctionType):
                found |= dict(self._of_function(label, value))
            place += 1
        return found

    def _of_class(self, label: str, cls: type) -> Iterator[tuple[str, str]]:
        for base in cls.__mro__[1:]:
            self.add(base)
        for name, value in list(vars(cls).items()):
            if isinstance(value, _FUNCTIONS):
                self.add(value)
                yield f"{label}.{name}", str(type(value))
            elif not name.startswith("__") and name not in ("_abc_impl",):
                yield f"{label}.{name}", self.text(value)

    def _of_function(self, label: str, function: Any) -> Iterator[tuple[str, str]]:
        """Its code, and what it reads: globals, cells, defaults, and its helpers'."""
        code = function.__code__
        yield f"{label}()", _code_text(code)
        names = names_in(code)
        for key, value in _values_of(function).items():
            if isinstance(value, types.ModuleType):
                yield from self._of_module(f"{label} > {key}", value, names)
            else:
                yield f"{label} > {key}", self.text(value)

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
            for key in sorted(names & vars(module).keys()):
                yield f"{label}.{key}", self.text(vars(module)[key])

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
            self.add(value)
            return f"class {value.__qualname__}"
        if isinstance(value, _FUNCTIONS):
            owner = getattr(value, "__self__", None)
            self.runs(value)
            self.add(value)
            own = "" if owner is None or isinstance(owner, type) else text(owner)
            return f"{name} {getattr(value, '__qualname__', '')} {own}"
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
                self.add(kind)
                return found
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
    waiting = [function]
    while waiting:
        function = waiting.pop()
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        known = _is_known(getattr(function, "__module__", ""))
        if known or id(function) in seen or not isinstance(function, types.FunctionType):
            continue
        seen.add(id(function))
        names, values = names_in(function.__code__), _values_of(function)
        waiting += [getattr(cls, name, None) for name in sorted(names - values.keys())]  # methods
        for value in values.values():
            found: set[str] = set()
            if isinstance(value, types.ModuleType):
                found = names & _RESTLESS.get(value.__name__, set())
                home = value.__name__
            elif isinstance(value, type(os.environ)):
                found, home = {"environ"}, "os"
            elif isinstance(value, type) and value.__module__ in ("datetime", "uuid"):
                found, home = names & _RESTLESS[value.__module__], value.__module__
            else:
                home = _home(value)
                found = {str(getattr(value, "__name__", ""))} & _RESTLESS.get(home, set())
                waiting.append(value)
            yield from (f"{home}.{name}" for name in sorted(found))


def _home(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def _values_of(function: Any) -> dict[str, Any]:
    """What a function finds outside of itself, by name: globals, cells, defaults, attributes."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    values = dict(_filled(cells))
    names = sorted(names_in(code) & function.__globals__.keys())
    values |= {n: function.__globals__[n] for n in names if not n.startswith("@py")}  # of pytest
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
        _code_text(c)
        if isinstance(c, types.CodeType)
        else sorted(map(repr, c))
        if isinstance(c, frozenset)
        else repr(c)
        for c in code.co_consts
    ]
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


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor: little-endian, in row-major order."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return type(tensor).__name__  # there are none
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
