"""A convolution that applies a matrix at each frequency of the image."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks, functional
from orthonet._torch import conv_paddings, set_conv_paddings
from orthonet.layers._base import WithoutPlainWeight, add_bias, set_zero
from orthonet.layers._declared import (
    SAFE,
    Declared,
    Norms,
    check_bias,
    float64,
    image_of,
    length_of,
)
from orthonet.layers._spectrum import LinearMap
from orthonet.layers.convolution.arguments import check_circular, spans, spatial_outputs
from orthonet.layers.zoo._base import (
    adopt_conv2d,
    check_image,
    match_channels,
)
from orthonet.layers.zoo._export import circular_twin, image_size_of
from orthonet.linalg.bounds.rounding import mul_up
from orthonet.linalg.bounds.sizes import Chained, Rounding, absolute_matrix, fourier_roundings
from orthonet.linalg.kernels.fourier import apply_symbol
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers import FourierWeight

__all__ = ["FourierConv2d", "fourier_chain"]


class FourierConv2d(LinearMap, WithoutPlainWeight, nn.Module):
    """A convolution with the arguments of `nn.Conv2d` that works on the whole torus at once."""

    _function: ClassVar[Any]
    _square = False  # the same number of channels in and out, padded or cropped around
    _center = True
    _noise = 0.1
    parametrization: FourierWeight
    bias: Tensor | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding: tuple[int, int] | str
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        owner = type(self)
        _checks.sizes(owner, 2, 1, stride=stride)
        same = padding == "same" and stride not in (1, (1, 1))
        window = (kernel_size, stride, 0 if same else padding, dilation, groups, padding_mode)
        adopt_conv2d(self, in_channels, out_channels, *window)
        _checks.lipschitz_constant(owner, lipschitz)
        _checks.factory(owner, device, dtype)
        if same:
            self._strided_same()
        _checks.require(
            self.stride[0] == self.stride[1] and (self.stride[0] == 1 or self.dilation == (1, 1)),
            owner,
            "the stride must be the same in both dims, and dilation must be 1 with a stride",
            "Use SpaceToDepth2d before the layer for other shapes",
            stride=self.stride,
            dilation=self.dilation,
        )
        self.lipschitz = float(lipschitz)
        self.image_size = image_size_of(owner, image_size)
        add_bias(self, bias, out_channels, device, dtype)
        rows = self.out_channels // groups
        columns = self.in_channels // groups * self.stride[0] * self.stride[1]
        if self._square:
            rows = columns = max(rows, columns)
        self._make((groups, rows, columns), device, dtype)

    def _strided_same(self) -> None:
        """Return the symmetric padding that gives size / stride outputs."""
        pads = []
        for k, s in zip(self.kernel_size, self.stride, strict=True):
            pads.append(max(0, k - s + 1) // 2)
        self.padding = (pads[0], pads[1])
        set_conv_paddings(self, [pads[1], pads[1], pads[0], pads[0]])

    def _make(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        # at a stride, the taps inside one block of pixels are channels
        taps = tuple(max(1, -(-k // s)) for k, s in zip(self.kernel_size, self.stride, strict=True))
        self.parametrization = FourierWeight(
            (*shape, *taps), self._function, self.dilation, self._noise, self._center, device, dtype
        )

    def reset_parameters(self) -> None:
        """Draw the kernel anew and set the bias to zero; nothing happens on the meta device."""
        self.parametrization.reset_parameters()
        set_zero(self.bias)

    def blocks(self, size: tuple[int, int]) -> Tensor:
        """Return the matrix at each frequency of a torus (size in strides), without the factor K.

        Shape:
            Complex, (groups, frequencies of `torch.fft.rfft2`, rows, columns).
        """
        return self.parametrization(size)

    def _torus(self, size: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size of the torus in pixels, and of the output."""
        s = self.stride[0]
        if self.padding_mode == "circular":
            return (size[-2], size[-1]), (size[-2] // s, size[-1] // s)
        height, width = (
            -(-(n + low + high) // s) * s
            for n, (*_, low, high) in zip(size[-2:], spans(self), strict=True)
        )
        rows, columns = spatial_outputs(self, size[-2:])
        return (height, width), (rows, columns)

    def linear(self, x: Tensor) -> Tensor:
        """Return the linear part of the layer, with its factor K."""
        dtype = compute_dtype(self.parametrization.original.dtype)
        torus, output = self._torus(tuple(x.shape))
        image = x.to(dtype)
        if self.padding_mode == "zeros":
            left, _, top, _ = conv_paddings(self)
            right, bottom = torus[1] - image.shape[-1] - left, torus[0] - image.shape[-2] - top
            image = nn.functional.pad(image, (left, right, top, bottom))
        if self.stride[0] > 1:
            image = functional.space_to_depth(image, self.stride[0], 2)
        with torch.autocast(image.device.type, enabled=False):
            y = self._on_torus(image)
        if self.padding_mode == "zeros":
            start = [
                d * ((k - 1) // 2) for k, d in zip(self.kernel_size, self.dilation, strict=True)
            ]
            start = [0, 0] if self.stride[0] > 1 else start
            y = y[..., start[0] : start[0] + output[0], start[1] : start[1] + output[1]]
        return y if self.lipschitz == 1.0 else y * self.lipschitz

    def _on_torus(self, image: Tensor) -> Tensor:
        """Apply the layer to an image that fills the torus, at stride 1, without the factor K."""
        blocks = self.blocks((image.shape[-2], image.shape[-1]))
        image = image.unflatten(-3, (self.groups, -1))
        image = match_channels(image, blocks.shape[-1]).flatten(-4, -3)
        y = apply_symbol(image, blocks).unflatten(-3, (self.groups, -1))
        return match_channels(y, self.out_channels // self.groups).flatten(-4, -3)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input`, batched or not, on its torus."""
        check_image(self, input)
        size = tuple(input.shape[-2:])
        _checks.require(
            self.image_size is None or size == self.image_size,
            self,
            f"this layer was made for images of {self.image_size}",
            "Leave image_size out to allow any",
            input_size=size,
        )
        if self.padding_mode == "circular":
            check_circular(self, input)
            _, output = self._torus(size)
            _checks.require(
                spatial_outputs(self, size) == output,
                self,
                "circular padding must give size / stride outputs",
                "Use padding='same'",
                padding=self.padding,
                input_size=size,
            )
        batched = input if input.ndim == 4 else input.unsqueeze(0)
        y = self._add_bias(self.linear(batched)).to(input.dtype)
        return y if input.ndim == 4 else y.squeeze(0)

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def to_plain(self) -> nn.Conv2d:
        """Return a stock `nn.Conv2d` whose kernel covers the image, independent of this layer.

        Raises:
            ValueError: The layer was made without `image_size`, or pads with zeros.
        """
        channels = (self.in_channels, self.out_channels)
        return circular_twin(
            self, self.linear, channels, self.image_size, self.bias, self.stride, self.groups
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, padding_mode={self.padding_mode!r}"
        )
        return text if self.groups == 1 else f"{text}, groups={self.groups}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        blocks, size, text = self._symbol(input_shape)
        value = mul_up(norms.matrix(blocks), self.lipschitz, SAFE)
        inside = self.in_channels // self.groups * self.stride[0] ** 2
        same = blocks.shape[-1] == inside and blocks.shape[-2] * self.groups == self.out_channels
        chain = fourier_chain(Chained(), blocks, size)
        rounding = self._finished(chain, length_of(self.bias, math.prod(size)))
        if self.padding_mode == "circular" and same:
            return Declared(value, text, True, rounding)
        return Declared(value, text, rounding=rounding)

    def _symbol(self, input_shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, int], str]:
        """Return the symbol on the torus, as the transforms of forward apply it.

        The inverse transform takes the Hermitian part of the first and of the last column of
        frequencies; elsewhere each block is applied as it is.
        """
        check_bias(self, self.out_channels, self.bias)
        torus, _ = self._torus(image_of(self, input_shape))
        size = (torus[0] // self.stride[0], torus[1] // self.stride[0])
        with torch.no_grad():
            blocks = float64(self, self.blocks(size))
        grid = blocks.unflatten(1, (size[0], size[1] // 2 + 1)).clone()
        opposite = -torch.arange(size[0]) % size[0]
        for column in {0} | ({size[1] // 2} if size[1] % 2 == 0 else set()):
            own = grid[:, :, column]
            grid[:, :, column] = (own + own[:, opposite].conj()) / 2
        text = "{} Fourier blocks {}x{}".format(blocks.shape[1], *blocks.shape[2:])
        return grid.flatten(1, 2), size, text

    def _finished(self, chain: Chained | None, bias: float = 0.0) -> Rounding | None:
        """Return the factor K and the bias."""
        return None if chain is None else chain.map(self.lipschitz, 1.0, bias).rounding()


def fourier_chain(chain: Chained, blocks: Tensor, size: tuple[int, int]) -> Chained | None:
    """Behind two transforms and the blocks between them, whose half spectrum counts twice."""
    transform = fourier_roundings(size)
    if transform is None:
        return None
    return chain.map(2.0 * absolute_matrix(blocks), 2.0 * transform + 4.0 * blocks.shape[-1] + 16.0)
