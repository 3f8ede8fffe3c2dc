"""Skew orthogonal convolution: the exponential of a convolution with a skew kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from orthonet import _checks
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
from orthonet.layers.zoo._base import CachedParts, SameSizeConv2d, match_channels, new_bias
from orthonet.layers.zoo._export import circular_twin, image_size_of
from orthonet.linalg.bounds.rounding import add_up, mul_up, up
from orthonet.linalg.bounds.sizes import Chained, absolute_convolution
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.rescaling import convolution_norm_upper

__all__ = ["SOCConv2d", "SkewKernel"]

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
        stored = self.original
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


class SOCConv2d(SameSizeConv2d):
    r"""Skew orthogonal convolution: \(y = e^{L} x\), the exponential series applied to the image.

    \(T_n(L) = \sum_{i < n} L^i / i!\) is applied term by term. For a skew L the eigenvalues are
    imaginary, and the remainder is at most that of \(e^{i \theta}\) at \(\theta = \|L\|\):
    \(|\,\|T_n(L) x\| - \|x\|\,| \le r \|x\|\) with \(r = \rho^n / n!\) for any
    \(\rho \ge \|L\|\). The result is divided by \(1 + r\) with the \(\rho\) of
    [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper], so it is at most 1 for
    certain. \(\|L\|\) is kept below `reach`, and the number of terms makes r smaller than the
    rounding: 12 in float32 and 20 in float64 (\(r \le 2.8\cdot 10^{-7}\) and
    \(1.4\cdot 10^{-15}\) for the default reach of 1.5).

    Channels of zeros are appended before the layer, or dropped after it, where the numbers of
    channels differ. A zero-padded convolution with a skew kernel is a skew matrix too, so zero
    padding stays orthogonal.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps, odd.
        stride: 1; put SpaceToDepth2d before the layer instead of a stride.
        padding: "same", or the number that is the same.
        dilation: Spacing of the taps.
        groups: Number of groups.
        bias: Whether to add a learnable bias, zero at first.
        padding_mode: "zeros" or "circular".
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        lipschitz: The constant K of the layer.
        terms: Terms of the series; by the dtype if None.
        reach: Largest norm of L, in radians.
        image_size: Height and width of the input, if they are fixed; `to_plain` needs them.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to the same with out_channels.

    Guarantee:
        Norm at most `lipschitz`, to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative, for
        every finite parameter and number of terms. For in_channels <= out_channels all singular
        values are `lipschitz` to that tolerance plus 2 r, with zero or circular padding.

    Raises:
        ValueError: even kernels, strides, other paddings, `terms` < 1, or `reach` outside (0, 10].

    References:
        Singla & Feizi, *Skew orthogonal convolutions*, ICML 2021, theorems 3 and 4,
        arXiv:2105.11417 (there the remainder is left out).
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
        super().__init__()
        self._adopt(
            in_channels, out_channels, kernel_size=kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        self._set_constant(lipschitz)
        _checks.in_range(type(self), 1e-3, 10.0, reach=reach)
        if terms is not None:
            _checks.positive_int(type(self), terms=terms)
        self.terms = terms
        self.image_size = image_size_of(type(self), image_size)
        width = max(in_channels, out_channels) // groups
        self.parametrization = SkewKernel(
            (groups * width, width, *self.kernel_size), groups, float(reach), device, dtype
        )
        _checks.boolean(type(self), bias=bias)
        new_bias(self, out_channels if bias else None, device, dtype)

    def _number_of_terms(self, dtype: torch.dtype) -> int:
        return self.terms or _TERMS[dtype]

    def factor(self, bound: Tensor) -> Tensor:
        """What the series is multiplied by, for a bound of the norm of its kernel."""
        terms = self._number_of_terms(bound.dtype)
        return self.lipschitz / (1.0 + bound**terms / math.factorial(terms))

    def linear(self, x: Tensor) -> Tensor:
        """The linear part of the layer, with its factor K."""
        kernel, bound = self.parametrization()
        x = x.to(kernel.dtype).unflatten(-3, (self.groups, -1))
        x = match_channels(x, kernel.shape[1]).flatten(-4, -3)
        terms = self._number_of_terms(kernel.dtype)
        with torch.autocast(x.device.type, enabled=False):
            total = term = x
            for i in range(1, terms):
                term = self._convolve(term, kernel) / i
                total = total + term
            total = total * self.factor(bound)
        total = total.unflatten(-3, (self.groups, -1))
        return match_channels(total, self.out_channels // self.groups).flatten(-4, -3)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the exponential to `input`, batched or not, and add the bias."""
        self._check_input(input)
        y = self.linear(input if input.ndim == 4 else input.unsqueeze(0))
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        y = y.to(input.dtype)
        return y if input.ndim == 4 else y.squeeze(0)

    def to_plain(self) -> nn.Conv2d:
        """Return a stock `nn.Conv2d` whose kernel covers the image, independent of this layer.

        Raises:
            ValueError: The layer was made without `image_size`, or pads with zeros: the series
                of zero-padded convolutions is not a convolution near the border.
        """
        channels = (self.in_channels, self.out_channels)
        return circular_twin(
            self, self.linear, channels, self.image_size, self.bias, groups=self.groups
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, terms={self.terms}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        """The remainder of the series of a skew operator, from a proved norm of it."""
        size = image_of(self, input_shape)
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
        value = mul_up(add_up(1.0, remainder), factor, SAFE)
        series = math.exp(absolute_convolution(kernel, self.groups))
        count = terms * (kernel[0].numel() + 3.0)
        chain = replace(Chained().map(series, count), stages=terms)
        rounding = chain.map(factor, 1.0, length_of(self.bias, math.prod(size))).rounding()
        return Declared(value, f"series of {terms} terms at |L| <= {norm:.3g}", rounding=rounding)
