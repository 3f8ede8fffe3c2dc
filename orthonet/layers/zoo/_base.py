"""What the layers of the zoo share: constructors, checks of the arguments, initial kernels."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import conv_forward, conv_paddings
from orthonet.layers._base import ConstrainedWeight, WithoutPlainWeight
from orthonet.linalg import haar
from orthonet.reparametrizers import MappedWeight, Weight

__all__ = [
    "CachedParts",
    "InnerWeight",
    "MappedConv2d",
    "MappedLinear",
    "SameSizeConv2d",
    "adopt_arguments",
    "check_circular",
    "check_image",
    "delta_orthogonal",
    "match_channels",
    "new_bias",
    "same_padding",
]

PADDING_MODES = ("zeros", "circular")


def delta_orthogonal(
    shape: Sequence[int],
    *,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random semi-orthogonal matrix, in the central tap of a kernel if `shape` has taps."""
    rows, columns, *taps = shape
    matrix = haar((groups, rows // groups, columns), dtype=dtype or torch.float32, device=device)
    kernel = torch.zeros(tuple(shape), dtype=matrix.dtype, device=matrix.device)
    kernel[(..., *((k - 1) // 2 for k in taps))] = matrix.flatten(0, 1)
    return kernel


def match_channels(x: Tensor, channels: int, dim: int = -3) -> Tensor:
    """Append channels of zeros, or drop the last ones: a map of norm 1."""
    missing = channels - x.shape[dim]
    if missing > 0:
        pad = [0, 0] * (-dim - 1) + [0, missing]
        return nn.functional.pad(x, pad)
    return x.narrow(dim, 0, channels) if missing else x


def new_bias(
    layer: nn.Module,
    size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    name: str = "bias",
) -> None:
    """A parameter of zeros, or None."""
    value = None
    if size is not None:
        value = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
    layer.register_parameter(name, value)


def adopt_arguments(
    layer: Any, in_channels: int, out_channels: int, *, padding_mode: str, **arguments: Any
) -> None:
    """Check the arguments of `nn.Conv2d` and set its attributes on `layer`, without a weight."""
    owner = type(layer)
    groups = arguments["groups"]
    _checks.positive_int(owner, in_channels=in_channels, out_channels=out_channels, groups=groups)
    _checks.one_of(owner, PADDING_MODES, padding_mode=padding_mode)
    _checks.require(
        in_channels % groups == 0 and out_channels % groups == 0,
        owner,
        "groups must divide in_channels and out_channels",
        "Choose a common divisor",
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
    )
    mode: Any = padding_mode
    twin = nn.Conv2d(
        in_channels, out_channels, bias=False, padding_mode=mode, device="meta", **arguments
    )
    for name, value in vars(twin).items():
        if name not in vars(layer):
            setattr(layer, name, value)


def same_padding(layer: Any) -> tuple[int, int]:
    """The padding of a layer that keeps the image size; any other one is refused."""
    wanted = tuple(d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    padding = wanted if layer.padding == "same" else layer.padding
    _checks.require(
        padding == wanted and all(k % 2 == 1 for k in layer.kernel_size) and layer.stride == (1, 1),
        type(layer),
        "this method keeps the image size: kernel_size must be odd, stride 1 and padding "
        "(kernel_size - 1) // 2 * dilation",
        "Use padding='same', and SpaceToDepth2d before the layer instead of a stride",
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
    )
    return wanted  # type: ignore[return-value]


class CachedParts(Weight):
    """A parametrization of several tensors, computed once per optimizer step and once in eval.

    They are kept as one, so that what holds for the cache of a weight holds for them.
    """

    @abc.abstractmethod
    def compute(self) -> tuple[Tensor, ...]:
        """Compute the tensors."""

    @abc.abstractmethod
    def _shapes(self) -> tuple[torch.Size, ...]:
        """Their shapes."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the vector of all of them."""
        return torch.Size((sum(shape.numel() for shape in self._shapes()),))

    def evaluate(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([part.reshape(-1) for part in self.compute()])

    def forward(self) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the tensors."""
        shapes = self._shapes()
        pieces = super().forward().split([shape.numel() for shape in shapes])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))


class InnerWeight(WithoutPlainWeight, nn.Module):
    """A layer with a sub-module of parameters that is no linear map with a plain weight."""

    parametrization: Weight
    bias: Tensor | None
    lipschitz: float

    def _set_constant(self, lipschitz: float) -> None:
        self.lipschitz = _checks.lipschitz_constant(type(self), lipschitz)

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero; nothing happens on the meta device."""
        self.parametrization.reset_parameters()
        if self.bias is not None and not self.bias.is_meta:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return "" if self.lipschitz == 1.0 else f"lipschitz={self.lipschitz:g}"


class SameSizeConv2d(InnerWeight):
    """Such a layer with convolutions that keep the image size."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def _adopt(self, in_channels: int, out_channels: int, **arguments: Any) -> None:
        if arguments["padding"] == "same" and arguments["stride"] not in (1, (1, 1)):
            arguments["padding"] = 0  # refused below, in our words
        adopt_arguments(self, in_channels, out_channels, **arguments)
        self._pad = same_padding(self)

    def _check_input(self, input: Tensor) -> None:
        check_image(self, input)
        _checks.require(
            self.padding_mode == "zeros"
            or all(n >= p for n, p in zip(input.shape[-2:], self._pad, strict=True)),
            self,
            "with circular padding the image must be as large as the padding",
            "Use a smaller kernel or a larger image",
            input_size=tuple(input.shape[-2:]),
            padding=self._pad,
        )

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        top, left = self._pad
        if self.padding_mode == "circular":
            x = nn.functional.pad(x, (left, left, top, top), mode="circular")
            top = left = 0
        return nn.functional.conv2d(x, kernel, bias, 1, (top, left), self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"padding_mode={self.padding_mode!r}"
        )
        return ", ".join(filter(None, [text, super().extra_repr()]))


def check_image(layer: Any, input: Tensor) -> None:
    """Refuse what is no image, or batch of images, of the channels of a layer."""
    _checks.require(
        input.ndim in (3, 4) and input.shape[-3] == layer.in_channels,
        layer,
        f"the input must be (N, {layer.in_channels}, H, W) or ({layer.in_channels}, H, W)",
        "Check the number of channels and of dimensions",
        shape=tuple(input.shape),
    )


def check_circular(layer: Any, input: Tensor) -> None:
    """Refuse sizes on which wrapping around would repeat or mix outputs."""
    sizes, pads = input.shape[-2:], conv_paddings(layer)
    for i, (size, k, s, d) in enumerate(
        zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        low, high = pads[2 * (1 - i) : 2 * (2 - i)]
        outputs = (size + low + high - d * (k - 1) - 1) // s + 1
        good = low == high == 0 or (
            size % s == 0 and outputs * s <= size and max(low, high) <= size
        )
        if not good:
            _checks.fail(
                layer,
                "with circular padding every input size must be a multiple of the stride, at "
                "least the padding, and give at most size / stride outputs",
                "Resize the input, lower the padding, or use padding_mode='zeros'",
                input_size=tuple(sizes),
                stride=layer.stride,
                padding=layer.padding,
                kernel_size=layer.kernel_size,
            )


class MappedLinear(ConstrainedWeight, nn.Linear):
    """`nn.Linear` whose weight is a function of a free matrix."""

    _plain_class = nn.Linear
    _inverse: ClassVar[Any] = None
    _initial: ClassVar[Callable[..., Tensor]] = staticmethod(delta_orthogonal)

    if TYPE_CHECKING:
        weight: Tensor  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        _checks.positive_int(type(self), in_features=in_features, out_features=out_features)
        _checks.lipschitz_constant(type(self), lipschitz)
        self.in_features = in_features
        self.out_features = out_features
        self.parametrization = MappedWeight(
            (out_features, in_features), self._map(), self._initial, lipschitz, device, dtype,
            inverse=self._inverse,
        )  # fmt: skip
        _checks.boolean(type(self), bias=bias)
        new_bias(self, out_features if bias else None, device, dtype)

    def _map(self) -> Callable[[Tensor], Tensor]:
        """The function from the free matrix to the weight."""
        raise AttributeError("a subclass gives the map")


class MappedConv2d(ConstrainedWeight, nn.Conv2d):
    """`nn.Conv2d` whose weight is a function of a free kernel."""

    _plain_class = nn.Conv2d
    _initial: ClassVar[Callable[..., Tensor]] = staticmethod(delta_orthogonal)

    if TYPE_CHECKING:
        weight: Tensor  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        adopt_arguments(
            self, in_channels, out_channels, kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        _checks.require(
            all(math.gcd(d, s) == 1 for d, s in zip(self.dilation, self.stride, strict=True)),
            type(self),
            "dilation and stride must have no common divisor in any dim, "
            "for otherwise some inputs are never read",
            "Change one of them",
            dilation=self.dilation,
            stride=self.stride,
        )
        _checks.lipschitz_constant(type(self), lipschitz)
        self.parametrization = self._make(lipschitz, device, dtype)
        _checks.boolean(type(self), bias=bias)
        new_bias(self, out_channels if bias else None, device, dtype)

    def _make(
        self, lipschitz: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Weight:
        initial = partial(self._initial, groups=self.groups)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return MappedWeight(shape, self._map(), initial, lipschitz, device, dtype)

    def _map(self) -> Callable[[Tensor], Tensor]:
        """The function from the free kernel to the weight."""
        raise AttributeError("a subclass gives the map")

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` with the present weight."""
        if self.padding_mode == "circular":
            check_circular(self, input)
        return conv_forward(self, input, self.weight, self.bias)
