r"""`geotorch.so`: the initializations of orthogonal matrices, which fill a tensor in place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from orthonet import _checks, linalg
from orthonet.manifolds import SO as _SO
from orthonet.manifolds import Stiefel

__all__ = ["cayley_map", "torus_init_", "uniform_init_"]


def cayley_map(X: Tensor) -> Tensor:
    r"""Return \((I + X/2)(I - X/2)^{-1}\)."""
    return linalg.cayley(0.5 * X)


def _target(tensor: Tensor) -> Tensor:
    """Return the tensor, or for a computed one (a constrained weight) a new one like it."""
    return tensor if tensor.grad_fn is None else torch.empty_like(tensor.detach())


def uniform_init_(tensor: Tensor) -> Tensor:
    """Fill a tensor with uniform orthogonal matrices, of determinant 1 where they are square.

    Args:
        tensor: Filled in place and returned; a constrained weight is left alone, and the value to
            assign is returned.

    Shape:
        `tensor`: (*batch, n, k).
    """
    shape = tuple(tensor.shape)
    space = _SO() if len(shape) > 1 and shape[-1] == shape[-2] else Stiefel()
    with torch.no_grad():
        value = space.sample(shape, dtype=tensor.dtype, device=tensor.device)
        return _target(tensor).copy_(value)


def torus_init_(
    tensor: Tensor,
    init_: Callable[[Tensor], object] | None = None,
    triv: Callable[[Tensor], Tensor] = torch.linalg.matrix_exp,
) -> Tensor:
    r"""Fill a tensor with `triv` of skew-symmetric matrices of 2 x 2 blocks.

    The blocks are \(\begin{pmatrix} 0 & -b \\ b & 0\end{pmatrix}\).

    Args:
        tensor: See `uniform_init_`.
        init_: Fills the tensor of the b in place. None: uniform in \((-\pi, \pi)\).
        triv: A map from skew-symmetric to orthogonal matrices.

    Shape:
        `tensor`: (*batch, n, n).

    Raises:
        ValueError: The matrices are not square.
    """
    shape = tuple(tensor.shape)
    _checks.require(
        len(shape) > 1 and shape[-1] == shape[-2],
        "torus_init_",
        "the tensor must hold square matrices (*batch, n, n)",
        "Use uniform_init_ for rectangular ones",
        shape=shape,
    )
    n = tensor.shape[-1]
    with torch.no_grad():
        angles = tensor.new_empty(*shape[:-2], n // 2)
        if init_ is None:
            angles.uniform_(-math.pi, math.pi)
        else:
            init_(angles)
        below = tensor.new_zeros(*shape[:-2], max(n - 1, 0))
        below[..., ::2] = angles
        x = torch.diag_embed(below, -1) if n > 1 else tensor.new_zeros(shape)
        return _target(tensor).copy_(triv(x - x.mT))
