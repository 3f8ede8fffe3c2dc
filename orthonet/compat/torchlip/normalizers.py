"""Normalizations of a kernel, to full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet import _checks, linalg

__all__ = [
    "bjorck_normalization",
    "spectral_normalization",
]


def bjorck_normalization(
    w: Tensor, eps: float = 1e-3, beta: float = 0.5, maxiter: int = 15
) -> Tensor:
    """Return the polar factor of the flattened kernel, to full precision.

    `eps`, `beta` and `maxiter` are checked and not needed: the iteration always converges.
    """
    _checks.in_range("bjorck_normalization", 0.0, 1.0, eps=eps, beta=beta)
    _checks.positive_int("bjorck_normalization", maxiter=maxiter)
    return linalg.polar(w.flatten(1)).view_as(w)


def spectral_normalization(
    kernel: Tensor, u: Tensor | None = None, eps: float = 1e-3, maxiter: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel over its spectral norm, the first right singular vector, and the norm.

    The decomposition is exact; `u`, `eps` and `maxiter` are not needed.
    """
    _checks.in_range("spectral_normalization", 0.0, 1.0, eps=eps)
    _checks.positive_int("spectral_normalization", maxiter=maxiter)
    flat = kernel.flatten(1)
    _checks.require(
        u is None or u.shape[-1] == flat.shape[1],
        "spectral_normalization",
        "u must be a vector as long as a row of the flattened kernel",
        "Leave it out",
        u=None if u is None else tuple(u.shape),
    )
    sigma = torch.linalg.matrix_norm(flat, 2)
    right = torch.linalg.svd(flat.detach(), full_matrices=False)[2][:1]
    return kernel / torch.where(sigma > 0, sigma, torch.ones_like(sigma)), right, sigma
