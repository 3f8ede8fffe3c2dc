r"""Orthogonal factors of the QR decomposition: sign-safe Householder and Cholesky-QR.

For a tall matrix \(W = Q R\) with \(R\) upper triangular and a non-negative diagonal; a wide matrix
is factorized through its transpose, \(W = L Q\). For full rank \(Q\) is unique, so all methods here
compute the same function; they differ in cost and in the conditioning that they bear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet.linalg._matrix import gram_defect, on_tall, require_finite, rms_scale

__all__ = ["cholesky_qr", "qr"]

_HOUSEHOLDER, _CHOLESKY, _SHIFTED = range(3)


@on_tall
def qr(w: Tensor) -> Tensor:
    r"""Orthogonal factor by Householder reflections, with the diagonal of \(R\) made non-negative.

    A zero on that diagonal keeps its direction (its sign is taken as +1), so rank is never dropped.

    Shape:
        `w`: (*batch, m, n). Output: the same.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, rank-deficient and zero included. Gradients are finite: diagonal entries of \(R\)
        below \(8\,\mathrm{eps}\) of the largest are taken as that in backward. Differentiable
        again.

    Raises:
        ValueError: `w` has a NaN or infinite entry.

    References:
        Walter & Lehmann, *Algorithmic differentiation of linear algebra functions*, 2010, for the
        gradient.
    """
    return _OrthogonalFactor.apply(w, _HOUSEHOLDER)[0]  # type: ignore[index]


@on_tall
def cholesky_qr(w: Tensor, *, shifted: bool = False) -> Tensor:
    r"""Orthogonal factor by Cholesky-QR2.

    Two rounds of \(L L^\top = W^\top W,\ W \leftarrow W L^{-\top}\), of which the second removes
    what the squared condition number leaves of the first. Matrices for
    which the Gram matrix is not positive definite enough, which is measured, go through a round
    with a relative diagonal shift first (Cholesky-QR3), and those still failing through
    Householder reflections: the result is the function of [`qr`][orthonet.linalg.qr] always.

    Args:
        w: Matrices of any scale and rank.
        shifted: Begin with the shifted round in any case, which spares ill-conditioned matrices
            (condition above about 1e3 in float32) the failed attempt.

    Shape:
        `w`: (*batch, m, n). Output: the same. All factorizations are of size min(m, n).

    Guarantee:
        As for `qr`.

    Raises:
        ValueError: `w` has a NaN or infinite entry.

    References:
        Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, *Shifted Cholesky QR for computing the
        QR factorization of ill-conditioned matrices*, SIAM J. Sci. Comput. 42 (2020).
    """
    return _OrthogonalFactor.apply(w, _SHIFTED if shifted else _CHOLESKY)[0]  # type: ignore[index]


def _householder(x: Tensor) -> tuple[Tensor, Tensor]:
    require_finite("qr", x)
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    return q * signs[..., None, :], r * signs[..., :, None]


def _round(x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """One round of Cholesky-QR: (x L^-T, L^T)."""
    gram = x.mT @ x
    if shift:
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        gram.diagonal(dim1=-2, dim2=-1).add_(shift * trace)
    lower, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(lower, x.mT, upper=False).mT, lower.mT


def _factorize(w: Tensor, method: int) -> tuple[Tensor, Tensor]:
    if 0 in w.shape:
        return w.clone(), w.new_zeros(*w.shape[:-2], w.shape[-1], w.shape[-1])
    if method == _HOUSEHOLDER:
        return _householder(w)
    scale = rms_scale(w)
    shift = 11.0 * w.shape[-1] ** 0.5 * torch.finfo(w.dtype).eps if method == _SHIFTED else 0.0
    q, r = _round(w / scale, shift)
    failed = torch.ones(w.shape[:-2], dtype=torch.bool, device=w.device)
    for _ in range(3):
        if not bool(failed.any()):
            break
        q, outer = _round(q)
        r = outer @ r
        # NaN when a Cholesky factorization broke down, eps-level when the rounds have worked
        failed = ~(gram_defect(q.mT @ q) <= 8.0 * torch.finfo(w.dtype).eps * w.shape[-1] ** 0.5)
    r = r * scale
    if bool(failed.any()):
        again = _SHIFTED if method == _CHOLESKY else _HOUSEHOLDER
        flat = w.reshape(-1, *w.shape[-2:])[failed.reshape(-1)]
        new_q, new_r = _factorize(flat, again)
        q, r = q.clone(), r.clone()
        q.view(-1, *q.shape[-2:])[failed.reshape(-1)] = new_q
        r.view(-1, *r.shape[-2:])[failed.reshape(-1)] = new_r
    return q, r


@torch.library.custom_op("orthonet::orthogonal_factor", mutates_args=())
def _factorize_op(w: Tensor, method: int) -> tuple[Tensor, Tensor]:
    q, r = _factorize(w, method)
    return q.contiguous(), r.contiguous()


@_factorize_op.register_fake
def _(w: Tensor, method: int) -> tuple[Tensor, Tensor]:
    n = w.shape[-1]
    shape = (*w.shape[:-2], n, n)
    return torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(shape)


class _OrthogonalFactor(torch.autograd.Function):
    """(Q, R) of tall matrices; the gradient is safe at rank deficiency."""

    @staticmethod
    def forward(w: Tensor, method: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_factorize_op if torch.compiler.is_compiling() else _factorize)(w, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_r: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, r = ctx.saved_tensors
        m = r @ grad_r.mT - grad_q.mT @ q
        symmetric = m.tril() + m.tril(-1).mT
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        largest = diagonal.detach().amax(-1, keepdim=True)
        floor = torch.where(largest > 0, 8.0 * torch.finfo(r.dtype).eps * largest, 1.0)
        safe = r + torch.diag_embed((floor - diagonal).clamp_min(0.0))
        right = grad_q + q @ symmetric
        return torch.linalg.solve_triangular(safe, right.mT, upper=True).mT, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, w: Tensor, method: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _OrthogonalFactor.apply(w.movedim(in_dims[0], 0), method), (0, 0)  # type: ignore[return-value]
