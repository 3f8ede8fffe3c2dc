"""Layers that are orthogonalized at each frequency of the image: Cayley, LOT, BRO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks, functional
from orthonet.layers._zoo._base import (
    MappedLinear,
    adopt_arguments,
    check_circular,
    delta_orthogonal,
    match_channels,
    new_bias,
)
from orthonet.layers._zoo._export import circular_twin, image_size_of
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg.fourier import apply_symbol
from orthonet.linalg.unitary import (
    block_reflector,
    cayley_parameter,
    cayley_rectangular,
    unitary_polar,
)
from orthonet.reparametrizers._mapped import MappedWeight
from orthonet.reparametrizers._spectral import FourierWeight

__all__ = ["BROConv2d", "BROLinear", "CayleyConv2d", "CayleyLinear", "LOTConv2d"]


def _gaussian(shape, *, dtype=None, device=None) -> Tensor:
    return torch.randn(tuple(shape), dtype=dtype, device=device) * shape[1] ** -0.5


def _rank_of(owner: type, rank: int | None, size: int) -> int:
    """The number of columns of V, half of the rows by default."""
    value = max(1, size // 2) if rank is None else rank
    _checks.positive_int(owner, rank=value)
    _checks.require(
        value <= size,
        owner,
        f"rank must be at most the number of channels (of a group), {size}",
        "Leave it out for half of them",
        rank=rank,
    )
    return value


class _FourierConv2d(nn.Module):
    """A convolution with the arguments of `nn.Conv2d` that works on the whole torus at once."""

    _function: ClassVar[Callable[[Tensor], Tensor]]
    _square = False  # the same number of channels in and out, padded or cropped around
    _centre = True
    _noise = 0.1
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding: tuple[int, int] | str
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

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
        self._build(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype, lipschitz, image_size,
        )  # fmt: skip
        rows = self.out_channels // groups
        columns = self.in_channels // groups * self.stride[0] * self.stride[1]
        if self._square:
            rows = columns = max(rows, columns)
        self._make((groups, rows, columns), device, dtype)

    def _build(
        self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype, lipschitz, image_size,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        same = padding == "same" and stride not in (1, (1, 1))
        adopt_arguments(
            self, in_channels, out_channels, kernel_size=kernel_size, stride=stride,
            padding=0 if same else padding, dilation=dilation, groups=groups,
            padding_mode=padding_mode,
        )  # fmt: skip
        owner = type(self)
        _checks.in_range(owner, 1e-30, 1e30, lipschitz=lipschitz)
        if same:
            self._strided_same()
        _checks.require(
            self.stride[0] == self.stride[1] and (self.stride[0] == 1 or self.dilation == (1, 1)),
            owner,
            "the stride must be the same in both dims, and dilation 1 beside a stride",
            "Use SpaceToDepth2d before the layer for other shapes",
            stride=self.stride,
            dilation=self.dilation,
        )
        self.lipschitz = float(lipschitz)
        self.image_size = image_size_of(owner, image_size)
        new_bias(self, out_channels if bias else None, device, dtype)

    def _strided_same(self) -> None:
        """The symmetric padding that gives size / stride outputs."""
        pads = []
        for k, s in zip(self.kernel_size, self.stride, strict=True):
            pads.append(max(0, k - s + 1) // 2)
        self.padding = (pads[0], pads[1])
        self._reversed_padding_repeated_twice = [pads[1], pads[1], pads[0], pads[0]]

    def _make(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        # at a stride, the taps inside one block of pixels are channels
        taps = tuple(max(1, -(-k // s)) for k, s in zip(self.kernel_size, self.stride, strict=True))
        self.parametrization = FourierWeight(
            (*shape, *taps), self._function, self.dilation, self._noise, self._centre, device, dtype
        )

    def reset_parameters(self) -> None:
        """Draw the kernel anew and set the bias to zero; nothing happens on the meta device."""
        self.parametrization.reset_parameters()
        if self.bias is not None and not self.bias.is_meta:
            nn.init.zeros_(self.bias)

    def blocks(self, size: tuple[int, int]) -> Tensor:
        """The matrix at each frequency of a torus of this size (in strides), without the factor K.

        Shape:
            Complex, (groups, frequencies of `torch.fft.rfft2`, rows, columns).
        """
        return self.parametrization(size)

    def _torus(self, size: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size of the torus in pixels, and of the output."""
        s = self.stride[0]
        if self.padding_mode == "circular":
            return (size[-2], size[-1]), (size[-2] // s, size[-1] // s)
        pads = self._reversed_padding_repeated_twice
        torus, output = [], []
        for i, (n, k, d) in enumerate(zip(size[-2:], self.kernel_size, self.dilation, strict=True)):
            padded = n + sum(pads[2 * (1 - i) : 2 * (2 - i)])
            torus.append(-(-padded // s) * s)
            output.append((padded - d * (k - 1) - 1) // s + 1)
        return (torus[0], torus[1]), (output[0], output[1])

    def linear(self, x: Tensor) -> Tensor:
        """The linear part of the layer, with its factor K."""
        dtype = compute_dtype(self.parametrization.original.dtype)
        torus, output = self._torus(tuple(x.shape))
        image = x.to(dtype)
        if self.padding_mode == "zeros":
            left, _, top, _ = self._reversed_padding_repeated_twice
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
        """The layer on an image that fills the torus, at stride 1 and without the factor K."""
        blocks = self.blocks((image.shape[-2], image.shape[-1]))
        image = image.unflatten(-3, (self.groups, -1))
        image = match_channels(image, blocks.shape[-1]).flatten(-4, -3)
        y = apply_symbol(image, blocks).unflatten(-3, (self.groups, -1))
        return match_channels(y, self.out_channels // self.groups).flatten(-4, -3)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input`, batched or not, on its torus."""
        size = tuple(input.shape[-2:])
        _checks.require(
            input.ndim in (3, 4) and input.shape[-3] == self.in_channels,
            self,
            f"the input must be (N, {self.in_channels}, H, W) or ({self.in_channels}, H, W)",
            "Check the number of channels and of dimensions",
            shape=tuple(input.shape),
        )
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
            pads = self._reversed_padding_repeated_twice
            kept = tuple(
                (n + sum(pads[2 * (1 - i) : 2 * (2 - i)]) - d * (k - 1) - 1) // s + 1
                for i, (n, k, s, d) in enumerate(
                    zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
                )
            )
            _checks.require(
                kept == output,
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


class CayleyConv2d(_FourierConv2d):
    r"""Orthogonal convolution by the Cayley transform of the symbol at each frequency.

    The kernel of k x k taps is the free parameter; the convolution that is applied covers the
    image, since the transform of a short kernel is not short. A stride s is a space-to-depth step
    before the convolution, with ceil(k / s) taps.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps of the free kernel.
        stride: Stride, the same in both dims.
        padding: "same", or zeros added on both sides with `padding_mode="zeros"`.
        dilation: Spacing of the taps.
        groups: Number of groups.
        bias: Whether to add a learnable bias, zero at first.
        padding_mode: "circular", or "zeros": the image is padded with zeros, convolved on the torus
            of the padded size, and the outputs that `nn.Conv2d` has are kept.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; computed in float32 at least.
        lipschitz: The constant K of the layer.
        image_size: Height and width of the input, if they are fixed; `to_plain` needs them.

    Shape:
        As `nn.Conv2d`, any image size, even or odd, unbatched input included.

    Guarantee:
        Circular: all singular values are `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\)
        (float64) relative, for every finite parameter. Zeros: at most that.

    Raises:
        ValueError: strides or paddings beside these, or `lipschitz` not a positive number; when
            called: an image size that the stride does not divide, or other than `image_size`.

    References:
        Trockman & Kolter, *Orthogonalizing convolutional layers with the Cayley transform*, ICLR
        2021, arXiv:2104.07167.
    """

    _function = staticmethod(cayley_rectangular)
    _centre = False
    _noise = 1.0


class LOTConv2d(_FourierConv2d):
    r"""Orthogonal convolution by the polar factor \(W (W^* W)^{-1/2}\) at each frequency.

    Arguments, shapes and errors are those of [`CayleyConv2d`][orthonet.layers.CayleyConv2d]. The
    inverse square root comes from eigenvectors, two Newton steps and a measured residual, with a
    singular value decomposition where that is too large; its gradient is implicit, so nothing of
    an iteration is stored. See [`unitary_polar`][orthonet.linalg.unitary_polar].

    Guarantee:
        Circular: all singular values are `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\)
        (float64) relative, for parameters of full rank at every frequency, of any condition
        number; where the rank is deficient they are at most that. Zeros: at most that.

    References:
        Xu, Li & Li, *LOT: layer-wise orthogonal training on improving l2 certified robustness*,
        NeurIPS 2022, arXiv:2210.11620.
    """

    _function = staticmethod(unitary_polar)


class BROConv2d(_FourierConv2d):
    r"""Orthogonal convolution by a block reflector \(I - 2 V (V^* V)^{-1} V^*\) at each frequency.

    Arguments, shapes and errors are those of [`CayleyConv2d`][orthonet.layers.CayleyConv2d]. The
    reflector is square: channels of zeros are appended before, or dropped after, where the numbers
    of channels differ.

    Args:
        rank: Columns of V in each group; half of the channels by default.

    Guarantee:
        The norm is at most `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative,
        for every finite parameter. Circular with in_channels = out_channels: orthogonal to the
        same tolerance where V is well conditioned at every frequency, see
        [`block_reflector`][orthonet.linalg.block_reflector].

    References:
        Lai, Huang, Wang & Zhang, *Enhancing certified robustness via block reflector orthogonal
        layers and logit annealing loss*, ICML 2025, arXiv:2505.15174.
    """

    _function = staticmethod(block_reflector)
    _square = True
    _noise = 0.1

    def __init__(self, *args, rank: int | None = None, **kwargs) -> None:
        self._rank = rank
        super().__init__(*args, **kwargs)

    def _make(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        groups, rows, _ = shape
        self.rank = _rank_of(type(self), self._rank, rows)
        super()._make((groups, rows, self.rank), device, dtype)


class CayleyLinear(MappedLinear):
    r"""`nn.Linear` with a semi-orthogonal weight by the rectangular Cayley transform.

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]; see
    [`cayley_rectangular`][orthonet.linalg.cayley_rectangular]. A weight can be assigned unless its
    upper square block has the eigenvalue -1.

    Guarantee:
        All singular values are `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\) (float64)
        relative, for every finite parameter.

    References:
        Trockman & Kolter, ICLR 2021.
    """

    _initial = staticmethod(_gaussian)
    _inverse = staticmethod(cayley_parameter)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return cayley_rectangular


def _cropped_reflector(v: Tensor, *, rows: int, columns: int) -> Tensor:
    return block_reflector(v)[:rows, :columns]


class BROLinear(MappedLinear):
    r"""`nn.Linear` with a block reflector of low rank, cropped to the wanted sides.

    Arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear]; the reflector has
    the larger of both sides, and V half as many columns by default. See
    [`block_reflector`][orthonet.linalg.block_reflector]. A weight cannot be assigned.

    Args:
        rank: Columns of V; half of the larger side by default.

    Guarantee:
        The norm is at most `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) relative,
        for every finite parameter; all singular values are `lipschitz` where V is well
        conditioned.

    References:
        Lai et al., ICML 2025.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        _checks.positive_int(type(self), in_features=in_features, out_features=out_features)
        size = max(in_features, out_features)
        self.rank = _rank_of(type(self), rank, size)
        self.in_features = in_features
        self.out_features = out_features
        function = partial(_cropped_reflector, rows=out_features, columns=in_features)
        self.parametrization = MappedWeight(
            (size, self.rank), function, delta_orthogonal, lipschitz, device, dtype,
            weight_shape=(out_features, in_features),
        )  # fmt: skip
        new_bias(self, out_features if bias else None, device, dtype)
