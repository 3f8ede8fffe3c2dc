"""What forward asks of tensors, besides computing with them: only shape, dtype and device count.

A graph says what is computed. It does not say that forward read a value into Python, asked how a
tensor is laid out, or wrote to one that shares its memory with another: such a model may be
another function where no sample shows it, also where it catches the error of a trace. So these are
noted while the model runs, and refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import tensors_in, version_of
from orthonet.certify.graph.outside import is_library
from orthonet.errors import UncertifiableError

__all__ = ["Found", "Questions", "asker", "refuse_found", "storages_of"]

_OF_SHAPE = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "get_device",
    "type",
    "is_same_size",
    "result_type",
    "is_neg",
    "is_conj",
    "sym_size",
    "sym_numel",
    "broadcast_shapes",
    "__len__",
    "__hash__",
    "register_hook",
    "retain_grad",
    "is_tensor",
    "dim_order",
}
_OF_SHAPE |= {
    f"{name}.__get__"
    for name in (
        "shape",
        "ndim",
        "dtype",
        "device",
        "layout",
        "itemsize",
        "nbytes",
        "names",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_mps",
        "is_xpu",
        "is_xla",
        "is_sparse",
        "is_sparse_csr",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
    )
}
_OF_DATA = {
    "item",
    "tolist",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
    "_assert",
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__contains__",
    "__array__",
    "__dlpack__",
    "__repr__",
    "__format__",
}
_OF_HISTORY = {"_base.__get__", "grad.__get__", "_grad.__get__", "grad_fn.__get__"}
"""None or an object: which of them, the values do not tell."""
_HARMLESS_SETTERS = {"requires_grad.__set__", "grad.__set__"}
_OVERRIDES = ("torch.overrides", "torch._tensor")


class Found(NamedTuple):
    """Something that forward must not do, where it does it."""

    requirement: str
    advice: str
    operation: str
    path: str
    source: str


class Questions:
    """The tensors of one forward pass that depend on its input, and what is asked of them.

    Attributes:
        found: What must not be.
        shared: The memory that goes into and comes out of a call with a rule.
    """

    def __init__(self, path: Callable[[], str], source: Callable[[], str]) -> None:
        self.path, self.source = path, source
        self.found: list[Found] = []
        self.shared: set[int] = set()
        self.start(())

    def start(self, inputs: Iterable[Tensor]) -> None:
        """Begin anew, with what the model is given."""
        self.ids: set[int] = set()
        self.memory: set[int] = set()
        self.depends_on(list(inputs))

    def depends_on(self, tensors: list[Tensor]) -> None:
        """Note tensors that depend on the input."""
        self.ids.update(map(id, tensors))
        self.memory |= storages_of(tensors)

    def ask(self, name: str, tensors: list[Tensor], call: Callable[[], Any]) -> Any:
        """Make a call of a function with these tensors, and note what it asks or writes."""
        for tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter) and not is_library(
                type(tensor).__module__
            ):
                self._note(name, *_SUBCLASS)
        moving = any(id(t) in self.ids for t in tensors) or bool(storages_of(tensors) & self.memory)
        before = [version_of(t) for t in tensors]
        result = call()
        written = [t for t, v in zip(tensors, before, strict=True) if version_of(t) != v]
        if moving:
            self.depends_on([*tensors_in(result), *written])
        if storages_of(written) & self.shared:
            self._note(name, *_WRITES_SHARED)
        if name == "set_" or (name.endswith(".__set__") and name not in _HARMLESS_SETTERS):
            self._note(name, *_SETS)
        elif moving and name in _OF_HISTORY and not is_library(asker()):
            self._note(name, *_ASKS)
        elif moving and not name.endswith("__set__") and not _holds_tensors(result):
            if name in _OF_DATA:
                self._note(name, *_READS)
            elif result is not None and name not in _OF_SHAPE and not is_library(asker()):
                self._note(name, *_ASKS)
        return result

    def note_count(self, name: str) -> None:
        """Note what is asked of a batch size."""
        self._note(name, *_COUNTS)

    def _note(self, name: str, requirement: str, advice: str) -> None:
        self.found.append(Found(requirement, advice, name, self.path(), self.source()))


def refuse_found(found: list[Found]) -> None:
    """Refuse a model that does what it must not; the message names the first of it.

    Raises:
        UncertifiableError: Something was found.
    """
    for requirement, advice, operation, path, source in found[:1]:
        _checks.fail(
            "certify",
            requirement,
            advice,
            UncertifiableError,
            operation=operation,
            path=path,
            source=source,
        )


_READS = (
    "forward must not read the data of tensors that depend on the input into Python",
    "Compute with tensors only (torch.where instead of if), and take prints and checks of values "
    "out of forward: a certificate cannot follow what Python does with a value",
)
_ASKS = (
    "forward must ask nothing of a tensor but its shape, dtype and device",
    "Take strides, memory formats, gradients and addresses out of forward, or call .contiguous(): "
    "inputs may come in another layout or gradient mode than the example",
)
_COUNTS = (
    "the batch size must be used for shapes of tensors only",
    "Take comparisons of it, and texts and numbers made of it, out of forward: a certificate is "
    "given for each sample on its own",
)
_SETS = (
    "forward must not put other data into a tensor",
    "Write y = f(y) for y.data = f(y): the exported graph does not show it",
)
_WRITES_SHARED = (
    "forward must not write in place into memory that a module with a rule shares with its input",
    "Write y = y * 2 for y.mul_(2): the module returned a view of what it was given",
)
_SUBCLASS = (
    "tensors must be of torch.Tensor, and parameters of torch.nn.Parameter, not of another class",
    "Store tensor.as_subclass(torch.Tensor): a class of its own may give operations another "
    "meaning",
)


def _holds_tensors(result: Any) -> bool:
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size) and not result:
        return True  # of no parts
    return bool(tensors_in(result))


def asker() -> str:
    """The name of the file that asks, other than those by which PyTorch passes questions on."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _OVERRIDES and not name.startswith(_HERE):
            return name
        frame = frame.f_back
    return ""


_HERE = __name__.rpartition(".")[0]


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the memory of tensors begins, of those that have any."""
    found = set()
    for tensor in tensors:
        try:
            found.add(tensor.untyped_storage().data_ptr())
        except RuntimeError:  # of a transform, or sparse
            continue
    return found - {0}
