r"""Spectral norm from below (power iteration) and from above (Gram iteration).

Both are fast and differentiable. Neither accounts for rounding: a certificate takes its norms from
the enclosures of `orthonet.linalg.enclosure`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from orthonet import _checks
from orthonet.linalg._matrix import rms_scale

__all__ = ["gram_iteration", "power_iteration"]


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
    """
    _checks.positive_int("power_iteration", niters=niters)
    with torch.no_grad():
        start, matrix = u, w.detach() / rms_scale(w.detach())
        v = u.new_zeros(*w.shape[:-2], w.shape[-1])
        for _ in range(niters):
            v = F.normalize((matrix.mT @ u.unsqueeze(-1)).squeeze(-1), dim=-1)
            u = F.normalize((matrix @ v.unsqueeze(-1)).squeeze(-1), dim=-1)
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        u = torch.where((norm > 0.5) & (norm < 2.0), u, start)  # comparisons with NaN are false
    sigma = (u.unsqueeze(-2) @ w @ v.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    return sigma, u, v


def gram_iteration(w: Tensor, *, niters: int = 6) -> Tensor:
    r"""Bound the spectral norm from above by Gram iteration.

    \(G_0 = W,\ G_{k+1} = G_k^\top G_k\), and \(\|W\|_2 \le \|G_K\|_F^{2^{-K}}\), rescaled against
    overflow. Converges to \(\|W\|_2\) faster than linearly.

    Args:
        w: Matrices.
        niters: Number K of Gram products; 0 gives the Frobenius norm.

    Shape:
        `w`: `(*batch, m, n)`. Output: `(*batch,)`.

    Guarantee:
        Upper bound in exact arithmetic, at most \(r^{2^{-K-1}}\) times the norm for rank r; in
        floating point up to relative rounding of a few eps. Differentiable.

    References:
        Delattre, Barthélemy, Araujo & Allauzen, *Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration*, ICML 2023.
    """
    _checks.floating("gram_iteration", w=w)
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
