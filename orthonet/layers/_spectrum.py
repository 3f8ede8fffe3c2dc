"""Singular values of layers that hold a linear map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks

__all__ = ["LinearMap"]


class LinearMap:
    """Mixin of layers that are a linear map plus a bias: its singular values and stable rank."""

    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        """Apply the linear part of the layer to a batch, in float32 at least."""
        raise AttributeError("a subclass gives the map")

    @torch.no_grad()
    def singular_values(self, input_size: int | tuple[int, ...] | None = None) -> Tensor:
        r"""Return the singular values of the linear part, largest first, in float64.

        For circular convolutions one matrix for each frequency is decomposed, else the dense matrix
        of the map: it has as many columns as an image has values, so keep `input_size` small.

        Args:
            input_size: Spatial size of the input of a convolution; an integer stands for a square.
                None for linear layers.

        Shape:
            Output: (min(values of the input, values of the output),).

        Raises:
            ValueError: A convolution without `input_size`, or a linear layer with it.

        Examples:
            >>> from orthonet.layers import OrthoConv2d
            >>> layer = OrthoConv2d(2, 4, 3, padding=1, padding_mode="circular")
            >>> values = layer.singular_values(8)
            >>> len(values), round(float(values.min()), 4), round(float(values.max()), 4)
            (128, 1.0, 1.0)
        """
        layer: Any = self
        dims = len(getattr(layer, "kernel_size", ()))
        _checks.require(
            (input_size is None) == (dims == 0),
            self,
            "input_size is needed by convolutions alone",
            "Pass the spatial size of an image to a convolution, nothing to a linear layer",
            input_size=input_size,
        )
        if dims == 0:
            return torch.linalg.svdvals(layer.weight.double())
        sizes = (input_size,) * dims if isinstance(input_size, int) else tuple(input_size or ())
        _checks.require(
            len(sizes) == dims,
            self,
            f"input_size must be an integer or {dims} of them",
            "Give one for each spatial dimension",
            input_size=input_size,
        )
        if layer.padding_mode == "circular":
            return _periodic(self, layer.in_channels, sizes)
        return _dense(self, (layer.in_channels, *sizes))

    def stable_rank(self, input_size: int | tuple[int, ...] | None = None) -> float:
        r"""Return \(\|A\|_F^2 / \|A\|_2^2\), between 1 and the rank of the linear part A.

        Args:
            input_size: As for `singular_values`.
        """
        squares = self.singular_values(input_size).square()
        return float(squares.sum() / squares.max()) if bool(squares.max() > 0) else 0.0


def _like(layer: Any) -> Tensor:
    """Return a tensor on the device of a layer, in float64 or the precision of its maps."""
    return next(p for p in layer.parameters() if p.is_floating_point())


def _images(layer: LinearMap, impulses: Tensor) -> Tensor:
    """Return what the linear part makes of a batch, in float64."""
    return torch.cat([layer.linear(part).double() for part in impulses.split(256)])


def _dense(layer: LinearMap, shape: tuple[int, ...]) -> Tensor:
    number = math.prod(shape)
    eye = torch.eye(number, dtype=torch.float64, device=_like(layer).device)
    columns = _images(layer, eye.view(number, *shape))
    return torch.linalg.svdvals(columns.flatten(1)).sort(descending=True).values


def _periodic(layer: LinearMap, channels: int, sizes: tuple[int, ...]) -> Tensor:
    """Return the singular values of a map that commutes with shifts by the stride.

    The images of the impulses inside one stride determine it. Pixels of one stride count as
    channels, in front of the map or, for a transposed one, behind it.
    """
    like = _like(layer)
    zeros = torch.zeros(1, channels, *sizes, dtype=torch.float64, device=like.device)
    outside = _images(layer, zeros).shape[2:]
    inside = [max(1, n // m) for n, m in zip(sizes, outside, strict=True)]
    cell = math.prod(inside) * channels
    impulses = zeros.new_zeros(cell, channels, *inside)
    impulses.view(cell, cell).copy_(torch.eye(cell, dtype=zeros.dtype))
    pad = [a for n, m in zip(reversed(sizes), reversed(inside), strict=True) for a in (0, n - m)]
    images = _images(layer, nn.functional.pad(impulses, pad))
    for dim, (n, m) in enumerate(zip(sizes, outside, strict=True)):
        step = max(1, m // n)  # of a transposed map: its pixels of one stride become channels
        split = images.unflatten(2 + dim, (m // step, step))
        images = split.movedim(3 + dim, 1).flatten(1, 2)
    axes = tuple(range(2, images.ndim))
    symbol = torch.fft.fftn(images, dim=axes).flatten(2).movedim(-1, 0)
    return torch.linalg.svdvals(symbol).flatten().sort(descending=True).values
