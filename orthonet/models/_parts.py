"""What the models have in common: the activation by name, and the classifying end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orthonet import _checks
from orthonet.layers import (
    Abs,
    GroupSort,
    L1Linear,
    LinfLinear,
    MaxMin,
    OrthoLinear,
    Scale,
    UnitNormLinear,
)
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["activation_of", "dense_layers", "scaled", "shape_of", "sizes_of", "widths_of"]

ACTIVATIONS = {"max_min": MaxMin, "group_sort": GroupSort, "abs": Abs}
HEADS = ("ortho", "unit_norm")
LINEAR = {"linf": LinfLinear, "l1": L1Linear}


def activation_of(owner: str, name: str) -> nn.Module:
    """A new 1-Lipschitz activation."""
    _checks.one_of(owner, tuple(ACTIVATIONS), activation=name)
    return ACTIVATIONS[name]()


def sizes_of(owner: str, **values: Sequence[int]) -> None:
    """Every value must be a tuple or a list of sizes."""
    for name, value in values.items():
        _checks.require(
            isinstance(value, (tuple, list)),
            owner,
            f"{name} must be a tuple of integers",
            f"Pass e.g. {name}=(64, 64)",
            **{name: value},
        )


def shape_of(owner: str, in_shape: Sequence[int], *names: str) -> tuple[int, ...]:
    """The shape of one input, which must have these dimensions."""
    _checks.require(
        isinstance(in_shape, (tuple, list)) and len(in_shape) == len(names),
        owner,
        f"in_shape must be ({', '.join(names)})",
        "Give them all",
        in_shape=in_shape,
    )
    return tuple(in_shape)


IMAGE = ("channels", "height", "width")


def widths_of(owner: str, activation: str, **widths: tuple[int, ...]) -> None:
    """Every width must be a positive integer that the activation can split into pairs."""
    for name, values in widths.items():
        for value in values:
            _checks.positive_int(owner, **{name: value})
            _checks.require(
                activation == "abs" or value % 2 == 0,
                owner,
                f"{name} must be even, {activation} works on pairs",
                "Add one, or choose activation='abs'",
                **{name: value},
            )


def dense_layers(
    owner: str,
    in_features: int,
    hidden: tuple[int, ...],
    num_classes: int,
    activation: str,
    head: str,
    ortho_params: OrthoParams | str,
    norm: str = "l2",
) -> dict[str, nn.Module]:
    """Hidden layers of constant 1 with their activations, then the layer of the logits."""
    _checks.positive_int(owner, in_features=in_features, num_classes=num_classes)
    _checks.one_of(owner, HEADS, head=head)
    _checks.one_of(owner, ("l2", *LINEAR), norm=norm)
    _checks.require(
        norm == "l2" or (head == "ortho" and ortho_params in ("default", DEFAULT_ORTHO_PARAMS)),
        owner,
        "head and ortho_params must be the default ones unless norm is 'l2'",
        "Leave them out",
        norm=norm,
        head=head,
        ortho_params=ortho_params,
    )

    def linear(inputs: int, outputs: int) -> nn.Module:
        if norm == "l2":
            return OrthoLinear(inputs, outputs, ortho_params=ortho_params)
        return LINEAR[norm](inputs, outputs)

    layers: dict[str, nn.Module] = {}
    for i, width in enumerate(hidden, 1):
        layers[f"linear{i}"] = linear(in_features, width)
        layers[f"activation_linear{i}"] = activation_of(owner, activation)
        in_features = width
    layers["head"] = (
        linear(in_features, num_classes)
        if head == "ortho"
        else UnitNormLinear(in_features, num_classes)
    )
    return layers


def scaled(network: nn.Sequential, lipschitz: float) -> nn.Sequential:
    """The 1-Lipschitz network with its outputs times K; without a layer more where K is 1."""
    _checks.lipschitz_constant("models", lipschitz)
    if lipschitz != 1.0:
        network.add_module("scale", Scale(lipschitz))
    return network
