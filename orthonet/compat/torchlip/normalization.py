"""Centering and normalization as deel-torchlip has them: averages over an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks, layers

__all__ = [
    "BatchCentering",
    "BatchCentering2d",
    "BatchLipNorm",
    "LayerCentering",
    "LayerCentering2d",
    "ScaleBiasLayer",
    "SharedLipFactory",
]


class SharedLipFactory(layers.SharedFactors):
    """`orthonet.layers.SharedFactors`; as a layer behind the network it divides by the product."""

    def get_current_product_value(self, training: bool) -> Tensor:
        """Return the product of the factors, of the last batch or of the running statistics."""
        modes = [(layer, layer.training) for layer in self._scaled]
        for layer, _ in modes:
            layer.training = training
        product = self.product()
        for layer, mode in modes:
            layer.training = mode
        return product


class ScaleBiasLayer(nn.Module):
    """Multiply by a number and add a bias to each channel."""

    scalar: Tensor
    bias: Tensor | None

    def __init__(
        self, scalar: float | Tensor = 1.0, num_features: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("scalar", torch.as_tensor(scalar, dtype=torch.get_default_dtype()))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Scale, and add the bias."""
        y = x * self.scalar
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (x.ndim - 2))


class LayerCentering(nn.Module):
    """`orthonet.layers.LayerCentering` with a bias of shape (`num_features`,)."""

    bias: Tensor | None

    def __init__(
        self, num_features: int = 1, dim: Sequence[int] = (-2, -1), bias: bool = True
    ) -> None:
        super().__init__()
        self.center = layers.LayerCentering(dim)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Center each sample."""
        y = self.center(x)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (x.ndim - 2))


LayerCentering2d = LayerCentering


def _channels_apart(owner: object, dim: Sequence[int] | None) -> None:
    _checks.require(
        dim is None or (0 in dim and 1 not in dim),
        owner,
        "the mean of each channel is taken over the batch and all other dimensions",
        "Leave dim out",
        dim=dim,
    )


class _Epoch:
    """The buffers of the peer, read from ours."""

    running_mean: Tensor
    num_batches_tracked: Tensor

    @property
    def running_num_batches(self) -> Tensor:
        """How many batches the averages hold."""
        return self.num_batches_tracked.reshape(1)

    @property
    def running_sum_bmean(self) -> Tensor:
        """The sum of the means of these batches."""
        return self.running_mean * self.num_batches_tracked

    def reset_states(self) -> None:
        """Forget all batches."""
        owner: Any = self
        bias = owner.bias
        owner.register_parameter("bias", None)
        owner.reset_parameters()
        owner.register_parameter("bias", bias)


class BatchCentering(_Epoch, layers.BatchCentering):
    """`orthonet.layers.BatchCentering` with averages over an epoch."""

    def __init__(
        self, num_features: int = 1, dim: Sequence[int] | None = None, bias: bool = True
    ) -> None:
        _channels_apart(type(self), dim)
        super().__init__(num_features, None, bias)

    def vanilla_export(self) -> nn.Module:
        """Return a `ScaleBiasLayer` of the running mean."""
        plain = ScaleBiasLayer(1.0, self.num_features)
        shift = -self.running_mean if self.bias is None else self.bias - self.running_mean
        plain.bias = nn.Parameter(shift.detach().clone())
        return plain


BatchCentering2d = BatchCentering


class BatchLipNorm(_Epoch, layers.BatchScaling):
    """`orthonet.layers.BatchScaling` with averages over an epoch, and `factory` for `factors`.

    `normalize=False` is refused: it is `BatchCentering`.
    """

    def __init__(
        self,
        num_features: int = 1,
        dim: Sequence[int] | None = None,
        centering: bool = True,
        bias: bool = True,
        normalize: bool = True,
        factory: SharedLipFactory | None = None,
        eps: float = 1e-5,
    ) -> None:
        _channels_apart(type(self), dim)
        _checks.require(
            normalize is True,
            type(self),
            "this layer normalizes",
            "Use BatchCentering for a layer that only centers",
            normalize=normalize,
        )
        super().__init__(num_features, eps, None, bias, centering=centering, factors=factory)

    def get_scaling_factor(self, training: bool = False) -> Tensor:
        """Return the factor of the last batch, or of the running statistics."""
        mode, self.training = self.training, training
        factor = self.factor()
        self.training = mode
        return factor

    def vanilla_export(self) -> nn.Module:
        """Return a `ScaleBiasLayer` of the running statistics."""
        factor = self.get_scaling_factor().detach()
        plain = ScaleBiasLayer(factor, self.num_features)
        shift = -self.running_mean * factor
        shift = shift if self.bias is None else shift + self.bias
        plain.bias = nn.Parameter(shift.detach().clone())
        return plain
