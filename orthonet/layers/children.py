"""Whether a module computes what its class defines, with the children that its bound relies on."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from orthonet._torch import flat_weights, is_hooked

__all__ = ["Child", "as_defined", "is_as_its_class"]


def as_defined(module: nn.Module, inside: bool = True) -> bool:
    """Return whether a module, with `inside` all in it too, computes what its class defines.

    Hooks and an own `forward` of an instance change the map; a layer with `declared_bound` relies
    on children of some classes, and a recurrent layer of `torch.nn` on a list of its weights.
    """
    for part in module.modules() if inside else (module,):
        if not is_as_its_class(part):
            return False
        if isinstance(part, (nn.RNN, nn.LSTM, nn.GRU)) and not _has_its_flat_weights(part):
            return False
        relied: dict[str, Child] = getattr(part, "relies_on", {})
        if not all(child.holds(getattr(part, name, None)) for name, child in relied.items()):
            return False
    return True


def is_as_its_class(module: nn.Module) -> bool:
    """Return whether calling the module runs what its class says, no hook or method of its own."""
    cls = type(module)
    return not is_hooked(module) and not any(
        callable(getattr(cls, name, None)) for name in vars(module)
    )


def _has_its_flat_weights(module: nn.RNNBase) -> bool:
    """Return whether it computes with its own parameters, in the order of its list."""
    ends = ("", "_reverse") if module.bidirectional else ("",)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    names = [
        f"{kind}_l{layer}{end}"
        for layer in range(module.num_layers)
        for end in ends
        for kind in kinds
    ]
    flat = flat_weights(module)
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return len(flat) == len(names) and all(
        own.get(name) is weight and weight is not None
        for name, weight in zip(names, flat, strict=True)
    )


class Child(NamedTuple):
    """A child of a layer on whose map its bound relies: an entry of the layer's `relies_on`.

    Attributes:
        classes: The classes that it may have, not one derived from them.
        settings: The values of its attributes, where it has them.
    """

    classes: tuple[type[nn.Module], ...]
    settings: Mapping[str, Any] = MappingProxyType({})

    def holds(self, module: nn.Module | None) -> bool:
        """Return whether a child is one of them."""
        settings = self.settings.items()
        return type(module) in self.classes and all(getattr(module, n, v) == v for n, v in settings)
