"""Batch normalization with gains of at most 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from orthonet._checks import in_range, positive_int, require
from orthonet.layers._declared import Declared, Norms, check_bias, float64, length_of
from orthonet.linalg.bounds.sizes import Rounding

__all__ = ["BatchLipNorm1d", "BatchLipNorm2d", "BatchLipNorm3d"]


class _BatchLipNorm(nn.Module):
    """Batch normalization, divided by its largest gain."""

    _ndims: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive_int(self, num_features=num_features)
        in_range(self, 1e-12, 1.0, eps=eps)
        in_range(self, 0.0, 1.0, momentum=momentum)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        for name in ("weight", "bias"):
            value = torch.empty(num_features, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value) if affine else None)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Running mean 0 and variance 1, weight 1 and bias 0."""
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def gains(self, variance: Tensor | None = None) -> Tensor:
        r"""The factor of each channel, of modulus at most 1.

        \(w_c / \sqrt{v_c + \epsilon}\), divided by the largest modulus over the channels; zeros if
        all are zero.
        """
        variance = self.running_var if variance is None else variance
        gain = (variance + self.eps).rsqrt()
        if self.weight is not None:
            gain = gain * self.weight.to(gain.dtype)
        largest = gain.abs().max()
        return gain / torch.where(largest > 0, largest, torch.ones_like(largest))

    def forward(self, x: Tensor) -> Tensor:
        require(
            x.ndim in self._ndims and x.shape[1] == self.num_features,
            self,
            f"the input must have a batch dimension, then {self.num_features} channels, and "
            f"{' or '.join(str(n) for n in self._ndims)} dimensions in all",
            "Add the batch dimension with x.unsqueeze(0), or change num_features",
            shape=tuple(x.shape),
        )
        if self.training:
            dims = (0, *range(2, x.ndim))
            variance, mean = torch.var_mean(x.to(self.running_var.dtype), dims, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        else:
            variance, mean = self.running_var, self.running_mean
        shape = (-1, *[1] * (x.ndim - 2))
        y = (x - mean.to(x.dtype).view(shape)) * self.gains(variance).to(x.dtype).view(shape)
        return y if self.bias is None else y + self.bias.to(x.dtype).view(shape)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        """Also accept what `nn.BatchNorm2d` and its like have saved."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        """Prove a bound of the Lipschitz constant from the weights that forward computes."""
        check_bias(
            self, self.num_features, self.running_mean, self.running_var, self.weight, self.bias
        )
        with torch.no_grad():
            gains = float64(self, self.gains())  # as forward computes them
            mean = float64(self, self.running_mean)
        largest, repeats = float(gains.abs().max()), math.prod(input_shape[1:])
        offset = length_of(gains * mean, repeats) + length_of(self.bias, repeats)
        return Declared(
            largest, "diagonal of running statistics", True, Rounding(4.0, largest, offset)
        )


class BatchLipNorm1d(_BatchLipNorm):
    """Twin of `BatchLipNorm2d` for (N, C) and (N, C, L)."""

    _ndims = (2, 3)


class BatchLipNorm2d(_BatchLipNorm):
    r"""1-Lipschitz batch normalization: that of `nn.BatchNorm2d`, divided by its largest gain.

    Channels are centred and brought to variances in a fixed proportion, that of the squared
    weights; the channel that is amplified most has gain 1. In eval mode the running statistics are
    used and nothing is written. A checkpoint of `nn.BatchNorm2d` loads.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: learn a weight (only its proportions matter) and a bias for each channel.

    Shape:
        (N, C, H, W); the output has the same.

    Guarantee:
        Eval: a diagonal map with constant exactly 1 (or 0 if every weight is 0), up to rounding.
        Train: the statistics are those of the batch, and no bound is given for it.

    Raises:
        ValueError: an argument out of range; when called: wrong number of dimensions or channels.

    Examples:
        >>> BatchLipNorm2d(3).eval().gains().tolist()
        [1.0, 1.0, 1.0]

    References:
        Béthune et al., *Pay attention to your loss*, NeurIPS 2022, and deel-torchlip's
        `BatchLipNorm` (there with a factor shared by the network).
    """

    _ndims = (4,)


class BatchLipNorm3d(_BatchLipNorm):
    """Twin of `BatchLipNorm2d` for (N, C, D, H, W)."""

    _ndims = (5,)
