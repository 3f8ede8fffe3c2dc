"""Input normalization, and centering of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet._checks import factory, integer, numbers, real_input, require

__all__ = ["LayerCentering", "Normalize"]


class Normalize(nn.Module):
    r"""Return \((x - \mathrm{mean}) / \mathrm{std}\), channel by channel, as part of the model.

    Normalizing inside the model keeps every radius in the units of the input: the constant
    \(1 / \min(\mathrm{std})\) is a factor of the certificate like that of any layer.

    Args:
        mean: One number for all channels, or one for each.
        std: As `mean`, positive.
        dim: Channel dimension.
        device: Of the buffers.
        dtype: Of the buffers.

    Shape:
        Any; output alike.

    Guarantee:
        Lipschitz constant exactly `lipschitz`, read from the buffers (so that it is right after
        a change of dtype or the loading of a checkpoint).

    Raises:
        ValueError: The lengths differ, `mean` is not finite, or a `std` is not positive and
            finite; when called: the input has another number of channels.

    Examples:
        >>> Normalize(mean=0.5, std=0.25).lipschitz
        4.0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: float | Sequence[float] | Tensor,
        std: float | Sequence[float] | Tensor,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given = {"mean": mean, "std": std}
        integer(self, dim=dim)
        factory(self, device, dtype)
        self._initial = tuple(numbers(self, *entry) for entry in given.items())
        means, stds = self._initial
        sizes = {len(means), len(stds)} - {1}
        require(
            len(sizes) <= 1 and min(len(means), len(stds)) > 0,
            self,
            "mean and std must have one entry, or one for each channel",
            "Give both the same length",
            **given,
        )
        require(
            all(map(math.isfinite, means)) and all(0 < value < math.inf for value in stds),
            self,
            "mean must be finite, and std must be positive and finite",
            "Use std=1.0 for a channel that is constant",
            **given,
        )
        self.dim = dim
        channels = max(len(means), len(stds))
        self.register_buffer("mean", torch.empty(channels, device=device, dtype=dtype))
        self.register_buffer("std", torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the constructor's `mean` and `std` into the buffers."""
        with torch.no_grad():
            for buffer, values in zip((self.mean, self.std), self._initial, strict=True):
                buffer.copy_(torch.tensor(values, dtype=torch.float64))

    @property
    def lipschitz(self) -> float:
        """The l2 Lipschitz constant, 1 / min(std)."""
        return 1 / self.std.min().item()

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.numel()
        require(
            -x.ndim <= self.dim < x.ndim and channels in (1, x.shape[self.dim]),
            self,
            f"the input must have {channels} channels in dimension {self.dim}",
            "Give one mean and std for each channel, or a single one for all",
            shape=tuple(x.shape),
        )
        shape = (-1, *[1] * (x.ndim - self.dim % x.ndim - 1))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}, dim={self.dim}"


class LayerCentering(nn.Module):
    r"""Subtract the mean of each sample over the given dimensions.

    Args:
        dim: Dimensions of the mean. The default, the two last, centers each channel of an
            image; `(-3, -2, -1)` centers over channels and space, `-1` over features.

    Shape:
        Any with these dimensions; output alike.

    Guarantee:
        The orthogonal projection \(I - \mathbf{1}\mathbf{1}^T / n\): constant exactly 1 for
        \(n > 1\) (singular values 1, and one 0 for each mean), in train and eval. It has no state.

    Raises:
        ValueError: When called: the input has no such dimension.

    Examples:
        >>> LayerCentering(dim=-1)(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[-2., -1.,  3.]])
    """

    def __init__(self, dim: int | Sequence[int] = (-2, -1)) -> None:
        super().__init__()
        given: Any = dim
        self.dim: tuple[int, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for each in self.dim:
            integer(self, dim=each)
        require(len(self.dim) > 0, self, "dim must not be empty", "Use dim=-1", dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        real_input(self, x)
        require(
            all(-x.ndim <= dim < x.ndim for dim in self.dim),
            self,
            "every dim must be a dimension of the input",
            "Use dim=-1 for features and dim=(-2, -1) for images",
            dim=self.dim,
            shape=tuple(x.shape),
        )
        return x - x.mean(self.dim, keepdim=True)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
