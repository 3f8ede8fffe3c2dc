"""Normalizations in place."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet.compat.torchlip.normalizers import bjorck_normalization, spectral_normalization

__all__ = [
    "bjorck_",
    "spectral_",
]


@torch.no_grad()
def spectral_(tensor: Tensor, eps_spectral: float = 1e-3, maxiter_spectral: int = 10) -> None:
    """Divide `tensor` by its spectral norm, in place."""
    tensor.copy_(spectral_normalization(tensor, None, eps_spectral, maxiter_spectral)[0])


@torch.no_grad()
def bjorck_(
    tensor: Tensor,
    eps_spectral: float = 1e-3,
    maxiter_spectral: int = 10,
    eps_bjorck: float = 1e-3,
    maxiter_bjorck: int = 15,
    beta: float = 0.5,
) -> None:
    """Replace `tensor` by its polar factor, in place."""
    spectral_(tensor, eps_spectral, maxiter_spectral)
    tensor.copy_(bjorck_normalization(tensor, eps_bjorck, beta, maxiter_bjorck))
