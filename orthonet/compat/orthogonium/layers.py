"""Activations, centering, residuals and linear layers of orthogonium."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orthonet import _checks, functional, layers
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = [
    "Abs",
    "AdditiveResidual",
    "BatchCentering2D",
    "ChannelShuffle",
    "ConcatResidual",
    "HouseHolder",
    "HouseHolder_Order_2",
    "L2NormResidual",
    "LayerCentering2D",
    "MaxMin",
    "OrthoLinear",
    "PrescaledAdditiveResidual",
    "SoftHuber",
    "UnitNormLinear",
]

Abs = layers.Abs


class SoftHuber(layers.SoftHuber):
    """`orthonet.layers.SoftHuber` with a narrower smooth part."""

    def __init__(self, delta: float = 0.05) -> None:
        super().__init__(delta)


class MaxMin(layers.MaxMin):
    """`orthonet.layers.MaxMin` with `axis` for `dim`."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__(axis)


class HouseHolder(layers.HouseholderActivation):
    r"""`orthonet.functional.householder` with `axis` for `dim`, from the other side of each line.

    The result is not divided by \(\sqrt 2\): the map keeps norms as it is.
    """

    def __init__(self, channels: int, axis: int = 1) -> None:
        super().__init__(channels, axis)

    def forward(self, x: Tensor) -> Tensor:
        """Reflect pairs of channels."""
        return functional.householder(x, self.theta + 2 * math.pi, self.dim)


class HouseHolder_Order_2(layers.HouseholderActivation2):  # noqa: N801 (the name of the peer)
    r"""`orthonet.layers.HouseholderActivation2` with `axis` for `dim`.

    `theta` holds half of the three angles of the peer. The result is not divided by
    \(\sqrt 2\): the map keeps norms as it is.
    """

    def __init__(self, channels: int, axis: int = 1) -> None:
        super().__init__(channels, axis)


class ChannelShuffle(layers.ChannelShuffle):
    """`orthonet.layers.ChannelShuffle` of `group_in` blocks of `group_out` channels."""

    def __init__(self, group_in: int, group_out: int, dim: int = 1) -> None:
        super().__init__(group_in, dim)
        self.group_in = group_in
        self.group_out = group_out


class LayerCentering2D(nn.Module):
    """Subtract the mean of each channel of each image, and add a bias of shape (1, C, 1, 1)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.center = layers.LayerCentering()
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Center each channel."""
        return self.center(x) + self.bias


class BatchCentering2D(nn.Module):
    """Subtract a running mean of each channel in train mode too, and add a bias (1, C, 1, 1).

    Gradients do not pass through the mean, so that the Jacobian is the identity in both modes.
    `orthonet.layers.BatchCentering` subtracts the mean of the batch in train mode.
    """

    running_mean: Tensor

    def __init__(self, num_features: int, momentum: float = 0.10) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(1, num_features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Update the mean in train mode, and subtract it."""
        if self.training:
            mean = x.detach().mean((0, -2, -1), keepdim=True)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            return x - self.running_mean.clone() + self.bias
        return x - self.running_mean + self.bias


class ConcatResidual(layers.ConcatResidual):
    """`orthonet.layers.ConcatResidual` with `fn` for `branch`."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__(fn)


class L2NormResidual(layers.L2NormResidual):
    """`orthonet.layers.L2NormResidual` with `fn` for `branch`; it needs no `eps` in the root."""

    def __init__(self, fn: nn.Module, eps: float = 1e-6) -> None:
        _checks.in_range(self, 0.0, 1.0, eps=eps)
        super().__init__(fn)


class AdditiveResidual(layers.ConvexResidual):
    r"""`orthonet.layers.ConvexResidual`: \(s x + (1 - s) f(x)\), s the sigmoid of `init_val`."""

    def __init__(self, fn: nn.Module, init_val: float = 1.0) -> None:
        super().__init__(fn, 1.0 / (1.0 + math.exp(init_val)))


class PrescaledAdditiveResidual(layers.PrescaledResidual):
    """`orthonet.layers.PrescaledResidual` with `fn` for `branch` and a positive gain."""

    def __init__(self, fn: nn.Module, init_val: float = 1.0) -> None:
        super().__init__(fn, init_val)


def _extremes(values: Tensor) -> tuple[float, float, float]:
    """Return the smallest and largest singular value, and the stable rank over the rank."""
    largest = float(values.max())
    share = float(values.square().mean()) / largest**2 if largest else 0.0
    return float(values.min()), largest, share


class OrthoLinear(layers.OrthoLinear):
    """`orthonet.layers.OrthoLinear` with `ortho_params` as the fourth argument."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    ) -> None:
        super().__init__(in_features, out_features, bias, ortho_params=ortho_params)

    def singular_values(self) -> tuple[float, float, float]:
        """Return the smallest and the largest singular value, and the stable rank over the rank."""
        return _extremes(super().singular_values())


class UnitNormLinear(layers.UnitNormLinear):
    """`orthonet.layers.UnitNormLinear`."""

    def singular_values(self) -> tuple[float, float, float]:
        """Return the smallest and the largest singular value, and the stable rank over the rank."""
        return _extremes(super().singular_values())
