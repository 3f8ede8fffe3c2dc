"""Pooling and invertible down-sampling in 1 to 3 dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from orthonet._checks import boolean, non_negative_int, positive_int, real_input, require, tensor

__all__ = [
    "depth_to_space",
    "global_l2_norm_pool",
    "global_scaled_avg_pool",
    "l2_norm_pool",
    "safe_sqrt",
    "scaled_avg_pool",
    "space_to_depth",
]

_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_TO_DEPTH = {
    1: "... c (h i) -> ... (c i) h",
    2: "... c (h i) (w j) -> ... (c i j) h w",
    3: "... c (d i) (h j) (w k) -> ... (c i j k) d h w",
}


def safe_sqrt(square: Tensor) -> Tensor:
    """Return the square root of non-negative numbers, with derivative 0 (not infinite) at 0.

    It makes norms differentiable in the sense of subgradients: the gradient of
    `safe_sqrt((x * x).sum())` is the unit vector along `x`, and 0 at 0.

    Shape:
        Any; output alike.

    Examples:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> safe_sqrt((x * x).sum()).backward()
        >>> x.grad
        tensor([0., 0.])
    """
    real_input("safe_sqrt", square, "square")
    positive = square > 0
    return torch.where(positive, square, 1).sqrt() * positive


def _window(
    owner: str,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None,
    padding: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the three tuples of a pooling window that fits into `x`, checked and of one length."""
    good = isinstance(kernel_size, (tuple, list, torch.Size))
    require(
        good and len(kernel_size) in _AVG_POOL,
        owner,
        "kernel_size must have 1, 2 or 3 entries, one for each spatial dimension",
        "Write (2, 2) for images",
        kernel_size=kernel_size,
    )
    stride = kernel_size if stride is None else stride
    padding = (0,) * len(kernel_size) if padding is None else padding
    require(
        all(isinstance(each, (tuple, list, torch.Size)) for each in (stride, padding))
        and len(stride) == len(padding) == len(kernel_size),
        owner,
        "kernel_size, stride and padding must be tuples of the same length",
        "Give one entry for each spatial dimension",
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
    )
    for k, s, p in zip(kernel_size, stride, padding, strict=True):
        positive_int(owner, kernel_size=k, stride=s)
        non_negative_int(owner, padding=p)
    _has_spatial(owner, x, len(kernel_size))
    sizes = x.shape[-len(kernel_size) :]
    require(
        all(2 * p <= k for p, k in zip(padding, kernel_size, strict=True)),
        owner,
        "padding must be at most half of kernel_size",
        "Take less padding, or a larger kernel_size",
        padding=tuple(padding),
        kernel_size=tuple(kernel_size),
    )
    require(
        all(n + 2 * p >= k for n, p, k in zip(sizes, padding, kernel_size, strict=True)),
        owner,
        "the window must fit into the padded input",
        "Take a smaller kernel_size, or an adaptive pool",
        kernel_size=tuple(kernel_size),
        shape=tuple(x.shape),
    )
    return tuple(kernel_size), tuple(stride), tuple(padding)


def _has_spatial(owner: str, x: Tensor, spatial: int) -> None:
    real_input(owner, x)
    require(
        x.ndim in (spatial + 1, spatial + 2),
        owner,
        f"the input must have {spatial} spatial dimensions, (N, C, ...) or (C, ...)",
        "Reshape it, or use the twin for another number of dimensions",
        shape=tuple(x.shape),
    )


def l2_norm_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
) -> Tensor:
    r"""Return the Euclidean norm of every window of every channel.

    \(y_W = c^{-1} \|x_W\|_2\) with \(c^2 = \prod_d \lceil k_d / s_d \rceil\), the number of windows
    that share a pixel: 1 unless the windows overlap. From
    \(|\,\|x_W\| - \|x'_W\|\,| \le \|(x - x')_W\|\), the squares sum to
    \(\|y - y'\|^2 \le c^{-2} \sum_i m_i (x_i - x'_i)^2\) with \(m_i \le c^2\), and \(m_i = c^2\) is
    reached: the factor is the best one that holds for every input size.

    Args:
        x: Input.
        kernel_size: Window, one entry for each of the 1 to 3 spatial dimensions.
        stride: Default `kernel_size`.
        padding: Zeros on both sides, at most half of the window; by default none.

    Shape:
        `(N, C, *spatial)` or `(C, *spatial)`, to the same with the sizes of `F.avg_pool2d`.

    Guarantee:
        Lipschitz constant exactly 1; the gradient is finite everywhere and 0 for a zero window.
        Squares are accumulated in at least float32.

    Raises:
        ValueError: The sizes are not positive or not of one length, or `x` has other dimensions.

    Examples:
        >>> l2_norm_pool(torch.tensor([[[3.0, 4.0, 0.0, 0.0]]]), (2,))
        tensor([[[5., 0.]]])
    """
    kernel_size, stride, padding = _window("l2_norm_pool", x, kernel_size, stride, padding)
    shared = math.prod([-(-k // s) for k, s in zip(kernel_size, stride, strict=True)])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _AVG_POOL[len(kernel_size)](wide * wide, kernel_size, stride, padding)
    square = mean * (math.prod(kernel_size) / shared)
    return safe_sqrt(square).to(x.dtype)


def scaled_avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
) -> Tensor:
    r"""Average every window, scaled so that the Lipschitz constant is 1.

    \(y_W = c^{-1} |W|^{-1/2} \sum_{i \in W} x_i\). The rows \(1_W / \sqrt{|W|}\) have unit norm and
    are orthogonal when the windows do not overlap (\(c = 1\)). In one dimension the Gram matrix
    of the rows is Toeplitz with the non-negative entries \(\max(0, k - |j|s)/k\), so its norm
    tends to their sum from below as the input grows:
    \(c^2 = \prod_d (1 + 2q_d - s_d q_d (q_d + 1) / k_d)\) with
    \(q_d = \lceil k_d / s_d \rceil - 1\). Arguments, shapes and errors are those of
    [`l2_norm_pool`][orthonet.functional.l2_norm_pool].

    Guarantee:
        Without overlap and padding all singular values are 1. Otherwise the constant is at most 1,
        and 1 is the supremum over the input sizes.

    Examples:
        >>> scaled_avg_pool(torch.ones(1, 1, 4, 4), (2, 2))
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    kernel_size, stride, padding = _window("scaled_avg_pool", x, kernel_size, stride, padding)
    square = 1.0
    for k, s in zip(kernel_size, stride, strict=True):
        q = -(-k // s) - 1
        square *= 1 + 2 * q - s * q * (q + 1) / k
    scale = math.sqrt(math.prod(kernel_size) / square)
    return _AVG_POOL[len(kernel_size)](x, kernel_size, stride, padding) * scale


def global_l2_norm_pool(x: Tensor, spatial: int, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm of every channel over its `spatial` last dimensions.

    Args:
        x: Input.
        spatial: Number of dimensions, from 1 to 3.
        keepdim: Keep them, with size 1.

    Guarantee:
        Lipschitz constant exactly 1 (each norm is 1-Lipschitz and the channels are disjoint);
        the gradient, and any further one, is 0 at a zero channel. Squares are accumulated in
        at least float32.

    Examples:
        >>> global_l2_norm_pool(torch.ones(1, 3, 4, 4), spatial=2)
        tensor([[4., 4., 4.]])
    """
    _has_spatial("global_l2_norm_pool", x, spatial)
    boolean("global_l2_norm_pool", keepdim=keepdim)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = (wide * wide).sum(dim=tuple(range(-spatial, 0)), keepdim=keepdim)
    return safe_sqrt(square).to(x.dtype)


def global_scaled_avg_pool(x: Tensor, spatial: int, keepdim: bool = False) -> Tensor:
    r"""Sum every channel over its `spatial` last dimensions, and divide by \(\sqrt{|W|}\).

    Arguments are those of [`global_l2_norm_pool`][orthonet.functional.global_l2_norm_pool].

    Guarantee:
        All singular values are 1: rows are unit vectors with disjoint supports.

    Examples:
        >>> global_scaled_avg_pool(torch.full((1, 1, 2, 2), 3.0), spatial=2)
        tensor([[6.]])
    """
    _has_spatial("global_scaled_avg_pool", x, spatial)
    boolean("global_scaled_avg_pool", keepdim=keepdim)
    scale = math.sqrt(math.prod(x.shape[-spatial:]))
    return x.mean(dim=tuple(range(-spatial, 0)), keepdim=keepdim) * scale


def space_to_depth(x: Tensor, downscale_factor: int, spatial: int) -> Tensor:
    """Move each block of `downscale_factor` pixels a side into the channels.

    Channel `c` becomes the channels `c r^n` to `(c + 1) r^n - 1`, one for each pixel of a block
    in row-major order; with two spatial dimensions it is `F.pixel_unshuffle`.

    Args:
        x: Input whose spatial sizes are multiples of the factor.
        downscale_factor: Side `r` of a block.
        spatial: Number `n` of spatial dimensions, 1 to 3.

    Shape:
        `(*, C, L1, ..., Ln)` to `(*, C r^n, L1 / r, ..., Ln / r)`.

    Guarantee:
        A permutation: orthogonal, exact, inverted by `depth_to_space`.

    Raises:
        ValueError: A spatial size is not a multiple of the factor.

    Examples:
        >>> space_to_depth(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), 2, spatial=1)
        tensor([[[1., 3.],
                 [2., 4.]]])
    """
    _check_blocks("space_to_depth", x, downscale_factor, spatial)
    sizes = x.shape[-spatial:]
    require(
        all(size % downscale_factor == 0 for size in sizes),
        "space_to_depth",
        "every spatial size must be a multiple of downscale_factor",
        "Pad the input to a multiple, e.g. with torch.nn.functional.pad",
        spatial_sizes=tuple(sizes),
        downscale_factor=downscale_factor,
    )
    axes = dict.fromkeys("ijk"[:spatial], downscale_factor)
    return rearrange(x, _TO_DEPTH[spatial], **axes)


def depth_to_space(y: Tensor, upscale_factor: int, spatial: int) -> Tensor:
    """Invert `space_to_depth`; with two spatial dimensions this is `F.pixel_shuffle`.

    Raises:
        ValueError: The number of channels is not a multiple of `upscale_factor ** spatial`.

    Examples:
        >>> x = torch.arange(8.0).view(1, 2, 4)
        >>> torch.equal(depth_to_space(space_to_depth(x, 2, spatial=1), 2, spatial=1), x)
        True
    """
    _check_blocks("depth_to_space", y, upscale_factor, spatial)
    channels = y.shape[-spatial - 1]
    require(
        channels % upscale_factor**spatial == 0,
        "depth_to_space",
        f"the number of channels must be a multiple of {upscale_factor**spatial}",
        "Choose another factor",
        channels=channels,
        upscale_factor=upscale_factor,
    )
    depth, space = reversed(_TO_DEPTH[spatial].split(" -> "))
    axes = dict.fromkeys("ijk"[:spatial], upscale_factor)
    return rearrange(y, f"{depth} -> {space}", **axes)


def _check_blocks(owner: str, x: Tensor, factor: int, spatial: int) -> None:
    positive_int(owner, factor=factor)
    tensor(owner, x=x)
    require(
        spatial in _TO_DEPTH and x.ndim > spatial,
        owner,
        "the input must have a channel dimension before its 1 to 3 spatial ones",
        "Reshape it to (N, C, ...) or (C, ...)",
        shape=tuple(x.shape),
        spatial=spatial,
    )
