"""Normalization by the statistics of a batch: centering, and scalings of a known constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet._checks import boolean, factory, in_range, positive_int, real_input, require
from orthonet.layers._declared import (
    Declared,
    Norms,
    check_bias,
    float64,
    length_of,
    refuse,
)
from orthonet.linalg.bounds.rounding import div_up
from orthonet.linalg.bounds.sizes import Rounding

__all__ = ["BatchCentering", "BatchLipNorm", "BatchScaling", "SharedFactors"]


class _BatchStatistics(nn.Module):
    """Running averages of what a batch says of each channel of (N, C, *)."""

    running_mean: Tensor
    num_batches_tracked: Tensor | None
    eps: float

    def __init__(
        self, num_features: int, momentum: float | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        positive_int(self, num_features=num_features)
        if momentum is not None:
            in_range(self, 0.0, 1.0, momentum=momentum)
        self.num_features = num_features
        self.momentum = momentum
        # As `nn.BatchNorm2d`: the count is needed for a cumulative average alone.
        factory(self, device, None)
        count = None if momentum is not None else torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", count)

    def _register(
        self,
        averages: Sequence[str],
        learned: Sequence[str],
        wanted: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make a number for each channel: buffers, and parameters where they are wanted."""
        factory(self, device, dtype)
        for name in (*averages, *learned):
            value = torch.empty(self.num_features, device=device, dtype=dtype)
            if name in averages:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set means, biases and the count of batches to 0, and variances and weights to 1."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            nn.init.constant_(tensor, float(name in ("weight", "running_var", "running_square")))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}"

    def train(self, mode: bool = True) -> _BatchStatistics:
        """Set the mode; where training is resumed, what was averaged counts as one batch."""
        resumed = mode and not self.training
        if resumed and self.num_batches_tracked is not None:
            self.num_batches_tracked.clamp_(max=1)
        return super().train(mode)

    def _check(self, x: Tensor) -> tuple[int, ...]:
        """Refuse an input without these channels; return the shape of a channel's number."""
        real_input(self, x)
        require(
            x.ndim >= 2 and x.shape[1] == self.num_features,
            self,
            f"the input must have a batch dimension, then {self.num_features} channels",
            "Add the batch dimension with x.unsqueeze(0), or change num_features",
            shape=tuple(x.shape),
        )
        return (-1, *[1] * (x.ndim - 2))

    @torch.no_grad()
    def _track(self, **observed: Tensor) -> None:
        """Move each running average toward what a batch has shown."""
        count = self.num_batches_tracked
        if count is not None:
            count.add_(1)
        for name, value in observed.items():
            average: Tensor = getattr(self, name)
            value = value.to(average.dtype)
            if count is None:
                average.lerp_(value, self.momentum or 0.0)
            else:
                average.add_((value - average) / count)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        """Also accept what `nn.BatchNorm2d` and its like have saved."""
        if self.num_batches_tracked is None:
            state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)


def _dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


class BatchCentering(_BatchStatistics):
    r"""Subtract the mean of each channel over the batch and space, and add a bias.

    In train mode the mean is that of the batch, and a running mean is kept; in eval mode the
    running mean is subtracted and nothing is written.

    Args:
        num_features: Number of channels.
        momentum: Weight of a new batch in the running mean. None for the plain average over the
            batches since training was last resumed, before which all count as one batch.
        bias: Whether to add a learnable bias to each channel.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.

    Shape:
        `(N, C, *)` with any number of spatial dimensions; output alike.

    Guarantee:
        Eval: a constant shift, its Jacobian is the identity. Train: the orthogonal projection
        \(I - \mathbf{1}\mathbf{1}^T / n\) of the *batch*, of norm 1; it mixes the samples, so the
        bound concerns all of them together.

    Raises:
        ValueError: `num_features` < 1, or `momentum` outside [0, 1]; when called: the input has no
            batch dimension, or another number of channels.

    Examples:
        >>> layer = BatchCentering(3).eval()
        >>> layer(torch.ones(1, 3, 1, 1)).flatten()
        tensor([1., 1., 1.], grad_fn=<...>)
    """

    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum, device)
        boolean(self, bias=bias)
        self._register(("running_mean",), ("bias",), bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the mean and add the bias."""
        shape = self._check(x)
        mean = self.running_mean
        if self.training:
            mean = x.mean(_dims(x))
            self._track(running_mean=mean)
        shift = mean if self.bias is None else mean - self.bias
        return x - shift.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"


class BatchLipNorm(_BatchStatistics):
    """1-Lipschitz batch normalization: `nn.BatchNorm2d`, divided by its largest gain.

    Channels are centered and brought to variances in a fixed proportion, that of the squared
    weights; the channel that is amplified most has gain 1. In eval mode the running statistics are
    used and nothing is written. A checkpoint of `nn.BatchNorm2d` loads. The other arguments, shapes
    and errors are those of [`BatchCentering`][orthonet.layers.BatchCentering].

    Args:
        eps: Added to the variance, in [1e-12, 1].
        affine: Whether to learn a weight (only its proportions matter) and a bias for each channel.

    Guarantee:
        Eval: a diagonal map with constant exactly 1 (or 0 if every weight is 0), up to rounding.
        Train: the statistics are those of the batch, and no bound is given for it.

    Examples:
        >>> BatchLipNorm(3).eval().gains().tolist()
        [1.0, 1.0, 1.0]

    References:
        Béthune et al., *Pay attention to your loss*, NeurIPS 2022.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum, device)
        in_range(self, 1e-12, 1.0, eps=eps)
        boolean(self, affine=affine)
        self.eps = eps
        learned = ("weight", "bias")
        self._register(("running_mean", "running_var"), learned, affine, device, dtype)

    def gains(self, variance: Tensor | None = None) -> Tensor:
        r"""Return the factor of each channel, of modulus at most 1.

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
        """Center and scale every channel."""
        shape = self._check(x)
        if self.training:
            wide = x.to(self.running_var.dtype)
            variance, mean = torch.var_mean(wide, _dims(x), correction=0)
            self._track(running_mean=mean, running_var=variance)
        else:
            variance, mean = self.running_var, self.running_mean
        y = (x - mean.to(x.dtype).view(shape)) * self.gains(variance).to(x.dtype).view(shape)
        return y if self.bias is None else y + self.bias.to(x.dtype).view(shape)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
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


class BatchScaling(_BatchStatistics):
    r"""Batch normalization with one factor for all channels: \(y = (x - \mu) / \sigma + b\).

    \(\sigma^2\) is the largest variance of a channel, plus `eps`. The factor \(1 / \sigma\) is the
    Lipschitz constant of the layer and may exceed 1. It is known at all times, so that a
    [`SharedFactors`][orthonet.layers.SharedFactors] at the end of the network can divide by it: a
    1-Lipschitz network whose inner layers see inputs of variance near 1. The other arguments,
    shapes
    and errors are those of [`BatchCentering`][orthonet.layers.BatchCentering].

    Args:
        eps: As of [`BatchLipNorm`][orthonet.layers.BatchLipNorm].
        centering: Whether to subtract the mean of each channel.
        factors: The layer that divides by the factor of this one.

    Guarantee:
        Eval: constant exactly `factor()`, up to rounding. Train: as of `BatchLipNorm`.

    Examples:
        >>> layer = BatchScaling(3, momentum=None)
        >>> _ = layer(4 * torch.randn(1000, 3))
        >>> 0.2 < layer.eval().factor().item() < 0.3
        True

    References:
        deel-torchlip's `BatchLipNorm` and `SharedLipFactory`.
    """

    bias: Tensor | None
    running_square: Tensor
    _last: Tensor | None = None  # the factor of the last batch in train mode

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        centering: bool = True,
        factors: SharedFactors | None = None,
    ) -> None:
        super().__init__(num_features, momentum, device)
        in_range(self, 1e-12, 1.0, eps=eps)
        boolean(self, bias=bias, centering=centering)
        require(
            factors is None or isinstance(factors, SharedFactors),
            self,
            "factors must be a SharedFactors",
            "Make one SharedFactors() and pass it to every layer that shares",
            factors=factors,
        )
        self.eps = eps
        self.centering = centering
        self._register(("running_mean", "running_square"), ("bias",), bias, device, dtype)
        if factors is not None:
            factors.register(self)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state.pop("_last", None)  # part of a graph, which cannot be copied
        return state

    def factor(self) -> Tensor:
        """Return the factor of the last batch, or in eval mode of the running statistics."""
        if self.training and self._last is not None:
            return self._last
        return self._factor(self.running_square - self.running_mean.square())

    def _factor(self, variance: Tensor) -> Tensor:
        return (variance.amax().clamp_min(0.0) + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Center and scale by the one factor."""
        shape = self._check(x)
        if self.training:
            wide = x.to(self.running_mean.dtype)
            mean, square = wide.mean(_dims(x)), wide.square().mean(_dims(x))
            mean = mean if self.centering else torch.zeros_like(mean)
            self._track(running_mean=mean, running_square=square)
            entries = max(2, x.numel() // max(1, self.num_features))
            factor = self._factor((square - mean.square()) * (entries / (entries - 1)))
            self._last = factor
        else:
            mean, factor = self.running_mean, self.factor()
        y = (x - mean.to(x.dtype).view(shape)) * factor.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype).view(shape)

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        check_bias(self, self.num_features, self.running_mean, self.running_square, self.bias)
        with torch.no_grad():
            factor = float(float64(self, self.factor()))
            mean = float64(self, self.running_mean)
        repeats = math.prod(input_shape[1:])
        offset = length_of(factor * mean, repeats) + length_of(self.bias, repeats)
        return Declared(factor, "factor of running statistics", True, Rounding(4.0, factor, offset))


class SharedFactors(nn.Module):
    r"""Divide by the product of the factors of other layers.

    Put it behind a sequential network of 1-Lipschitz layers and
    [`BatchScaling`][orthonet.layers.BatchScaling] layers that were made with `factors=` this one:
    the whole has constant 1.

    Shape:
        Any; output alike.

    Guarantee:
        Constant exactly \(1 / \prod_i f_i\) in eval mode, with the factors \(f_i\) of the
        registered layers.

    Examples:
        >>> end = SharedFactors()
        >>> model = nn.Sequential(BatchScaling(3, factors=end), end)
        >>> _ = model(torch.randn(100, 3))
        >>> round(float(end.product() - model[0].factor()), 6)
        0.0
    """

    def __init__(self) -> None:
        super().__init__()
        self._scaled: list[BatchScaling] = []  # no children: they belong to the network

    def register(self, layer: BatchScaling) -> None:
        """Divide by the factor of `layer`, too."""
        self._scaled.append(layer)

    def product(self) -> Tensor:
        """Return the product of the factors; 1 without a registered layer."""
        factors = [layer.factor() for layer in self._scaled]
        return torch.stack(factors).prod() if factors else torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the product."""
        return x / self.product().to(x.dtype) if self._scaled else x

    def extra_repr(self) -> str:
        return f"layers={len(self._scaled)}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        with torch.no_grad():
            product = float(float64(self, self.product()))
        if not product > 0.0:
            refuse(self, "the product of the factors must be positive", "Look for an underflow")
        return Declared(div_up(1.0, product), "inverse of the factors", True, 1.0)
