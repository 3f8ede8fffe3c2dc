"""Sorting activations and reflections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet._checks import integer, positive_int, real_input, require

__all__ = ["absolute", "group_sort", "householder", "max_min"]


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
