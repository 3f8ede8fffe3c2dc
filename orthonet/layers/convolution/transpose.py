"""Orthogonal transposed convolutions with the arguments of `nn.ConvTranspose1d/2d/3d`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks
from orthonet._torch import conv_output_padding
from orthonet.functional import circular_pad
from orthonet.layers.convolution.base import OrthoConvNd
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["OrthoConvTranspose1d", "OrthoConvTranspose2d", "OrthoConvTranspose3d"]

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CIRCULAR_PAD = {1: nn.CircularPad1d, 2: nn.CircularPad2d, 3: nn.CircularPad3d}


class _OrthoConvTranspose(OrthoConvNd):
    """Constructor and forward of the three transposed convolutions."""

    _padding_modes = ("zeros", "circular")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        method: str = "aoc",
        ranks: str = "half",
        lipschitz: float = 1.0,
    ) -> None:
        self._build(
            in_channels,
            out_channels,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            ortho_params=ortho_params,
            method=method,
            ranks=ranks,
            lipschitz=lipschitz,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
        )
        if padding_mode == "circular":
            self._check_circular()

    def _check_circular(self) -> None:
        for k, s, d, p, extra in self._geometry():
            _checks.require(
                d * (k - 1) + 1 + extra - 2 * p == s,
                self,
                "with circular padding every output size must be stride times the input size, "
                "dilation * (kernel_size - 1) + 1 + output_padding - 2 * padding = stride",
                "Change padding or output_padding",
                kernel_size=self.kernel_size,
                stride=self.stride,
                dilation=self.dilation,
                padding=self.padding,
                output_padding=self.output_padding,
            )

    if TYPE_CHECKING:
        padding: tuple[int, ...]  # never a string here

    def _geometry(self) -> list[tuple[int, int, int, int, int]]:
        """Return (kernel, stride, dilation, padding, output padding) of each dim."""
        fields = (
            self.kernel_size,
            self.stride,
            self.dilation,
            self.padding,
            self.output_padding,
        )
        return list(zip(*fields, strict=True))

    def _wrapping(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how much to wrap around on each side, and the padding that then crops."""
        wrap = tuple(
            max(-(-(d * (k - 1) - p) // s), (p - 1) // s + 1, 0)
            for k, s, d, p, _ in self._geometry()
        )
        crop = tuple(a * s + p for a, (_, s, _, p, _) in zip(wrap, self._geometry(), strict=True))
        return wrap, crop

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve `input` with the present weight; `output_size` as in the `nn` twin."""
        dims = len(self.kernel_size)
        self._check_input(input, self.in_channels, -1 - dims, dims)
        if self.padding_mode == "circular":
            sizes = tuple(input.shape[-dims:])
            expected = [n * s for n, s in zip(sizes, self.stride, strict=True)]
            asked = expected if output_size is None else list(output_size)[-dims:]
            wrap, _ = self._wrapping()
            if asked != expected or any(a > n for a, n in zip(wrap, sizes, strict=True)):
                _checks.fail(
                    self,
                    "with circular padding the output size is stride times the input size, and "
                    f"every input size is at least {wrap}",
                    "Leave output_size out, enlarge the input, or use padding_mode='zeros'",
                    input_size=sizes,
                    output_size=output_size,
                )
            return self._apply_weight(input, self.weight, self.bias)
        extra = conv_output_padding(self, input, output_size)
        return _CONV_TRANSPOSE[dims](
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            extra,
            self.groups,
            self.dilation,
        )

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode == "circular":
            wrap, padding = self._wrapping()
            input = circular_pad(input, [a for w in reversed(wrap) for a in (w, w)])
        return _CONV_TRANSPOSE[len(self.kernel_size)](
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def _input_size(self, output_size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            (size - d * (k - 1) - 1 + 2 * p - extra) // s + 1
            for size, (k, s, d, p, extra) in zip(output_size, self._geometry(), strict=True)
        )

    def to_plain(self) -> nn.Module:
        """Return a new stock module; with circular padding, `nn.CircularPad` in front of it."""
        plain: Any = super().to_plain()
        if self.padding_mode == "circular":
            wrap, crop = self._wrapping()
            plain.padding, plain.padding_mode = crop, "zeros"
            pad = _CIRCULAR_PAD[len(self.kernel_size)](
                tuple(a for w in reversed(wrap) for a in (w, w))
            )
            plain = nn.Sequential(pad, plain).train(self.training)
        return plain


class OrthoConvTranspose1d(_OrthoConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with an orthogonal kernel.

    Arguments, guarantee and errors are those of
    [`OrthoConvTranspose2d`][orthonet.layers.OrthoConvTranspose2d].

    Shape:
        As `nn.ConvTranspose1d`.

    Examples:
        >>> OrthoConvTranspose1d(4, 2, 2, stride=2)(torch.zeros(1, 4, 5)).shape
        torch.Size([1, 2, 10])
    """

    _plain_class = nn.ConvTranspose1d


class OrthoConvTranspose2d(_OrthoConvTranspose, nn.ConvTranspose2d):
    r"""`nn.ConvTranspose2d` with an orthogonal kernel: change the name, keep the arguments.

    The adjoint of [`OrthoConv2d`][orthonet.layers.OrthoConv2d] from `out_channels` to `in_channels`
    with the same kernel. The other arguments are those of `nn.ConvTranspose2d`, then the options of
    `OrthoConv2d`.

    Args:
        padding: Values cut off on both sides of the output.
        output_padding: Values kept in addition at the end of the output.
        padding_mode: "zeros", or "circular" (which the `nn` twin lacks): the output wraps around,
            and has stride times the size of the input.

    Shape:
        As `nn.ConvTranspose2d`, unbatched input included.

    Guarantee:
        With \(S\) the product of the strides, l2 -> l2, in train and eval mode, for every
        preset:

        - `padding_mode="circular"`: all singular values are 1 to \(10^{-5}\) (float32) or
          \(10^{-12}\) (float64).
        - no padding: all are 1 when \(c_i \le c_o S\); at most 1 otherwise.
        - zero padding, which cuts outputs off: at most 1.

    Raises:
        ValueError: As `OrthoConv2d`; with circular padding also sizes that do not fit, see the
            message.

    Examples:
        >>> OrthoConvTranspose2d(4, 2, 2, stride=2)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 2, 10, 10])

    References:
        As `OrthoConv2d`.
    """

    _plain_class = nn.ConvTranspose2d


class OrthoConvTranspose3d(_OrthoConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with an orthogonal kernel.

    See [`OrthoConvTranspose2d`][orthonet.layers.OrthoConvTranspose2d].

    Shape:
        As `nn.ConvTranspose3d`.

    Examples:
        >>> OrthoConvTranspose3d(4, 2, 2, stride=2)(torch.zeros(1, 4, 3, 3, 3)).shape
        torch.Size([1, 2, 6, 6, 6])
    """

    _plain_class = nn.ConvTranspose3d
