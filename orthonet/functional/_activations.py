"""Sorting activations, reflections and other piecewise isometries, and shifts of the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet._checks import (
    in_range,
    integer,
    one_of,
    positive_int,
    real_input,
    require,
    tensor,
)

__all__ = [
    "absolute",
    "beta_abs",
    "channel_shuffle",
    "group_sort",
    "householder",
    "householder_order2",
    "max_min",
    "n_activation",
    "soft_huber",
    "spatial_shift",
]


def _channel_dim(owner: str, x: Tensor, dim: int, group_size: int) -> int:
    """Return `dim` as a non-negative number, after the check that the groups divide its size."""
    real_input(owner, x)
    integer(owner, dim=dim)
    require(
        -x.ndim <= dim < x.ndim,
        owner,
        f"dim must be a dimension of the {x.ndim}-dimensional input",
        "Use dim=-1 for features, dim=-3 for images with or without a batch dimension",
        dim=dim,
    )
    require(
        x.shape[dim] % group_size == 0,
        owner,
        f"the number of channels must be a multiple of {group_size}",
        "Change the width of the layer before, or the group size",
        channels=x.shape[dim],
        dim=dim,
    )
    return dim % x.ndim


def _sort_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (larger, smaller), bit for bit, with a permutation as Jacobian, ties included."""
    swap = (a < b).to(a.dtype)
    return torch.lerp(a, b, swap), torch.lerp(b, a, swap)


def max_min(x: Tensor, dim: int = 1) -> Tensor:
    r"""Sort pairs of channels: the maxima come first, then the minima.

    Channel \(i\) of the first half is paired with channel \(i\) of the second one,
    \(y = (\max(x_1, x_2), \min(x_1, x_2))\): `group_sort` with groups of two, up to a permutation
    of the channels.

    Args:
        x: Finite input.
        dim: Channel dimension, of even size.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz and gradient-norm preserving: every Jacobian is a permutation, at ties the
        identity. Values are exact in every dtype.

    Raises:
        ValueError: The number of channels is odd, or `dim` out of range.

    Examples:
        >>> max_min(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
        tensor([[3., 4., 1., 2.]])

    References:
        Anil, Lucas, Grosse, *Sorting out Lipschitz function approximation*, ICML 2019,
        https://arxiv.org/abs/1811.05381
    """
    dim = _channel_dim("max_min", x, dim, 2)
    return torch.cat(_sort_pair(*x.chunk(2, dim)), dim)


def group_sort(x: Tensor, group_size: int = 2, dim: int = 1) -> Tensor:
    """Sort each group of `group_size` consecutive channels in ascending order.

    Args:
        x: Finite input.
        group_size: Channels in a group; the number of channels itself sorts all of them
            (*full sort*).
        dim: Channel dimension; `group_size` divides its size.

    Shape:
        Any; output alike.

    Guarantee:
        As of [`max_min`][orthonet.functional.max_min].

    Raises:
        ValueError: `group_size` does not divide the number of channels, or `dim` out of range.

    Examples:
        >>> group_sort(torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[1., 4., 2., 3.]])

    References:
        As of `max_min`.
    """
    positive_int("group_sort", group_size=group_size)
    dim = _channel_dim("group_sort", x, dim, group_size)
    groups = x.unflatten(dim, (-1, group_size))
    if group_size == 2:
        low, high = groups.unbind(dim + 1)
        high, low = _sort_pair(high, low)
        return torch.stack((low, high), dim + 1).flatten(dim, dim + 1)
    return groups.sort(dim=dim + 1).values.flatten(dim, dim + 1)


def absolute(x: Tensor) -> Tensor:
    """Return the absolute value, with derivative +1 at 0.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz and gradient-norm preserving at every point, 0 included (`torch.abs` has
        derivative 0 there). Values are exact in every dtype.

    Examples:
        >>> absolute(torch.tensor([-2.0, 3.0]))
        tensor([2., 3.])
    """
    real_input("absolute", x)
    return x * (1 - 2 * (x < 0).to(x.dtype))


def householder(
    x: Tensor,
    theta: Tensor,  # (channels / 2,)
    dim: int = 1,
) -> Tensor:
    r"""Reflect the pairs of channels that lie on the wrong side of a line (order 1).

    With \(v = (\sin(\theta/2), -\cos(\theta/2))\), a pair \(z\) becomes \(z\) when
    \(v^T z \ge 0\) and \((I - 2vv^T) z\) otherwise, that is
    \(z + 2v \max(-v^T z, 0)\). Channels are paired as in `max_min`, which is the case
    \(\theta = \pi/2\).

    Args:
        x: Input.
        theta: One angle a pair.
        dim: Channel dimension, of even size.

    Shape:
        `x`: any; output alike. `theta`: (channels / 2,).

    Guarantee:
        1-Lipschitz and gradient-norm preserving in `x`: every Jacobian is block diagonal with
        an identity or a reflection for each pair, so all singular values are 1 up to the
        rounding of \(v\), which is computed in at least float32. No factor \(1/\sqrt 2\) is needed:
        the two outputs of a pair see the same \(z\) through an orthogonal matrix.

    Raises:
        ValueError: The number of channels is odd, `dim` out of range, or `theta` no such vector.

    Examples:
        >>> householder(torch.tensor([[1.0, 4.0]]), torch.tensor([torch.pi]))
        tensor([[1., 4.]])

    References:
        Singla, Singla, Feizi, *Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100*,
        ICLR 2022, equation 3, https://arxiv.org/abs/2108.04062
    """
    dim = _channel_dim("householder", x, dim, 2)
    tensor("householder", theta=theta)
    pairs = x.shape[dim] // 2
    require(
        theta.shape == (pairs,),
        "householder",
        f"theta must hold one angle for each of the {pairs} pairs of channels",
        "Make it a vector of half the number of channels",
        theta=theta,
    )
    half = torch.promote_types(theta.dtype, torch.float32)
    half_angle = theta.to(half).view(-1, *[1] * (x.ndim - dim - 1)) / 2
    v1, v2 = half_angle.sin(), -half_angle.cos()
    z1, z2 = x.chunk(2, dim)
    distance = 2 * F.relu(-(v1 * z1 + v2 * z2))
    return torch.cat((z1 + v1 * distance, z2 + v2 * distance), dim).to(x.dtype)


def beta_abs(x: Tensor, beta: float = 0.5, dim: int = 1) -> Tensor:
    r"""Take the modulus of the first \(\lfloor \beta c \rceil\) channels, and keep the others.

    Args:
        x: Input.
        beta: Share of the channels whose modulus is taken, in [0, 1].
        dim: Channel dimension.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz and gradient-norm preserving, exactly, 0 included.

    Raises:
        ValueError: `beta` outside [0, 1], or `dim` out of range.

    Examples:
        >>> beta_abs(torch.tensor([[-1.0, -2.0]]), 0.5)
        tensor([[ 1., -2.]])

    References:
        Hu et al., *LipNeXt*, ICLR 2026 (beta-Abs).
    """
    in_range("beta_abs", 0.0, 1.0, beta=beta)
    dim = _channel_dim("beta_abs", x, dim, 1)
    count = round(beta * x.shape[dim])
    if count == x.shape[dim]:
        return absolute(x)
    first, rest = x.tensor_split((count,), dim)
    return torch.cat((absolute(first), rest), dim)


def soft_huber(x: Tensor, delta: float = 1.0) -> Tensor:
    r"""Return the smooth modulus \(\sqrt{x^2 + \delta^2} - \delta\).

    Args:
        x: Input.
        delta: Half width of the smooth part, positive.

    Shape:
        Any; output alike.

    Guarantee:
        1-Lipschitz: the slope \(x / \sqrt{x^2 + \delta^2}\) lies in (-1, 1) and tends to 1.

    Raises:
        ValueError: `delta` is not positive.

    Examples:
        >>> soft_huber(torch.tensor([0.0, 3.0]), 4.0)
        tensor([0., 1.])
    """
    in_range("soft_huber", 1e-12, 1e12, delta=delta)
    real_input("soft_huber", x)
    return (x * x + delta * delta).sqrt() - delta


def n_activation(
    x: Tensor,
    theta: Tensor,  # (2, channels)
    dim: int = 1,
) -> Tensor:
    r"""Apply slopes +1, -1, +1, changing at two learnable places for each channel.

    With \(a \le b\) the sorted places: \(x - 2a\) below a, \(-x\) between, \(x - 2b\) above b.

    Args:
        x: Input.
        theta: The two places of each channel, in any order.
        dim: Channel dimension.

    Shape:
        `x`: any with the channels in `dim`; output alike. `theta`: (2, channels).

    Guarantee:
        1-Lipschitz and gradient-norm preserving in `x`.

    Raises:
        ValueError: `theta` has another shape, or `dim` is out of range.

    Examples:
        >>> n_activation(torch.tensor([[-3.0, 0.5, 3.0]]), torch.tensor([[-1.0] * 3, [1.0] * 3]))
        tensor([[-1.0000, -0.5000,  1.0000]])

    References:
        Prach & Lampert, *1-Lipschitz neural networks are more expressive with N-activations*,
        2023, arXiv:2311.06103.
    """
    dim = _channel_dim("n_activation", x, dim, 1)
    tensor("n_activation", theta=theta)
    require(
        theta.shape == (2, x.shape[dim]),
        "n_activation",
        f"theta must hold two places for each of the {x.shape[dim]} channels",
        "Make it of shape (2, channels)",
        theta=theta,
    )
    shape = (-1, *[1] * (x.ndim - dim - 1))
    low, high = (t.to(x.dtype).view(shape) for t in (theta.amin(0), theta.amax(0)))
    return torch.where(x < low, x - 2 * low, torch.where(x > high, x - 2 * high, -x))


def householder_order2(
    x: Tensor,
    theta: Tensor,  # (3, channels / 2)
    dim: int = 1,
) -> Tensor:
    r"""Turn and reflect pairs of channels in four sectors: the Householder activation of order 2.

    In polar coordinates the angle \(\varphi = \varphi_0 + \psi\) of each pair goes to
    \(\varphi\) for \(\psi < a\), \(2(\varphi_0 + a) - \varphi\) for \(\psi < a + b\),
    \(\varphi - 2 b\) for \(\psi < b + \pi\), and \(2 \varphi_0 - \varphi\) beyond; the length is
    kept. The sectors have the sizes \(a, b, \pi - a, \pi - b\), so the map is continuous;
    \(a = \pi\) gives order 1. Channels are paired as in `max_min`.

    Args:
        x: Input.
        theta: \(\varphi_0\), a and b of each pair; a and b are clamped to \([0, \pi]\).
        dim: Channel dimension, of even size.

    Shape:
        `x`: any; output alike. `theta`: (3, channels / 2).

    Guarantee:
        1-Lipschitz and gradient-norm preserving in `x`: every Jacobian has singular values 1 up to
        the rounding of sine and cosine, which are computed in at least float32.

    Raises:
        ValueError: The number of channels is odd, `dim` out of range, or `theta` of another shape.

    Examples:
        >>> y = householder_order2(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [1.0], [0.5]]))
        >>> round(y.norm().item(), 4)
        5.0

    References:
        Singla, Singla & Feizi, *Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100*,
        ICLR 2022, appendix on higher orders, arXiv:2108.04062.
    """
    dim = _channel_dim("householder_order2", x, dim, 2)
    pairs = x.shape[dim] // 2
    tensor("householder_order2", theta=theta)
    require(
        theta.shape == (3, pairs),
        "householder_order2",
        f"theta must hold three angles for each of the {pairs} pairs of channels",
        "Make it of shape (3, channels / 2)",
        theta=theta,
    )
    wide = torch.promote_types(torch.promote_types(theta.dtype, x.dtype), torch.float32)
    start, a, b = theta.to(wide).view(3, -1, *[1] * (x.ndim - dim - 1))
    a, b = a.clamp(0.0, math.pi), b.clamp(0.0, math.pi)
    z1, z2 = x.to(wide).chunk(2, dim)
    psi = (torch.atan2(z2, z1) - start).detach().remainder(2 * math.pi)
    first, second, third = psi < a, psi < a + b, psi < b + math.pi
    zero = torch.zeros_like(psi)
    turn = torch.where(first, zero, torch.where(second, 2 * (start + a), 2 * start))
    turn = torch.where(third & ~second, -2 * b, turn)
    # a turn keeps the orientation, a reflection changes the sign of the second entry first
    flipped = torch.where(first | (third & ~second), z2, -z2)
    cos, sin = turn.cos(), turn.sin()
    y = torch.cat((cos * z1 - sin * flipped, sin * z1 + cos * flipped), dim)
    return y.to(x.dtype)


def channel_shuffle(x: Tensor, groups: int, dim: int = 1) -> Tensor:
    """Interleave `groups` blocks of channels: channel (g, i) goes to place (i, g).

    Args:
        x: Input.
        groups: Number of blocks, a divisor of the number of channels.
        dim: Channel dimension.

    Shape:
        Any; output alike.

    Guarantee:
        A permutation, exact.

    Raises:
        ValueError: `groups` does not divide the number of channels, or `dim` out of range.

    Examples:
        >>> channel_shuffle(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2)
        tensor([[1., 3., 2., 4.]])
    """
    positive_int("channel_shuffle", groups=groups)
    dim = _channel_dim("channel_shuffle", x, dim, groups)
    return x.unflatten(dim, (groups, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def spatial_shift(x: Tensor, fraction: float = 0.5, padding_mode: str = "circular") -> Tensor:
    """Shift a quarter of a share of the channels by one pixel in each of the four directions.

    Args:
        x: Images.
        fraction: Share of the channels that are shifted, the first ones, in [0, 1].
        padding_mode: "circular" wraps around; "zeros" drops a row or column.

    Shape:
        (*, C, H, W); output alike.

    Guarantee:
        Circular: a permutation. Zeros: norm at most 1.

    Raises:
        ValueError: An argument is out of range, or `x` has fewer than three dimensions.

    Examples:
        >>> spatial_shift(torch.arange(8.0).view(1, 4, 1, 2), 1.0).flatten().tolist()
        [1.0, 0.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    """
    in_range("spatial_shift", 0.0, 1.0, fraction=fraction)
    one_of("spatial_shift", ("zeros", "circular"), padding_mode=padding_mode)
    real_input("spatial_shift", x)
    require(
        x.ndim >= 3,
        "spatial_shift",
        "the input must be (*, C, H, W)",
        "Add the missing dimensions",
        shape=tuple(x.shape),
    )
    quarter = round(fraction * x.shape[-3] / 4)
    parts = x.tensor_split(tuple(quarter * i for i in range(1, 5)), -3)
    moved = []
    for part, dim, step in zip(parts, (-1, -1, -2, -2), (1, -1, 1, -1), strict=False):
        if padding_mode == "circular":
            moved.append(part.roll(step, dim))
            continue
        before, after = (1, 0) if step > 0 else (0, 1)
        pad = (before, after) if dim == -1 else (0, 0, before, after)
        moved.append(F.pad(part, pad).narrow(dim, after, x.shape[dim]))
    return torch.cat((*moved, parts[4]), -3)
