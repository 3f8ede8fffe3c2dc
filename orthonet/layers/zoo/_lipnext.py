"""The LipNeXt block: shifts of the image between orthogonal mixings of the channels."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from orthonet import _checks, functional
from orthonet.layers._activations import BetaAbs
from orthonet.layers._base import WithoutPlainWeight, add_bias, set_zero
from orthonet.layers._declared import (
    REARRANGEMENT,
    SAFE,
    Declared,
    Norms,
    float64,
    image_of,
    length_of,
)
from orthonet.layers.children import Child
from orthonet.layers.zoo._base import check_image, match_channels
from orthonet.linalg.bounds.rounding import mul_up
from orthonet.linalg.bounds.sizes import Chained, absolute_matrix
from orthonet.reparametrizers import POLAR_ORTHO_PARAMS, OrthoParams, OrthoWeight
from orthonet.reparametrizers.params import read_params

__all__ = ["LipNeXtBlock2d", "SpatialShift2d"]


class SpatialShift2d(nn.Module):
    """Shift a share of the channels by one pixel, a quarter of it in each direction.

    The first channels go to the right, the next to the left, down and up; the rest stays.

    Args:
        fraction: Share of the channels that are shifted, in [0, 1].
        padding_mode: "circular" wraps around, a permutation; "zeros" drops one row or column.

    Shape:
        Input and output: (*, C, H, W).

    Guarantee:
        Circular: a permutation, orthogonal and exact. Zeros: a selection of entries, of norm at
        most 1.

    Raises:
        ValueError: `fraction` or `padding_mode` is another.

    Examples:
        >>> x = torch.arange(8.0).view(1, 4, 1, 2)
        >>> SpatialShift2d(1.0)(x).flatten().tolist()
        [1.0, 0.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    """

    def __init__(self, fraction: float = 0.5, padding_mode: str = "circular") -> None:
        super().__init__()
        _checks.in_range(self, 0.0, 1.0, fraction=fraction)
        _checks.one_of(self, ("zeros", "circular"), padding_mode=padding_mode)
        self.fraction = fraction
        self.padding_mode = padding_mode

    def forward(self, x: Tensor) -> Tensor:
        return functional.spatial_shift(x, self.fraction, self.padding_mode)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction:g}, padding_mode={self.padding_mode!r}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        image_of(self, input_shape)
        if self.padding_mode == "circular":
            return Declared(1.0, REARRANGEMENT, True, 0.0)
        return Declared(1.0, "selection of entries", rounding=0.0)


class LipNeXtBlock2d(WithoutPlainWeight, nn.Module):
    r"""LipNeXt block: \(y = K\, \beta\mathrm{Abs}(M R^\top S(R x) + b)\), without a convolution.

    R and M are orthogonal matrices over the channels, S shifts a share of the channels by one
    pixel in the four directions, and \(\beta\mathrm{Abs}\) takes the modulus of the first
    \(\beta\) of the channels. Neighbors meet through \(R^\top S R\), and nothing needs a transform
    of the image. Channels of zeros are appended before the block, or dropped after it, where the
    numbers differ; the block contains its activation, and `bias` stands before it.

    Args:
        in_channels: Channels of the input.
        out_channels: Those of the output; `in_channels` if None.
        bias: As of [`AOLLinear`][orthonet.layers.AOLLinear].
        device: As there.
        dtype: As there.
        fraction: Share of the channels that are shifted.
        beta: Share of the channels whose modulus is taken.
        padding_mode: "circular" or "zeros", at the border of the shifts.
        lipschitz: As there.
        ortho_params: How R and M are made orthogonal.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) to the same with out_channels.

    Guarantee:
        Circular, in_channels <= out_channels: gradient-norm preserving, every singular value of
        every Jacobian is `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative.
        Otherwise constant at most that.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> LipNeXtBlock2d(4, 8)(torch.zeros(1, 4, 3, 5)).shape
        torch.Size([1, 8, 3, 5])

    References:
        Hu, Hu & Fredrikson, *LipNeXt: scaling up Lipschitz-based certified robustness to
        billion-parameter models*, ICLR 2026, arXiv:2601.18513 (spatial shift module, beta-Abs);
        there is no public code, and positions are not encoded here.
    """

    relies_on: ClassVar = {
        "shift": Child((SpatialShift2d,)),
        "activation": Child((BetaAbs,), {"dim": -3}),
    }
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        fraction: float = 0.5,
        beta: float = 0.75,
        padding_mode: str = "circular",
        lipschitz: float = 1.0,
        ortho_params: OrthoParams | str = POLAR_ORTHO_PARAMS,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        _checks.positive_int(type(self), in_channels=in_channels, out_channels=out_channels)
        _checks.lipschitz_constant(type(self), lipschitz)
        _checks.in_range(type(self), 0.0, 1.0, fraction=fraction, beta=beta)
        _checks.factory(type(self), device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.lipschitz = float(lipschitz)
        width = max(in_channels, out_channels)
        ortho_params = read_params(type(self), ortho_params)
        self.rotation = OrthoWeight((width, width), ortho_params, device, dtype)
        self.mixing = OrthoWeight((width, width), ortho_params, device, dtype)
        self.shift = SpatialShift2d(fraction, padding_mode)
        self.activation = BetaAbs(beta, dim=-3)
        add_bias(self, bias, width, device, dtype)

    def reset_parameters(self) -> None:
        """Draw R and M anew and set the bias to zero; nothing happens on the meta device."""
        self.rotation.reset_parameters()
        self.mixing.reset_parameters()
        set_zero(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the block to `input`, batched or not."""
        check_image(self, input)
        rotation, mixing = self.rotation.compute(), self.mixing.compute()
        with torch.autocast(input.device.type, enabled=False):
            x = match_channels(input.to(rotation.dtype), rotation.shape[0])
            x = x if input.ndim == 4 else x.unsqueeze(0)
            y = self.shift(nn.functional.conv2d(x, rotation[:, :, None, None]))
            bias = None if self.bias is None else self.bias.to(rotation.dtype)
            y = nn.functional.conv2d(y, (mixing @ rotation.mT)[:, :, None, None], bias)
            y = match_channels(self.activation(y), self.out_channels)
            y = y if self.lipschitz == 1.0 else y * self.lipschitz
        return y.to(input.dtype) if input.ndim == 4 else y.squeeze(0).to(input.dtype)

    @torch.no_grad()
    def to_plain(self) -> fx.GraphModule:
        """Return a `torch.fx.GraphModule` of two stock convolutions that does the same."""
        rotation, mixing = self.rotation.compute(), self.mixing.compute()
        stored = self.rotation.original
        width = rotation.shape[0]
        first = nn.Conv2d(width, width, 1, bias=False).to(stored)
        second = nn.Conv2d(width, width, 1, bias=self.bias is not None).to(stored)
        first.weight.copy_(rotation[:, :, None, None])
        second.weight.copy_((mixing @ rotation.mT)[:, :, None, None])
        if self.bias is not None and second.bias is not None:
            second.bias.copy_(self.bias)
        plain = _PlainBlock(first, second, self)
        return fx.symbolic_trace(plain).train(self.training)

    def extra_repr(self) -> str:
        scale = "" if self.lipschitz == 1.0 else f", lipschitz={self.lipschitz:g}"
        return f"{self.in_channels}, {self.out_channels}{scale}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        size = image_of(self, input_shape)
        with torch.no_grad():  # as forward computes them, in its dtype
            rotation, mixing = self.rotation.compute(), self.mixing.compute()
            mixing = float64(self, mixing @ rotation.mT)
        rotation = float64(self, rotation)
        sizes = norms.matrix(rotation), norms.matrix(mixing)
        chain = Chained().map(absolute_matrix(rotation), float(len(rotation)))
        bias = length_of(self.bias, math.prod(size))
        chain = chain.map(absolute_matrix(mixing), len(mixing) + 1.0, bias).map(self.lipschitz, 1.0)
        value = mul_up(*sizes, self.lipschitz, SAFE)
        return Declared(value, "shift between orthogonal mixings", rounding=chain.rounding())


class _PlainBlock(nn.Module):
    """The block of stock layers that is traced for export."""

    def __init__(self, first: nn.Module, second: nn.Module, block: LipNeXtBlock2d) -> None:
        super().__init__()
        self.first, self.second = first, second
        width = max(block.in_channels, block.out_channels)
        self.width = width
        self.appended, self.kept = width - block.in_channels, block.out_channels
        self.quarter = round(block.shift.fraction * width / 4)
        self.circular = block.shift.padding_mode == "circular"
        self.moduli = round(block.activation.beta * width)
        self.lipschitz = block.lipschitz

    def forward(self, x: Tensor) -> Tensor:
        if self.appended:
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.appended))
        x, q = self.first(x), self.quarter
        parts = x.tensor_split((q, 2 * q, 3 * q, 4 * q), -3)
        y = torch.cat([*(self._shifted(parts[i], i) for i in range(4)), parts[4]], -3)
        first, rest = self.second(y).tensor_split((self.moduli,), -3)
        y = torch.cat((first.abs(), rest), -3)
        if self.kept < self.width:
            y = y.narrow(-3, 0, self.kept)
        return y if self.lipschitz == 1.0 else y * self.lipschitz

    def _shifted(self, part: Tensor, direction: int) -> Tensor:
        dim, step = ((-1, 1), (-1, -1), (-2, 1), (-2, -1))[direction]
        if self.circular:
            return part.roll(step, dim)
        kept = part[..., :-1] if dim == -1 else part[..., :-1, :]
        if step < 0:
            kept = part[..., 1:] if dim == -1 else part[..., 1:, :]
        before, after = (1, 0) if step > 0 else (0, 1)
        return nn.functional.pad(kept, (before, after) if dim == -1 else (0, 0, before, after))
