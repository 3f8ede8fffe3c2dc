"""The factor of a layer, networks of a given constant, and their export."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from orthonet import _checks, convert

__all__ = [
    "LipschitzModule",
    "Sequential",
    "vanilla_model",
]


class _Factor(nn.Module):
    """Multiply a weight by the factor of its layer."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.coefficient


class LipschitzModule(nn.Module):
    """Base class of the layers here: a factor, and `vanilla_export`.

    A layer of your own derives from a class of `nn` and from this one, calls both constructors and
    multiplies its output by `_coefficient_lip`, or its weight by `apply_lipschitz_factor()`.

    Args:
        coefficient_lip: The factor.
        factory: Not taken: only `BatchLipNorm` shares its factor.
    """

    _coefficient: float = 1.0

    def __init__(self, coefficient_lip: float = 1.0, factory: Any = None) -> None:
        if "_parameters" not in vars(self):  # else the other base class has made the module
            super().__init__()
        _checks.require(
            factory is None,
            self,
            "the factor of this layer is a constant and is not shared",
            "Leave factory out, or use BatchLipNorm(factory=...)",
            factory=type(factory),
        )
        self._coefficient_lip = coefficient_lip

    def apply_lipschitz_factor(self) -> None:
        """Multiply `weight` by the factor, in front of every use."""
        factor = _Factor(self._coefficient_lip)
        nn.utils.parametrize.register_parametrization(self, "weight", factor)

    @property
    def _coefficient_lip(self) -> float:
        """The constant of the layer."""
        return self._coefficient

    @_coefficient_lip.setter
    def _coefficient_lip(self, value: float) -> None:
        _checks.lipschitz_constant(type(self), value)
        self._coefficient = float(value)
        for part in self.modules():
            if isinstance(part, _Factor):
                part.coefficient = self._coefficient

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self._coefficient == 1.0 else y * self._coefficient

    def vanilla_export(self) -> nn.Module:
        """Return an independent module of stock layers, or a copy where there is none."""
        return convert.to_plain(self)


class WithWeight(LipschitzModule):
    """A layer of `orthonet.layers` whose weight carries the factor."""

    lipschitz: float

    @property
    def _coefficient_lip(self) -> float:
        return self.lipschitz

    @_coefficient_lip.setter
    def _coefficient_lip(self, value: float) -> None:
        self.lipschitz = value

    def vanilla_export(self) -> nn.Module:
        """Return a stock layer with the present weight."""
        layer: Any = self
        return layer.to_plain()


class Sequential(nn.Sequential, LipschitzModule):
    """`nn.Sequential` whose n Lipschitz layers have constant `k_coef_lip ** (1 / n)` each.

    Layers of this module take the factor into their weight or output; a nested `Sequential` shares
    its part out among its own layers. The whole has constant `k_coef_lip`, which
    `orthonet.certify` proves.
    """

    def __init__(self, *args: Any, k_coef_lip: float = 1.0) -> None:
        nn.Sequential.__init__(self, *args)
        self._coefficient_lip = k_coef_lip

    @property
    def _coefficient_lip(self) -> float:
        """The constant of the whole."""
        return self._coefficient

    @_coefficient_lip.setter
    def _coefficient_lip(self, value: float) -> None:
        _checks.lipschitz_constant(type(self), value)
        self._coefficient = float(value)
        parts = [part for part in self if isinstance(part, LipschitzModule)]
        _checks.require(
            bool(parts) or value == 1.0,
            self,
            "a constant other than 1 needs Lipschitz layers that take it",
            "Add a layer of this module, or put orthonet.layers.Scale behind the network",
            k_coef_lip=value,
        )
        for part in parts:
            part._coefficient_lip = value ** (1 / len(parts))

    def vanilla_export(self) -> nn.Sequential:
        """Return a new `nn.Sequential` of stock layers."""
        exported = OrderedDict()
        for name, part in self.named_children():
            export: Any = getattr(part, "vanilla_export", None)
            exported[name] = copy.deepcopy(part) if export is None else export()
        return nn.Sequential(exported).train(self.training)


def vanilla_model(model: nn.Module, in_place: bool = True, new_module: Any = None) -> nn.Module:
    """Replace the layers of `model`, wherever they are in it, by stock ones.

    Args:
        model: The model. With `in_place` it is changed, as the peer does;
            `orthonet.convert.to_plain` never changes its argument.
        in_place: Whether to change `model` itself.
        new_module: Not needed; must be None.

    Returns:
        `model`, or a copy.
    """
    _checks.require(
        new_module is None,
        "vanilla_model",
        "new_module is for the recursion of the peer",
        "Leave it out",
        new_module=type(new_module),
    )
    model = model if in_place else copy.deepcopy(model)
    if not in_place:
        model.eval()
    for name, part in list(model.named_children()):
        export: Any = getattr(part, "vanilla_export", None)
        if export is not None:
            setattr(model, name, export())
        elif any(hasattr(inner, "vanilla_export") for inner in part.modules()):
            vanilla_model(part)
        else:
            setattr(model, name, convert.to_plain(part))
    return model
