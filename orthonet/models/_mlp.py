"""Multi-layer perceptrons of orthogonal layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet.models._parts import dense_layers, scaled, sizes_of, widths_of
from orthonet.models._registry import register
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["mlp", "mlp_digits"]


@register
def mlp(
    in_features: int,
    num_classes: int,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: str = "max_min",
    head: str = "ortho",
    norm: str = "l2",
    lipschitz: float = 1.0,
    ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
) -> nn.Sequential:
    """Build linear layers of constant 1 with an activation that keeps the norm.

    Args:
        in_features: Number of entries of an input.
        num_classes: As of [`convnet`][orthonet.models.convnet].
        hidden: Widths of the hidden layers; even, unless the activation is "abs".
        activation: As there.
        head: As there; "ortho" unless `norm` is "l2".
        norm: "l2" for orthogonal layers, "linf" for [`LinfLinear`][orthonet.layers.LinfLinear],
            "l1" for [`L1Linear`][orthonet.layers.L1Linear]: the norm in which the constant is K.
        lipschitz: As there.
        ortho_params: As there.

    Shape:
        Input (batch, *) with `in_features` entries after the batch, output (batch, num_classes).

    Guarantee:
        As of `convnet`, in `norm`.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> mlp(64, 10, hidden=(32,))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    owner = "mlp"
    sizes_of(owner, hidden=hidden)
    widths = tuple(hidden)
    widths_of(owner, activation, hidden=widths)
    layers = dense_layers(
        owner, in_features, widths, num_classes, activation, head, ortho_params, norm
    )
    return scaled(nn.Sequential(OrderedDict(flatten=nn.Flatten(), **layers)), lipschitz)


@register
def mlp_digits(**arguments: Any) -> nn.Sequential:
    """Build an [`mlp`][orthonet.models.mlp] for the 8x8 digits of scikit-learn; same keywords."""
    return mlp(64, 10, **{"hidden": (128, 128), **arguments})
