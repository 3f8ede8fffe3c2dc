"""Convolutional networks for time series."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.layers import OrthoConv1d
from orthonet.models._parts import activation_of, dense_layers, scaled, shape_of
from orthonet.models._registry import register
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["convnet_series"]


@register
def convnet_series(
    in_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 2,
    kernel_size: int = 5,
    lipschitz: float = 1.0,
    ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
) -> nn.Sequential:
    """Orthogonal convolutions along the time, then one orthogonal linear layer.

    MaxMin follows each convolution. Zero padding keeps the length.

    Args:
        in_shape: Channels and length of a series.
        num_classes: Number of logits.
        width: Channels of the convolutions, even.
        depth: Number of convolutions.
        kernel_size: Taps of a convolution, odd.
        lipschitz: Constant K of the network.
        ortho_params: How the weights are made orthogonal.

    Shape:
        Input (batch, *in_shape), output (batch, num_classes).

    Guarantee:
        l2 constant over the whole series at most K up to rounding.

    Raises:
        ValueError: An argument out of range.

    Examples:
        >>> convnet_series((3, 20), 4, width=8)(torch.zeros(5, 3, 20)).shape
        torch.Size([5, 4])
    """
    owner = "convnet_series"
    _checks.positive_int(owner, width=width, depth=depth, kernel_size=kernel_size)
    _checks.require(
        width % 2 == 0 and kernel_size % 2 == 1,
        owner,
        "width must be even, MaxMin works on pairs, and kernel_size odd, to keep the length",
        "Add one",
        width=width,
        kernel_size=kernel_size,
    )
    layers: dict[str, nn.Module] = {}
    channels, length = shape_of(owner, in_shape, "channels", "length")
    for i in range(1, depth + 1):
        layers[f"conv{i}"] = OrthoConv1d(
            channels, width, kernel_size, padding=kernel_size // 2, ortho_params=ortho_params
        )
        layers[f"activation_conv{i}"] = activation_of(owner, "max_min")
        channels = width
    dense = dense_layers(owner, width * length, (), num_classes, "max_min", "ortho", ortho_params)
    network = nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), **dense))
    return scaled(network, lipschitz)
