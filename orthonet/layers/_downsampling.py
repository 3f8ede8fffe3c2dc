"""Invertible down-sampling in 1, 2 and 3 dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from orthonet import functional
from orthonet._checks import positive_int

__all__ = ["SpaceToDepth1d", "SpaceToDepth2d", "SpaceToDepth3d"]


class _SpaceToDepth(nn.Module):
    """Move each block of pixels into the channels."""

    _spatial: int

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        positive_int(self, downscale_factor=downscale_factor)
        self.downscale_factor = downscale_factor

    def forward(self, x: Tensor) -> Tensor:
        return functional.space_to_depth(x, self.downscale_factor, self._spatial)

    def inverse(self, y: Tensor) -> Tensor:
        """The input of which `y` is the output."""
        return functional.depth_to_space(y, self.downscale_factor, self._spatial)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"


class SpaceToDepth1d(_SpaceToDepth):
    """One-dimensional twin of `SpaceToDepth2d`: r times shorter, r times the channels."""

    _spatial = 1


class SpaceToDepth2d(nn.PixelUnshuffle):
    """Invertible down-sampling: `torch.nn.PixelUnshuffle` with its `inverse`.

    Args:
        downscale_factor: side r of the blocks of pixels that become channels.

    Shape:
        `(*, C, H, W)` to `(*, C r^2, H / r, W / r)`.

    Guarantee:
        A permutation: orthogonal and exact, in train and eval; `inverse(forward(x))` is `x`.

    Raises:
        ValueError: a factor < 1; when called: it does not divide H and W.

    Examples:
        >>> SpaceToDepth2d(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    def __init__(self, downscale_factor: int) -> None:
        positive_int(self, downscale_factor=downscale_factor)
        super().__init__(downscale_factor)

    def forward(self, input: Tensor) -> Tensor:
        return functional.space_to_depth(input, self.downscale_factor, 2)

    def inverse(self, y: Tensor) -> Tensor:
        """The input of which `y` is the output."""
        return functional.depth_to_space(y, self.downscale_factor, 2)


class SpaceToDepth3d(_SpaceToDepth):
    """Three-dimensional twin of `SpaceToDepth2d`: r^3 times the channels."""

    _spatial = 3
