"""Activations, pooling and residual connections of deel-torchlip."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks, layers
from orthonet.certify import Bound, register_rule
from orthonet.compat.torchlip.functional import lipschitz_prelu, max_min
from orthonet.compat.torchlip.module import LipschitzModule
from orthonet.functional import householder

__all__ = [
    "FullSort",
    "GroupSort",
    "GroupSort2",
    "HouseHolder",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "LPReLU",
    "LipResidual",
    "MaxMin",
    "ScaledAdaptativeL2NormPool2d",
    "ScaledAdaptiveAvgPool2d",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
]

Size = int | tuple[int, int]


class _Positive(nn.Module):
    """The positive parts of x and of -x, side by side."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return max_min(x, self.dim)


@register_rule(_Positive)
def _isometry(module: _Positive, input_shape: tuple[int, ...]) -> Any:
    """For a > b: (a+ - b+)^2 + (a- - b-)^2 <= (a - b)^2, with equality for equal signs."""
    return Bound(1.0), "positive and negative parts"


class MaxMin(LipschitzModule):
    """Positive and negative parts side by side, with twice the channels.

    `orthonet.layers.MaxMin` sorts pairs of channels instead and keeps their number.
    """

    def __init__(self, dim: int | None = None, k_coef_lip: float = 1.0) -> None:
        super().__init__()
        self._coefficient_lip = k_coef_lip
        self.parts = _Positive(dim)

    def forward(self, input: Tensor) -> Tensor:
        """Split `input`."""
        return self._scaled(self.parts(input))


class GroupSort(LipschitzModule):
    """`orthonet.layers.GroupSort`; all channels without `group_size`."""

    def __init__(self, group_size: int | None = None, k_coef_lip: float = 1.0) -> None:
        super().__init__()
        self._coefficient_lip = k_coef_lip
        self.group_size = group_size
        self.sort: nn.Module = (
            layers.FullSort() if group_size is None else layers.GroupSort(group_size)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Sort the channels."""
        return self._scaled(self.sort(input))


class GroupSort2(GroupSort):
    """`orthonet.layers.GroupSort` of pairs."""

    def __init__(self, k_coef_lip: float = 1.0) -> None:
        super().__init__(2, k_coef_lip)


class FullSort(GroupSort):
    """`orthonet.layers.FullSort`."""

    def __init__(self, k_coef_lip: float = 1.0) -> None:
        super().__init__(None, k_coef_lip)


class LPReLU(nn.PReLU, LipschitzModule):
    """`nn.PReLU` with slopes clamped to [-k, k]: constant max(1, k) at most."""

    def __init__(
        self, num_parameters: int = 1, init: float = 0.25, k_coef_lip: float = 1.0
    ) -> None:
        super().__init__(num_parameters, init)
        self._coefficient_lip = k_coef_lip

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation."""
        return lipschitz_prelu(input, self.weight, self._coefficient_lip)

    def vanilla_export(self) -> nn.Module:
        """Return an `nn.PReLU` with the clamped slopes."""
        k = self._coefficient_lip
        plain = nn.PReLU(self.num_parameters).to(self.weight)
        plain.weight = nn.Parameter(self.weight.detach().clamp(-k, k))
        return plain


_THETA = {"zeros": nn.init.zeros_, "ones": nn.init.ones_, "normal": nn.init.normal_}


class HouseHolder(LipschitzModule):
    """`orthonet.functional.householder`, which keeps the other side of each line.

    At the first angle, pi / 2, a pair is sorted in ascending order.
    """

    def __init__(
        self,
        channels: int,
        k_coef_lip: float = 1.0,
        theta_initializer: float | str | None = None,
    ) -> None:
        super().__init__()
        self._coefficient_lip = k_coef_lip
        _checks.require(
            channels % 2 == 0, self, "channels must be even", "Add or drop one", channels=channels
        )
        fill = math.pi / 2 if theta_initializer is None else theta_initializer
        start = fill if isinstance(fill, (int, float)) else 0.0
        self.theta = nn.Parameter(torch.full((channels // 2,), float(start)))
        if isinstance(fill, str):
            _checks.one_of(self, tuple(_THETA), theta_initializer=fill)
            _THETA[fill](self.theta)

    def forward(self, z: Tensor, axis: int = 1) -> Tensor:
        """Reflect pairs of channels."""
        return self._scaled(householder(z, self.theta + 2 * math.pi, axis))


class _Wrapped(LipschitzModule):
    """A layer of `orthonet.layers` with a factor behind it."""

    def __init__(self, inner: nn.Module, k_coef_lip: float) -> None:
        super().__init__()
        self._coefficient_lip = k_coef_lip
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return self._scaled(self.inner(input))

    def vanilla_export(self) -> nn.Module:
        """Return the layer inside, with an `orthonet.layers.Scale` if there is a factor."""
        inner, k = copy.deepcopy(self.inner), self._coefficient_lip
        return inner if k == 1.0 else nn.Sequential(inner, layers.Scale(k))


def _tiling(owner: object, kernel_size: Size, stride: Size | None, **others: Any) -> None:
    _checks.require(
        stride in (None, kernel_size) and not any(others.values()),
        owner,
        "windows must tile the image: stride equal to kernel_size, and no padding or ceil_mode",
        "Use orthonet.layers.ScaledAvgPool or L2NormPool, which take strides and padding",
        kernel_size=kernel_size,
        stride=stride,
        **others,
    )


class ScaledAvgPool2d(_Wrapped):
    """`orthonet.layers.ScaledAvgPool` of windows that tile the image."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        k_coef_lip: float = 1.0,
    ) -> None:
        _tiling(
            type(self),
            kernel_size,
            stride,
            padding=padding,
            ceil_mode=ceil_mode,
            divisor_override=divisor_override,
        )
        _checks.boolean(type(self), count_include_pad=count_include_pad)
        super().__init__(layers.ScaledAvgPool(kernel_size), k_coef_lip)


class ScaledL2NormPool2d(_Wrapped):
    """`orthonet.layers.L2NormPool` of windows that tile the image."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        ceil_mode: bool = False,
        k_coef_lip: float = 1.0,
    ) -> None:
        _tiling(type(self), kernel_size, stride, ceil_mode=ceil_mode)
        super().__init__(layers.L2NormPool(kernel_size), k_coef_lip)


def _global(owner: object, output_size: Sequence[int]) -> None:
    _checks.require(
        tuple(output_size) == (1, 1),
        owner,
        "output_size must be (1, 1)",
        "Use orthonet.layers.AdaptiveScaledAvgPool or AdaptiveL2NormPool for other sizes",
        output_size=output_size,
    )


class ScaledAdaptiveAvgPool2d(_Wrapped):
    """`orthonet.layers.AdaptiveScaledAvgPool` to one pixel."""

    def __init__(self, output_size: Sequence[int], k_coef_lip: float = 1.0) -> None:
        _global(type(self), output_size)
        super().__init__(layers.AdaptiveScaledAvgPool(1), k_coef_lip)


class ScaledAdaptativeL2NormPool2d(_Wrapped):
    """`orthonet.layers.AdaptiveL2NormPool` to one pixel."""

    def __init__(self, output_size: Sequence[int] = (1, 1), k_coef_lip: float = 1.0) -> None:
        _global(type(self), output_size)
        super().__init__(layers.AdaptiveL2NormPool(1), k_coef_lip)


class InvertibleDownSampling(_Wrapped):
    """`nn.PixelUnshuffle`."""

    def __init__(self, kernel_size: int, k_coef_lip: float = 1.0) -> None:
        super().__init__(nn.PixelUnshuffle(kernel_size), k_coef_lip)


class InvertibleUpSampling(_Wrapped):
    """`nn.PixelShuffle`."""

    def __init__(self, kernel_size: int, k_coef_lip: float = 1.0) -> None:
        super().__init__(nn.PixelShuffle(kernel_size), k_coef_lip)


class LipResidual(nn.Module):
    r"""Mix two values: \(s x + (1 - s) y\) with a learnable s, the sigmoid of `alpha`."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mix x and y."""
        share = torch.sigmoid(self.alpha)
        return share * x + (1 - share) * y
