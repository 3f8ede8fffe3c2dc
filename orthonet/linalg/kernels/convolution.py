r"""Algebra of convolution kernels: their product.

A kernel of shape (*batch, c_out, c_in, *taps) stands for the matrix polynomial
\(K(z) = \sum_t K_t z^t\); composing two convolutions multiplies the polynomials.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks

__all__ = ["block_convolution"]


def block_convolution(outer: Tensor, inner: Tensor, *, spatial_dims: int) -> Tensor:
    r"""Return the kernel of the composition `outer` after `inner`, both with stride 1.

    \((K L)_t = \sum_{r + s = t} K_r L_s\), matrix products over the channels.

    Args:
        outer: Kernel that acts last.
        inner: Kernel that acts first.
        spatial_dims: Number of trailing tap dimensions.

    Shape:
        `outer`: `(*batch, a, b, *k)`, `inner`: `(*batch, b, c, *l)`. Output:
        `(*batch, a, c, *(k + l - 1))`.

    Examples:
        >>> one, two = torch.ones(1, 1, 2), torch.tensor([[[1.0, 3.0]]])
        >>> block_convolution(one, two, spatial_dims=1)
        tensor([[[1., 4., 3.]]])

    References:
        Li, Haque, Anil, Lucas, Grosse & Jacobsen, *Preventing gradient attenuation in Lipschitz
        constrained convolutional networks*, NeurIPS 2019, definition of the block convolution.
    """
    first = outer.ndim - spatial_dims
    _checks.require(
        outer.ndim == inner.ndim and outer.shape[first - 1] == inner.shape[first - 2],
        "block_convolution",
        "the inner channels of both kernels must agree",
        "Pass (*batch, a, b, *k) and (*batch, b, c, *l)",
        outer=outer,
        inner=inner,
    )
    taps = [range(size) for size in outer.shape[first:]]
    sizes = [k + m - 1 for k, m in zip(outer.shape[first:], inner.shape[first:], strict=True)]
    batch = torch.broadcast_shapes(outer.shape[: first - 2], inner.shape[: first - 2])
    out = outer.new_zeros(*batch, outer.shape[first - 2], inner.shape[first - 1], *sizes)
    flat_inner = inner.flatten(first - 1)
    for tap in product(*taps):
        block = outer[(..., *tap)] @ flat_inner
        block = block.unflatten(-1, inner.shape[first - 1 :])
        pad = [
            amount
            for t, m, size in reversed(list(zip(tap, inner.shape[first:], sizes, strict=True)))
            for amount in (t, size - m - t)
        ]
        out = out + F.pad(block, pad)
    return out
