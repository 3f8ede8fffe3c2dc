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
from orthonet._torch import conv_forward
from orthonet.layers._base import (
    ConstrainedWeight,
    WithoutPlainWeight,
    add_bias,
    new_bias,
    set_zero,
)
from orthonet.layers._declared import Norms, float64
from orthonet.layers.convolution.arguments import (
    adopt_arguments,
    check_circular,
    require_coprime,
)
from orthonet.linalg import haar
from orthonet.linalg.bounds.sizes import absolute_matrix
from orthonet.linalg.matrix import compute_dtype
from orthonet.reparametrizers import MappedWeight, OrthoWeight, Weight

__all__ = [
    "CachedParts",
    "InnerWeight",
    "MappedConv2d",
    "MappedLinear",
    "SameSizeConv2d",
    "add_bias",
    "adopt_conv2d",
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
    """Return a random semi-orthogonal matrix, in the central tap if `shape` has taps."""
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


def adopt_conv2d(
    layer: Any,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    padding_mode: str,
) -> None:
    """Set the attributes of an `nn.Conv2d` on `layer`, without a weight."""
    adopt_arguments(
        layer,
        nn.Conv2d,
        in_channels,
        out_channels,
        groups=groups,
        padding_mode=padding_mode,
        modes=PADDING_MODES,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def same_padding(layer: Any) -> tuple[int, int]:
    """Return the padding of a layer that keeps the image size; refuse any other one."""
    (height, width), (down, right) = layer.kernel_size, layer.dilation
    wanted = (down * (height - 1) // 2, right * (width - 1) // 2)
    padding = wanted if layer.padding == "same" else layer.padding
    _checks.require(
        padding == wanted and height % 2 == width % 2 == 1,
        type(layer),
        "this method keeps the image size in front of the stride: kernel_size must be odd and "
        "padding (kernel_size - 1) // 2 * dilation",
        "Use padding='same'",
        kernel_size=layer.kernel_size,
        padding=layer.padding,
        dilation=layer.dilation,
    )
    return wanted


class CachedParts(Weight):
    """A parametrization of several tensors, computed once per optimizer step and once in eval.

    They are kept as one, so that what holds for the cache of a weight holds for them.
    """

    @abc.abstractmethod
    def compute(self) -> tuple[Tensor, ...]:
        """Compute the tensors."""

    @abc.abstractmethod
    def _shapes(self) -> tuple[torch.Size, ...]:
        """Return the shapes of the tensors."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the vector of all of them."""
        return torch.Size((sum(shape.numel() for shape in self._shapes()),))

    def evaluate(self) -> Tensor:
        """Return all of them in one vector."""
        return torch.cat([part.reshape(-1) for part in self.compute()])

    def forward(self) -> tuple[Tensor, ...]:
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
        set_zero(self.bias)

    def extra_repr(self) -> str:
        return "" if self.lipschitz == 1.0 else f"lipschitz={self.lipschitz:g}"


class SameSizeConv2d(InnerWeight):
    """Such a layer with convolutions that keep the image size, and a stride behind them.

    The stride is a semi-orthogonal matrix on the blocks of stride x stride pixels.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    reduction: OrthoWeight | None

    def _adopt(
        self,
        channels: tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: str | int | tuple[int, int],
        *rest: Any,
    ) -> None:
        same = padding == "same"  # which torch refuses together with a stride
        adopt_conv2d(self, *channels, kernel_size, stride, 0 if same else padding, *rest)
        self.padding = padding if same else self.padding
        self._pad = same_padding(self)

    def _reduce(
        self,
        inside: int,
        outside: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the matrix from the blocks of pixels of `inside` channels to `outside` channels."""
        area, groups = math.prod(self.stride), self.groups
        self.reduction = None
        if area > 1:
            shape = (groups, outside // groups, inside // groups * area)
            self.reduction = OrthoWeight(shape, device=device, dtype=dtype)

    def _reduction(self) -> Tensor:
        """Return the matrix as the kernel of a strided convolution, in float32 at least."""
        reduction: Any = self.reduction
        matrix = reduction()
        matrix = matrix.to(compute_dtype(matrix.dtype))
        return matrix.flatten(0, 1).unflatten(1, (-1, *self.stride))

    def _reduced(self, y: Tensor) -> Tensor:
        return nn.functional.conv2d(y, self._reduction(), stride=self.stride, groups=self.groups)

    def _plain_reduction(self, like: Tensor) -> nn.Conv2d | None:
        """Return the stride as a stock module."""
        if self.reduction is None:
            return None
        kernel = self._reduction()
        channels = kernel.shape[1] * self.groups
        plain = nn.Conv2d(
            channels, kernel.shape[0], self.stride, self.stride, groups=self.groups, bias=False
        )
        plain.to(like).weight.copy_(kernel)
        return plain

    def _reduction_norm(self, norms: Norms) -> tuple[float, float, float]:
        """Return a proved norm of the matrix, that of its modulus, the products in a sum."""
        if self.reduction is None:
            return 1.0, 1.0, 0.0
        with torch.no_grad():
            matrix = float64(self, self._reduction()).flatten(1).unflatten(0, (self.groups, -1))
        return norms.matrix(matrix), absolute_matrix(matrix), matrix.shape[-1] + 2.0

    def reset_parameters(self) -> None:
        """Draw the weights anew and set the bias to zero; nothing happens on the meta device."""
        super().reset_parameters()
        if self.reduction is not None:
            self.reduction.reset_parameters()

    def _check_circular(self, sizes: tuple[int, int]) -> None:
        _checks.require(
            self.padding_mode == "zeros"
            or all(n >= p for n, p in zip(sizes, self._pad, strict=True)),
            self,
            "with circular padding the image must be as large as the padding",
            "Use a smaller kernel or a larger image",
            input_size=sizes,
            padding=self._pad,
        )

    def _check_input(self, input: Tensor) -> None:
        check_image(self, input)
        self._check_circular((input.shape[-2], input.shape[-1]))
        _checks.require(
            all(n % s == 0 for n, s in zip(input.shape[-2:], self.stride, strict=True)),
            self,
            "every input size must be a multiple of the stride",
            "Put PadToStride(stride) in front of the layer",
            input_size=tuple(input.shape[-2:]),
            stride=self.stride,
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
        if self.stride != (1, 1):
            text = f"{text}, stride={self.stride}"
        return ", ".join(filter(None, [text, super().extra_repr()]))


def check_image(layer: Any, input: Tensor) -> None:
    """Refuse what is no image, or batch of images, of the channels of a layer."""
    _checks.real_input(layer, input, "input")
    _checks.require(
        input.ndim in (3, 4) and input.shape[-3] == layer.in_channels,
        layer,
        f"the input must be (N, {layer.in_channels}, H, W) or ({layer.in_channels}, H, W)",
        "Check the number of channels and of dimensions",
        input=input,
    )


class MappedLinear(ConstrainedWeight, nn.Linear):
    """`nn.Linear` whose weight is a function of a free matrix."""

    _plain_class = nn.Linear
    _inverse: ClassVar[Any] = None
    _initial: ClassVar[Callable[..., Tensor]] = staticmethod(delta_orthogonal)

    if TYPE_CHECKING:
        weight: Tensor

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
        _checks.factory(type(self), device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.parametrization = MappedWeight(
            (out_features, in_features),
            self._map(),
            self._initial,
            lipschitz,
            device,
            dtype,
            inverse=self._inverse,
        )
        add_bias(self, bias, out_features, device, dtype)

    def _map(self) -> Callable[[Tensor], Tensor]:
        """Return the function from the free matrix to the weight."""
        raise AttributeError("a subclass gives the map")

    def forward(self, input: Tensor) -> Tensor:
        """Multiply `input` by the present weight."""
        self._check_input(input, self.in_features, -1)
        return super().forward(input)


class MappedConv2d(ConstrainedWeight, nn.Conv2d):
    """`nn.Conv2d` whose weight is a function of a free kernel."""

    _plain_class = nn.Conv2d
    _initial: ClassVar[Callable[..., Tensor]] = staticmethod(delta_orthogonal)

    if TYPE_CHECKING:
        weight: Tensor

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
        window = (kernel_size, stride, padding, dilation, groups, padding_mode)
        adopt_conv2d(self, in_channels, out_channels, *window)
        require_coprime(self, "inputs are never read")
        _checks.lipschitz_constant(type(self), lipschitz)
        _checks.factory(type(self), device, dtype)
        self.parametrization = self._make(lipschitz, device, dtype)
        add_bias(self, bias, out_channels, device, dtype)

    def _make(
        self, lipschitz: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Weight:
        initial = partial(self._initial, groups=self.groups)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return MappedWeight(shape, self._map(), initial, lipschitz, device, dtype)

    def _map(self) -> Callable[[Tensor], Tensor]:
        """Return the function from the free kernel to the weight."""
        raise AttributeError("a subclass gives the map")

    def linear(self, x: Tensor) -> Tensor:
        """Apply the convolution without the bias, in the dtype of `x`."""
        return conv_forward(self, x, self.weight.to(x.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input`, batched or not."""
        self._check_input(input, self.in_channels, -3, 2)
        if self.padding_mode == "circular":
            check_circular(self, input)
        return conv_forward(self, input, self.weight, self.bias)
