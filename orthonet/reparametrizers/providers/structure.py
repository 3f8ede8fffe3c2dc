"""What a computed weight depends on, and whether it is all the same still."""

from __future__ import annotations

from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from orthonet import _torch
from orthonet.reparametrizers.weight import NUMBER, SLOT

__all__ = ["STATE", "Stamps", "Structure"]

STATE = "_cached"  # the attribute of a module that holds its slot
# What every module has: its hooks, which do not enter a value, and what is looked at below.
INTERNAL = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
INTERNAL |= {STATE, SLOT, NUMBER}


class Structure:
    """Which tensors, attributes and sub-modules a module has, compared by identity.

    What is compared is kept alive, so that no identity is used twice. Of the module itself the
    values are held, not its dictionary, which leads back here.
    """

    __slots__ = (
        "attributes",
        "audited",
        "count",
        "homes",
        "names",
        "parts",
        "size",
        "sized",
        "tensors",
        "where",
    )

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        names = [name for name in own if name not in INTERNAL]
        self.count, self.names = len(own), itemgetter(*names)
        self.attributes = self.names(own)
        held = list(self.attributes)
        self.parts = []  # the same of the sub-modules
        self.sized = []  # dictionaries that must not grow
        self.homes: list[tuple[int, dict[str, Any], str]] = []  # of parameters and buffers
        for part in module.modules():
            for place in (part._parameters, part._buffers):
                self.homes += [(id(part), place, n) for n, t in place.items() if t is not None]
            contents = [part._parameters, part._buffers, part._modules]
            self.sized += contents
            self.parts += [_values(d, tuple(d)) for d in contents if d]
            held += [value for d in contents for value in d.values()]
            if part is not module:
                values = vars(part)
                self.sized += [values, *_torch.forward_hook_tables(part)]
                self.parts.append(_values(values, tuple(n for n in values if n not in INTERNAL)))
                held += self.parts[-1][2]
        self.size = sum(map(len, self.sized))
        self.tensors = list({id(v): v for v in held if isinstance(v, Tensor)}.values())
        self.where: list[int] = []
        self.audited: set[bool] = set()

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` is as it was."""
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
        return True

    def settle(self) -> None:
        """Remember where the tensors lie; called once it is known that they lie somewhere."""
        self.where = [t.data_ptr() for t in self.tensors]

    def settled(self) -> bool:
        """Whether the tensors lie where they lay."""
        return len(self.where) == len(self.tensors) and all(
            t.data_ptr() == place for t, place in zip(self.tensors, self.where, strict=True)
        )


def _values(values: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], Any, Any]:
    """A dictionary, a function of it that returns the values of `names`, and these now."""
    get: Any = itemgetter(*names, names[0])  # the repetition has it return a tuple always
    return values, get, get(values)


class Stamps:
    """The state of some tensors at one time."""

    __slots__ = ("entries", "requires_grad")

    def __init__(self, structure: Structure) -> None:
        self.entries = [(t, _torch.Stamp(t)) for t in structure.tensors]
        self.requires_grad = any(t.requires_grad for t in structure.tensors)

    def hold(self) -> bool:
        """Whether the recorded state is still current."""
        for tensor, stamp in self.entries:
            if tensor.requires_grad is not stamp.requires_grad or not stamp.holds(tensor):
                return False
        return True
