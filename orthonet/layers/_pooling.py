"""1-Lipschitz pooling in 1, 2 and 3 dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from orthonet import functional
from orthonet._checks import (
    boolean,
    fail,
    non_negative_int,
    one_of,
    positive_int,
    real_input,
    require,
)

__all__ = [
    "AdaptiveL2NormPool",
    "AdaptiveScaledAvgPool",
    "GlobalL2NormPool",
    "GlobalScaledAvgPool",
    "L2NormPool",
    "ScaledAvgPool",
]

Size = int | Sequence[int]


def _dims_of(owner: object, dims: int | None, *sizes: Size | None) -> int:
    """Return the number of spatial dimensions: `dims`, or the length of a size, or 2."""
    if dims is None:
        lengths = [len(size) for size in sizes if isinstance(size, (tuple, list))]
        dims = lengths[0] if lengths else 2
    one_of(owner, (1, 2, 3), dims=dims)
    return dims


def _sizes(owner: object, dims: int, name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as one integer for each spatial dimension."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    if len(sizes) != dims:
        requirement = f"{name} must be an integer or {dims} of them"
        advice = "Give one entry for each spatial dimension, or another dims"
        fail(owner, requirement, advice, ValueError, **{name: value})
    return sizes


class _WindowPool(nn.Module):
    """Pooling over windows of fixed size."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        *,
        dims: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = _dims_of(self, dims, kernel_size, stride, padding)
        self.kernel_size = _sizes(self, self.dims, "kernel_size", kernel_size)
        stride = self.kernel_size if stride is None else stride
        self.stride = _sizes(self, self.dims, "stride", stride)
        self.padding = _sizes(self, self.dims, "padding", padding)
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


class _AdaptivePool(nn.Module):
    """Pooling to a given output size, which must divide the input size."""

    def __init__(self, output_size: Size, *, dims: int | None = None) -> None:
        super().__init__()
        self.dims = _dims_of(self, dims, output_size)
        self.output_size = _sizes(self, self.dims, "output_size", output_size)
        for size in self.output_size:
            positive_int(self, output_size=size)

    def _window(self, x: Tensor) -> tuple[int, ...]:
        real_input(self, x)
        sizes = tuple(x.shape[-self.dims :])
        require(
            x.ndim > self.dims
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


class _GlobalPool(nn.Module):
    """Pooling over all spatial dimensions."""

    def __init__(self, keepdim: bool = False, *, dims: int = 2) -> None:
        super().__init__()
        boolean(self, keepdim=keepdim)
        one_of(self, (1, 2, 3), dims=dims)
        self.dims = dims
        self.keepdim = keepdim

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}" + ("" if self.dims == 2 else f", dims={self.dims}")


class L2NormPool(_WindowPool):
    r"""Return the Euclidean norm of every window of every channel.

    Overlapping windows are divided by the square root of the number of windows that share a
    pixel, \(\prod_d \lceil k_d / s_d \rceil\). The module of
    [`l2_norm_pool`][orthonet.functional.l2_norm_pool], which has the proof.

    Args:
        kernel_size: Window.
        stride: Default `kernel_size`.
        padding: Zeros on both sides, at most half of the window.
        dims: Number of spatial dimensions, 1 to 3. The default is the length of `kernel_size`, or
            2 if that is an integer.

    Shape:
        `(N, C, *spatial)` or `(C, *spatial)`; output sizes as torch's average pooling.

    Guarantee:
        Lipschitz constant exactly 1, gradient finite everywhere and 0 for a zero window.

    Raises:
        ValueError: A size is not positive, or the padding larger than half of the window; when
            called: the input has another number of dimensions.

    Examples:
        >>> L2NormPool(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
        >>> L2NormPool(2, dims=1)(torch.tensor([[[3.0, 4.0]]]))
        tensor([[[5.]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.l2_norm_pool(x, self.kernel_size, self.stride, self.padding)


class ScaledAvgPool(_WindowPool):
    r"""Average every window and multiply by \(\sqrt{|W|}\), so that the constant is 1.

    Overlapping windows are also divided by the exact norm of the operator. The module of
    [`scaled_avg_pool`][orthonet.functional.scaled_avg_pool], which has the proof. Arguments, shapes
    and errors are those of [`L2NormPool`][orthonet.layers.L2NormPool].

    Guarantee:
        All singular values are 1 without overlap and padding. Otherwise the constant is at most 1,
        the supremum over the input sizes.

    Examples:
        >>> ScaledAvgPool(2)(torch.ones(1, 1, 4, 4))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_avg_pool(x, self.kernel_size, self.stride, self.padding)


class AdaptiveL2NormPool(_AdaptivePool):
    """Return the Euclidean norm over the windows that give `output_size`.

    Args:
        output_size: Size of the output. It must divide the input size, so that the windows tile
            the input.
        dims: Number of spatial dimensions. The default is the length of `output_size`, or
            2 if that is an integer.

    Shape:
        `(N, C, *spatial)` or `(C, *spatial)`, to the same with `output_size`.

    Guarantee:
        Lipschitz constant exactly 1: the windows are disjoint. The gradient is finite.

    Raises:
        ValueError: When called: `output_size` does not divide the input size.

    Examples:
        >>> AdaptiveL2NormPool(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.l2_norm_pool(x, self._window(x))


class AdaptiveScaledAvgPool(_AdaptivePool):
    """Return the scaled average over the windows that give `output_size`.

    Arguments, shapes and errors are those of
    [`AdaptiveL2NormPool`][orthonet.layers.AdaptiveL2NormPool].

    Guarantee:
        All singular values are 1: the rows are unit vectors with disjoint supports.

    Examples:
        >>> AdaptiveScaledAvgPool(1)(torch.ones(1, 1, 3, 3))
        tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_avg_pool(x, self._window(x))


class GlobalL2NormPool(_GlobalPool):
    """Return the Euclidean norm of every channel.

    Args:
        keepdim: Keep the spatial dimensions, with size 1.
        dims: Number of spatial dimensions, 1 to 3.

    Shape:
        `(N, C, *spatial)` or `(C, *spatial)`, to (N, C) or (C,), or with trailing ones.

    Guarantee:
        Lipschitz constant exactly 1; the gradient is 0 at a zero channel.

    Raises:
        ValueError: When called: the input has another number of dimensions.

    Examples:
        >>> GlobalL2NormPool()(torch.ones(1, 2, 3, 3))
        tensor([[3., 3.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_l2_norm_pool(x, self.dims, self.keepdim)


class GlobalScaledAvgPool(_GlobalPool):
    """Average every channel and multiply by the square root of its number of pixels.

    Arguments, shapes and errors are those of
    [`GlobalL2NormPool`][orthonet.layers.GlobalL2NormPool], the guarantee is that of
    [`AdaptiveScaledAvgPool`][orthonet.layers.AdaptiveScaledAvgPool].

    Examples:
        >>> GlobalScaledAvgPool()(torch.ones(1, 2, 3, 3))
        tensor([[3., 3.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.global_scaled_avg_pool(x, self.dims, self.keepdim)
