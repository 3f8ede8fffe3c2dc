"""Transposed convolutions whose kernel is a rescaled free kernel: AOL and spectral."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import conv_output_padding
from orthonet.layers._base import ConstrainedWeight, add_bias
from orthonet.layers.convolution.arguments import adopt_arguments, require_coprime
from orthonet.layers.zoo._base import delta_orthogonal
from orthonet.linalg.rescaling import almost_orthogonal, normalized_spectral
from orthonet.reparametrizers import MappedWeight

__all__ = ["AOLConvTranspose2d", "SpectralConvTranspose2d"]


class _MappedConvTranspose2d(ConstrainedWeight, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`, the adjoint of the convolution with a kernel of norm at most 1."""

    _plain_class = nn.ConvTranspose2d

    if TYPE_CHECKING:
        weight: Tensor
        padding: tuple[int, ...]  # never a string here

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        adopt_arguments(
            self,
            nn.ConvTranspose2d,
            in_channels,
            out_channels,
            groups=groups,
            padding_mode=padding_mode,
            modes=("zeros",),
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
        )
        require_coprime(self, "outputs are never written")
        _checks.lipschitz_constant(type(self), lipschitz)
        _checks.factory(type(self), device, dtype)
        self.parametrization = MappedWeight(
            (in_channels, out_channels // groups, *self.kernel_size),
            self._map(),
            partial(delta_orthogonal, groups=groups),
            lipschitz,
            device,
            dtype,
        )
        add_bias(self, bias, out_channels, device, dtype)

    def _map(self) -> Callable[[Tensor], Tensor]:
        """Return the function from the free kernel to the weight."""
        raise AttributeError("a subclass gives the map")

    def linear(self, x: Tensor) -> Tensor:
        """Apply the transposed convolution without the bias, in the dtype of `x`."""
        return self._apply_weight(x, self.weight.to(x.dtype), None, self.output_padding)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer; `output_size` as in the `nn` twin."""
        self._check_input(input, self.in_channels, -3, 2)
        extra = conv_output_padding(self, input, output_size)
        return self._apply_weight(input, self.weight, self.bias, extra)

    def _apply_weight(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Sequence[int]
    ) -> Tensor:
        return nn.functional.conv_transpose2d(
            x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


class AOLConvTranspose2d(_MappedConvTranspose2d):
    """`nn.ConvTranspose2d` with an almost-orthogonal kernel.

    The adjoint of [`AOLConv2d`][orthonet.layers.AOLConv2d] from `out_channels` to `in_channels`
    with the same kernel. The arguments are those of `nn.ConvTranspose2d` and `lipschitz`, a factor
    of the kernel; `padding_mode` must be "zeros", and `stride` and `dilation` have no common
    divisor.

    Shape:
        As `nn.ConvTranspose2d`, unbatched input included.

    Guarantee:
        As of `AOLConv2d`.

    Raises:
        ValueError: `nn.ConvTranspose2d` refuses an argument, the dilation shares a divisor with the
            stride, or `lipschitz` is not a positive number.

    Examples:
        >>> AOLConvTranspose2d(4, 3, 2, stride=2)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 3, 10, 10])

    References:
        Prach & Lampert, ECCV 2022, theorem 2.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(almost_orthogonal, groups=self.groups)


class SpectralConvTranspose2d(_MappedConvTranspose2d):
    """`nn.ConvTranspose2d` with a kernel divided by an upper bound of the norm of the operator.

    The adjoint of [`SpectralConv2d`][orthonet.layers.SpectralConv2d]. Arguments, shapes, guarantee
    and errors are those of [`AOLConvTranspose2d`][orthonet.layers.AOLConvTranspose2d].

    Examples:
        >>> SpectralConvTranspose2d(4, 3, 3, stride=3)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 3, 15, 15])

    References:
        Miyato et al., ICLR 2018; Delattre et al., ICML 2023.
    """

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(normalized_spectral, groups=self.groups)
