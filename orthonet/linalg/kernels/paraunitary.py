r"""Products of paraunitary factors \(V V^\top + (I - V V^\top) z\), with their own backward.

The kernel of an orthogonal convolution is made of such factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from orthonet import _checks
from orthonet.linalg.kernels.projector_product import multiply_projectors

__all__ = ["apply_projectors"]


def apply_projectors(
    kernel: Tensor,
    bases: Tensor,
    *,
    taps: int,
    dim: int | Sequence[int],
    weights: Tensor | None = None,
) -> Tensor:
    r"""Multiply a kernel on the left by the paraunitary factors \(P + (I - P) z_d\).

    \(P = V V^\top\), or \(P = V \mathrm{diag}(w) V^\top\) with `weights` w of zeros and ones. Each
    matrix of `bases` gives one factor, the first one applied first. A factor lengthens the tap
    dimension `dim` by one. For orthonormal columns V each factor is orthogonal on every torus,
    whatever the rank of P, so the product of `kernel` with all of them has the singular values of
    `kernel`.

    Args:
        kernel: Matrix polynomial with the channels first and any columns last.
        bases: Orthonormal columns, one matrix per factor.
        taps: Number of tap dimensions, between channels and columns.
        dim: The tap dimension that grows, counted from 0; one for all factors, or one for each.
        weights: The columns of a basis that belong to the projector; by default all of them.

    Shape:
        `kernel`: `(*batch, c, *k, n)`, `bases`: `(*batch, f, c, r)`, `weights`: `(*batch, f, r)`.
        Output: `kernel` with each `k[d]` larger by the number of factors along d.

    References:
        Li, Haque, Anil, Lucas, Grosse & Jacobsen, *Preventing gradient attenuation in Lipschitz
        constrained convolutional networks*, NeurIPS 2019 (BCOP); the factors go back to Xiao,
        Bahri, Sohl-Dickstein, Schoenholz & Pennington, ICML 2018 (delta-orthogonal) and to
        paraunitary filter banks (Vaidyanathan, *Multirate Systems and Filter Banks*, 1993,
        chapter 14).
    """
    channel = kernel.ndim - taps - 2
    count = bases.shape[-3]
    dims = (dim,) * count if isinstance(dim, int) else tuple(dim)
    _checks.require(
        len(dims) == count and all(0 <= d < taps for d in dims),
        "apply_projectors",
        "dim must name one of the tap dimensions for every factor",
        "Pass an integer, or one integer per factor",
        dim=dim,
        taps=taps,
        bases=bases,
    )
    batch = kernel.shape[:channel]
    count = math.prod(batch)
    flat = kernel.movedim(-1, channel + 1)
    left = bases if weights is None else bases * weights.unsqueeze(-2)
    left = left.reshape(count, *bases.shape[-3:])
    right = None if weights is None else bases.reshape(left.shape)
    product = multiply_projectors(
        flat.reshape(count, *flat.shape[channel:]), left, right, dims, channels_first=True
    )
    return product.view(*batch, *product.shape[1:]).movedim(channel + 1, -1)
