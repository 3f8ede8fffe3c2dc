r"""Orthogonal factors of the QR decomposition: sign-safe Householder and Cholesky-QR.

For a tall matrix \(W = Q R\) with \(R\) upper triangular and a non-negative diagonal; a wide matrix
is factorized through its transpose, \(W = L Q\). For full rank \(Q\) is unique, so all methods here
compute the same function; they differ in cost and in the conditioning that they bear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet._torch import in_transform
from orthonet.linalg.matrix import (
    add_identity,
    cholesky,
    divide_triangular,
    minus_product,
    on_tall,
    require_finite,
    rms_scale,
    symmetric_product,
)

__all__ = ["cholesky_qr", "qr"]

_HOUSEHOLDER, _CHOLESKY, _SHIFTED = range(3)


@on_tall
def qr(w: Tensor) -> Tensor:
    r"""Return the orthogonal factor by Householder reflections.

    The diagonal of \(R\) is non-negative. A zero on it counts as positive, so rank is never lost.

    Shape:
        (*batch, m, n), kept.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, rank-deficient and zero included. Gradients are finite: diagonal entries of \(R\)
        below \(8\,\mathrm{eps}\) of the largest are replaced by that value in backward. The
        gradient can be differentiated again.

    Raises:
        ValueError: `w` has a NaN or infinite entry.

    Examples:
        >>> qr(torch.tensor([[3.0], [4.0]]))
        tensor([[0.6000],
                [0.8000]])

    References:
        Walter & Lehmann, *Algorithmic differentiation of linear algebra functions*, 2010, for the
        gradient.
    """
    return _apply(w, _HOUSEHOLDER)


@on_tall
def cholesky_qr(w: Tensor, *, shifted: bool = False) -> Tensor:
    r"""Return the orthogonal factor by Cholesky-QR2.

    Two rounds of \(L L^\top = W^\top W,\ W \leftarrow W L^{-\top}\), are run; the second removes
    the error that the squared condition number leaves after the first. If the measured Gram matrix
    is not positive definite enough, a round with a relative diagonal shift comes first
    (Cholesky-QR3). Matrices that still fail go through Householder reflections. The result is
    always the function of [`qr`][orthonet.linalg.qr].

    Args:
        w: Matrices of any scale and rank.
        shifted: Always begin with the shifted round. This saves the failed attempt on
            ill-conditioned matrices (condition above about 1e3 in float32).

    Shape:
        (*batch, m, n), kept. All factorizations are of size min(m, n).

    Guarantee:
        As for `qr`.

    Raises:
        ValueError: `w` has a NaN or infinite entry.

    Examples:
        >>> w = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
        >>> cholesky_qr(w).allclose(qr(w), atol=1e-5)
        True

    References:
        Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, *Shifted Cholesky QR for computing the
        QR factorization of ill-conditioned matrices*, SIAM J. Sci. Comput. 42 (2020).
    """
    return _apply(w, _SHIFTED if shifted else _CHOLESKY)


def _householder(x: Tensor) -> Tensor:
    require_finite("qr", x)
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    return q * signs[..., None, :]


def _factorize(w: Tensor, method: int) -> Tensor:
    """The orthogonal factor; the last round of Cholesky-QR to first order where that is exact.

    With E = Q^T Q - I, the Cholesky factor of I + E is I + D up to |E|^2, D the lower triangle of E
    with half its diagonal.
    """
    if 0 in w.shape:
        return w.clone()
    if method == _HOUSEHOLDER:
        return _householder(w)
    eps, n = torch.finfo(w.dtype).eps, w.shape[-1]
    q, gram = w, symmetric_product(w, w)
    mean = (gram.trace() if w.ndim == 2 else gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / n
    low, high = [mean.item()] * 2 if w.ndim == 2 else torch.stack(torch.aminmax(mean)).tolist()
    if not (low > torch.finfo(w.dtype).tiny ** 0.5 and high < eps**-4):
        q = w / rms_scale(w)
        gram, mean = symmetric_product(q, q), torch.ones_like(mean)
    defect, enough = None, 0.5 * eps**0.5
    for step in range(4):
        if step == 0 and method == _SHIFTED:
            gram.diagonal(dim1=-2, dim2=-1).add_((11.0 * n**1.5 * eps) * mean[..., None])
        lower, info = cholesky(gram)
        if w.ndim == 2 and int(info):
            break
        q = divide_triangular(q, lower.mT)
        if step == 0 and method == _SHIFTED:
            gram = symmetric_product(q, q)
            continue
        e = add_identity(symmetric_product(q, q), -1.0)
        defect = torch.linalg.vector_norm(e, dim=(-2, -1))
        if float(defect) <= enough if w.ndim == 2 else bool((defect <= enough).all()):
            return minus_product(q, q, _half_diagonal(e.triu_()))
        gram = add_identity(e, 1.0)
    failed = torch.ones_like(mean, dtype=torch.bool) if defect is None else ~(defect <= enough)
    again = _SHIFTED if method == _CHOLESKY else _HOUSEHOLDER
    if bool(failed.all()):
        return _factorize(w, again)
    failed, flat = failed.reshape(-1), w.reshape(-1, *w.shape[-2:])
    result = torch.empty_like(flat)
    result[~failed] = _factorize(flat[~failed], method)
    result[failed] = _factorize(flat[failed], again)
    return result.reshape(w.shape)


def _half_diagonal(a: Tensor) -> Tensor:
    a.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return a


@torch.library.custom_op("orthonet::orthogonal_factor", mutates_args=())
def _factorize_op(w: Tensor, method: int) -> Tensor:
    return _factorize(w, method).contiguous()


@_factorize_op.register_fake
def _(w: Tensor, method: int) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _bounded_factor(w: Tensor, q: Tensor) -> Tensor:
    """W^T Q, whose lower triangle is R^T, the diagonal raised to 8 eps of its largest entry.

    That of a zero matrix is raised to 1.
    """
    adjoint = w.mT @ q
    diagonal = adjoint.diagonal(dim1=-2, dim2=-1).clone()
    largest = diagonal.detach().amax(-1, keepdim=True)
    floor = torch.where(largest > 0, 8.0 * torch.finfo(w.dtype).eps * largest, 1.0)
    adjoint.diagonal(dim1=-2, dim2=-1).copy_(torch.maximum(diagonal, floor))
    return adjoint


def _pull_back(w: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """(G - Q (L + L^T)) R^-T with L the lower triangle of G^T Q, half its diagonal."""
    inner = grad.mT @ q
    lower = _half_diagonal(inner.tril() if in_transform(grad) else inner.tril_())
    right = minus_product(grad, q, lower.mT.contiguous().add_(lower))
    return divide_triangular(right, _bounded_factor(w, q), upper=False)


class _OrthogonalFactor(torch.autograd.Function):
    """Q of tall matrices; R = Q^T W comes back in backward, safe at rank deficiency."""

    @staticmethod
    def forward(w: Tensor, method: int) -> Tensor:
        return (_factorize_op if torch.compiler.is_compiling() else _factorize)(w, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, q = ctx.saved_tensors
        return _pull_back(w, q, grad), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, w: Tensor, method: int) -> tuple[Tensor, int]:
        return _apply(w.movedim(in_dims[0], 0), method), 0


class _OrthogonalFactorForward(_OrthogonalFactor):
    """With forward mode, which Dynamo does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        w, q = ctx.saved_tensors
        moved = divide_triangular(tangent, _bounded_factor(w, q).mT)
        inner = q.mT @ moved
        lower = inner.tril(-1)
        return moved - q @ (inner - lower + lower.mT)


def _apply(w: Tensor, method: int) -> Any:
    function = _OrthogonalFactor if torch.compiler.is_compiling() else _OrthogonalFactorForward
    return function.apply(w, method)
