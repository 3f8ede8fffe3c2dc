"""Convolutional networks of orthogonal layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch  # noqa: F401 (for the example)
from torch import nn

from orthonet import _checks
from orthonet.layers import OrthoConv2d
from orthonet.models._parts import (
    IMAGE,
    activation_of,
    dense_layers,
    scaled,
    shape_of,
    sizes_of,
    widths_of,
)
from orthonet.models._registry import register
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["convnet", "convnet_digits", "convnet_images", "convnet_mnist"]


@register
def convnet(
    in_shape: Sequence[int],
    num_classes: int,
    *,
    channels: Sequence[int] = (16, 32, 32),
    kernel_sizes: Sequence[int] = (2, 4, 3),
    strides: Sequence[int] = (2, 2, 1),
    hidden: Sequence[int] = (128,),
    activation: str = "max_min",
    head: str = "ortho",
    lipschitz: float = 1.0,
    ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
) -> nn.Sequential:
    """Build orthogonal convolutions, some with a stride, then orthogonal linear layers.

    Zero padding of `(kernel_size - stride) // 2` (rounded up) on each side, so that a stride s
    divides the size by s. It keeps the constant at 1 or less; where the digits end before the
    border, it costs nothing. No layer normalizes its input: the radius is in the units of the
    pixels.

    Args:
        in_shape: Channels, height and width of an input.
        num_classes: Number of logits.
        channels: Output channels of every convolution; even, unless the activation is "abs".
        kernel_sizes: Kernel size of every convolution, at least its stride.
        strides: Stride of every convolution.
        hidden: Widths of the hidden linear layers; even, unless the activation is "abs".
        activation: "max_min", "group_sort" or "abs".
        head: "ortho" (the logits together are 1-Lipschitz) or "unit_norm" (each of them is).
        lipschitz: Constant K of the network: its logits are K times those of a 1-Lipschitz one.
        ortho_params: How the weights are made orthogonal.

    Shape:
        Input (batch, *in_shape), output (batch, num_classes).

    Guarantee:
        l2 constant at most K up to rounding with `head="ortho"`; every single logit with
        `head="unit_norm"`. The certificate says how much the rounding is.

    Raises:
        ValueError: An argument out of range, or an image too small for the strides.

    Examples:
        >>> net = convnet((3, 32, 32), 10, channels=(16, 32), kernel_sizes=(4, 3), strides=(4, 1))
        >>> net(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    owner = "convnet"
    sizes_of(
        owner,
        in_shape=in_shape,
        channels=channels,
        kernel_sizes=kernel_sizes,
        strides=strides,
        hidden=hidden,
    )
    shape, widths = shape_of(owner, in_shape, *IMAGE), tuple(channels)
    _checks.require(
        len(widths) == len(kernel_sizes) == len(strides) > 0,
        owner,
        "channels, kernel_sizes and strides must have one entry for every convolution",
        "Give all three the same length",
        channels=channels,
        kernel_sizes=kernel_sizes,
        strides=strides,
    )
    widths_of(owner, activation, channels=widths, hidden=tuple(hidden))
    layers: dict[str, nn.Module] = {}
    depth, height, width = shape
    for i, (out, kernel, stride) in enumerate(zip(widths, kernel_sizes, strides, strict=True), 1):
        padding = max(0, kernel - stride + 1) // 2
        layers[f"conv{i}"] = OrthoConv2d(
            depth, out, kernel, stride, padding, ortho_params=ortho_params
        )
        layers[f"activation_conv{i}"] = activation_of(owner, activation)
        depth = out
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        _checks.require(
            min(height, width) >= 1,
            owner,
            f"the image must survive convolution {i}",
            "Use larger images or fewer strides",
            in_shape=in_shape,
            strides=strides,
        )
    features = depth * height * width
    dense = dense_layers(
        owner, features, tuple(hidden), num_classes, activation, head, ortho_params
    )
    network = nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), **dense))
    return scaled(network, lipschitz)


@register
def convnet_digits(**arguments: Any) -> nn.Sequential:
    """Build a [`convnet`][orthonet.models.convnet] for scikit-learn's 8x8 digits; same keywords."""
    small = {"channels": (16, 32), "kernel_sizes": (3, 2), "strides": (1, 2), "hidden": (128,)}
    return convnet((1, 8, 8), 10, **{**small, **arguments})


@register
def convnet_mnist(**arguments: Any) -> nn.Sequential:
    """Build a [`convnet`][orthonet.models.convnet] for the 28x28 digits of MNIST; same keywords."""
    return convnet((1, 28, 28), 10, **arguments)


@register
def convnet_images(
    in_shape: Sequence[int] = (3, 224, 224),
    num_classes: int = 1000,
    *,
    width: int = 32,
    widest: int = 512,
    depth: int = 1,
    patch: int | None = None,
    smallest: int = 7,
    hidden: Sequence[int] = (),
    **arguments: Any,
) -> nn.Sequential:
    """Build a [`convnet`][orthonet.models.convnet] for images of any size.

    A first convolution with the stride `patch`, then stages that halve the image and double the
    channels, until its shorter side is `smallest` pixels or less; in front of each halving stand
    `depth` 3x3 convolutions. With the defaults 56, 28, 14 and 7 pixels with 32, 64, 128 and 256
    channels.

    Args:
        in_shape: As of `convnet`.
        num_classes: As of `convnet`.
        width: Channels of the first convolution, even.
        widest: Channels at most.
        depth: 3x3 convolutions of a stage.
        patch: Kernel size and stride of the first convolution; 1 stands for a 3x3 convolution
            without a stride. By default the power of 2 that leaves 64 pixels or less.
        smallest: Where the stages end, in pixels of the shorter side.
        hidden: As of `convnet`.
        arguments: `activation`, `head`, `lipschitz` and `ortho_params` of `convnet`.

    Guarantee:
        That of `convnet`.

    Raises:
        ValueError: As of `convnet`.

    Examples:
        >>> net = convnet_images((3, 40, 30), 5, width=8, smallest=10)
        >>> [m.out_channels for m in net if hasattr(m, "out_channels")], net.head.in_features
        ([8, 8, 16, 16, 32], 2240)
    """
    owner = "convnet_images"
    shape = shape_of(owner, in_shape, *IMAGE)
    _checks.positive_int(owner, width=width, widest=widest, depth=depth, smallest=smallest)
    side = min(shape[1:])
    patch = 1 << max(0, math.ceil(math.log2(max(1, side) / 64))) if patch is None else patch
    _checks.positive_int(owner, height=shape[1], width=shape[2], patch=patch)
    layers = [(width, patch, patch) if patch > 1 else (width, 3, 1)]
    side //= patch
    while side > smallest:
        layers += [(width, 3, 1)] * depth
        width = min(2 * width, max(width, widest))
        layers.append((width, 4, 2))
        side //= 2
    channels, kernel_sizes, strides = zip(*layers, strict=True)
    return convnet(
        shape,
        num_classes,
        channels=channels,
        kernel_sizes=kernel_sizes,
        strides=strides,
        hidden=hidden,
        **arguments,
    )
