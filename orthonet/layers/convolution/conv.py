"""Orthogonal convolutions with the arguments of `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import _checks
from orthonet._torch import conv_paddings
from orthonet.layers.convolution.arguments import check_circular, spatial_outputs
from orthonet.layers.convolution.base import OrthoConvNd
from orthonet.layers.convolution.padding import SymmetricPad, pad_input, required_sizes
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoKernel, OrthoParams

__all__ = ["OrthoConv1d", "OrthoConv2d", "OrthoConv3d"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _OrthoConv(OrthoConvNd):
    """Constructor and forward of the three convolutions."""

    _padding_modes = ("zeros", "circular", "reflect", "replicate", "symmetric")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        method: str = "aoc",
        ranks: str = "half",
        apply_by: str = "auto",
        lipschitz: float = 1.0,
    ) -> None:
        _checks.one_of(type(self), ("auto", "kernel", "factors"), apply_by=apply_by)
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
            dilation=dilation,
        )
        _checks.require(
            method == "aoc" or apply_by != "factors",
            type(self),
            "only method='aoc' has factors",
            "Leave apply_by out",
            method=method,
            apply_by=apply_by,
        )
        self.apply_by = apply_by

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` with the present weight."""
        dims = len(self.kernel_size)
        self._check_input(input, self.in_channels, -1 - dims, dims)
        if self.padding_mode != "zeros":
            self._check_size(input)
        else:
            self._check_window(input)
        weight = self.parametrization
        if isinstance(weight, OrthoKernel) and self.application(input) == "factors":
            output = weight.convolve(self._padded(input), self.stride, self.dilation)
            output = output if self._factor == 1.0 else output * self._factor
            if self.bias is not None:
                output = output + self.bias.view(-1, *(1,) * len(self.kernel_size))
            return output if input.ndim == output.ndim else output.squeeze(0)
        return self._apply_weight(input, self.weight, self.bias)

    def to_plain(self) -> nn.Module:
        """Return a new stock module; with symmetric padding, a `SymmetricPad` in front of it."""
        plain: Any = super().to_plain()
        if self.padding_mode == "symmetric":
            pad = SymmetricPad(conv_paddings(self))
            plain.padding, plain.padding_mode = (0,) * len(self.kernel_size), "zeros"
            plain = nn.Sequential(pad, plain).train(self.training)
        return plain

    def application(self, input: Tensor) -> str:
        """Return "kernel" or "factors": how a forward pass on `input` is computed now.

        With `apply_by="auto"` the factors are applied in training, with gradients enabled, on a
        batch in float32 or float64 outside autocast, where they are expected to be faster
        ([`OrthoKernel.prefers_factors`][orthonet.reparametrizers.OrthoKernel.prefers_factors]):
        few pixels and many channels. Both ways give the same values up to rounding.
        """
        if not isinstance(self.parametrization, OrthoKernel):
            return "kernel"
        if self.apply_by != "auto":
            return self.apply_by
        dims, plain = len(self.kernel_size), (torch.float32, torch.float64)
        if (
            not self.training
            or not torch.is_grad_enabled()
            or input.ndim != dims + 2
            or input.dtype not in plain
            or torch.is_autocast_enabled(input.device.type)
        ):
            return "kernel"
        pixels = input.shape[0]
        for size, s in zip(input.shape[2:], self.stride, strict=True):
            pixels *= -(-size // s)
        return "factors" if self.parametrization.prefers_factors(pixels) else "kernel"

    def _padded(self, input: Tensor) -> Tensor:
        """Return a batch of inputs with all padding done."""
        pads = conv_paddings(self)
        batch = input if input.ndim > len(self.kernel_size) + 1 else input.unsqueeze(0)
        if not any(pads):
            return batch
        if self.padding_mode == "zeros":
            return F.pad(batch, list(pads))
        return pad_input(batch, self.padding_mode, pads)

    def _apply_weight(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad_input(input, self.padding_mode, conv_paddings(self))
            padding = 0
        return _CONV[len(self.kernel_size)](
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )

    def _check_window(self, input: Tensor) -> None:
        """Refuse an image in which the kernel has no place."""
        sizes = input.shape[-len(self.kernel_size) :]
        if any(outputs < 1 for outputs in spatial_outputs(self, sizes)):
            _checks.fail(
                self,
                "the kernel must fit into the padded input",
                "Enlarge the input, raise the padding, or leave out a layer that shrinks it",
                input=input,
                kernel_size=self.kernel_size,
            )

    def _check_size(self, input: Tensor) -> None:
        """Refuse sizes on which the padding would repeat or mix more than it may."""
        if self.padding_mode == "circular":
            check_circular(self, input)
            return
        sizes = input.shape[-len(self.kernel_size) :]
        least = required_sizes(self.padding_mode, conv_paddings(self))
        if any(size < low for size, low in zip(sizes, least, strict=True)):
            _checks.fail(
                self,
                f"with {self.padding_mode} padding every input size must be at least {least}, so "
                "that no value is repeated more often than the norm allows",
                "Enlarge the input, lower the padding, or use padding_mode='zeros'",
                input_size=tuple(sizes),
                padding=self.padding,
            )


class OrthoConv1d(_OrthoConv, nn.Conv1d):
    """`nn.Conv1d` with an orthogonal kernel.

    Arguments, guarantee and errors are those of [`OrthoConv2d`][orthonet.layers.OrthoConv2d].

    Shape:
        Input (N, C_in, L) or (C_in, L), output as `nn.Conv1d`.

    Examples:
        >>> OrthoConv1d(4, 8, 3, padding=1)(torch.zeros(1, 4, 6)).shape
        torch.Size([1, 8, 6])
    """

    _plain_class = nn.Conv1d


class OrthoConv2d(_OrthoConv, nn.Conv2d):
    r"""`nn.Conv2d` with an orthogonal kernel: change the name, keep the arguments.

    The kernel is composed from orthogonal matrices (the AOC construction, see
    [`OrthoKernel`][orthonet.reparametrizers.OrthoKernel]): paraunitary factors of k - s + 1 taps,
    then a reshaped matrix of s taps at stride s.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps, odd or even, at least the stride in every dimension.
        stride: Stride.
        padding: Zeros or wrapped values added on both sides, "same" or "valid".
        dilation: Spacing of the taps, without a common divisor with the stride.
        groups: Number of groups.
        bias: As of [`OrthoLinear`][orthonet.layers.OrthoLinear].
        padding_mode: "zeros", "circular", "reflect", "replicate", or "symmetric", which mirrors the
            values at the edge, the edge included (the `nn` twin lacks it).
        device: As there.
        dtype: As there.
        ortho_params: Which normalizer and orthogonalizer make the factors; a preset or its name.
        method: "aoc", or "rko" for a reshaped kernel
            ([`ReshapedKernel`][orthonet.reparametrizers.ReshapedKernel]), which is 1-Lipschitz for
            every configuration and rarely orthogonal.
        ranks: "half", or "free" for projectors of learned rank, which make every separable
            orthogonal kernel at stride 1 (see
            [`OrthoKernel`][orthonet.reparametrizers.OrthoKernel]).
        apply_by: "kernel", "factors" (the input is sent through the factors and no kernel is
            formed), or "auto": whichever `layer.application(input)` expects to be faster.
        lipschitz: The constant K of the layer: the kernel is K times what the guarantee says.

    Shape:
        As `nn.Conv2d`, unbatched input included.

    Guarantee:
        With \(S\) the product of the strides, l2 -> l2, in train and eval mode and for every
        preset:

        - `padding_mode="circular"` with "same"-sized padding: all
          \(\min(c_i n, c_o n / S)\) singular values are 1 to \(10^{-5}\) (float32) or \(10^{-12}\)
          (float64).
        - no padding ("valid"): all are 1 when \(c_o \le c_i S\); at most 1 otherwise.
        - zero padding: at most 1.
        - "reflect", "symmetric" and "replicate": at most 1. The kernel is divided by the norm of
          the padding, \(\sqrt 2\) or \(\sqrt{1 + p}\) for every dimension that is padded (by
          p); inputs so small that a value would be reflected at both ends are refused.

        Circular padding on sizes that the stride does not divide is refused. A kernel smaller than
        the stride, or a divisor that dilation and stride share, is allowed as long as
        \(c_o \le c_i\) times the taps that one window reads alone: the rows stay orthonormal.
        Depthwise kernels (a single channel in and out) have something to train with a multiplier or
        a stride; at stride 1 the only orthogonal ones are plus or minus a shift, which
        `ranks="free"` learns.

    Raises:
        ValueError: No kernel makes the configuration orthogonal, or none that can be trained; the
            message names the nearest that does. When called: the sizes do not fit the padding.

    Examples:
        >>> layer = OrthoConv2d(4, 4, 3, padding=1, padding_mode="circular")
        >>> x = torch.ones(1, 4, 6, 6)
        >>> bool((layer(x) - layer(torch.zeros_like(x))).norm().allclose(x.norm(), rtol=1e-5))
        True

    References:
        Boissin et al., *An adaptive orthogonal convolution scheme for efficient and flexible CNN
        architectures*, ICML 2025; Li et al., NeurIPS 2019; Xiao et al., ICML 2018.
    """

    _plain_class = nn.Conv2d


class OrthoConv3d(_OrthoConv, nn.Conv3d):
    """`nn.Conv3d` with an orthogonal kernel; see [`OrthoConv2d`][orthonet.layers.OrthoConv2d].

    Shape:
        Input (N, C_in, D, H, W) or (C_in, D, H, W), output as `nn.Conv3d`.

    Examples:
        >>> OrthoConv3d(4, 8, 3)(torch.zeros(1, 4, 5, 5, 5)).shape
        torch.Size([1, 8, 3, 3, 3])
    """

    _plain_class = nn.Conv3d
