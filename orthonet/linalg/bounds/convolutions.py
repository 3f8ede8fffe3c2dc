"""Upper bounds of the norm of a convolution, proved in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.bounds.autocorrelation import autocorrelation_bound
from orthonet.linalg.bounds.axis import Axis
from orthonet.linalg.bounds.enclosure import exact_float64, gram_norm_bound, spectral_norm_bound
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    add_up,
    div_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
    up,
)
from orthonet.linalg.bounds.unfoldings import unfolding_bound

__all__ = ["NormBound", "convolution_norm_bound"]

_OWNER = "convolution_norm_bound"
_DENSE_SIDE = 1024  # shorter side of the largest matrix that is written out; twice that if tight
_DENSE_ENTRIES = 2**22  # all groups together; four times that if tight
_UNFOLDED_SIDE = 512  # of the shorter side of unfoldings that are tried next to a coarse grid
_EXCESS = {"fast": 1e-2, "default": 1e-4}  # of a bound by the autocorrelation over the norm
_TORUS_WORK = 4e9  # operations of a torus that make the autocorrelation worth a try
_COARSE = 8  # points of a coarse grid for each degree of the symbol
_TWIDDLE_ERROR = 2.0**-47  # of a computed root of unity: three roundings below 2 pi, and cos, sin


class NormBound(NamedTuple):
    """A proved upper bound of an operator norm, and how it was obtained."""

    value: float
    method: str
    tight: bool
    """The bound is the norm itself up to rounding, not only an upper bound."""


def convolution_norm_bound(
    kernel: Tensor,
    input_size: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int | tuple[int, int], ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    padding_mode: Literal["zeros", "circular"] = "zeros",
    method: Literal["auto", "dense", "fourier", "gram", "unfoldings"] = "auto",
    effort: Literal["fast", "default", "tight"] = "default",
) -> NormBound:
    r"""Prove an upper bound of $\|x \mapsto w * x\|_2$ on inputs of one spatial size.

    `"dense"` writes the operator out as a matrix. `"fourier"` embeds the input into a torus large
    enough that padding zeros stay zeros: the convolution is then an exact compression (selection
    of rows and columns) of a circular one, which the Fourier transform turns into small blocks

    $$ \tfrac{1}{\sqrt{s}} \, [S(f), S(f + N/s), \dots], \qquad
       S(f) = \sum_t w_t \, e^{2 \pi i f t d / N}, $$

    one for each output frequency f, with stride s, dilation d and circumference N in each dim.
    Groups are independent; the largest norm counts. Every block is enclosed by
    `spectral_norm_bound`, and the rounding of S is added. `method="auto"` uses the first that
    applies:

    1. `"fourier"` for circular padding with exactly size / stride outputs in every dim: tight.
    2. `"dense"` for a matrix of at most 1024 rows or columns and 2^22 entries in all: tight.
    3. the autocorrelation of the kernel, if the torus would be large and the kernel is so close to
       a multiple of an isometry that the bound is within 1e-4 of the norm.
    4. `"fourier"`, typically 0.1 to 5 % above the norm. Where circular padding meets a stride
       that does not divide the size, the operator without that stride is bounded: up to the
       square root of the stride above, and sound.

    Args:
        kernel: The weight of `torch.nn.functional.conv{1,2,3}d`.
        input_size: The spatial sizes of the input.
        stride: As in torch.
        padding: As in torch: numbers, `"same"` or `"valid"`.
        dilation: As in torch.
        groups: As in torch.
        padding_mode: As in torch.
        method: How to bound the norm. `"gram"` is `"fourier"` with the blocks bounded by
            `gram_norm_bound`. `"unfoldings"` takes the kernel alone, reshaped to matrices:
            $\sqrt{k_1 k_2}$ times the least norm of its four unfoldings in two dims, often 1.2 to 2
            times the norm; it does not depend on the input size.
        effort: `"fast"` takes the autocorrelation where its bound is within 1 % of the norm on
            large images, and replaces a torus with many frequencies by a grid of 8 points for each
            degree of the symbol, which is a polynomial of degree k - 1 in the waves: between the
            points its norm is at most 1 / cos(pi (k - 1) / 2N) times larger in each dim, 4 %
            for images; the least of that and of the unfoldings with a side of at most 512 is
            taken. `"tight"` writes out larger matrices and takes the best of three tori.

    Shape:
        kernel: (out_channels, in_channels / groups, *kernel_size), one to three spatial dims

    Guarantee:
        Upper bound in the l2 norm of the given floats, see `spectral_norm_bound`.

    Raises:
        ValueError: The sizes do not fit, or the kernel is not finite.

    Examples:
        >>> bound = convolution_norm_bound(torch.ones(1, 1, 3), (64,), padding=1)
        >>> bound.method, bound.tight, 2.99 < bound.value < 3.0
        ('matrix 64x64', True, True)

    References:
        H. Sedghi, V. Gupta, P. Long, The singular values of convolutional layers, ICLR 2019
        (the circular case with stride 1). H. Ehlich, K. Zeller, Schwankung von Polynomen zwischen
        Gitterpunkten, Math. Z. 86 (1964), for the grid. S. Singla, S. Feizi, Fantastic four,
        ICLR 2021, for the unfoldings.
    """
    _checks.one_of(_OWNER, ("zeros", "circular"), padding_mode=padding_mode)
    _checks.one_of(_OWNER, ("auto", "dense", "fourier", "gram", "unfoldings"), method=method)
    _checks.tensor(_OWNER, kernel=kernel)
    axes = _axes(kernel, input_size, stride, padding, dilation, padding_mode == "circular")
    out_channels, in_channels = kernel.shape[:2]
    _checks.positive_int(_OWNER, groups=groups)
    _checks.require(
        out_channels % groups == 0,
        _OWNER,
        "groups must divide the number of output channels",
        "Check the order (out_channels, in_channels / groups, *kernel_size)",
        groups=groups,
        kernel=kernel,
    )
    kernel = exact_float64(kernel, _OWNER)
    scale = power_of_two_scale(kernel)
    if scale == 0.0:
        return NormBound(0.0, "zero kernel", True)
    weight = (kernel / scale).unflatten(0, (groups, out_channels // groups))
    rows = out_channels // groups * math.prod(axis.outputs for axis in axes)
    columns = in_channels * math.prod(axis.size for axis in axes)
    folds = any(axis.circular and axis.dilation * (axis.kernel - 1) >= axis.size for axis in axes)
    exact = all(axis.circular and axis.outputs * axis.stride == axis.size for axis in axes)
    _checks.one_of(_OWNER, ("fast", "default", "tight"), effort=effort)
    more = 2 if effort == "tight" else 1
    small = min(rows, columns) <= more * _DENSE_SIDE
    small = small and groups * rows * columns <= more**2 * _DENSE_ENTRIES
    coarse = effort == "fast" and any(_coarse(axis) for axis in axes)
    if effort == "fast":
        small = small and min(rows, columns) <= _DENSE_SIDE // 4
    if method == "dense" or (method == "auto" and small and not exact and not folds):
        value, name, tight = _dense(weight, axes), f"matrix {rows}x{columns}", not folds
    elif (
        method == "auto"
        and (near := _near_isometry(weight, axes, effort, exact, coarse)) < math.inf
    ):
        value, name, tight = near, "autocorrelation of the kernel", False
    elif method == "unfoldings":
        value, name, tight = unfolding_bound(weight, axes), "unfoldings of the kernel", False
    else:
        extras = (0, 1, 2) if effort == "tight" and padding_mode == "zeros" else (0,)
        enclose = gram_norm_bound if method == "gram" else spectral_norm_bound
        value = min(_fourier(weight, axes, coarse, extra, enclose) for extra in extras)
        name, tight = "torus embedding", exact and not coarse and method != "gram"
        if coarse:
            name = "coarse grid of frequencies"
        elif exact:
            name = "Fourier blocks"
        elif padding_mode == "circular":
            name = "torus, rows repeated or left out"
        name = f"{name}, Gram iteration" if method == "gram" else name
        cheap = unfolding_bound(weight, axes, _UNFOLDED_SIDE) if coarse else math.inf
        if cheap < value:
            value, name = cheap, "unfoldings of the kernel"
    lost = mul_up(sqrt_up(kernel.numel()), sqrt_up(kernel[0, 0].numel()), UNDERFLOW)
    return NormBound(mul_up(add_up(value, lost), scale), name, tight)


def _axes(kernel, input_size, stride, padding, dilation, circular: bool) -> list[Axis]:
    dims = kernel.ndim - 2
    _checks.require(
        isinstance(input_size, (tuple, list))
        and 1 <= dims <= 3
        and len(input_size) == dims
        and kernel.numel() > 0,
        _OWNER,
        "kernel must be (out, in / groups, *kernel_size) with one spatial dim per input size",
        "Pass the spatial sizes only, without batch and channels",
        kernel=kernel,
        input_size=input_size,
    )

    def each(value):
        values = (value,) * dims if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    axes = []
    for a, (size, taps, step, spread) in enumerate(
        zip(input_size, kernel.shape[2:], each(stride), each(dilation), strict=True)
    ):
        if padding == "same":
            left = spread * (taps - 1) // 2
            right = spread * (taps - 1) - left
        else:
            sides = 0 if padding == "valid" else each(padding)[a]
            left, right = sides if isinstance(sides, tuple) else (sides, sides)
        _checks.positive_int(_OWNER, input_size=size, stride=step, dilation=spread)
        _checks.non_negative_int(_OWNER, padding=left)
        _checks.non_negative_int(_OWNER, padding=right)
        axis = Axis(size, taps, step, spread, left, right, circular)
        _checks.require(
            axis.outputs >= 1,
            _OWNER,
            "the dilated kernel must fit into the padded input",
            "Use a larger input or more padding",
            input_size=tuple(input_size),
            kernel_size=tuple(kernel.shape[2:]),
            padding=padding,
            dilation=dilation,
        )
        axes.append(axis)
    return axes


def _dense(weight: Tensor, axes: list[Axis]) -> float:
    """Weight (groups, out, in, *kernel): the norm of the matrix, each entry of which is one tap.

    Where a circular kernel folds onto itself the entries are sums; their rounding is added.
    """
    matrix = weight
    for axis in axes:  # (..., in, taps of this axis, rest) -> (..., in, rest, outputs, size)
        matrix = torch.tensordot(matrix, axis.taps(), dims=([3], [0]))  # type: ignore[arg-type]
    dims = len(axes)
    order = [0, 1, *(3 + 2 * a for a in range(dims)), 2, *(4 + 2 * a for a in range(dims))]
    matrix = matrix.permute(order).flatten(2 + dims).flatten(1, 1 + dims)
    taps = weight[0, 0, 0].numel()
    rounding = 0.0
    if any(axis.circular and axis.dilation * (axis.kernel - 1) >= axis.size for axis in axes):
        rounding = mul_up(2 * gamma(taps), sqrt_up(taps), sqrt_up(squared_norm_up(weight, 1)))
        rounding = mul_up(rounding, sqrt_up(math.prod(axis.outputs for axis in axes)))
    return add_up(spectral_norm_bound(matrix), rounding)


def _near_isometry(
    weight: Tensor, axes: list[Axis], effort: str, exact: bool, coarse: bool
) -> float:
    """The bound by the autocorrelation where it saves much, infinity elsewhere."""
    if effort == "tight" or (exact and effort != "fast"):
        return math.inf
    groups, out_channels, in_channels = weight.shape[:3]
    block = sorted((out_channels, in_channels * math.prod(axis.stride for axis in axes)))
    frequencies = math.prod(axis.torus()[0] / axis.torus()[1] for axis in axes) / 2
    work = 16.0 * groups * frequencies * block[0] ** 2 * block[1]
    if work < _TORUS_WORK and not coarse:
        return math.inf
    return autocorrelation_bound(weight, axes, _EXCESS[effort])


def _coarse(axis: Axis) -> int:
    """The points of a coarse grid along an axis; 0 if that is not smaller than its circle.

    With a dilation the waves only turn faster, unless it has a divisor in common with the stride.
    """
    if math.gcd(axis.dilation, axis.stride) > 1:
        return 0
    points = _COARSE * (axis.kernel - 1)
    points = axis.stride * math.ceil(max(points, 1) / axis.stride)
    circle, stride, _ = axis.torus()
    return points if stride == axis.stride and 2 * points <= circle else 0


def _fourier(
    weight: Tensor,
    axes: list[Axis],
    coarse: bool,
    extra: int,
    enclose: Callable[[Tensor], float],
) -> float:
    """Weight (groups, out, in, *kernel): the largest block of the torus that holds the input."""
    groups, out_channels, in_channels = weight.shape[:3]
    circles, strides, repeats = map(list, zip(*(axis.torus(extra) for axis in axes), strict=True))
    between = 1.0
    for a, axis in enumerate(axes):
        points = _coarse(axis) if coarse else 0
        if points:  # the supremum over all frequencies, which does not depend on the dilation
            circles[a], axes = points, [*axes[:a], axis._replace(dilation=1), *axes[a + 1 :]]
            angle = up(math.pi * (axis.kernel - 1) / (2 * points)) * (1 + 2.0**-50)
            between = mul_up(between, div_up(1.0, math.cos(angle) * (1 - 2.0**-50)))
    waves = torch.ones(1, 1, dtype=torch.complex128)  # (frequencies, taps)
    for axis, circle in zip(axes, circles, strict=True):
        turns = torch.arange(circle)[:, None] * (torch.arange(axis.kernel) * axis.dilation)
        angles = (turns % circle).to(torch.float64) * (2 * math.pi / circle)
        wave = torch.complex(angles.cos(), angles.sin())
        waves = torch.einsum("ft,gs->fgts", waves, wave).flatten(2).flatten(0, 1)
    taps = waves.shape[1]
    matrix = weight.flatten(3).flatten(0, 2).T.contiguous()
    symbol = torch.complex(waves.real @ matrix, waves.imag @ matrix)

    # The aliases of each output frequency side by side; a real kernel needs half the frequencies.
    shape = [size for n, s in zip(circles, strides, strict=True) for size in (s, n // s)]
    dims = len(axes)
    symbol = symbol.reshape(*shape, groups, out_channels, in_channels)
    order = [*range(1, 2 * dims, 2), 2 * dims, 2 * dims + 1, *range(0, 2 * dims, 2), 2 * dims + 2]
    symbol = symbol.permute(order)
    half = symbol.shape[dims - 1] // 2 + 1
    blocks = symbol.narrow(dims - 1, 0, half).flatten(dims + 2).flatten(0, dims)

    # Entrywise |fl(S) - S| <= (twiddles + products) * sum_t |w_t|, hence the Frobenius norm.
    relative = mul_up(2.0, add_up(2 * dims * _TWIDDLE_ERROR, gamma(2 * taps + 8)))
    aliases = math.prod(strides)
    error = mul_up(relative, sqrt_up(taps), sqrt_up(squared_norm_up(weight, 1)), sqrt_up(aliases))
    bound = add_up(enclose(blocks), error)
    # 1 / sqrt(s) of the aliases, and sqrt(multiplicity) of rows that are read repeatedly
    norm = sqrt_up(mul_up(bound, bound, math.prod(repeats)) / aliases * (1 + 2.0**-50))
    return mul_up(norm, between)
