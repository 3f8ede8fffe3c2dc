"""Small tools shared by the matrix functions: which side is small, safe scales, dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from orthonet import _checks

__all__ = [
    "add_identity",
    "compute_dtype",
    "gram_defect",
    "in_transform",
    "on_tall",
    "require_finite",
    "rms_scale",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix function of `dtype` input works: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def in_transform() -> bool:
    """Whether a `torch.func` transform (vmap, grad, ...) is running, which forbids side effects.

    Never under `torch.compile`, which traces transforms itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def on_tall(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function of tall matrices (m >= n) serve wide ones, by transposition.

    It also checks the input once and lifts half-precision input to float32 for the computation.
    """

    @functools.wraps(function)
    def wrapper(w: Tensor, *args: object, **kwargs: object) -> Tensor:
        name = function.__name__
        _checks.floating(name, w=w)
        _checks.require(
            w.ndim >= 2,
            name,
            "w must be a matrix or a batch of matrices (*batch, m, n)",
            "Reshape it, e.g. kernel.flatten(1)",
            shape=tuple(w.shape),
        )
        x = w.to(compute_dtype(w.dtype))
        if w.shape[-2] >= w.shape[-1]:
            return function(x, *args, **kwargs).to(w.dtype)
        return function(x.mT, *args, **kwargs).mT.to(w.dtype)

    return wrapper


def add_identity(a: Tensor, scale: float = 1.0) -> Tensor:
    """Add `scale` times the identity to `a` in place and return it."""
    a.diagonal(dim1=-2, dim2=-1).add_(scale)
    return a


def require_finite(owner: str, w: Tensor) -> None:
    """Raise unless every entry is finite; the error names `owner`."""
    _checks.require(
        bool(torch.isfinite(w).all()),
        owner,
        "w must be finite",
        "Lower the learning rate or clip gradients; the weight holds NaN or Inf",
        shape=tuple(w.shape),
    )


def rms_scale(x: Tensor) -> Tensor:
    """Root mean square singular value of each matrix, (*batch, 1, 1); 1 where the matrix is 0.

    The largest entry is divided out first, so that neither huge nor tiny matrices overflow.
    """
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.matrix_norm(x / largest, keepdim=True)
    scale = largest * norm * min(x.shape[-2:]) ** -0.5
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def gram_defect(gram: Tensor) -> Tensor:
    """Frobenius norm of gram - I for each matrix of the batch."""
    return torch.linalg.matrix_norm(add_identity(gram.clone(), -1.0))
