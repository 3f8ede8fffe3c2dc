r"""Spectral norm from below (power iteration) and from above (Gram iteration).

Both are fast and differentiable. Neither accounts for rounding: a certificate takes its norms from
the enclosures of `orthonet.linalg.bounds.enclosure`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import is_traced
from orthonet.linalg.matrix import rms_scale

__all__ = ["gram_iteration", "power_iteration", "rounds"]


def power_iteration(w: Tensor, u: Tensor, *, niters: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    r"""Estimate the spectral norm from below, \(\sigma = u^\top W v \le \|W\|_2\).

    `niters` rounds of \(v \leftarrow W^\top u / \|W^\top u\|\), \(u \leftarrow W v / \|W v\|\)
    without gradient; then \(\sigma\) is differentiable in `w`, with gradient \(u v^\top\).

    Args:
        w: Matrices.
        u: Starting vectors of unit norm; kept where the iteration meets a zero or non-finite
            vector.
        niters: Number of rounds, at least 1.

    Shape:
        `w`: `(*batch, m, n)`, `u`: `(*batch, m)`. Output: sigma `(*batch,)`, u `(*batch, m)`,
        v `(*batch, n)`.

    Guarantee:
        An estimate: at most \(\|W\|_2\) up to rounding, by an unknown amount.

    Examples:
        >>> w = torch.diag(torch.tensor([2.0, 1.0]))
        >>> sigma, _, _ = power_iteration(w, torch.ones(2), niters=9)
        >>> round(sigma.item(), 3)
        2.0
    """
    _checks.floating("power_iteration", w=w, u=u)
    _checks.matrices("power_iteration", filled=True, w=w)
    _checks.require(
        u.ndim >= 1 and u.shape[-1] == w.shape[-2],
        "power_iteration",
        "u must have an entry for each row of w, (*batch, m)",
        "Pass e.g. torch.ones(w.shape[:-1])",
        u=u,
        w=w,
    )
    _checks.positive_int("power_iteration", niters=niters)
    u, v = leading_vectors(w, u, niters)
    sigma = (u.unsqueeze(-2) @ w @ v.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    return sigma, u, v


@torch.no_grad()
def leading_vectors(w: Tensor, u: Tensor, niters: int) -> tuple[Tensor, Tensor]:
    """The vectors u (*batch, m) and v (*batch, n) of `power_iteration`."""
    start, x = u.unsqueeze(-1), w.detach()
    if not _squares_are_in_range(x):
        x = x / rms_scale(x)
    column, row = rounds(x, start, niters)
    length = _length(column)
    column = torch.where((length > 0.5) & (length < 2.0), column, start)  # false for NaN
    return column.squeeze(-1), row.squeeze(-1)


def rounds(x: Tensor, column: Tensor, niters: int) -> tuple[Tensor, Tensor]:
    """The columns u (*batch, m, 1) and v (*batch, n, 1) after rounds that begin at `column`.

    Differentiable. The squares of `x` must be in range; a zero matrix gives zeros.
    """
    row = x.new_zeros(*x.shape[:-2], x.shape[-1], 1)
    for _ in range(niters):
        row = x.mT @ column
        column = x @ row
        column = column / _length(column).clamp_min(1e-30)
    return column, row / _length(row).clamp_min(1e-30)


def _length(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=-2, keepdim=True)


def _squares_are_in_range(x: Tensor) -> bool:
    """Whether W^T W v and its norm neither overflow nor underflow; not asked for if it is slow."""
    if not x.is_cpu or is_traced(x) or not x.numel():
        return False
    low, high = torch.aminmax(torch.linalg.vector_norm(x, dim=(-2, -1)))
    return float(low) > 1e-6 and float(high) < 1e6


def gram_iteration(w: Tensor, *, niters: int = 6) -> Tensor:
    r"""Bound the spectral norm from above by Gram iteration.

    \(G_0 = W,\ G_{k+1} = G_k^\top G_k\), and \(\|W\|_2 \le \|G_K\|_F^{2^{-K}}\), rescaled against
    overflow. The bound converges to \(\|W\|_2\) faster than linearly.

    Args:
        w: Matrices.
        niters: Number K of Gram products; 0 gives the Frobenius norm.

    Shape:
        `w`: `(*batch, m, n)`. Output: `(*batch,)`.

    Guarantee:
        Upper bound in exact arithmetic, at most \(r^{2^{-K-1}}\) times the norm for rank r; in
        floating point up to relative rounding of a few eps. Differentiable.

    Examples:
        >>> gram_iteration(torch.diag(torch.tensor([2.0, 1.0])), niters=6).round(decimals=4)
        tensor(2.)

    References:
        Delattre, Barthélemy, Araujo & Allauzen, *Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration*, ICML 2023.
    """
    _checks.floating("gram_iteration", w=w)
    _checks.matrices("gram_iteration", filled=True, w=w)
    _checks.non_negative_int("gram_iteration", niters=niters)
    gram = w if w.shape[-2] >= w.shape[-1] else w.mT
    log_bound = gram.new_zeros(gram.shape[:-2])
    weight = 1.0
    for _ in range(niters):
        scale = rms_scale(gram)
        log_bound = log_bound + weight * scale.log().squeeze(-1).squeeze(-1)
        gram = gram / scale
        gram = gram.mT @ gram
        weight /= 2
    norm = torch.linalg.matrix_norm(gram)
    safe = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(norm > 0, safe**weight * log_bound.exp(), torch.zeros_like(norm))
