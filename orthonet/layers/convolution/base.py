"""What all orthogonal convolutions share: construction, checks, adjoint, inverse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import ConvNd, conv_forward, conv_paddings
from orthonet.layers._base import ConstrainedWeight, add_bias
from orthonet.layers.convolution.arguments import adopt_arguments, spans
from orthonet.layers.convolution.padding import padding_norm
from orthonet.reparametrizers import KERNEL_METHODS, OrthoParams
from orthonet.reparametrizers.params import read_params

__all__ = ["OrthoConvNd"]


class OrthoConvNd(ConstrainedWeight):
    """Mixin before an `nn` convolution; `_build` takes the place of its `__init__`."""

    _plain_class: ClassVar[type[ConvNd]]
    _padding_modes: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        in_channels: int
        out_channels: int
        kernel_size: tuple[int, ...]
        stride: tuple[int, ...]
        dilation: tuple[int, ...]
        groups: int
        padding: tuple[int, ...] | str
        output_padding: tuple[int, ...]
        padding_mode: str
        training: bool
        transposed: bool

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        ortho_params: OrthoParams | str,
        method: str,
        ranks: str,
        lipschitz: float,
        **arguments: Any,
    ) -> None:
        nn.Module.__init__(self)
        owner = type(self)
        _checks.factory(owner, device, dtype)
        _checks.one_of(owner, ("half", "free"), ranks=ranks)
        ortho_params = read_params(owner, ortho_params)
        _checks.one_of(owner, tuple(KERNEL_METHODS), method=method)
        adopt_arguments(
            self,
            self._plain_class,
            in_channels,
            out_channels,
            groups=groups,
            padding_mode=padding_mode,
            modes=self._padding_modes,
            **arguments,
        )
        self.method = method
        options: dict[str, Any] = {}
        if method == "aoc":
            self._check_configuration(ranks)
            options["ranks"] = ranks
        else:
            _checks.require(
                ranks == "half",
                owner,
                "ranks belongs to method='aoc'",
                "Leave ranks out, or use method='aoc'",
                method=method,
                ranks=ranks,
            )
        gain = 1.0 / padding_norm(padding_mode, conv_paddings(self))
        # A transposed convolution is the adjoint of the convolution with the same kernel.
        rows = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.parametrization = KERNEL_METHODS[method](
            *rows,
            self.kernel_size,
            self._tap_stride(),
            groups,
            ortho_params,
            device,
            dtype,
            gain=gain,
            **options,
        )
        self._set_factor(lipschitz)
        add_bias(self, bias, out_channels, device, dtype)

    def _tap_stride(self) -> tuple[int, ...]:
        """Return the stride in taps: windows overlap in taps that lie s / gcd(s, d) apart."""
        pairs = zip(self.stride, self.dilation, strict=True)
        return tuple(s // math.gcd(s, d) for s, d in pairs)

    def _check_configuration(self, ranks: str) -> None:
        """Refuse what no kernel makes orthogonal, and what has nothing to train."""
        owner = type(self)
        kernel, stride, dilation = self.kernel_size, self.stride, self.dilation
        rows, columns = self.out_channels // self.groups, self.in_channels // self.groups
        if self.transposed:
            rows, columns = columns, rows
        steps = self._tap_stride()
        area = math.prod(min(k, s) for k, s in zip(kernel, steps, strict=True))
        spread = tuple(1 if t < s else d for t, s, d in zip(steps, stride, dilation, strict=True))
        fewer, more = ("in", "out") if self.transposed else ("out", "in")
        _checks.require(
            rows <= columns * area
            or (all(k >= s for k, s in zip(kernel, stride, strict=True)) and steps == stride),
            owner,
            "kernel_size must be >= stride in every dim and dilation without common divisor with "
            f"it, unless {fewer}_channels <= {area} * {more}_channels, otherwise some values are "
            "never read and no kernel is orthogonal",
            f"The nearest that is: kernel_size={tuple(map(max, kernel, stride))}, "
            f"dilation={spread}, or {fewer}_channels={columns * area * self.groups}, or stride=1 "
            "followed by SpaceToDepth; method='rko' is 1-Lipschitz without being orthogonal",
            kernel_size=kernel,
            stride=stride,
            dilation=dilation,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
        )
        _checks.require(
            ranks == "free" or rows > 1 or columns * area > 1,
            owner,
            "a group must have more than one channel in or out, for a single-channel orthogonal "
            "convolution is plus or minus a shift and has nothing to train",
            f"Use {fewer}_channels={2 * self.in_channels} (a multiplier), fewer groups, or stride "
            "above 1 with kernel_size >= stride; ranks='free' learns the shift, and "
            "method='rko' a 1-Lipschitz kernel that is not orthogonal",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            groups=self.groups,
        )

    def linear(self, x: Tensor) -> Tensor:
        """Apply the linear part of the layer to a batch, in the dtype of `x`."""
        return self._apply_weight(x, self.weight.to(x.dtype), None)

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of the layer with a given weight and bias."""
        return conv_forward(self, input, weight, bias)

    def _input_size(self, output_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the smallest spatial input size that the layer maps to `output_size`."""
        return tuple(
            (size - 1) * s + d * (k - 1) + 1 - low - high
            for size, (k, s, d, low, high) in zip(output_size, spans(self), strict=True)
        )

    def extra_repr(self) -> str:
        """Return the arguments."""
        text = super().extra_repr()
        if self._factor != 1.0:
            text = f"{text}, lipschitz={self._factor:g}"
        return text if self.method == "aoc" else f"{text}, method={self.method!r}"

    def adjoint(self, y: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        r"""Apply the transpose of the linear part, \(A^\top y\), with all padding honored.

        Args:
            y: What the layer returns, batched or not.
            input_size: Spatial size of the result; the default is the output size times the
                stride (divided by it for a transposed layer) for circular padding, and the
                smallest input that gives the output otherwise.

        Shape:
            `y`: (N, C_out, *output_size); result: (N, C_in, *input_size).
        """
        dims = len(self.kernel_size)
        sizes = tuple(y.shape[-dims:])
        if input_size is None and self.padding_mode == "circular":
            scale = zip(sizes, self.stride, strict=True)
            input_size = tuple(n // s if self.transposed else n * s for n, s in scale)
        shape = (*y.shape[: -dims - 1], self.in_channels, *(input_size or self._input_size(sizes)))
        weight = self.weight
        output, pull_back, *_ = torch.func.vjp(
            lambda x: self._apply_weight(x, weight, None), y.new_zeros(shape)
        )
        _checks.require(
            output.shape == y.shape,
            self,
            "y must have the shape that the layer returns for the input size",
            "Pass input_size, the spatial size of the layer's input",
            y=y,
            input_size=shape[-dims:],
        )
        return pull_back(y)[0]

    def inverse(self, y: Tensor) -> Tensor:
        r"""Return the x that the layer maps to `y`, when the layer is orthogonal and square.

        That is \(A^\top (y - b) / K^2\): exact, since \(A^\top A = A A^\top = K^2 I\).

        Shape:
            `y`: (N, C_out, *output_size); result: (N, C_in, *input_size).

        Raises:
            ValueError: The layer is not square (as many channels out as channels in times the
                strides), or its padding is not circular and cuts something off.
        """
        rows, columns = self.out_channels, self.in_channels
        if self.transposed:
            rows, columns = columns, rows
        cut = any(conv_paddings(self)) or any(self.output_padding)
        fits = self.kernel_size == self.stride and max(self.dilation) == 1 and not cut
        square = rows == columns * math.prod(self.stride) and self.parametrization.orthogonal
        _checks.require(
            square and (self.padding_mode == "circular" or fits),
            self,
            "only an orthogonal layer with circular padding (or kernel_size equal to stride and no "
            "padding) that keeps the number of values can be inverted",
            "Use padding_mode='circular' and out_channels = in_channels * prod(stride)",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            stride=self.stride,
            padding_mode=self.padding_mode,
        )
        if self.bias is not None:
            y = y - self.bias.view(-1, *(1,) * len(self.kernel_size))
        return self.adjoint(y) / self._factor**2
