"""A factor in a network, for constants other than 1, and a choice of channels."""

from __future__ import annotations

from torch import Tensor, nn

from orthonet._checks import in_range, positive_int, require, tensor
from orthonet.layers._declared import Declared, Norms

__all__ = ["FirstChannels", "Scale"]


class Scale(nn.Module):
    """Multiply by K: in front of or behind a 1-Lipschitz network, it makes it K-Lipschitz.

    Args:
        factor: The number K, positive; it is not learned.

    Shape:
        Any; output alike.

    Guarantee:
        Constant exactly K, in train and eval.

    Raises:
        ValueError: `factor` is not a positive finite number.

    Examples:
        >>> Scale(2.0)(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        in_range(self, 1e-30, 1e30, factor=factor)
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"

    def declared_bound(self, input_shape: tuple[int, ...], norms: Norms) -> Declared:
        return Declared(abs(self.factor), "factor", True, 1.0)


class FirstChannels(nn.Module):
    """Keep the first channels of the input, dim 1, and drop the others.

    Args:
        channels: How many are kept.

    Shape:
        (N, C, *) with C >= `channels`; output (N, channels, *).

    Guarantee:
        Constant 1, in train and eval: a projection.

    Raises:
        ValueError: `channels` is not a positive integer; when called: the input has fewer.

    Examples:
        >>> FirstChannels(2)(torch.zeros(5, 4, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        positive_int(self, channels=channels)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        tensor(self, x=x)
        require(
            x.ndim >= 2 and x.shape[1] >= self.channels,
            self,
            f"the input must have {self.channels} channels or more",
            "Keep fewer",
            shape=tuple(x.shape),
        )
        return x[:, : self.channels]

    def extra_repr(self) -> str:
        return f"{self.channels}"
