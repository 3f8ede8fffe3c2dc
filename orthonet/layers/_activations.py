"""Activations that preserve the norm of gradients, as modules, and a shuffle of channels."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from orthonet import functional
from orthonet._checks import factory, in_range, integer, positive_int, real_input, require
from orthonet.layers._declared import REARRANGEMENT, Declared, Norms, isometric, length_of, refuse
from orthonet.linalg.bounds.sizes import Rounding

__all__ = [
    "Abs",
    "BetaAbs",
    "ChannelShuffle",
    "FullSort",
    "GroupSort",
    "HouseholderActivation",
    "HouseholderActivation2",
    "MaxMin",
    "NActivation",
    "SoftHuber",
]


class _AlongDim(nn.Module):
    """An activation that works along one dimension."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        integer(self, dim=dim)
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class MaxMin(_AlongDim):
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

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_min(x, self.dim)


class GroupSort(_AlongDim):
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
        super().__init__(dim)
        positive_int(self, group_size=group_size)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_sort(x, self.group_size, self.dim)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, {super().extra_repr()}"


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


class _Learnable(_AlongDim):
    """An activation with learnable numbers `theta` for each channel, or group of channels."""

    _rows: ClassVar[tuple[int, ...]] = ()  # how many numbers
    _group: ClassVar[int] = 2

    def __init__(
        self,
        channels: int,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        positive_int(self, channels=channels)
        factory(self, device, dtype)
        require(
            channels % self._group == 0,
            self,
            "channels must be even",
            "Add or drop one",
            channels=channels,
        )
        self.channels = channels
        shape = (*self._rows, channels // self._group)
        self.theta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the numbers to their first values."""
        raise AttributeError("a subclass sets them")

    def extra_repr(self) -> str:
        return f"{self.channels}, {super().extra_repr()}"


class HouseholderActivation(_Learnable):
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

    def reset_parameters(self) -> None:
        """Set every angle to pi / 2, the angle of `MaxMin`."""
        nn.init.constant_(self.theta, math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        return functional.householder(x, self.theta, self.dim)


class FullSort(_AlongDim):
    """Sort all channels in ascending order.

    [`GroupSort`][orthonet.layers.GroupSort] with one group.

    Args:
        dim: Channel dimension.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz, gradient-norm preserving.

    Examples:
        >>> FullSort()(torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[1., 2., 3., 4.]])

    References:
        Anil, Lucas, Grosse, ICML 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        real_input(self, x)
        require(
            -x.ndim <= self.dim < x.ndim,
            self,
            f"dim must be a dimension of the {x.ndim}-dimensional input",
            "Use dim=-1 for features",
            dim=self.dim,
        )
        return functional.group_sort(x, x.shape[self.dim], self.dim)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        return isometric(self, input_shape, 0.0)


class BetaAbs(_AlongDim):
    """Take the modulus of the first share `beta` of the channels.

    The module of [`beta_abs`][orthonet.functional.beta_abs].

    Args:
        beta: Share of the channels, in [0, 1].
        dim: Channel dimension.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz, gradient-norm preserving.

    Raises:
        ValueError: `beta` outside [0, 1].

    Examples:
        >>> BetaAbs(0.5)(torch.tensor([[-1.0, -2.0]]))
        tensor([[ 1., -2.]])
    """

    def __init__(self, beta: float = 0.5, dim: int = 1) -> None:
        super().__init__(dim)
        in_range(self, 0.0, 1.0, beta=beta)
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return functional.beta_abs(x, self.beta, self.dim)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, {super().extra_repr()}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        return isometric(self, input_shape, 0.0)


class SoftHuber(nn.Module):
    r"""Smooth modulus \(\sqrt{x^2 + \delta^2} - \delta\).

    The module of [`soft_huber`][orthonet.functional.soft_huber].

    Args:
        delta: Half width of the smooth part, > 0.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz.

    Raises:
        ValueError: `delta` is not positive.

    Examples:
        >>> SoftHuber(4.0)(torch.tensor([0.0, 3.0]))
        tensor([0., 1.])
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        in_range(self, 1e-12, 1e12, delta=delta)
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        return functional.soft_huber(x, self.delta)

    def extra_repr(self) -> str:
        return f"delta={self.delta:g}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        rounding = Rounding(64.0, 2.0, 2.0 * math.prod(input_shape) ** 0.5)
        return Declared(1.0, "slope in (-1, 1)", rounding=rounding)


class NActivation(_Learnable):
    """Slopes +1, -1, +1 with two learnable places for each channel.

    The first half of the channels starts as the modulus (places -100 and 0, up to a constant
    sign), the other half as the identity (both places 0). The module of
    [`n_activation`][orthonet.functional.n_activation].

    Args:
        channels: Size of the channel dimension.
        dim: Channel dimension.
        device: Of the places.
        dtype: Of the places.

    Shape:
        Any with `channels` in `dim`; output alike.

    Guarantee:
        1-Lipschitz, gradient-norm preserving.

    Raises:
        ValueError: `channels` is not positive; when called: the input has another number.

    Examples:
        >>> NActivation(2)(torch.tensor([[3.0, 3.0]])).detach()
        tensor([[3., 3.]])

    References:
        Prach & Lampert, 2023, https://arxiv.org/abs/2311.06103
    """

    _rows = (2,)
    _group = 1

    def reset_parameters(self) -> None:
        """Make half of the channels the modulus, half the identity."""
        with torch.no_grad():
            self.theta.zero_()
            self.theta[0, : self.channels // 2] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        return functional.n_activation(x, self.theta, self.dim)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        shifts = self.theta.abs().amax(0)
        repeats = math.prod(input_shape) // max(1, shifts.numel())
        return isometric(self, input_shape, Rounding(2.0, 1.0, 2.0 * length_of(shifts, repeats)))


class HouseholderActivation2(HouseholderActivation):
    r"""Turn and reflect pairs of channels in four learnable sectors (order 2).

    Three angles for each pair, see
    [`householder_order2`][orthonet.functional.householder_order2]. They start at
    \((-3\pi/4, 3\pi/4, \pi/2)\). Arguments, shapes, guarantee and errors are those of
    [`HouseholderActivation`][orthonet.layers.HouseholderActivation].

    Examples:
        >>> y = HouseholderActivation2(4)(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
        >>> round(y.norm().item() ** 2, 3)
        30.0

    References:
        Singla, Singla, Feizi, ICLR 2022.
    """

    _rows = (3,)

    def reset_parameters(self) -> None:
        """Set the angles to their first values."""
        with torch.no_grad():
            for row, angle in zip(self.theta, (-0.75, 0.75, 0.5), strict=True):
                row.fill_(angle * math.pi)

    def forward(self, x: Tensor) -> Tensor:
        return functional.householder_order2(x, self.theta, self.dim)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        # For exact angles; that sines and cosines and the choice of the sector round is counted
        # with the forward pass, relative to the largest angle.
        angle = float(self.theta.detach().abs().max()) + 2.0 * math.pi
        return isometric(self, input_shape, Rounding(128.0, 4.0 * (1.0 + angle)))


class ChannelShuffle(_AlongDim):
    """Interleave blocks of channels, so that grouped layers behind it mix them.

    `nn.ChannelShuffle` with a channel dimension and an inverse.

    Args:
        groups: Number of blocks, a divisor of the number of channels.
        dim: Channel dimension.

    Shape:
        Any; output alike.

    Guarantee:
        A permutation, exact.

    Raises:
        ValueError: `groups` < 1; when called: it does not divide the number of channels.

    Examples:
        >>> ChannelShuffle(2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1., 3., 2., 4.]])
    """

    def __init__(self, groups: int, dim: int = 1) -> None:
        super().__init__(dim)
        positive_int(self, groups=groups)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return functional.channel_shuffle(x, self.groups, self.dim)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the input of the shuffle that gives `y`."""
        return functional.channel_shuffle(y, y.shape[self.dim] // self.groups, self.dim)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, {super().extra_repr()}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        if self.dim % (len(input_shape) + 1) == 0:
            refuse(self, "the channels must not be the batch", "Choose another dim")
        return Declared(1.0, REARRANGEMENT, True, 0.0)
