r"""Principal logarithm of rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.matrix import compute_dtype, require_finite

__all__ = ["rotation_logarithm"]

_ROOTS = 3
_TERMS = 13  # tan(pi / 32)^27 / 27 < 1e-28 after three roots


def rotation_logarithm(q: Tensor) -> Tensor:
    r"""Return the shortest skew-symmetric A with \(e^A = Q\), for orthogonal Q of determinant 1.

    The eigenvectors of \(Q + Q^\top\) split off the planes that Q turns by more than a right angle.
    There, \(-Q\) is used, so rotations by \(\pi\) are no exception (their logarithm is one of
    several of the same length). Three square roots and a series give the logarithm of the rest:
    \(\log Q = 2 \sum_j Y^{2j+1} / (2j+1)\) with \(Y = (Q - I)(Q + I)^{-1}\). The computation is in
    float64. Autograd gives the derivative with respect to Q away from rotations by \(\pi\).

    Shape:
        `q`: (*batch, n, n). Output: the same.

    Raises:
        ValueError: Q is not square, not finite, or has determinant -1.

    References:
        Higham, *Functions of Matrices*, 2008, section 11.5.
    """
    _checks.floating("rotation_logarithm", q=q)
    _checks.require(
        q.ndim >= 2 and q.shape[-1] == q.shape[-2],
        "rotation_logarithm",
        "the matrix must be square",
        "Pass (*batch, n, n)",
        shape=tuple(q.shape),
    )
    if 0 in q.shape or q.shape[-1] == 1:
        return torch.zeros_like(q)
    require_finite("rotation_logarithm", q)
    x = q.to(torch.promote_types(compute_dtype(q.dtype), torch.float64))
    _checks.require(
        bool((torch.linalg.det(x.detach()) > 0).all()),
        "rotation_logarithm",
        "the matrix must have determinant 1",
        "Only rotations have a skew-symmetric logarithm; flip the sign of one column",
        shape=tuple(q.shape),
    )
    if x.ndim == 2:
        return _logarithm(x).to(q.dtype)
    flat = [_logarithm(single) for single in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(flat).reshape(x.shape).to(q.dtype)


def _logarithm(q: Tensor) -> Tensor:
    cosine, v = torch.linalg.eigh((q.detach() + q.detach().mT) / 2)
    # Split in a gap of the spectrum, so that no plane is torn: pairs of equal cosines are adjacent.
    turned = int((cosine < 0).sum())
    turned -= turned % 2
    if turned == 0:
        return _small(q)
    p, r = v[:, :turned], v[:, turned:]
    minus = -(p.mT @ q @ p)
    rest = _small(minus)
    return p @ (rest + torch.pi * _complex_structure(-rest.detach())) @ p.mT + (
        r @ _small(r.mT @ q @ r) @ r.mT
    )


def _small(q: Tensor) -> Tensor:
    """Logarithm of a rotation by angles up to a little over a right one."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for _ in range(_ROOTS):  # the square root of Q is the polar factor of I + Q
        x = q + identity
        for _ in range(6):
            x = 0.5 * (x + torch.linalg.inv(x).mT)
        q = x
    y = torch.linalg.solve(q + identity, q - identity)
    y = 0.5 * (y - y.mT)
    square, total = y @ y, torch.zeros_like(y)
    for j in reversed(range(_TERMS)):
        total = square @ total + identity / (2 * j + 1)
    result = y @ total
    return 2.0**_ROOTS * (result - result.mT)


def _complex_structure(s: Tensor) -> Tensor:
    """J skew with J^2 = -I that commutes with the skew s, and s J^T >= 0: its polar factor.

    The kernel of s, of even dimension, is turned by an arbitrary quarter.
    """
    values, v = torch.linalg.eigh(-(s @ s))
    scale = values.clamp_min(0.0).sqrt()
    kernel = int((scale <= 1e-9).sum())
    kernel -= kernel % 2
    inverse = torch.where(torch.arange(len(scale), device=s.device) < kernel, 0.0, 1.0 / scale)
    j = s @ ((v * inverse) @ v.mT)
    quarter = torch.zeros_like(s)
    for i in range(0, kernel, 2):
        a, b = v[:, i], v[:, i + 1]
        quarter = quarter + torch.outer(b, a) - torch.outer(a, b)
    return 0.5 * (j - j.mT) + quarter
