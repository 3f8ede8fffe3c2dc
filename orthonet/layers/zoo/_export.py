"""Stock twins of circular layers: the kernel that does the same on one image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks

__all__ = ["circular_twin", "image_size_of"]


def image_size_of(owner: object, image_size: Any) -> tuple[int, int] | None:
    """Return `image_size` as (height, width); an integer stands for a square."""
    if image_size is None:
        return None
    sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
    _checks.require(
        isinstance(sizes, (tuple, list)) and len(sizes) == 2,
        owner,
        "image_size must be an integer or (height, width)",
        "Give both sizes",
        image_size=image_size,
    )
    for size in sizes:
        _checks.positive_int(owner, image_size=size)
    return sizes[0], sizes[1]


@torch.no_grad()
def circular_twin(
    layer: Any,
    linear: Callable[[Tensor], Tensor],
    channels: tuple[int, int],
    size: tuple[int, int] | None,
    bias: Tensor | None,
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> nn.Conv2d:
    """Return an `nn.Conv2d` that covers the torus and equals `linear` plus `bias` on it.

    The kernel is read off the images of unit impulses, one for each input channel of a group and
    each position inside a stride.

    Raises:
        ValueError: The layer does not know its image size, or its padding is not circular.
    """
    _checks.require(
        size is not None and layer.padding_mode == "circular",
        layer,
        "a stock convolution that does the same exists for one image size and circular padding",
        "Make the layer with image_size=(height, width) and padding_mode='circular', or deploy "
        "it unchanged",
        image_size=size,
        padding_mode=layer.padding_mode,
    )
    height, width = size or (0, 0)
    inside, outside = channels[0] // groups, channels[1]
    kernel_size, padding = [], []
    for n, s in zip((height, width), stride, strict=True):
        taps = n if (n - s) % 2 == 0 else n + 1  # symmetric padding; the last tap stays 0
        kernel_size.append(taps)
        padding.append((taps - s) // 2)
    parameter = next(layer.parameters())
    plain = nn.Conv2d(
        *channels,
        tuple(kernel_size),
        stride,
        tuple(padding),
        groups=groups,
        bias=bias is not None,
        padding_mode="circular",
        device=parameter.device,
        dtype=parameter.dtype,
    )
    weight = torch.zeros_like(plain.weight)
    rows = torch.arange(height // stride[0], device=weight.device)
    columns = torch.arange(width // stride[1], device=weight.device)
    for a in range(stride[0]):
        for b in range(stride[1]):
            impulses = weight.new_zeros(inside, groups, inside, height, width)
            index = torch.arange(inside, device=weight.device)
            impulses[index, :, index, a, b] = 1.0
            images = linear(impulses.flatten(1, 2))  # (inside, out, rows, columns)
            i = (a + padding[0] - rows * stride[0]) % height
            j = (b + padding[1] - columns * stride[1]) % width
            weight[:, :, i[:, None], j[None, :]] = images.transpose(0, 1).to(weight.dtype)
    plain.weight.copy_(weight.view(outside, inside, *kernel_size))
    if bias is not None and plain.bias is not None:
        plain.bias.copy_(bias)
    return plain.train(layer.training)
