r"""Rescalings that bring a matrix or convolution to norm at most 1, and differentiable bounds.

Kernels have the layout of `torch.nn.functional.conv{1,2,3}d`, (c_out, c_in / groups, *taps); a
matrix is a kernel without taps. What is bounded is the convolution on the infinite grid: circular
padding samples its frequencies, zero padding, strides and borders select rows and columns, so the
bound holds for every input size and each of these paddings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet.linalg.matrix import compute_dtype

__all__ = [
    "almost_orthogonal",
    "convolution_norm_upper",
    "bounded_columns",
    "bounded_rows",
    "gershgorin_scale",
    "normalized_frobenius",
    "normalized_spectral",
    "overlap",
]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _swap_channels(kernel: Tensor, groups: int) -> Tensor:
    """The kernel with the input channels of each group first: (c_in, c_out / groups, *taps)."""
    return kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _unit_scale(kernel: Tensor) -> Tensor:
    """The kernel divided by its largest entry, which keeps squares away from overflow."""
    largest = kernel.detach().abs().amax()
    return kernel / torch.where(largest > 0, largest, torch.ones_like(largest))


def _row_overlaps(kernel: Tensor, groups: int) -> Tensor:
    r"""\(\sum_{lag} |(K K^\top)_{ij}|\) for rows i, j of one group: (groups, rows, rows)."""
    dims = kernel.ndim - 2
    rows = kernel.shape[0] // groups
    if dims == 0:
        split = kernel.unflatten(0, (groups, rows))
        return (split @ split.mT).abs()
    images = kernel.unflatten(0, (groups, rows)).transpose(0, 1).flatten(1, 2)
    padding = tuple(size - 1 for size in kernel.shape[2:])
    lags = _CONVOLUTIONS[dims](images, kernel, padding=padding, groups=groups)
    return lags.abs().flatten(2).sum(-1).unflatten(1, (groups, rows)).movedim(1, 0)


def gershgorin_scale(
    kernel: Tensor,
    *,
    groups: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Return a diagonal T with \(T \succeq K K^\top\), one number for each row (output channel).

    \(t_i = \sum_j |K K^\top|_{ij}\, q_j / q_i\), where the modulus of a convolution is the sum of
    the moduli over all lags: \(T - K K^\top\) is diagonally dominant after scaling by q.

    Args:
        kernel: A matrix or kernel.
        groups: See `nn.Conv2d`.
        weights: Positive numbers q, one for each row; ones if None.

    Shape:
        `kernel`: (c_out, c_in / groups, *taps), up to three tap dims. Output: (c_out,); 0 for a
        row of zeros.

    Guarantee:
        Holds on every grid and for zero or circular padding, up to the rounding of the sums.

    Examples:
        >>> gershgorin_scale(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([2., 3.])

    References:
        Araujo, Havens, Delattre, Allauzen & Hu, *A unified algebraic perspective on Lipschitz
        neural networks*, ICLR 2023.
    """
    _checks.kernel("gershgorin_scale", kernel, groups)
    overlaps = _row_overlaps(kernel, groups)
    if weights is None:
        return overlaps.sum(-1).flatten()
    q = weights.view(groups, 1, -1)
    return ((overlaps * q).sum(-1) / q.squeeze(1)).flatten()


def almost_orthogonal(kernel: Tensor, *, groups: int = 1) -> Tensor:
    r"""Rescale to norm at most 1 by the almost-orthogonal (AOL) rule; orthogonal kernels stay.

    Columns (input channels) are divided by \(\big(\sum_j |P^\top P|_{ij}\big)^{1/2}\), with the
    moduli of convolutions summed over the lags. If there are fewer rows than columns, the rows are
    divided instead, which loses less. A zero column stays zero.

    Args:
        kernel: Matrix or kernel, of any scale.
        groups: See `nn.Conv2d`.

    Shape:
        (c_out, c_in / groups, *taps), up to three tap dims. Output: the same.

    Guarantee:
        \(\|W\|_2 \le 1\) up to rounding, on every grid, for zero or circular padding and any
        stride.

    Examples:
        >>> almost_orthogonal(torch.diag(torch.tensor([3.0, 0.5]))).diagonal()
        tensor([1., 1.])

    References:
        Prach & Lampert, *Almost-orthogonal layers for efficient general-purpose Lipschitz
        networks*, ECCV 2022, theorem 1 (matrices) and theorem 2 (convolutions).
    """
    _checks.kernel("almost_orthogonal", kernel, groups)
    work = _unit_scale(kernel.to(compute_dtype(kernel.dtype)))
    rows, columns = kernel.shape[0] // groups, kernel.shape[1]
    flip = rows >= columns
    sides = _swap_channels(work, groups) if flip else work
    sums = gershgorin_scale(sides, groups=groups)
    factor = torch.where(sums > 0, sums, torch.ones_like(sums)).rsqrt()
    scaled = sides * factor.view(-1, *(1,) * (sides.ndim - 1))
    return (_swap_channels(scaled, groups) if flip else scaled).to(kernel.dtype)


def overlap(kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Count the windows of a strided convolution that read one pixel, at most."""
    return math.prod([-(-k // s) for k, s in zip(kernel_size, stride, strict=True)])


def normalized_frobenius(kernel: Tensor, *, groups: int = 1, reads: int | None = None) -> Tensor:
    r"""Divide each group by a bound of the Frobenius norm of its symbol: norm at most 1.

    \(\|S(f)\|_2^2 \le \|S(f)\|_F^2 = \sum_{lag} a_{lag} e^{i f \cdot lag} \le \sum_{lag}
    |a_{lag}|\) with the autocorrelation \(a_{lag} = \sum_t \langle K_t, K_{t + lag} \rangle\). A
    strided convolution has norm at most \(\sqrt{reads}\,\|K\|_F\) too, and the smaller one is
    taken. A matrix, and a kernel with one tap that is not 0, is divided by its Frobenius norm.

    Args:
        kernel: Matrix or kernel, of any scale.
        groups: See `nn.Conv2d`.
        reads: How many windows read one pixel, see `overlap`; None if it is not known.

    Shape:
        (c_out, c_in / groups, *taps), up to three tap dims. Output: the same; a zero group stays
        zero.

    Guarantee:
        As of `almost_orthogonal`.

    Examples:
        >>> normalized_frobenius(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    _checks.kernel("normalized_frobenius", kernel, groups)
    work = _unit_scale(kernel.to(compute_dtype(kernel.dtype))).unflatten(0, (groups, -1))
    dims = kernel.ndim - 2
    if dims == 0:
        squares = work.square().flatten(1).sum(1)
    else:
        flat = work.flatten(1, 2)  # (groups, entries of a tap, *taps)
        padding = tuple(size - 1 for size in kernel.shape[2:])
        lags = _CONVOLUTIONS[dims](flat.flatten(0, 1)[None], flat, padding=padding, groups=groups)
        squares = lags.abs().flatten(2).sum(-1).flatten()
        if reads is not None:
            squares = torch.minimum(squares, reads * flat.square().flatten(1).sum(1))
    squares = torch.where(squares > 0, squares, torch.ones_like(squares))
    scaled = work * squares.rsqrt().view(-1, *(1,) * (work.ndim - 1))
    return scaled.flatten(0, 1).to(kernel.dtype)


_PRODUCTS_A_SCALE = 3  # from norm 1 the largest entry falls to no less than rank^-5


def convolution_norm_upper(kernel: Tensor, *, groups: int = 1, niters: int = 6) -> Tensor:
    r"""Return a differentiable upper bound of the norm of a convolution on every grid.

    The squared length \(\|S(f) x\|^2\) of the image of the symbol is a trigonometric polynomial of
    degree k - 1 in each frequency. Its maximum is at most \(\prod_d 1 / \cos(\pi (k_d - 1) / N_d)\)
    times its maximum over a grid of \(N_d\) frequencies, here \(N = 12 (k - 1)\). Gram iteration
    bounds the norm at these frequencies, \(\|S\|_2 \le \|G_n\|_F^{2^{-n}}\).

    Args:
        kernel: Matrix or kernel.
        groups: See `nn.Conv2d`.
        niters: Gram products.

    Shape:
        (c_out, c_in / groups, *taps), up to three tap dims. Output: a scalar.

    Guarantee:
        Upper bound up to rounding (a few eps); at most \(1.02^{d}\, r^{2^{-n-1}}\) times the
        norm, for d dims with more than one tap and rank r. Autograd passes through it; 0 for a
        zero kernel.

    Examples:
        >>> bound = convolution_norm_upper(torch.ones(1, 1, 3, 3))  # the norm is 9
        >>> 9.0 <= bound.item() <= 9.0 * 1.02**2
        True

    References:
        Ehlich & Zeller, *Schwankung von Polynomen zwischen Gitterpunkten*, Math. Z. 86 (1964);
        Delattre et al., ICML 2023 (Gram iteration).
    """
    _checks.kernel("convolution_norm_upper", kernel, groups)
    _checks.non_negative_int("convolution_norm_upper", niters=niters)
    work = kernel.to(compute_dtype(kernel.dtype))
    largest = work.detach().abs().amax()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    blocks = (work / largest).unflatten(0, (groups, -1))
    slack = 1.0
    if kernel.ndim > 2:
        sizes = tuple(max(1, 12 * (k - 1)) for k in kernel.shape[2:])
        for k, n in zip(kernel.shape[2:], sizes, strict=True):
            slack *= math.cos(math.pi * (k - 1) / n)
        axes = tuple(range(3, blocks.ndim))
        blocks = torch.fft.rfftn(blocks, s=sizes, dim=axes).flatten(3).movedim(-1, 0)
    blocks = blocks.flatten(0, -3)
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = blocks.mH
    blocks = blocks.resolve_conj().contiguous()
    with torch.no_grad():
        bound = _gram_bound(blocks, niters)
    if torch.is_grad_enabled() and blocks.requires_grad:
        # The gradient of a maximum is that of the largest: one block instead of hundreds.
        bound = _gram_bound(blocks.index_select(0, bound.argmax()[None]), niters)
    return (bound.amax() * largest / math.sqrt(slack)).to(kernel.dtype)


def _gram_bound(
    blocks: Tensor,  # (batch, m, n), m >= n
    niters: int,
) -> Tensor:
    """Upper bounds (batch,) of the norms of matrices, by Gram iteration."""
    blocks = blocks.contiguous()
    log_norm = blocks.new_zeros(blocks.shape[:-2], dtype=blocks.real.dtype)
    weight = 1.0
    for i in range(niters):
        if i % _PRODUCTS_A_SCALE == 0:
            scale = _frobenius(blocks.detach())
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            log_norm = log_norm + weight * scale.log()
            blocks = _divided(blocks, scale)
        # from the second on the matrix is its own adjoint
        blocks = (blocks if i else blocks.mH) @ blocks
        weight /= 2
    norm = _frobenius(blocks)
    positive = norm > 0
    safe = torch.where(positive, norm, torch.ones_like(norm))
    return torch.where(positive, safe**weight * log_norm.exp(), torch.zeros_like(norm))


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Matrices over a positive number each; real arithmetic, which is several times faster."""
    if not blocks.is_complex():
        return blocks / scale[:, None, None]
    return torch.view_as_complex(torch.view_as_real(blocks) / scale[:, None, None, None])


def _frobenius(blocks: Tensor) -> Tensor:
    """Frobenius norms (batch,), from real and imaginary parts: the gradient at 0 is 0.

    The norm of a complex tensor takes as long as several products of these matrices.
    """
    flat = torch.view_as_real(blocks).flatten(-3) if blocks.is_complex() else blocks.flatten(-2)
    return torch.linalg.vector_norm(flat, dim=-1)


def normalized_spectral(kernel: Tensor, *, groups: int = 1) -> Tensor:
    r"""Divide by a bound of the norm of the whole convolution, not of the reshaped kernel.

    See [`convolution_norm_upper`][orthonet.linalg.convolution_norm_upper].

    Shape:
        (c_out, c_in / groups, *taps), up to three tap dims. Output: the same; zero stays zero.

    Guarantee:
        \(\|W\|_2 \le 1\) up to rounding, on every grid, for zero or circular padding, any stride.
    """
    work = _unit_scale(kernel.to(compute_dtype(kernel.dtype)))
    bound = convolution_norm_upper(work, groups=groups)
    return (work / torch.where(bound > 0, bound, torch.ones_like(bound))).to(kernel.dtype)


_DUAL = {"l1": torch.inf, "l2": 2.0, "linf": 1.0}
_NORM = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}


def bounded_rows(matrix: Tensor, norm: str = "linf") -> Tensor:
    r"""Divide each row by its dual norm where that is above 1: a map from `norm` to l-infinity.

    The constant of \(x \mapsto W x\) into l-infinity is the largest dual norm of a row: the sum of
    moduli if x is measured in l-infinity, the length in l2, the largest modulus in l1.

    Args:
        matrix: The matrix.
        norm: The norm of the input, "linf", "l2" or "l1".

    Shape:
        (..., m, n). Output: the same.

    Guarantee:
        Every row of the result has a dual norm of at most 1 in exact arithmetic, in float32 and
        float64, and at least 1 - 16 eps where it was above 1. Other rows change by at most that.
    """
    return _bounded(matrix, -1, _DUAL[norm])


def bounded_columns(matrix: Tensor, to: str = "l1") -> Tensor:
    r"""Divide each column by its norm where that is above 1: a map from l1 to the norm `to`.

    The constant of \(x \mapsto W x\) from l1 is the largest norm of a column.

    Args:
        matrix: The matrix.
        to: The norm of the output, "l1", "l2" or "linf".

    Shape:
        (..., m, n). Output: the same.

    Guarantee:
        As for `bounded_rows`, for the columns.
    """
    return _bounded(matrix, -2, _NORM[to])


def _bounded(matrix: Tensor, dim: int, order: float) -> Tensor:
    """Vectors of norm at most 1: the norm is taken in float64, and rounding is made up for."""
    eps = torch.finfo(matrix.dtype).eps
    wide = matrix.double()
    largest = wide.detach().abs().amax(dim, keepdim=True).clamp_min(1.0)
    size = torch.linalg.vector_norm(wide / largest, order, dim, keepdim=True) * largest
    count = matrix.shape[dim]
    slack = 4.0 * eps + (2.0 * count + 8.0) * torch.finfo(torch.float64).eps
    return (wide / (size.clamp_min(1.0) * (1.0 + slack))).to(matrix.dtype)
