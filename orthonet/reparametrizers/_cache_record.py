"""What a computed weight depends on, and whether it is all the same still."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

__all__ = ["INTERNAL", "STATE", "Record", "probe", "unique"]

STATE = "_cached"  # the attribute of a module that holds its slot
# What every module has: its hooks, which do not enter a value, and what is looked at below.
INTERNAL = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}


class Record:
    """What a value of one module was computed from, and whether it is all the same still."""

    __slots__ = (
        "attributes",
        "count",
        "names",
        "parts",
        "requires_grad",
        "size",
        "sized",
        "stamps",
    )

    def __init__(self, module: nn.Module) -> None:
        # Everything is compared by identity, and kept alive for that. Of the module itself only
        # values are held, not its dictionary, which leads back here.
        own = vars(module)
        names = [name for name in own if name not in INTERNAL and name != STATE]
        self.count, self.names = len(own), itemgetter(*names)
        self.attributes = self.names(own)
        held = list(self.attributes)
        self.parts = []  # the same of the sub-modules
        self.sized = []  # dictionaries that must not grow
        for part in module.modules():
            contents = [part._parameters, part._buffers, part._modules]
            self.sized += contents
            self.parts += [_values(d, tuple(d)) for d in contents if d]
            held += [value for d in contents for value in d.values()]
            if part is not module:
                values = vars(part)
                self.sized.append(values)
                self.parts.append(_values(values, tuple(n for n in values if n not in INTERNAL)))
                held += self.parts[-1][2]
        self.size = sum(map(len, self.sized))
        self.stamps = [_stamp(t) for t in unique(v for v in held if isinstance(v, Tensor))]
        self.requires_grad = any(t.requires_grad for t, *_ in self.stamps)

    def fits(self, module: nn.Module) -> bool:
        own = vars(module)
        if len(own) != self.count or sum(map(len, self.sized)) != self.size:
            return False
        try:
            if not all(map(is_, self.names(own), self.attributes)):
                return False
            for values, names, saved in self.parts:
                if not all(map(is_, names(values), saved)):
                    return False
        except KeyError:  # one attribute has gone and another come
            return False
        for tensor, version, pointer, requires_grad, dtype, strides, entry, value in self.stamps:
            if (
                tensor._version != version
                or tensor.data_ptr() != pointer
                or tensor.requires_grad is not requires_grad
                or tensor.dtype is not dtype
                or tensor.stride() != strides
                or (entry is not None and entry.item() != value)
            ):
                return False
        return True

    def tensors(self) -> list[Tensor]:
        """The tensors of the module and its sub-modules, each once."""
        return [tensor for tensor, *_ in self.stamps]


def _values(values: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], Any, Any]:
    """A dictionary, a function of it that returns the values of `names`, and these now."""
    get: Any = itemgetter(*names, names[0])  # the repetition has it return a tuple always
    return values, get, get(values)


def unique(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Each tensor once, in order."""
    return {id(t): t for t in tensors}.values()


def probe(tensor: Tensor) -> tuple[Tensor | None, float]:
    """One entry of a tensor in main memory, and its value now.

    A write that leaves no trace (through `.data`, NumPy) to the whole tensor changes it, most
    likely. On an accelerator, to look would be to wait.
    """
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None, 0.0
    flat = tensor.detach()
    start = tensor.storage_offset()
    if tensor.is_contiguous():
        start += tensor.numel() * 5 // 8
    entry = flat.as_strided((), (), start)
    return entry, entry.item()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor,
        tensor._version,
        tensor.data_ptr(),
        tensor.requires_grad,
        tensor.dtype,
        tensor.stride(),
        *probe(tensor),
    )
