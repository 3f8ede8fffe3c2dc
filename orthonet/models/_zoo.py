"""One convolutional network for every method of the registry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.layers import (
    MaxMin,
    OrthoLinear,
    SpaceToDepth2d,
    available,
    make_conv,
    make_linear,
    method,
)
from orthonet.models._parts import IMAGE, scaled, shape_of
from orthonet.models._registry import register
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

# Methods whose kernels have one tap: the rearranged pixels give them their neighborhood.
_ONE_TAP = ("cholesky",)


@register
def convnet_zoo(
    in_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 10,
    *,
    layer: str = "ortho",
    width: int = 32,
    depth: int = 3,
    hidden: int = 128,
    lipschitz: float = 1.0,
    ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
) -> nn.Sequential:
    r"""Build the network of the comparison of methods: the same for each, but for its layer.

    Pixels are rearranged to a quarter of the size (half where the image has less than 16 pixels
    a side), then come `depth` circular convolutions of 3x3 taps, an orthogonal projection to
    `hidden` features, a square linear layer of the method, and an orthogonal head. MaxMin follows
    each layer that holds no activation of its own.

    Args:
        in_shape: Channels, height and width of an input; even sizes, from 16 pixels
            on divisible by 4.
        num_classes: As of [`convnet`][orthonet.models.convnet].
        layer: A name of [`available("conv")`][orthonet.layers.available]. Its linear layer is used
            where it has one, else `OrthoLinear`; "cholesky" has kernels of one tap.
        width: Channels of the convolutions, even.
        depth: Number of convolutions.
        hidden: Width of the hidden linear layer, even.
        lipschitz: See `convnet`.
        ortho_params: See `convnet`.

    Shape:
        As of `convnet`.

    Guarantee:
        As of `convnet`.

    Raises:
        ValueError: An argument out of range, or an image whose size cannot be divided.

    Examples:
        >>> convnet_zoo(layer="bro", width=8)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    owner = "convnet_zoo"
    shape = shape_of(owner, in_shape, *IMAGE)
    _checks.one_of(owner, available("conv"), layer=layer)
    _checks.positive_int(owner, width=width, depth=depth, hidden=hidden, num_classes=num_classes)
    _checks.require(
        width % 2 == 0 and hidden % 2 == 0,
        owner,
        "width and hidden must be even, MaxMin works on pairs",
        "Add one",
        width=width,
        hidden=hidden,
    )
    first = 2 if min(shape[1:]) < 16 else 4
    _checks.require(
        all(n % first == 0 and (n // first) >= 2 for n in shape[1:]),
        owner,
        f"height and width must be divisible by {first} and at least {2 * first}",
        "Pad the images",
        in_shape=in_shape,
    )
    layers: dict[str, nn.Module] = {"rearrange1": SpaceToDepth2d(first)}
    channels = shape[0] * first**2
    height, wide = (n // first for n in shape[1:])
    inside = method(layer).nonlinear

    def block(name: str, build: nn.Module, active: bool) -> None:
        layers[name] = build
        if not active:
            layers[f"activation_{name}"] = MaxMin()

    def conv(inputs: int) -> nn.Module:
        taps = 1 if layer in _ONE_TAP else 3
        options: dict[str, Any] = {"ortho_params": ortho_params} if layer == "ortho" else {}
        return make_conv(
            layer, inputs, width, taps, padding="same", padding_mode="circular", **options
        )

    for i in range(1, depth + 1):
        block(f"conv{i}", conv(channels), inside)
        channels = width
    layers["flatten"] = nn.Flatten()
    features = width * height * wide
    block("linear1", OrthoLinear(features, hidden, ortho_params=ortho_params), False)
    if method(layer).linear in (None, OrthoLinear):
        block("linear2", OrthoLinear(hidden, hidden, ortho_params=ortho_params), False)
    else:
        block("linear2", make_linear(layer, hidden, hidden), inside)
    layers["head"] = OrthoLinear(hidden, num_classes, ortho_params=ortho_params)
    return scaled(nn.Sequential(OrderedDict(layers)), lipschitz)
