"""The small network of the comparison "1-Lipschitz layers compared"."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.layers import (
    FirstChannels,
    MaxMin,
    OrthoLinear,
    SpaceToDepth2d,
    available,
    make_conv,
    method,
)
from orthonet.models._parts import scaled
from orthonet.models._registry import register
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["convnet_xs"]


@register
def convnet_xs(
    in_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    *,
    layer: str = "ortho",
    width: int = 16,
    depth: int = 5,
    lipschitz: float = 1.0,
    ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
) -> nn.Sequential:
    r"""Build blocks of convolutions that halve the image until one pixel is left.

    Zeros are appended up to `width` channels and mixed by a 1x1 convolution. Each block is `depth`
    times a 3x3 convolution and MaxMin, then keeps half of the channels and moves 2x2 pixels into
    them, so that the width doubles; the last block, on 2x2 pixels, has 1x1 kernels. A square
    orthogonal linear layer follows, of which the first `num_classes` outputs are the logits. With
    the defaults there are 5 blocks and, for a method with one number for each entry of a kernel,
    1.57 million numbers without biases.

    Args:
        in_shape: Channels, height and width of an input, a square with a power of 2 as side.
        num_classes: As of [`convnet`][orthonet.models.convnet].
        layer: A name of [`available("conv")`][orthonet.layers.available], for the 3x3 and 1x1
            convolutions; "lipnext", which has no kernel, is used at 3x3 only and "cholesky" at 1x1
            only. `OrthoConv2d` has the places that they leave.
        width: Channels of the first block, even.
        depth: Convolutions of a block.
        lipschitz: See `convnet`.
        ortho_params: See `convnet`.

    Shape:
        As of `convnet`.

    Guarantee:
        As of `convnet`.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> convnet_xs((1, 8, 8), 3, width=4, depth=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])

    References:
        Prach, Brau, Buttazzo & Lampert, *1-Lipschitz layers compared: memory, speed, and
        certifiable robustness*, CVPR 2024 (the network "XS"; here with circular padding).
    """
    owner, shape = "convnet_xs", tuple(in_shape)
    _checks.one_of(owner, available("conv"), layer=layer)
    _checks.positive_int(owner, width=width, depth=depth, num_classes=num_classes)
    square = len(shape) == 3 and shape[1] == shape[2] and shape[1].bit_count() == 1 < shape[1]
    _checks.require(
        square,
        owner,
        "in_shape must be (channels, side, side), side a power of 2 above 1",
        "Pad the images",
        in_shape=in_shape,
    )
    blocks = shape[1].bit_length() - 1
    _checks.require(
        width % 2 == 0 and shape[0] <= width and num_classes <= width * 2**blocks,
        owner,
        "width must be even, with room for the channels of the input and for the classes",
        "Use a larger one",
        width=width,
        in_shape=in_shape,
        num_classes=num_classes,
    )
    layers: dict[str, nn.Module] = {}
    if shape[0] < width:
        layers["zeros"] = nn.ZeroPad3d((0, 0, 0, 0, 0, width - shape[0]))

    def add(name: str, channels: int, taps: int) -> None:
        fits = {"lipnext": 3, "cholesky": 1}.get(layer, taps) == taps
        used = layer if fits else "ortho"
        options: dict[str, Any] = {"ortho_params": ortho_params} if used == "ortho" else {}
        if taps > 1:
            options |= {"padding": "same", "padding_mode": "circular"}
        layers[name] = make_conv(used, channels, channels, taps, **options)
        if not method(used).nonlinear:
            layers[f"activation_{name}"] = MaxMin()

    add("mix", width, 1)
    for block in range(1, blocks + 1):
        for i in range(1, depth + 1):
            add(f"conv{block}_{i}", width, 3 if block < blocks else 1)
        layers[f"keep{block}"] = FirstChannels(width // 2)
        layers[f"rearrange{block}"] = SpaceToDepth2d(2)
        width *= 2
    layers["flatten"] = nn.Flatten()
    layers["head"] = OrthoLinear(width, width, ortho_params=ortho_params)
    layers["logits"] = FirstChannels(num_classes)
    return scaled(nn.Sequential(OrderedDict(layers)), lipschitz)
