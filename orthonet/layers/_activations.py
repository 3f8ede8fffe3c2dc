"""Gradient-norm preserving activations as modules."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from orthonet import functional
from orthonet._checks import integer, positive_int, require

__all__ = ["Abs", "GroupSort", "HouseholderActivation", "MaxMin"]


class MaxMin(nn.Module):
    r"""Sort pairs of channels: \((\max(x_1, x_2), \min(x_1, x_2))\) of the two halves.

    The module of [`max_min`][orthonet.functional.max_min].

    Args:
        dim: Channel dimension, of even size. Use -1 for features behind any number of
            batch dimensions, -3 for images with or without one.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz and gradient-norm preserving, exactly, in train and eval mode: every Jacobian is
        a permutation.

    Raises:
        ValueError: When called: the number of channels is odd, or `dim` out of range.

    Examples:
        >>> MaxMin()(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
        tensor([[3., 4., 1., 2.]])

    References:
        Anil, Lucas, Grosse, ICML 2019, https://arxiv.org/abs/1811.05381
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        integer(self, dim=dim)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_min(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GroupSort(nn.Module):
    """Sort each group of consecutive channels in ascending order.

    The module of [`group_sort`][orthonet.functional.group_sort].

    Args:
        group_size: Channels in a group; the number of channels itself gives the *full sort*.
        dim: Channel dimension; `group_size` divides its size.

    Shape:
        Any; output alike.

    Guarantee:
        As of [`MaxMin`][orthonet.layers.MaxMin].

    Raises:
        ValueError: `group_size` < 1; when called: it does not divide the number of channels.

    Examples:
        >>> GroupSort(2)(torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[1., 4., 2., 3.]])

    References:
        As of `MaxMin`.
    """

    def __init__(self, group_size: int = 2, dim: int = 1) -> None:
        super().__init__()
        positive_int(self, group_size=group_size)
        self.group_size = group_size
        integer(self, dim=dim)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_sort(x, self.group_size, self.dim)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class Abs(nn.Module):
    """Take the absolute value, with derivative +1 at 0.

    The module of [`absolute`][orthonet.functional.absolute].

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz, gradient-norm preserving.

    Examples:
        >>> Abs()(torch.tensor([-2.0, 3.0]))
        tensor([2., 3.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.absolute(x)


class HouseholderActivation(nn.Module):
    r"""Reflect pairs of channels at learnable lines (order 1).

    Each pair is kept on one side of a line through 0 and reflected onto it from the other. The
    angles start at \(\pi/2\), where the layer equals `MaxMin`. The module of
    [`householder`][orthonet.functional.householder].

    Args:
        channels: Size of the channel dimension, even.
        dim: Channel dimension.
        device: Of the angles.
        dtype: Of the angles.

    Shape:
        Any with `channels` in `dim`; output alike.

    Guarantee:
        1-Lipschitz and gradient-norm preserving in train and eval mode: the singular values of
        every
        Jacobian are 1 up to rounding (4e-7 in float32).

    Raises:
        ValueError: `channels` is not even and positive; when called: the input has another number.

    Examples:
        >>> HouseholderActivation(4)(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).detach()
        tensor([[3.0000, 4.0000, 1.0000, 2.0000]])

    References:
        Singla, Singla, Feizi, ICLR 2022, equation 3, https://arxiv.org/abs/2108.04062
    """

    _angles: ClassVar[tuple[int, ...]] = ()  # for each pair

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive_int(self, channels=channels)
        require(
            channels % 2 == 0, self, "channels must be even", "Add or drop one", channels=channels
        )
        self.channels = channels
        integer(self, dim=dim)
        self.dim = dim
        shape = (*self._angles, channels // 2)
        self.theta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every angle to pi / 2, the angle of `MaxMin`."""
        nn.init.constant_(self.theta, math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.householder(x, self.theta, self.dim)

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}"
