"""A factor in a network: constants other than 1."""

from __future__ import annotations

from torch import Tensor, nn

from orthonet._checks import in_range

__all__ = ["Scale"]


class Scale(nn.Module):
    r"""\(y = K x\): in front of or behind a 1-Lipschitz network, it makes it K-Lipschitz.

    Args:
        factor: The number K, positive; it is not learned.

    Shape:
        Any; the output has the same.

    Guarantee:
        Constant exactly K, in train and eval.

    Raises:
        ValueError: `factor` is not a positive finite number.

    Examples:
        >>> import torch
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
