"""Skew orthogonal convolution: the exponential of a convolution with a skew kernel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._base import add_bias
from orthonet.layers._declared import (
    SAFE,
    Declared,
    Norms,
    check_bias,
    float64,
    image_of,
    length_of,
    refuse,
)
from orthonet.layers._spectrum import LinearMap
from orthonet.layers.zoo._base import (
    CachedParts,
    SameSizeConv2d,
    check_image,
    match_channels,
)
from orthonet.layers.zoo._export import circular_twin, image_size_of
from orthonet.linalg.bounds.rounding import add_up, mul_up, up
from orthonet.linalg.bounds.sizes import Chained, absolute_convolution
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.rescaling import convolution_norm_upper
from orthonet.reparametrizers.weight import settled

__all__ = ["SOCConv2d", "SOCConvTranspose2d", "SkewKernel"]

_TERMS = {torch.float32: 12, torch.float64: 20}


class SkewKernel(CachedParts):
    r"""A kernel L with \(L^\top = -L\), of norm at most `reach`, and its bound.

    \(L = M - M^\top\), divided by the bound of its norm where that exceeds `reach`; the adjoint
    of a convolution swaps its channels and flips its taps.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        reach: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.reach = reach
        self.original = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def _shapes(self) -> tuple[torch.Size, ...]:
        return self.original.shape, torch.Size()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the kernel and an upper bound of its norm, in float32 at least."""
        stored = settled(self.original)
        with torch.autocast(stored.device.type, enabled=False):
            m = stored.to(compute_dtype(stored.dtype)).unflatten(0, (self.groups, -1))
            skew = (m - m.transpose(1, 2).flip(-2, -1)).flatten(0, 1)
            bound = convolution_norm_upper(skew, groups=self.groups)
            factor = self.reach / bound.clamp_min(self.reach)
            return skew * factor, bound * factor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw M anew; nothing happens on the meta device."""
        if not self.original.is_meta:
            self.original.normal_().mul_(0.5 * self.original[0].numel() ** -0.5)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.original.shape)}, reach={self.reach:g}"


class _SkewConv2d(LinearMap, SameSizeConv2d):
    """The series of a skew convolution, and what SOC and its transposed twin share."""

    parametrization: SkewKernel

    def _build(
        self,
        channels: tuple[int, int],
        width: int,
        window: tuple[Any, ...],
        bias: bool,
        lipschitz: float,
        terms: int | None,
        reach: float,
        image_size: int | tuple[int, int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        _checks.factory(type(self), device, dtype)
        self.image_size = image_size_of(type(self), image_size)
        self._adopt(channels, *window)
        self._set_constant(lipschitz)
        _checks.in_range(type(self), 1e-3, 10.0, reach=reach)
        if terms is not None:
            _checks.positive_int(type(self), terms=terms)
        self.terms = terms
        width = width if self.stride != (1, 1) else max(channels)
        inside = width // self.groups
        shape = (self.groups * inside, inside, *self.kernel_size)
        self.parametrization = SkewKernel(shape, self.groups, float(reach), device, dtype)
        add_bias(self, bias, channels[1], device, dtype)

    def _number_of_terms(self, dtype: torch.dtype) -> int:
        return self.terms or _TERMS[dtype]

    def factor(self, bound: Tensor) -> Tensor:
        """Return what the series is multiplied by, for a bound of the norm of its kernel."""
        terms = self._number_of_terms(bound.dtype)
        return self.lipschitz / (1.0 + bound**terms / math.factorial(terms))

    def _series(self, x: Tensor, kernel: Tensor, bound: Tensor) -> Tensor:
        """Return the scaled series, applied to an image of the channels of the kernel."""
        total = term = x
        for i in range(1, self._number_of_terms(kernel.dtype)):
            term = self._convolve(term, kernel) / i
            total = total + term
        return total * self.factor(bound)

    def _matched(self, x: Tensor, channels: int) -> Tensor:
        """Append zeros to the channels of each group, or drop the last ones."""
        inside = channels // self.groups
        return match_channels(x.unflatten(-3, (self.groups, -1)), inside).flatten(-4, -3)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the exponential to `input`, batched or not, and add the bias."""
        self._check_input(input)
        y = self.linear(input if input.ndim == 4 else input.unsqueeze(0))
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        y = y.to(input.dtype)
        return y if input.ndim == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={self.terms}"

    def _torus(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of the image that the series is applied to."""
        return size

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        """Bound the remainder of the series of a skew operator, from a proved norm of it."""
        size = self._torus(image_of(self, input_shape))
        check_bias(self, self.out_channels, self.bias)
        with torch.no_grad():
            deployed, used = self.parametrization()
            factor = float(float64(self, self.factor(used)))
        kernel = float64(self, deployed)
        grouped = kernel.unflatten(0, (self.groups, -1))
        if not torch.equal(grouped, -grouped.transpose(1, 2).flip(-2, -1)):
            refuse(self, "the kernel must be skew", "Make it by L = M - M^T, as the layer does")
        terms = self._number_of_terms(deployed.dtype)
        norm = norms.convolution(
            kernel,
            size,
            padding=self._pad,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )
        remainder = mul_up(up(math.pow(up(norm), terms)), 1.0 / math.factorial(terms), SAFE)
        gain, size_of, sums = self._reduction_norm(norms)
        value = mul_up(mul_up(add_up(1.0, remainder), factor, SAFE), gain)
        series = math.exp(absolute_convolution(kernel, self.groups))
        count = terms * (kernel[0].numel() + 3.0)
        chain = replace(Chained().map(series, count), stages=terms)
        if sums:
            chain = chain.map(size_of, sums)
        rounding = chain.map(factor, 1.0, length_of(self.bias, math.prod(size))).rounding()
        return Declared(value, f"series of {terms} terms at |L| <= {norm:.3g}", rounding=rounding)


class SOCConv2d(_SkewConv2d):
    r"""Skew orthogonal convolution: \(y = e^{L} x\), the exponential series applied to the image.

    \(T_n(L) = \sum_{i < n} L^i / i!\) is applied term by term. For a skew L the eigenvalues are
    imaginary, and the remainder is at most that of \(e^{i \theta}\) at \(\theta = \|L\|\):
    \(|\,\|T_n(L) x\| - \|x\|\,| \le r \|x\|\) with \(r = \rho^n / n!\) for any
    \(\rho \ge \|L\|\). The result is divided by \(1 + r\) with the \(\rho\) of
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper], so it is at most 1 for
    certain. \(\|L\|\) is kept below `reach`, and the number of terms makes r smaller than the
    rounding: 12 in float32 and 20 in float64 (\(r \le 2.8\cdot 10^{-7}\) and
    \(1.4\cdot 10^{-15}\) for the default reach of 1.5).

    At stride 1, channels of zeros are appended before the layer, or dropped after it, where the
    numbers of channels differ. With a stride the series works on `in_channels`, and a
    semi-orthogonal matrix maps every block of stride x stride pixels to `out_channels`. A
    zero-padded convolution with a skew kernel is a skew matrix too, so zero padding stays
    orthogonal.

    The other arguments are those of [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Args:
        kernel_size: Taps of L, odd.
        stride: Stride; the image sizes must be multiples of it.
        padding: "same", or the number that keeps the size at stride 1.
        terms: Terms of the series; by the dtype if None.
        reach: Largest norm of L, in radians.
        image_size: As of [`CayleyConv2d`][orthonet.layers.CayleyConv2d].

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W), to out_channels and H and W divided by the
        stride.

    Guarantee:
        Norm at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative, for
        every finite parameter and number of terms. For in_channels <= out_channels, or with a
        stride, all \(\min(c_i H W, c_o H W / S)\) singular values are `lipschitz` to that
        tolerance plus 2 r, with zero or circular padding; S is the product of the strides.

    Raises:
        ValueError: The kernel is even, the padding another, `terms` < 1, or `reach` outside (0,
            10];
            when called: the stride does not divide a size.

    Examples:
        >>> SOCConv2d(2, 8, 3, stride=2)(torch.zeros(1, 2, 10, 10)).shape
        torch.Size([1, 8, 5, 5])

    References:
        Singla & Feizi, *Skew orthogonal convolutions*, ICML 2021, theorems 3 and 4,
        arXiv:2105.11417 (there the remainder is left out); Boissin et al., ICML 2025 (the stride).
    """

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
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
        terms: int | None = None,
        reach: float = 1.5,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        window = (kernel_size, stride, padding, dilation, groups, padding_mode)
        options = (bias, lipschitz, terms, reach, image_size, device, dtype)
        self._build((in_channels, out_channels), in_channels, window, *options)
        self._reduce(in_channels, out_channels, device, dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Apply the linear part of the layer, with its factor K, to a batch."""
        kernel, bound = self.parametrization()
        with torch.autocast(x.device.type, enabled=False):
            y = self._series(self._matched(x.to(kernel.dtype), kernel.shape[0]), kernel, bound)
            if self.reduction is None:
                return self._matched(y, self.out_channels)
            return self._reduced(y)

    def to_plain(self) -> nn.Conv2d:
        """Return a stock `nn.Conv2d` that covers the image, independent of this layer.

        Raises:
            ValueError: The layer was made without `image_size`, or pads with zeros: the series
                of zero-padded convolutions is not a convolution near the border.
        """
        channels = (self.in_channels, self.out_channels)
        return circular_twin(
            self, self.linear, channels, self.image_size, self.bias, self.stride, self.groups
        )


class SOCConvTranspose2d(_SkewConv2d):
    """Transposed skew orthogonal convolution, the adjoint of a strided SOC.

    A semi-orthogonal matrix maps each pixel to a block of stride x stride pixels of
    `out_channels`, and the exponential series of [`SOCConv2d`][orthonet.layers.SOCConv2d] is
    applied to the result. At stride 1 it is `SOCConv2d` with the arguments of `nn.ConvTranspose2d`.

    The other arguments are those of `SOCConv2d`, in the order of `nn.ConvTranspose2d`.

    Args:
        stride: How many times larger the output is.
        output_padding: stride - 1, with which the output size is stride times the input size; None
            stands for it.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to the same with out_channels and H and W
        multiplied by the stride.

    Guarantee:
        As `SOCConv2d`: norm at most `lipschitz`, and with a stride all singular values are
        `lipschitz`.

    Raises:
        ValueError: As `SOCConv2d`, or another `output_padding`.

    Examples:
        >>> SOCConvTranspose2d(8, 2, 3, stride=2)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 2, 10, 10])

    References:
        As `SOCConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        output_padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
        terms: int | None = None,
        reach: float = 1.5,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        window = (kernel_size, stride, padding, dilation, groups, padding_mode)
        options = (bias, lipschitz, terms, reach, image_size, device, dtype)
        self._build((in_channels, out_channels), out_channels, window, *options)
        wanted = tuple(s - 1 for s in self.stride)
        given = (output_padding,) * 2 if isinstance(output_padding, int) else output_padding
        _checks.require(
            given is None or (isinstance(given, (tuple, list)) and tuple(given) == wanted),
            type(self),
            "the output size is stride times the input size: output_padding must be stride - 1",
            "Leave it out, and cut the output off behind the layer",
            output_padding=output_padding,
            stride=self.stride,
        )
        self.output_padding = wanted
        # as that of the convolution from out_channels to in_channels, whose adjoint this is
        self._reduce(out_channels, in_channels, device, dtype)

    def _check_input(self, input: Tensor) -> None:
        check_image(self, input)
        sizes = self._torus((input.shape[-2], input.shape[-1]))
        self._check_circular(sizes)

    def _torus(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] * self.stride[0], size[1] * self.stride[1]

    def linear(self, x: Tensor) -> Tensor:
        kernel, bound = self.parametrization()
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(kernel.dtype)
            if self.reduction is None:
                x = self._matched(x, kernel.shape[0])
            else:
                blocks = self._reduction()
                x = nn.functional.conv_transpose2d(
                    x, blocks, stride=self.stride, groups=self.groups
                )
            return self._matched(self._series(x, kernel, bound), self.out_channels)

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return stock convolutions that do the same on one image size, independent of this layer.

        Raises:
            ValueError: The layer was made without `image_size`, or pads with zeros.
        """
        size = None if self.image_size is None else self._torus(self.image_size)
        outside, groups = self.out_channels, self.groups
        if self.reduction is None:
            channels = (self.in_channels, outside)
            return circular_twin(self, self.linear, channels, size, self.bias, groups=groups)
        kernel, bound = self.parametrization()

        def turn(x: Tensor) -> Tensor:
            return self._series(x.to(kernel.dtype), kernel, bound)

        last = circular_twin(self, turn, (outside, outside), size, self.bias, groups=groups)
        first = nn.ConvTranspose2d(
            self.in_channels, outside, self.stride, self.stride, groups=groups, bias=False
        ).to(last.weight)
        first.weight.copy_(self._reduction())
        return nn.Sequential(first, last).train(self.training)
