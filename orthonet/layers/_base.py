"""What all layers with a constrained weight share: reading, assigning, loading, exporting it."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.errors import NotOnManifoldError, ProjectionWarning
from orthonet.layers._spectrum import LinearMap
from orthonet.reparametrizers import Weight
from orthonet.reparametrizers.recorded import RecordedWeight, keep_if_refused

__all__ = [
    "ConstrainedWeight",
    "OneLine",
    "ReadsPlain",
    "WithoutPlainWeight",
    "add_bias",
    "new_bias",
    "set_zero",
]


# Mixins stand before a class of `nn`: a type checker takes them for modules, Python does not.
Module = nn.Module if TYPE_CHECKING else object


def new_bias(
    layer: nn.Module,
    size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    name: str = "bias",
) -> None:
    """Register a parameter of zeros, or None."""
    value = None
    if size is not None:
        value = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
    layer.register_parameter(name, value)


def add_bias(
    layer: nn.Module,
    bias: bool,
    size: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Register the bias that the user asked for, or None."""
    _checks.boolean(type(layer), bias=bias)
    new_bias(layer, size if bias else None, device, dtype)


def set_zero(*tensors: Tensor | None) -> None:
    """Set biases to zero, where there are some and not on the meta device."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_meta:
            nn.init.zeros_(tensor)


class OneLine(Module):
    """Mixin before `nn.Module`: a layer prints as one line, without the modules of its weights."""

    def __repr__(self) -> str:
        parts = [self.extra_repr()]
        for name, child in self.named_children():
            if not any(isinstance(module, Weight) for module in child.modules()):
                parts.append(f"{name}={' '.join(repr(child).split())}")
        made = dict.fromkeys(
            module.preset for module in self.modules() if isinstance(module, RecordedWeight)
        )
        for name in made:
            short = name.removesuffix("_ORTHO_PARAMS")
            if short == name:  # no published one
                parts.append(name if name.startswith("triv=") else f"ortho_params=({name})")
            elif short != "DEFAULT":
                parts.append(f"ortho_params={short.lower()!r}")
        return f"{type(self).__name__}({', '.join(filter(None, parts))})"


class ReadsPlain(OneLine):
    """Mixin before an `nn` class: the layer looks for its plain twin in a checkpoint first."""

    def _read_plain(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
        """Make entries of this layer of those of its plain twin; False if there is no way."""
        raise AttributeError("a subclass says how it reads a plain checkpoint")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        if self._read_plain(state_dict, prefix, rest[-1]):
            super()._load_from_state_dict(state_dict, prefix, *rest, **options)


class ConstrainedWeight(LinearMap, ReadsPlain):
    """Mixin before an `nn` class: `weight` becomes a property computed by a sub-module.

    The sub-module `parametrization`, a [`Weight`][orthonet.reparametrizers.Weight], owns the raw
    parameters and returns the weight when called. The layer is an ordinary class, so pickle,
    deepcopy, `state_dict`, the meta device, compile and export work as for the `nn` twin.
    """

    parametrization: Weight
    bias: Tensor | None
    _plain_class: ClassVar[type[nn.Module]]
    _factor: float = 1.0  # what the weight of the sub-module is multiplied by; no part of the state

    def _check_input(self, input: Tensor, channels: int, dim: int, spatial: int = 0) -> None:
        """Refuse inputs that the layer was not made for, and a layer without data."""
        _checks.channels(self, input, channels, dim, spatial)
        for stored in () if input.is_meta else self.parametrization.parameters():
            if stored.is_meta:
                _checks.fail(
                    self,
                    "the layer must be on a device with data to be called",
                    "Call layer.to_empty(device='cpu') and reset_parameters(), or load a "
                    "checkpoint",
                    device=stored.device,
                )

    def _set_factor(self, lipschitz: float) -> None:
        self._factor = _checks.lipschitz_constant(type(self), lipschitz)

    @property
    def lipschitz(self) -> float:
        """The constant K of the layer; assigning one rescales the weight."""
        return self._factor * self.parametrization.lipschitz

    @lipschitz.setter
    def lipschitz(self, value: float) -> None:
        self._set_factor(value / self.parametrization.lipschitz)

    def linear(self, x: Tensor) -> Tensor:
        """Apply the linear part of the layer, in the dtype of `x`."""
        return nn.functional.linear(x, self.weight.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The constrained weight, computed from the parameters and differentiable in them.

        Assigning a tensor that satisfies the constraint sets the parameters; another one raises
        [`NotOnManifoldError`][orthonet.errors.NotOnManifoldError] and changes nothing.
        """
        weight = self.parametrization()
        return weight if self._factor == 1.0 else weight * self._factor

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        _check_weight(self, value)
        self.parametrization.assign_(value.detach() / self._factor, self)

    def project_(self, weight: Tensor) -> float:
        r"""Set the weight to the constrained one nearest to `weight` that the layer finds.

        Returns:
            The relative distance \(\|W_{new} - W\|_F / \|W\|_F\) that the projection moved it.
        """
        _check_weight(self, weight)
        if not weight.is_meta and weight.numel() and not bool(weight.any()):
            sentence = _checks.message(
                self,
                "the zero weight has no nearest one, and some other is taken",
                "Draw one with reset_parameters(), or look for the weight that was meant",
                weight=weight,
            )
            warnings.warn(sentence, ProjectionWarning, stacklevel=2)
        return self.parametrization.project_(weight.detach() / self._factor, self)

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero; nothing happens on the meta device."""
        self.parametrization.reset_parameters()
        set_zero(self.bias)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a new stock `nn` module with the present weight, independent of this layer."""
        plain = self._plain_class.__new__(self._plain_class)
        nn.Module.__init__(plain)
        for name, value in vars(self).items():
            if name not in vars(plain) and name != "_factor":
                setattr(plain, name, copy.deepcopy(value))
        plain.weight = nn.Parameter(self.weight.detach().clone())
        bias = self.bias
        bias = None if bias is None else nn.Parameter(bias.detach().clone())
        plain.register_parameter("bias", bias)
        plain.train(self.training)
        return plain

    def _read_plain(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
        """Also accept the `weight` of a plain `nn` layer: it is projected, with a warning.

        And the names that layers of a constant other than 1 had before theirs were those of 1.
        """
        plain, own = f"{prefix}weight", f"{prefix}parametrization."
        if not hasattr(self.parametrization, "weight"):
            for key in [key for key in state_dict if key.startswith(f"{own}weight.")]:
                state_dict[own + key.removeprefix(f"{own}weight.")] = state_dict.pop(key)
        keep_if_refused(self, state_dict, prefix, error_msgs)
        self.parametrization.load_plain(
            state_dict, plain, own, error_msgs, self, lambda w: w.detach() / self._factor
        )
        return True


def _check_weight(owner: object, weight: Any) -> None:
    """Refuse what cannot become a weight: arrays, complex numbers, NaN."""
    _checks.floating(owner, weight=weight)
    _checks.require(
        weight.is_meta or bool(weight.isfinite().all()),
        owner,
        "weight must be finite",
        "Look for the step that made a NaN or an infinity",
        NotOnManifoldError,
        weight=weight,
    )


class WithoutPlainWeight(ReadsPlain):
    """Mixin before `nn.Module`: a layer that no plain weight can be projected onto says so."""

    def _read_plain(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
        """Refuse the `weight` of a plain `nn` layer by one sentence."""
        known = {name for name, _ in self.named_parameters()}
        if f"{prefix}weight" in state_dict and "weight" not in known:
            error_msgs.append(
                _checks.message(
                    self,
                    "the weight of a plain layer has no projection onto this one, which is no "
                    "single linear map or is made in the frequency domain",
                    "Load a checkpoint of this class, or use a layer that projects, such as "
                    "OrthoConv2d or AOLConv2d",
                    weight=state_dict[f"{prefix}weight"],
                )
            )
            for name in list(state_dict):
                if name.startswith(prefix):
                    state_dict.pop(name)
            return False
        keep_if_refused(self, state_dict, prefix, error_msgs)
        return True
