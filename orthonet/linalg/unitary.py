r"""Semi-unitary matrices, real or complex: what Fourier-domain layers make at each frequency."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet._torch import in_transform
from orthonet.linalg.polar import polar

__all__ = [
    "block_reflector",
    "cayley_parameter",
    "cayley_rectangular",
    "cholesky_contraction",
    "complex_polar",
    "polish",
    "unitary_polar",
]


def polish(q: Tensor) -> Tensor:
    r"""Take one step \(\sigma \mapsto \sigma (3 - \sigma^2) / 2\) on the smaller side.

    The step squares the distance of a singular value from 1. The map has its maximum 1 at 1, so no
    singular value that was at most \(\sqrt 3\) ends above 1.

    Shape:
        (*batch, m, n), real or complex, kept.
    """
    if q.shape[-2] >= q.shape[-1]:
        return 1.5 * q - 0.5 * (q @ (q.mH @ q))
    return 1.5 * q - 0.5 * ((q @ q.mH) @ q)


def cayley_rectangular(w: Tensor) -> Tensor:
    r"""Return the Cayley transform of a matrix of any shape, real or complex.

    For tall \(W = [U; V]\) with square U and \(A = U - U^* + V^* V\),

    \[ Q = \begin{bmatrix} (I + A)^{-1} (I - A) \\ -2 V (I + A)^{-1} \end{bmatrix},
       \qquad Q^* Q = I; \]

    wide matrices by transposition. Matrices of norm above about 30 are scaled down first, which
    keeps \(I + A\) well conditioned; one `polish` follows.

    Shape:
        (*batch, m, n), kept.

    Guarantee:
        \(\max |\sigma - 1| \le 10^{-5}\) (complex64, float32), \(10^{-12}\) (double) for every
        finite input.

    Examples:
        >>> q = cayley_rectangular(torch.randn(4, 2))
        >>> (q.T @ q).allclose(torch.eye(2), atol=1e-5)
        True

    References:
        Trockman & Kolter, *Orthogonalizing convolutional layers with the Cayley transform*, ICLR
        2021, section 4 and appendix on semi-orthogonal layers.
    """
    _checks.matrices("cayley_rectangular", lifted=False, w=w)
    m, n = w.shape[-2:]
    if m < n:
        return cayley_rectangular(w.mT).mT
    norm = torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True)
    w = w * (_REACH / norm.clamp_min(_REACH))
    top, bottom = w[..., :n, :], w[..., n:, :]
    a = top - top.mH
    if m > n:
        a = a + bottom.mH @ bottom
    identity = torch.eye(n, dtype=w.dtype, device=w.device)
    solved = torch.linalg.solve(identity + a, torch.cat([identity - a, identity.expand_as(a)], -1))
    q = solved[..., :n]
    if m > n:
        q = torch.cat([q, -2 * (bottom @ solved[..., n:])], -2)
    return polish(q)


_REACH = 30.0


def cayley_parameter(q: Tensor) -> Tensor:
    r"""Return a preimage of `q` under [`cayley_rectangular`][orthonet.linalg.cayley_rectangular].

    It is exact for semi-unitary q whose leading square block has no eigenvalue near -1.

    Shape:
        As of [`cayley_rectangular`][orthonet.linalg.cayley_rectangular].
    """
    m, n = q.shape[-2:]
    if m < n:
        return cayley_parameter(q.mT).mT
    top, bottom = q[..., :n, :], q[..., n:, :]
    identity = torch.eye(n, dtype=q.dtype, device=q.device)
    a = torch.linalg.solve(identity + (1 + 1e-7) * top, identity - top)
    v = -0.5 * (bottom @ (identity + a))
    u = 0.5 * (a - v.mH @ v)
    return torch.cat([0.5 * (u - u.mH), v], -2)


def block_reflector(v: Tensor) -> Tensor:
    r"""Return the reflection \(I - 2 V (V^* V)^{-1} V^*\) at the complement of the columns of V.

    The columns are scaled to unit length, a small multiple of the identity is added to the Gram
    matrix, and three McWeeny steps \(P \mapsto 3 P^2 - 2 P^3\) make the projector exact where V is
    well conditioned; one `polish` follows.

    Args:
        v: Columns, real or complex; fewer of them than rows.

    Shape:
        `(*batch, n, r)`. Output: `(*batch, n, n)`, Hermitian.

    Guarantee:
        Norm at most 1 to \(10^{-5}\) (single precision) or \(10^{-12}\) (double) for every finite
        V. All singular values are 1 to the same tolerance when the columns, scaled to unit length,
        have a condition number of at most 10; a singular value may be smaller in a direction that V
        nearly loses. V = 0 gives the identity.

    Examples:
        >>> block_reflector(torch.tensor([[3.0], [0.0]])).diagonal().round(decimals=4)
        tensor([-1.,  1.])

    References:
        Lai, Huang, Wang & Zhang, *Enhancing certified robustness via block reflector orthogonal
        layers and logit annealing loss*, ICML 2025, section 4.
    """
    _checks.matrices("block_reflector", lifted=False, v=v)
    length = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    tiny = torch.finfo(length.dtype).tiny ** 0.5
    v = v / length.clamp_min(tiny)
    gram = v.mH @ v
    shift = 1e-3 if length.dtype == torch.float32 else 1e-8
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    s = torch.linalg.inv(gram + shift * identity)
    for _ in range(3):
        first = s @ (gram @ s)
        s = 3 * first - 2 * (first @ (gram @ s))
    s = (s + s.mH) * 0.5
    outer = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
    return polish(outer - 2 * (v @ (s @ v.mH)))


def cholesky_contraction(w: Tensor) -> Tensor:
    r"""Orthogonalize with a ridge: \(L^{-1} W\) with \(L L^\top = W W^\top + \varepsilon I\).

    Then \(Q Q^\top = I - \varepsilon L^{-1} L^{-\top} \preceq I\) for every W. Rows are scaled to
    unit length first, and \(\varepsilon\) is \(10^{-4}\) in float32 and \(10^{-9}\) in float64. One
    `polish` follows. Tall matrices are treated by transposition.

    Shape:
        As of [`cayley_rectangular`][orthonet.linalg.cayley_rectangular].

    Guarantee:
        Norm at most 1 to \(10^{-5}\) (float32) or \(10^{-12}\) (float64) for every finite input;
        orthogonal to the same tolerance for well-conditioned ones. Zero rows stay zero.

    Examples:
        >>> q = cholesky_contraction(torch.randn(2, 8))
        >>> bool(torch.linalg.matrix_norm(q, 2) <= 1 + 1e-5)
        True

    References:
        Hu, Leino, Wang & Fredrikson, *A recipe for improved certifiable robustness*, ICLR 2024
        (Cholesky-orthogonalized residual dense layers).
    """
    _checks.matrices("cholesky_contraction", lifted=False, w=w)
    _checks.floating("cholesky_contraction", w=w)
    if w.shape[-2] > w.shape[-1]:
        return cholesky_contraction(w.mT).mT
    largest = w.detach().abs().amax(-1, keepdim=True)
    w = w / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    w = w / torch.where(length > 0, length, torch.ones_like(length))
    shift = 1e-4 if w.dtype == torch.float32 else 1e-9
    identity = torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
    factor = torch.linalg.cholesky(w @ w.mT + shift * identity)
    return polish(torch.linalg.solve_triangular(factor, w, upper=False))


def unitary_polar(w: Tensor) -> Tensor:
    r"""Return the nearest semi-unitary matrix of real or complex matrices, \(W (W^* W)^{-1/2}\).

    It is computed from the eigenvectors of the Gram matrix and two Newton steps \(U \mapsto U (3 I
    - U^* U) / 2\). Blocks whose measured residual is too large are computed again by a singular
    value decomposition. The gradient is implicit, as for [`polar`][orthonet.linalg.polar], and
    cannot be differentiated again.

    Shape:
        As of [`cayley_rectangular`][orthonet.linalg.cayley_rectangular].

    Guarantee:
        \(\max |\sigma - 1| \le 10^{-5}\) in single precision, \(10^{-12}\) in double, for every
        finite input. Gradients are finite: singular values below 8 eps of the largest are replaced
        by that value.

    Examples:
        >>> unitary_polar(3j * torch.eye(2)).allclose(1j * torch.eye(2), atol=1e-5)
        True

    References:
        Xu, Li & Li, *LOT: layer-wise orthogonal training on improving l2 certified robustness*,
        NeurIPS 2022.
    """
    _checks.matrices("unitary_polar", lifted=False, w=w)
    if w.shape[-2] < w.shape[-1]:
        return unitary_polar(w.mH).mH
    if in_transform(w):
        return _Transformed.apply(w)[0]
    return torch.ops.orthonet.unitary_polar(w)[0]


def _polar_parts(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, eigenvectors and eigenvalues of H, where W = U H and H is positive."""
    real = torch.float64 if w.dtype in (torch.float64, torch.complex128) else torch.float32
    eps = torch.finfo(real).eps
    scale = torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = w / scale
    values, vectors = torch.linalg.eigh(x.mH @ x)
    sigma = values.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(8 * eps)
    u = ((x @ vectors) / sigma.unsqueeze(-2).to(x.dtype)) @ vectors.mH
    residual = u.mH @ u
    residual.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    bad = ~(torch.linalg.vector_norm(residual, dim=(-2, -1)) < 1e-3)
    u = polish(polish(u))
    if bool(bad.any()):
        left, exact, right = torch.linalg.svd(x[bad], full_matrices=False)
        u[bad] = left @ right
        sigma[bad] = exact.clamp_min(8 * eps)
        vectors[bad] = right.mH
    return u.contiguous(), vectors.contiguous(), (sigma * scale.squeeze(-1)).contiguous()


_unitary_polar = torch.library.custom_op(
    "orthonet::unitary_polar",
    _polar_parts,
    mutates_args=(),
    schema="(Tensor w) -> (Tensor, Tensor, Tensor)",
)


@_unitary_polar.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = w.shape[-1]
    real = torch.float64 if w.dtype in (torch.float64, torch.complex128) else torch.float32
    vectors = w.new_empty(*w.shape[:-2], n, n)
    return w.new_empty(w.shape), vectors, w.new_empty(*w.shape[:-2], n, dtype=real)


def _pull_back(grad: Tensor, u: Tensor, vectors: Tensor, sigma: Tensor) -> Tensor:
    inner = vectors.mH @ (u.mH @ grad) @ vectors
    skew = (inner - inner.mH) / (sigma.unsqueeze(-1) + sigma.unsqueeze(-2)).to(u.dtype)
    outside = (grad - u @ (u.mH @ grad)) @ vectors
    return ((u @ (vectors @ skew)) + outside / sigma.unsqueeze(-2).to(u.dtype)) @ vectors.mH


_unitary_polar_backward = torch.library.custom_op(
    "orthonet::unitary_polar_backward",
    _pull_back,
    mutates_args=(),
    schema="(Tensor grad, Tensor u, Tensor vectors, Tensor sigma) -> Tensor",
)


@_unitary_polar_backward.register_fake
def _(grad: Tensor, u: Tensor, vectors: Tensor, sigma: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def complex_polar(x: Tensor) -> Tensor:
    """Return the polar factor of complex matrices, through the real matrices of twice the size."""
    if x.shape[-2] < x.shape[-1]:
        return complex_polar(x.mT).mT
    k = x.shape[-1]
    real = torch.cat([torch.cat([x.real, -x.imag], -1), torch.cat([x.imag, x.real], -1)], -2)
    u = polar(real)
    return torch.complex(u[..., : x.shape[-2], :k], u[..., x.shape[-2] :, :k])


def _differentiable(w: Tensor, grad: Tensor) -> Tensor:
    """The pull-back by operations that can be differentiated again."""
    _, pull_back, *_ = torch.func.vjp(complex_polar if w.is_complex() else polar, w)
    return pull_back(grad)[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
    w, *parts = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable(w, grad)
    return torch.ops.orthonet.unitary_polar_backward(grad, *parts)


_unitary_polar.register_autograd(_backward, setup_context=_setup)


class _Transformed(torch.autograd.Function):
    """The same for `torch.func`, which does not differentiate operators with an own gradient."""

    @staticmethod
    def forward(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _polar_parts(w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _checks.require(
            all(grad is None for grad in grads[1:]),
            "unitary_polar",
            "torch.func has its first derivatives only",
            "Use torch.autograd.grad with create_graph=True for second ones",
            RuntimeError,
        )
        return _pull_back(grads[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], w: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _Transformed.apply(w.movedim(in_dims[0], 0)), (0, 0, 0)
