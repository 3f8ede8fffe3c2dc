"""A model must be one function, however it is called: its calls of PyTorch must be the same.

A sample shows a branch only where the branch makes a difference; the calls show it everywhere. They
are recorded while the model is exported, and then while it runs at batch 1, with gradients, in
inference mode, with another default dtype and number of threads, and as if it were compiled, and
compared one by one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orthonet import _checks
from orthonet._torch import tensors_in
from orthonet.certify.graph.counts import counted, symbolic_places
from orthonet.certify.graph.outside import digest, is_library
from orthonet.certify.graph.questions import Questions, asker
from orthonet.errors import UncertifiableError

__all__ = ["Recorder", "compare", "recording", "variants"]


class Variant(NamedTuple):
    """One more way to call the model."""

    name: str
    mode: Callable[[], contextlib.AbstractContextManager[Any]]
    single: bool = False
    """At batch 1, not with the batch that it was traced with."""
    threads: bool = False
    """With another number of threads."""
    compiled: bool = False
    """As if it were compiled or exported."""
    dtype: bool = False
    """With another default dtype, so that the dtypes of the calls may differ."""
    counts: bool = False
    """With a batch size that notes what is asked of it."""
    settings: bool = False
    """With the other answer to questions about settings of PyTorch, and without gradients of the
    inputs."""

    @contextlib.contextmanager
    def around(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, this thread sees the model called in this way."""
        answers: dict[Any, Any] = {}
        if self.threads:
            answers[torch.get_num_threads] = torch.get_num_threads() + 1
        if self.compiled:
            answers |= dict.fromkeys(_COMPILING, _yes_to_the_user)
        if self.settings:
            answers |= dict.fromkeys(_SETTINGS, _no_to_the_user)
        if self.dtype:
            answers |= {torch.get_default_dtype: _other_dtype(), torch.tensor: _tensor}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_answering(model, answers))
            if self.dtype:
                stack.enter_context(_Factories())
            stack.enter_context(self.mode())
            yield


def variants() -> list[Variant]:
    """The ways to call a model that may make no difference."""
    none, grad, inference = torch.no_grad, torch.enable_grad, torch.inference_mode
    return [
        Variant("without gradients", none),
        Variant("with a number as the batch size", none, counts=True),
        Variant("with gradients", grad),
        Variant("in inference mode", inference, threads=True),
        Variant("at batch 1", none, single=True),
        Variant("at batch 1 with gradients", grad, single=True, threads=True),
        Variant("at batch 1 in inference mode", inference, single=True),
        Variant("under torch.compile or torch.export", none, compiled=True),
        Variant("with another default dtype", none, dtype=True),
        Variant("with gradients of weights only, or deterministic", grad, settings=True),
    ]


_COMPILING = tuple(
    getattr(torch.compiler, name)
    for name in ("is_compiling", "is_exporting", "is_dynamo_compiling")
    if hasattr(torch.compiler, name)
)


_SETTINGS = (
    torch.are_deterministic_algorithms_enabled,
    torch.is_deterministic_algorithms_warn_only_enabled,
    torch.is_anomaly_enabled,
    torch.is_anomaly_check_nan_enabled,
    torch.is_warn_always_enabled,
)


def _no_to_the_user(function: Callable[[], bool]) -> bool:
    """What is not so where the model asks, the truth where PyTorch or this library does."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return function() if is_library(caller) else not function()


def _yes_to_the_user(function: Callable[[], bool]) -> bool:
    """Yes where the model asks, the truth where PyTorch or this library does."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return function() if is_library(caller) else True


_default_dtype = torch.get_default_dtype  # not the one that answers otherwise


def _other_dtype() -> torch.dtype:
    return torch.float32 if _default_dtype() == torch.float64 else torch.float64


@contextlib.contextmanager
def _answering(model: torch.nn.Module, answers: dict[Any, Any]) -> Iterator[None]:
    """Within it, functions of torch give other answers, or are other functions, to this thread.

    Nothing is set: the default dtype and the threads of the process are those of all threads.
    """
    spaces: list[Any] = [vars(torch), vars(torch.compiler)]
    spaces += [getattr(type(m).forward, "__globals__", {}) for m in model.modules()]
    me, changed = threading.get_ident(), []

    def answering(function: Callable[..., Any], answer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me:
                return function(*args, **kwargs)
            return answer(function, *args, **kwargs) if callable(answer) else answer

        return call

    wrapped = {f: answering(f, answer) for f, answer in answers.items()}
    kinds = (types.BuiltinFunctionType, types.FunctionType)
    for space in {id(s): s for s in spaces}.values() if answers else ():
        for name, value in list(space.items()):
            if isinstance(value, kinds) and value in wrapped:
                changed.append((space, name, value))
                space[name] = wrapped[value]
    try:
        yield
    finally:
        for space, name, value in changed:
            space[name] = value


_FACTORIES = {"zeros", "ones", "empty", "rand", "randn", "eye", "linspace", "logspace"}
_OF_DATA = {"full", "arange", "as_tensor", "scalar_tensor", "asarray"}


def _tensor(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which no mode sees while a model is traced."""
    if kwargs.get("dtype") is None and _has_float(args):
        kwargs["dtype"] = _other_dtype()
    return function(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """In this thread, new tensors without a dtype get another default dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if kwargs.get("dtype") is None and (
            name in _FACTORIES or (name in _OF_DATA and _has_float((args, kwargs)))
        ):
            kwargs["dtype"] = _other_dtype()
        return func(*args, **kwargs)


def _has_float(data: Any) -> bool:
    if isinstance(data, dict):
        data = tuple(data.values())
    return isinstance(data, float) or (
        isinstance(data, (tuple, list)) and any(map(_has_float, data))
    )


# recording --------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One call of PyTorch.

    Attributes:
        calls: What is called with which arguments, and the shapes and dtypes of what it returns,
            for each batch size.
        loose: The same without dtypes.
        data: The contents of the tensors that it reads from outside of the model.
        name: The function.
        path: The module in whose forward it is.
        source: The line of the user's code.
        sized: Where it found sizes that depend on the batch size.
    """

    calls: dict[int, Any]
    loose: dict[int, Any]
    data: tuple[str, ...]
    name: str
    path: str
    source: str
    sized: tuple[int, ...] = ()


class Recorder(TorchFunctionMode):
    """Lists the calls of PyTorch in one forward pass, and what it returns."""

    def __init__(self, model: torch.nn.Module, sizes: tuple[int, ...], path: Callable[[], str]):
        super().__init__()
        self.model, self.sizes, self.path = model, sizes, path
        self.lines: list[Line] = []
        self.ran = False
        self.questions = Questions(path, _source)
        self.counting: Recorder | None = None
        """The record of a trace, where the batch size is to note what is asked of it."""

    def start(self, inputs: Any) -> None:
        """Begin anew: a trace may run the model several times."""
        self.lines, self.kept, self.data, self.ran = [], [], [], True
        self.known: dict[int, Any] = {}
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            self.known.setdefault(id(tensor), ("stored", name))
        for place, tensor in enumerate(inputs):
            self.known[id(tensor)] = ("input", place)
        if len(self.sizes) == 1:
            self.questions.start(tensors_in(inputs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name_of(func)
        if name != "certify_mark" and _is_ours():
            result = self.call(name, func, args, kwargs, ours=True)
            for tensor in tensors_in(result):
                self.known.setdefault(id(tensor), ("ours", len(self.lines)))
            self.kept.append((args, kwargs, result))
            return result
        self.data = []
        before = {
            (n, dtypes): self.text((args, kwargs), n, dtypes)
            for n in self.sizes
            for dtypes in (True, False)
        }
        inner = getattr(func, "__wrapped__", None)
        if inner is not None and not is_library(getattr(func, "__module__", "")):
            with self:  # a function of the user's that PyTorch shows as one call
                return inner(*args, **kwargs)
        result = self.call(name, func, args, kwargs)
        found = tensors_in(result)
        if name == "certify_mark":
            self.known[id(result)] = self.known.get(id(args[0]), "?")
            self.kept.append(result)
            return result
        in_place = name.endswith("_") and not name.endswith("__")
        if not found and not in_place and not name.endswith(_WRITING):
            return self.answer(name, result, before)
        for place, tensor in enumerate(found):
            # also where it is an operand
            self.known[id(tensor)] = ("result", len(self.lines), place)
        self.kept.append((args, kwargs, result))  # so that no id is used again
        calls = {n: (name, before[n, True], self.shapes(found, n, True)) for n in self.sizes}
        loose = {n: (name, before[n, False], self.shapes(found, n, False)) for n in self.sizes}
        source = _source()
        self.lines.append(Line(calls, loose, tuple(self.data), name, self.path(), source))
        return result

    def answer(self, name: str, result: Any, asked: dict[tuple[int, bool], Any]) -> Any:
        """Note a question of the user's about shapes and dtypes, and answer it."""
        if name in _UNASKED or is_library(asker()):
            return result
        place, sized = len(self.lines), symbolic_places(result)
        calls = {n: (name, asked[n, True]) for n in self.sizes}
        loose = {n: (name, asked[n, False]) for n in self.sizes}
        self.lines.append(Line(calls, loose, (), name, self.path(), _source(), sized))
        if self.counting is not None and place < len(self.counting.lines):
            sized = self.counting.lines[place].sized
            return counted(result, sized, self.questions.note_count)
        return result

    def call(self, name: str, func: Any, args: Any, kwargs: Any, ours: bool = False) -> Any:
        """Call a function; outside of a trace, its tensors are followed."""
        if len(self.sizes) > 1:
            return func(*args, **kwargs)
        noted = len(self.questions.found)
        tensors = tensors_in((args, kwargs))
        result = self.questions.ask(name, tensors, lambda: func(*args, **kwargs))
        if ours:  # what a layer of this library asks is its own matter
            del self.questions.found[noted:]
        return result

    def finish(self, result: Any) -> None:
        """Note what the model returns."""
        calls = {n: ("return", self.text(result, n, True)) for n in self.sizes}
        self.lines.append(Line(calls, calls, (), "return", "", ""))
        self.kept, self.known = [], {}

    def text(self, value: Any, size: int, dtypes: bool) -> Any:
        """The same for the same arguments, with `size` for a free batch size."""
        if isinstance(value, Tensor):
            if id(value) not in self.known:
                self.known[id(value)] = ("constant", tuple(map(str, value.shape)))
                self.kept.append(value)
                if len(self.sizes) == 1:  # in a trace it has no contents
                    self.data.append(_content(value))
            return self.known[id(value)]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _at(value, size)
        if isinstance(value, (tuple, list)):
            return tuple(self.text(v, size, dtypes) for v in value)
        if isinstance(value, dict):
            kept = ((k, v) for k, v in value.items() if dtypes or k != "dtype")
            return tuple((str(k), self.text(v, size, dtypes)) for k, v in kept)
        if isinstance(value, slice):
            return ("slice", self.text((value.start, value.stop, value.step), size, dtypes))
        if isinstance(value, torch.dtype):
            return str(value) if dtypes else "dtype"
        if isinstance(value, int) and not isinstance(value, bool):
            return ("int", int.__repr__(value))  # also of a size that is counted
        if isinstance(value, (int, float, complex, str, bytes)):
            return (type(value).__name__, repr(value))
        if type(value).__module__ == "numpy":
            self.data.append(repr(value.tolist()))
        return (type(value).__name__, str(value) if isinstance(value, _PRINTED) else "")

    @staticmethod
    def shapes(found: list[Tensor], size: int, dtypes: bool) -> Any:
        """The shapes and dtypes of tensors, with `size` for a free batch size."""
        return tuple(
            (
                tuple(_at(n, size)[1] if isinstance(n, torch.SymInt) else str(n) for n in t.shape),
                str(t.dtype) if dtypes else t.dtype.is_floating_point,
            )
            for t in found
        )


_UNASKED = {
    "device.__get__"
}  # a trace answers it itself; however a model is called, it is the same
_WRITING = ("__setitem__", "__set__", "__delitem__")
_PRINTED = (type(None), type(...), torch.device, torch.memory_format, torch.layout)


def _name_of(func: Any) -> str:
    """The name of a function, of the property whose getter it is, or of an operation."""
    owner, name = getattr(func, "__self__", None), getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return f"{getattr(owner, '__name__', '')}.{name}"
    return name.split(".")[0]


def _at(number: Any, size: int) -> Any:
    """The value of a symbolic number where every free size is `size`."""
    expression = number.node.expr
    found = expression.subs(dict.fromkeys(expression.free_symbols, size))
    kind = {torch.SymInt: int, torch.SymFloat: float}.get(type(number), bool)
    try:
        return (kind.__name__, repr(kind(found)))
    except TypeError:
        return ("symbolic", str(found))


def _content(value: Tensor) -> str:
    """The bytes of a tensor that the forward pass makes, or that is no parameter; "" in a trace."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_meta:
        return ""
    return digest(value)


def _is_ours() -> bool:
    """Whether this library calls PyTorch, in one of its layers: they take other ways in a trace."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in _BETWEEN and name != __name__:
            return name.startswith("orthonet.") and not name.startswith("orthonet.certify.")
        frame = frame.f_back
    return False


_BETWEEN = ("torch", "contextlib", "functools")


def _source() -> str:
    """The line of the user's code that is running, `file:line`."""
    frame: Any = sys._getframe(2)
    while frame is not None and is_library(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it, the calls of the model are recorded."""
    model, before = recorder.model, vars(recorder.model).get("forward")
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        recorder.start((*args, *kwargs.values()))
        with recorder:
            result = plain(*args, **kwargs)
        recorder.finish(result)
        return result

    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def compare(
    base: Recorder, other: Recorder, variant: Variant, *, traced: bool, autocast: bool = False
) -> None:
    """Refuse a model that calls something else when it is called in another way.

    With `traced`, the base is a trace, in which constants have no contents, and no operation has
    been given another dtype by `autocast` yet.

    Raises:
        UncertifiableError: The records differ; the message names the first call.
    """
    (size,) = other.sizes

    loose = variant.dtype or (traced and autocast)

    def same(a: Line, b: Line) -> bool:
        calls = a.loose[size] == b.loose[size] if loose else a.calls[size] == b.calls[size]
        return calls and (traced or variant.dtype or a.data == b.data)

    pairs = zip(base.lines, other.lines, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if not same(a, b)), None)
    if place is None and len(base.lines) == len(other.lines):
        return
    place = min(len(base.lines), len(other.lines)) - 1 if place is None else place
    line = other.lines[place] if other.lines[place].source else base.lines[place]
    _checks.fail(
        "certify",
        "the model must be the same function of its input however it is called",
        "Take branches on gradient mode, inference mode, torch.compiler, the default dtype, the "
        "number of threads and the batch size out of forward: this one computes something else "
        "there",
        UncertifiableError,
        called=variant.name,
        operation=line.name,
        path=line.path,
        source=line.source,
    )
