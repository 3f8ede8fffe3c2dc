"""Invertible down-sampling in 1, 2 and 3 dimensions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from orthonet import functional
from orthonet._checks import in_range, positive_int, require

__all__ = ["PadToStride", "SpaceToDepth1d", "SpaceToDepth2d", "SpaceToDepth3d"]


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
        """Return the input that gives `y`."""
        return functional.depth_to_space(y, self.downscale_factor, self._spatial)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"


class SpaceToDepth1d(_SpaceToDepth):
    """Invertible down-sampling of sequences: r times shorter, r times the channels.

    See [`SpaceToDepth2d`][orthonet.layers.SpaceToDepth2d].

    Shape:
        `(*, C, L)` to `(*, C r, L / r)`.

    Examples:
        >>> SpaceToDepth1d(2)(torch.ones(1, 3, 8)).shape
        torch.Size([1, 6, 4])
    """

    _spatial = 1


class SpaceToDepth2d(nn.PixelUnshuffle):
    """Invertible down-sampling: `torch.nn.PixelUnshuffle` with its `inverse`.

    Args:
        downscale_factor: Side r of the blocks of pixels that become channels.

    Shape:
        `(*, C, H, W)` to `(*, C r^2, H / r, W / r)`.

    Guarantee:
        A permutation: orthogonal and exact, in train and eval; `inverse(forward(x))` is `x`.

    Raises:
        ValueError: The factor is not positive; when called: it does not divide H and W.

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
        """Return the input that gives `y`, exactly."""
        return functional.depth_to_space(y, self.downscale_factor, 2)


class SpaceToDepth3d(_SpaceToDepth):
    """Invertible down-sampling of volumes: r^3 times the channels.

    See [`SpaceToDepth2d`][orthonet.layers.SpaceToDepth2d].

    Shape:
        `(*, C, D, H, W)` to `(*, C r^3, D / r, H / r, W / r)`.

    Examples:
        >>> SpaceToDepth3d(2)(torch.ones(1, 1, 4, 4, 4)).shape
        torch.Size([1, 8, 2, 2, 2])
    """

    _spatial = 3


class PadToStride(nn.Module):
    r"""Append zeros to every spatial dimension, up to a multiple of the stride.

    In front of blocks of `stride` pixels it gives as many blocks as a convolution with this kernel,
    stride and no padding has outputs, \(\lfloor (n - k) / s \rfloor + 1\): what that convolution
    reads only in part is filled up, what it never reads is cut off.

    Args:
        stride: Side s of the blocks.
        kernel_size: Taps k of the convolution, at most the stride.
        spatial: Number of spatial dimensions, 1 to 3.

    Shape:
        `(*, L1, ..., Ln)` to the same with sizes that the stride divides.

    Guarantee:
        1-Lipschitz, exactly; an isometry unless something is cut off, which a kernel of one tap
        never does.

    Raises:
        ValueError: A size is not positive, or `kernel_size` above the stride.

    Examples:
        >>> PadToStride(2)(torch.ones(1, 3, 7, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, stride: int, kernel_size: int = 1, spatial: int = 2) -> None:
        super().__init__()
        positive_int(self, stride=stride, kernel_size=kernel_size)
        in_range(self, 1, stride, kernel_size=kernel_size)
        in_range(self, 1, 3, spatial=spatial)
        self.stride, self.kernel_size, self.spatial = stride, kernel_size, spatial

    def forward(self, x: Tensor) -> Tensor:
        s, k = self.stride, self.kernel_size
        require(
            x.ndim > self.spatial,
            self,
            f"the input must have {self.spatial} spatial dimensions behind its channels",
            "Reshape it to (N, C, ...) or (C, ...)",
            shape=tuple(x.shape),
        )
        missing = [((n - k) // s + 1) * s - n for n in x.shape[-self.spatial :]]
        return F.pad(x, [a for m in reversed(missing) for a in (0, m)])

    def extra_repr(self) -> str:
        return f"stride={self.stride}, kernel_size={self.kernel_size}, spatial={self.spatial}"
