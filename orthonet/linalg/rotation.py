r"""Exponential and Cayley map of skew-Hermitian matrices, and their forms for n x k frames.

Written for speed in training: few products, small factorizations, a backward of two products for
each product forward. Every function is smooth in its arguments, at zero and at repeated eigenvalues
too, for no eigendecomposition is involved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import in_forward_mode, is_traced
from orthonet.linalg.exponential import matrix_exponential
from orthonet.linalg.matrix import add_identity, high
from orthonet.linalg.packing import (
    identity_minus_half_skew,
    pack_difference,
    pack_skew,
    unpack_skew,
)

__all__ = [
    "complement_reflector",
    "frame_cayley",
    "frame_cayley_inverse",
    "frame_exponential",
    "polished",
    "rotated_cayley",
    "skew_exponential",
    "times_complement",
    "times_complement_adjoint",
]

# Norm up to which a Cayley map needs no polishing: |sigma - 1| up to 1.0e-6 was seen at 4, for
# n = 16 to 1024 in float32, and 1.5e-6 at 8. Where ||A||_F / sqrt(2) is 8, it was up to 1.1e-6, for
# A of any rank.
_UNPOLISHED = 4.0
_UNPOLISHED_TOTAL = 8.0

# Side up to which three products took less time than a solve with factors and one product:
# 0.8 of it at 64, 0.9 at 128, 1.0 at 256, on one and on two threads.
_PRODUCTS_TO = 192

# Highest degree of the Taylor polynomial -> matrix products that it takes (see `_taylor`).
_DEGREES = (5, 9, 13)


def _identity_like(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def polished(q: Tensor) -> Tensor:
    r"""Remove the rounding error of nearly orthonormal columns; the gradient stays that of `q`.

    One step \(Q (3 I - Q^* Q) / 2\), which squares the distance from orthonormality.
    """
    x = q.detach()
    step = x @ add_identity(x.mH @ x * -0.5, 0.5)
    return q + step


def rotated_cayley(base: Tensor, coordinates: Tensor) -> Tensor:
    r"""\(B (I - A/2)^{-1} (I + A/2)\) for orthogonal B and skew-Hermitian A, the Cayley map.

    A is given by its coordinates, see `unpack_skew`.

    It agrees with \(B e^A\) to second order. With \(Y = B (I - A/2)^{-1}\) it is \(2 Y - B\), so
    that one factorization and one solve compute it, and a change of A moves it by
    \(Y \, dA \, (I - A/2)^{-1}\): backward takes one solve with the same factors and one product.
    Large A (\(\|A\|_2\) above about 4, estimated) are polished. B is a constant.
    """
    n = base.shape[-1]
    if coordinates.is_meta or is_traced(coordinates, base) or in_forward_mode() or n < 2:
        a = unpack_skew(coordinates, n)
        inverse, _ = torch.linalg.inv_ex(add_identity(a * -0.5, 1.0))
        return polished(base @ (2.0 * inverse - _identity_like(a)))
    if coordinates.is_complex():
        return _RotatedCayley.apply(base, unpack_skew(coordinates, n), False)
    return _RotatedCayley.apply(base, coordinates, True)


class _RotatedCayley(torch.autograd.Function):
    r"""The map of A, or of its coordinates where it is `packed`, as one node.

    Backward needs \(Y^* G M^*\) with \(M = (I - A/2)^{-1} = B^* Y\): for small matrices the two
    products \(G (Y^* B)\) take less time than a solve, and the factors are not saved.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, given: Tensor, packed: bool) -> Tensor:
        n = base.shape[-1]
        x = identity_minus_half_skew(given, n) if packed else add_identity(given * -0.5, 1.0)
        # Transposed throughout: the memory of B^T and of I + A/2 is in the order of LAPACK.
        left, right = (x.mT, base.mT) if packed else (x.mH, base.mH)
        factors, pivots, _ = torch.linalg.lu_factor_ex(left)
        y = torch.linalg.lu_solve(factors, pivots, right)
        y = y.mT if packed else y.mH
        ctx.save_for_backward(given, base, y, *(() if n <= _PRODUCTS_TO else (factors, pivots)))
        ctx.packed = packed
        result = torch.lerp(base, y, 2.0)
        return result if _is_small(given, x, packed) else polished(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (g,) = grads
        given, base, y, *factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted
            a = unpack_skew(given, base.shape[-1]) if ctx.packed else given
            inverse, _ = torch.linalg.inv_ex(add_identity(a * -0.5, 1.0))
            grad = (base @ inverse).mH @ g @ inverse.mH
            return None, pack_skew(grad - grad.mT) if ctx.packed else grad, None
        adjoint = y.mH
        if factors:
            grad = adjoint @ torch.linalg.lu_solve(*factors, g.mH, adjoint=True).mH
        else:
            grad = adjoint @ (g @ (adjoint @ base))
        return None, pack_difference(grad) if ctx.packed else grad, None


def _is_small(given: Tensor, x: Tensor, packed: bool) -> bool:
    """Whether the rounding of the map of each skew-Hermitian A needs no polishing; `x` is I - A/2.

    By the Frobenius norm, from the coordinates where they are `packed` (twice the squares of which
    add up to its square), then by an estimate of the spectral norm.
    """
    norm = torch.linalg.vector_norm(given, dim=-1 if packed else (-2, -1))
    if norm.ndim:
        norm = norm.amax() if norm.numel() else norm.sum()
    if norm.item() <= _UNPOLISHED_TOTAL * (1.0 if packed else math.sqrt(2.0)):
        return True
    v = torch.linspace(1.0, 2.0, x.shape[-1], dtype=x.dtype, device=x.device)[:, None]
    for _ in range(3):  # an overflow makes the ratio NaN, which is not small
        v = v - x @ v
    after, before = (torch.linalg.vector_norm(t, dim=-2) for t in (v - x @ v, v))
    return bool((after <= 0.5 * _UNPOLISHED * before).all())


def skew_exponential(a: Tensor) -> Tensor:
    r"""\(e^A\) of skew-Hermitian matrices: 3 to 6 products, squarings, and one polishing step.

    The even and the odd part of the Taylor polynomial are polynomials in \(A^2\); the degree and
    the scaling follow from \(\|A^4\|_F^{1/4} \ge \|A\|_2\). Traced code takes PyTorch's own
    matrix exponential instead, since the degree may not depend on the data there.

    Raises:
        ValueError: `a` has a NaN or infinite entry.
    """
    if 0 in a.shape:
        return a + _identity_like(a)
    if is_traced(a) or a.is_meta:
        return polished(torch.linalg.matrix_exp(a))
    square = a @ a
    fourth = square @ square
    bound = float(torch.linalg.matrix_norm(fourth.detach()).amax()) ** 0.25
    _checks.require(
        math.isfinite(bound),
        "skew_exponential",
        "the matrix must be finite",
        "Lower the learning rate or clip gradients; the coordinates hold NaN or Inf",
        norm=bound,
    )
    unit = torch.finfo(a.dtype).eps / 2
    reach = [(unit * math.factorial(d + 1)) ** (1.0 / (d + 1)) for d in _DEGREES]
    degree = next((d for d, r in zip(_DEGREES, reach, strict=True) if bound <= r), _DEGREES[-1])
    squarings = max(0, math.ceil(math.log2(bound / reach[-1]))) if bound > 0 else 0
    if squarings:
        scale = 2.0**-squarings
        a, square, fourth = a * scale, square * scale**2, fourth * scale**4
    result = _taylor(a, square, fourth, degree)
    for _ in range(squarings):
        result = result @ result
    return polished(result)


def _taylor(a: Tensor, x: Tensor, y: Tensor, degree: int) -> Tensor:
    """Taylor polynomial of the exponential, from a, x = a^2 and y = a^4."""
    even = [1.0 / math.factorial(k) for k in range(0, degree, 2)]
    odd = [1.0 / math.factorial(k) for k in range(1, degree + 1, 2)]
    if degree == 5:
        even_part, odd_part = (add_identity(c[1] * x + c[2] * y, c[0]) for c in (even, odd))
    elif degree == 9:
        even_part, odd_part = (
            add_identity(c[1] * x + y @ add_identity(c[3] * x + c[4] * y, c[2]), c[0])
            for c in (even, odd)
        )
    else:
        z = x @ y
        even_part, odd_part = (
            add_identity(
                c[1] * x + c[2] * y + z @ add_identity(c[4] * x + c[5] * y + c[6] * z, c[3]), c[0]
            )
            for c in (even, odd)
        )
    return even_part + a @ odd_part


def frame_exponential(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    r"""The first k columns of \(\exp\begin{pmatrix} A & -C^* \\ C & 0 \end{pmatrix}\).

    Returned as the k x k block and the (n - k) x k block below it. When n is at least 2 k, only a
    2k x 2k exponential is taken: with \(K = \begin{pmatrix} A & -C^* C \\ I & 0 \end{pmatrix}\) and
    \(\begin{pmatrix} E \\ N \end{pmatrix}\) the first block column of \(e^K\), the blocks are E and
    C N.

    Shape:
        `a`: (*batch, k, k) skew-Hermitian. `c`: (*batch, n - k, k).

    References:
        Edelman, Arias & Smith, *The geometry of algorithms with orthogonality constraints*, SIAM J.
        Matrix Anal. Appl. 20 (1998), eq. 2.42, here without the QR factorization of C.
    """
    k = a.shape[-1]
    if c.shape[-2] < k:
        full = skew_exponential(_full(a, c))
        return full[..., :k, :k], full[..., k:, :k]
    gram = c.mH @ c
    # A similarity by diag(I, tau I) makes both off-diagonal blocks as large as C.
    tau = torch.linalg.matrix_norm(gram.detach(), keepdim=True).sqrt().clamp_min(1.0)
    identity = _identity_like(a).expand(a.shape)
    top = torch.cat([a, -gram / tau], -1)
    block = torch.cat([top, torch.cat([identity * tau, torch.zeros_like(a)], -1)], -2)
    column = _exponential(block)[..., :, :k]
    return column[..., :k, :], c @ (column[..., k:, :] / tau)


def _exponential(block: Tensor) -> Tensor:
    if block.is_complex() or is_traced(block) or block.is_meta:
        return torch.linalg.matrix_exp(block)
    return matrix_exponential(block)


def frame_cayley(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    r"""The first k columns of the Cayley map of \(\begin{pmatrix} A & -C^* \\ C & 0\end{pmatrix}\).

    With \(N = (I - A/2 + C^* C/4)^{-1}\), a k x k matrix whose inverse has a positive definite
    Hermitian part, the blocks are \(2 N - I\) and \(C N\): a Schur complement of the n x n solve.

    Shape:
        `a`: (*batch, k, k) skew-Hermitian. `c`: (*batch, n - k, k).
    """
    inverse = frame_cayley_inverse(a, c)
    return 2.0 * inverse - _identity_like(a), c @ inverse


def frame_cayley_inverse(a: Tensor, c: Tensor) -> Tensor:
    r"""\(N = (I - A/2 + C^* C/4)^{-1}\) of `frame_cayley`."""
    inverse, _ = torch.linalg.inv_ex(add_identity(torch.add(c.mH @ c, a, alpha=-2.0) * 0.25, 1.0))
    return inverse


def _full(a: Tensor, c: Tensor) -> Tensor:
    rest = c.shape[-2]
    zeros = c.new_zeros(*c.shape[:-2], rest, rest)
    return torch.cat([torch.cat([a, -c.mH], -1), torch.cat([c, zeros], -1)], -2)


def complement_reflector(base: Tensor) -> Tensor:
    r"""Y of a block reflector \(H = I - Y Y^*\) that carries the first k axes onto span(B).

    The last n - k columns of H are an orthonormal basis \(B_\perp\) of the complement of B, which
    thereby takes n k numbers instead of n (n - k). With \(B_1\) the top block of B,
    \(B_1 = U |B_1|\) and \(V = B + \begin{pmatrix} U \\ 0 \end{pmatrix}\):
    \(Y = V (I + |B_1|)^{-1/2}\), which is always well conditioned.

    Shape:
        `base`: (*batch, n, k) with orthonormal columns. Output: the same.

    References:
        Schreiber & Parlett, *Block reflectors: theory and computation*, SIAM J. Numer. Anal. 25
        (1988).
    """
    k = base.shape[-1]
    b = high(base)
    u, s, wh = torch.linalg.svd(b[..., :k, :])
    top = b[..., :k, :] + u @ wh
    v = torch.cat([top, b[..., k:, :]], -2)
    return ((v @ wh.mH) * (1.0 + s).rsqrt()[..., None, :] @ wh).to(base.dtype)


def times_complement(reflector: Tensor, f: Tensor) -> Tensor:
    r"""\(B_\perp F\) for the complement that `complement_reflector` describes, in O(n k^2)."""
    k = reflector.shape[-1]
    inner = reflector[..., k:, :].mH @ f
    padded = torch.cat([f.new_zeros(*f.shape[:-2], k, f.shape[-1]), f], -2)
    return padded - reflector @ inner


def times_complement_adjoint(reflector: Tensor, v: Tensor) -> Tensor:
    r"""\(B_\perp^* V\), the adjoint of `times_complement`."""
    k = reflector.shape[-1]
    return v[..., k:, :] - reflector[..., k:, :] @ (reflector.mH @ v)
