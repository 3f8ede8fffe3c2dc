"""1-Lipschitz pooling in 1, 2 and 3 dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from orthonet import functional
from orthonet._checks import fail, non_negative_int, positive_int, require

__all__ = [
    "AdaptiveL2NormPool1d",
    "AdaptiveL2NormPool2d",
    "AdaptiveL2NormPool3d",
    "AdaptiveScaledAvgPool1d",
    "AdaptiveScaledAvgPool2d",
    "AdaptiveScaledAvgPool3d",
    "GlobalL2NormPool1d",
    "GlobalL2NormPool2d",
    "GlobalL2NormPool3d",
    "GlobalScaledAvgPool1d",
    "GlobalScaledAvgPool2d",
    "GlobalScaledAvgPool3d",
    "L2NormPool1d",
    "L2NormPool2d",
    "L2NormPool3d",
    "ScaledAvgPool1d",
    "ScaledAvgPool2d",
    "ScaledAvgPool3d",
]

Size = int | Sequence[int]


def _sizes(owner: object, spatial: int, name: str, value: Size) -> tuple[int, ...]:
    """`value` as one integer for each spatial dimension."""
    sizes = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(sizes) != spatial:
        requirement = f"{name} must be an integer or {spatial} of them"
        fail(owner, requirement, "Give one entry for each spatial dimension", **{name: value})  # type: ignore[arg-type]
    return sizes


class _WindowPool(nn.Module):
    """Pooling over windows of fixed size."""

    _spatial: int

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__()
        self.kernel_size = _sizes(self, self._spatial, "kernel_size", kernel_size)
        stride = self.kernel_size if stride is None else stride
        self.stride = _sizes(self, self._spatial, "stride", stride)
        self.padding = _sizes(self, self._spatial, "padding", padding)
        for k, s, p in zip(self.kernel_size, self.stride, self.padding, strict=True):
            positive_int(self, kernel_size=k, stride=s)
            non_negative_int(self, padding=p)
            require(
                2 * p <= k,
                self,
                "padding must be at most half of kernel_size",
                "Use a larger window, or pad the input before",
                kernel_size=self.kernel_size,
                padding=self.padding,
            )

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _L2NormPool(_WindowPool):
    """Norm of every window."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.l2_norm_pool(x, self.kernel_size, self.stride, self.padding)


class _ScaledAvgPool(_WindowPool):
    """Scaled average of every window."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_avg_pool(x, self.kernel_size, self.stride, self.padding)


class _AdaptivePool(nn.Module):
    """Pooling to a given output size, which must divide that of the input."""

    _spatial: int

    def __init__(self, output_size: Size) -> None:
        super().__init__()
        self.output_size = _sizes(self, self._spatial, "output_size", output_size)
        for size in self.output_size:
            positive_int(self, output_size=size)

    def _window(self, x: Tensor) -> tuple[int, ...]:
        sizes = tuple(x.shape[-self._spatial :])
        require(
            x.ndim > self._spatial
            and all(s > 0 and s % o == 0 for s, o in zip(sizes, self.output_size, strict=True)),
            self,
            "every spatial size must be a multiple of output_size",
            "Choose an output_size that divides it, or pad the input; windows of unequal size "
            "would overlap and the constant would no longer be exactly 1",
            shape=tuple(x.shape),
            output_size=self.output_size,
        )
        return tuple(s // o for s, o in zip(sizes, self.output_size, strict=True))

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class _AdaptiveL2NormPool(_AdaptivePool):
    """Norm over the windows of a given output size."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.l2_norm_pool(x, self._window(x))


class _AdaptiveScaledAvgPool(_AdaptivePool):
    """Scaled average over the windows of a given output size."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_avg_pool(x, self._window(x))


class _GlobalPool(nn.Module):
    """Pooling over all of the spatial dimensions."""

    _spatial: int

    def __init__(self, keepdim: bool = False) -> None:
        super().__init__()
        self.keepdim = keepdim

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}"


class _GlobalL2NormPool(_GlobalPool):
    """Norm of every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_l2_norm_pool(x, self._spatial, self.keepdim)


class _GlobalScaledAvgPool(_GlobalPool):
    """Scaled average of every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_scaled_avg_pool(x, self._spatial, self.keepdim)


class L2NormPool1d(_L2NormPool):
    """One-dimensional twin of `L2NormPool2d`."""

    _spatial = 1


class L2NormPool2d(_L2NormPool):
    r"""Euclidean norm of every window of every channel.

    Overlapping windows are divided by the square root of the number of windows that share a
    pixel, \(\prod_d \lceil k_d / s_d \rceil\).

    Args:
        kernel_size: window.
        stride: default `kernel_size`.
        padding: zeros on both sides, at most half of the window.

    Shape:
        (N, C, H, W) or (C, H, W); output sizes as those of the average pooling of torch.

    Guarantee:
        Lipschitz constant exactly 1, gradient finite everywhere and 0 for a zero window; see
        `orthonet.functional.l2_norm_pool` for the proof.

    Raises:
        ValueError: sizes that are not positive, padding larger than half of the window; when
            called: wrong number of dimensions.

    Examples:
        >>> L2NormPool2d(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    _spatial = 2


class L2NormPool3d(_L2NormPool):
    """Three-dimensional twin of `L2NormPool2d`."""

    _spatial = 3


class ScaledAvgPool1d(_ScaledAvgPool):
    """One-dimensional twin of `ScaledAvgPool2d`."""

    _spatial = 1


class ScaledAvgPool2d(_ScaledAvgPool):
    r"""Average pooling times \(\sqrt{|W|}\), so that its Lipschitz constant is 1.

    Overlapping windows are also divided by the exact norm of the operator.

    Args:
        kernel_size: window.
        stride: default `kernel_size`.
        padding: zeros on both sides, at most half of the window.

    Shape:
        (N, C, H, W) or (C, H, W); output sizes as those of the average pooling of torch.

    Guarantee:
        Without overlap and padding all singular values are 1. Else the constant is at most 1,
        and 1 is the supremum over the input sizes; see `orthonet.functional.scaled_avg_pool`
        for the proof.

    Raises:
        ValueError: sizes that are not positive, padding larger than half of the window; when
            called: wrong number of dimensions.

    Examples:
        >>> ScaledAvgPool2d(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    _spatial = 2


class ScaledAvgPool3d(_ScaledAvgPool):
    """Three-dimensional twin of `ScaledAvgPool2d`."""

    _spatial = 3


class AdaptiveL2NormPool1d(_AdaptiveL2NormPool):
    """One-dimensional twin of `AdaptiveL2NormPool2d`."""

    _spatial = 1


class AdaptiveL2NormPool2d(_AdaptiveL2NormPool):
    """Euclidean norm over the windows that give `output_size`.

    Args:
        output_size: size of the output; it must divide the size of the input, so that the
            windows tile it.

    Shape:
        (N, C, H, W) or (C, H, W), to the same with `output_size`.

    Guarantee:
        Lipschitz constant exactly 1: the windows are disjoint. The gradient is finite.

    Raises:
        ValueError: when called: `output_size` does not divide the input size.

    Examples:
        >>> AdaptiveL2NormPool2d(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    _spatial = 2


class AdaptiveL2NormPool3d(_AdaptiveL2NormPool):
    """Three-dimensional twin of `AdaptiveL2NormPool2d`."""

    _spatial = 3


class AdaptiveScaledAvgPool1d(_AdaptiveScaledAvgPool):
    """One-dimensional twin of `AdaptiveScaledAvgPool2d`."""

    _spatial = 1


class AdaptiveScaledAvgPool2d(_AdaptiveScaledAvgPool):
    """Scaled average over the windows that give `output_size`.

    Args:
        output_size: size of the output; it must divide the size of the input, so that the
            windows tile it.

    Shape:
        (N, C, H, W) or (C, H, W), to the same with `output_size`.

    Guarantee:
        All singular values are 1: the rows are unit vectors with disjoint supports.

    Raises:
        ValueError: when called: `output_size` does not divide the input size.

    Examples:
        >>> AdaptiveScaledAvgPool2d(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    _spatial = 2


class AdaptiveScaledAvgPool3d(_AdaptiveScaledAvgPool):
    """Three-dimensional twin of `AdaptiveScaledAvgPool2d`."""

    _spatial = 3


class GlobalL2NormPool1d(_GlobalL2NormPool):
    """One-dimensional twin of `GlobalL2NormPool2d`."""

    _spatial = 1


class GlobalL2NormPool2d(_GlobalL2NormPool):
    """Euclidean norm of every channel.

    Args:
        keepdim: keep the spatial dimensions, with size 1.

    Shape:
        (N, C, H, W) or (C, H, W), to (N, C) or (C,), or with trailing ones.

    Guarantee:
        Lipschitz constant exactly 1; the gradient is 0 at a zero channel.

    Raises:
        ValueError: when called: wrong number of dimensions.

    Examples:
        >>> GlobalL2NormPool2d()(torch.ones(1, 2, 3, 3))
        tensor([[3., 3.]])
    """

    _spatial = 2


class GlobalL2NormPool3d(_GlobalL2NormPool):
    """Three-dimensional twin of `GlobalL2NormPool2d`."""

    _spatial = 3


class GlobalScaledAvgPool1d(_GlobalScaledAvgPool):
    """One-dimensional twin of `GlobalScaledAvgPool2d`."""

    _spatial = 1


class GlobalScaledAvgPool2d(_GlobalScaledAvgPool):
    r"""Average of every channel times the square root of its number of pixels.

    Args:
        keepdim: keep the spatial dimensions, with size 1.

    Shape:
        (N, C, H, W) or (C, H, W), to (N, C) or (C,), or with trailing ones.

    Guarantee:
        All singular values are 1: the rows are unit vectors with disjoint supports.

    Raises:
        ValueError: when called: wrong number of dimensions.

    Examples:
        >>> GlobalScaledAvgPool2d()(torch.ones(1, 2, 3, 3))
        tensor([[3., 3.]])
    """

    _spatial = 2


class GlobalScaledAvgPool3d(_GlobalScaledAvgPool):
    """Three-dimensional twin of `GlobalScaledAvgPool2d`."""

    _spatial = 3
