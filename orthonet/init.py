"""Orthogonal initializations of plain tensors, in place: those of `torch.nn.init`, and kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg import apply_projectors, block_convolution, haar
from orthonet.linalg.matrix import compute_dtype

__all__ = ["conv_orthogonal_", "orthogonal_"]


@torch.no_grad()
def orthogonal_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Fill a weight with a matrix from the Haar distribution, times `gain`.

    As `torch.nn.init.orthogonal_`, also for half-precision tensors (drawn in float32 and rounded).
    For a convolution kernel this makes the flattened matrix orthogonal, not the convolution: see
    [`conv_orthogonal_`][orthonet.init.conv_orthogonal_].

    Args:
        tensor: Weight of at least two dimensions; all but the first are flattened.
        gain: Factor.
        generator: Source of randomness.

    Returns:
        `tensor`.

    Guarantee:
        All singular values of `tensor.flatten(1)` are `gain`, to \(2\cdot 10^{-6}\) relative in
        float32 and \(10^{-12}\) in float64.

    Raises:
        ValueError: fewer than two dimensions.

    Examples:
        >>> w = orthogonal_(torch.empty(2, 3))
        >>> bool(torch.allclose(w @ w.T, torch.eye(2), atol=1e-6))
        True
    """
    _checks.floating("orthogonal_", tensor=tensor)
    _check_gain("orthogonal_", gain)
    _checks.require(
        tensor.ndim >= 2,
        "orthogonal_",
        "tensor must have at least two dimensions",
        "Initialize vectors otherwise",
        tensor=tensor,
    )
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    shape = (tensor.shape[0], tensor[0].numel())
    drawn = _draw(shape, tensor, generator)
    return tensor.copy_(gain * drawn.view(tensor.shape))


@torch.no_grad()
def conv_orthogonal_(
    tensor: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    method: str = "delta",
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill the kernel of a plain convolution so that the convolution is orthogonal, times `gain`.

    Args:
        tensor: Kernel (c_out, c_in / groups, *k) of `nn.Conv1d/2d/3d`, or (c_in, c_out / groups,
            *k) of `nn.ConvTranspose1d/2d/3d`, whose operator is the transpose.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        groups: Groups of the convolution.
        method: "delta": a random orthogonal matrix in the central taps (with stride s: a reshaped
            one in the s central taps of each dimension), zeros elsewhere. "aoc": that, multiplied
            by random paraunitary factors, so that all taps are filled.
        gain: Factor, such as `torch.nn.init.calculate_gain` gives.
        generator: Source of randomness.

    Returns:
        `tensor`.

    Guarantee:
        On every torus whose sizes the stride divides all singular values are `gain`, to
        \(10^{-5}\) relative in float32 and \(10^{-12}\) in float64; with zero padding at most that.

    Raises:
        ValueError: no kernel of this shape is orthogonal: `kernel_size < stride`, or a common
            divisor of stride and dilation, with more than c_in times the taps read channels out.

    Examples:
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> conv_orthogonal_(conv.weight).square().sum().round()
        tensor(8., grad_fn=<RoundBackward0>)

    References:
        Xiao, Bahri, Sohl-Dickstein, Schoenholz & Pennington, *Dynamical isometry and a mean field
        theory of CNNs*, ICML 2018 (delta-orthogonal, algorithm 2); Li et al., NeurIPS 2019.
    """
    owner = "conv_orthogonal_"
    _checks.floating(owner, tensor=tensor)
    taps = tensor.ndim - 2
    _checks.require(
        1 <= taps <= 3,
        owner,
        "tensor must be a kernel (c_out, c_in / groups, *k)",
        "Use orthogonal_ for a matrix",
        tensor=tensor,
    )
    _checks.one_of(owner, ("delta", "aoc"), method=method)
    _checks.positive_int(owner, groups=groups)
    _check_gain(owner, gain)
    _checks.require(
        tensor.shape[0] % groups == 0,
        owner,
        "groups must divide the channels",
        "Pass the groups of the layer",
        groups=groups,
        tensor=tensor,
    )
    strides = (stride,) * taps if isinstance(stride, int) else tuple(stride)
    dilations = (dilation,) * taps if isinstance(dilation, int) else tuple(dilation)
    _checks.require(
        len(strides) == len(dilations) == taps,
        owner,
        "stride and dilation must be integers or have one entry for each dim",
        "Shorten them",
        stride=stride,
        dilation=dilation,
    )
    sizes = tensor.shape[2:]
    for s, d in zip(strides, dilations, strict=True):
        _checks.positive_int(owner, stride=s, dilation=d)
    steps = [s // math.gcd(s, d) for s, d in zip(strides, dilations, strict=True)]
    block = [min(k, s) for k, s in zip(sizes, steps, strict=True)]
    out, inner, area = tensor.shape[0] // groups, tensor.shape[1], math.prod(block)
    contracting = out <= inner * area
    _checks.require(
        contracting or list(block) == list(strides),
        owner,
        "kernel_size must be >= stride, without common divisor of stride and dilation, otherwise "
        "some inputs are never read and no kernel with so many channels out is orthogonal",
        "Use a larger kernel or fewer channels out",
        kernel_size=tuple(sizes),
        stride=strides,
        dilation=dilations,
    )
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    channels = inner if contracting else out // area
    delays = [k - b for k, b in zip(sizes, block, strict=True)]
    outer = _draw((groups, out, channels * area), tensor, generator)
    outer = outer.unflatten(-1, (channels, *block))  # (g, out, channels, *block)
    if contracting:
        start = outer.movedim(1, -1)  # the factors act from the left on the transpose
    else:
        start = _draw((groups, channels, inner), tensor, generator)
        start = start.unflatten(-1, (*(1,) * taps, inner))
    if method == "aoc" and channels > 1:
        dims = [d for d, count in enumerate(delays) for _ in range(count)]
        bases = _draw((groups, len(dims), channels, channels // 2), tensor, generator)
        start = apply_projectors(start, bases, taps=taps, dim=dims)
    else:
        pad = [n for d in reversed(delays) for n in (d // 2, d - d // 2)]
        start = torch.nn.functional.pad(start, [0, 0, *pad])
    kernel = start.movedim(-1, 1 if contracting else 2)
    if not contracting:
        kernel = block_convolution(outer, kernel, spatial_dims=taps)
    return tensor.copy_(gain * kernel.reshape(tensor.shape))


def _check_gain(owner: str, gain: float) -> None:
    _checks.require(
        isinstance(gain, (int, float)) and math.isfinite(gain),
        owner,
        "gain must be a finite number",
        "Pass what torch.nn.init.calculate_gain returns",
        gain=gain,
    )


def _draw(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype = compute_dtype(like.dtype)
    return haar(shape, dtype=dtype, device=like.device, generator=generator)
