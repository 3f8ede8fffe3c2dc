"""Upper bounds of the spectral norm that hold in exact arithmetic.

A computed singular value is an approximation from either side, a power iteration one from below.
Here the approximation only proposes a number; the number is then *proved*, a posteriori, from the
residual of a Cholesky factorization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    down,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
    up,
)

__all__ = ["exact_float64", "gram_norm_bound", "spectral_norm_bound"]

_MARGINS = (1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 4e-7, 2e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
_CHUNK = 2**17  # entries of Gram matrices that are held at once: what a cache holds
_DIRECT = 256  # Gram matrices up to this size go to eigvalsh, larger ones to Lanczos
_TINY = 16  # up to here eigvalsh takes every block
_SCREENING = 8
_CANDIDATES = 8
_KRYLOV = 100
_PRODUCTS = 8
_OUTWARD = 1.0 + 2.0**-50  # covers four roundings of non-negative terms, and its own


def spectral_norm_bound(matrix: Tensor) -> float:
    r"""Prove an upper bound of $\|A\|_2$; over batch dims the largest, as for a block-diagonal A.

    With $G = \mathrm{fl}(A^* A)$ and an estimate $\lambda$ of its largest eigenvalue, a slightly
    larger $\tau$ is proved: if $R$ is the computed Cholesky factor of $\tau I - G$, then
    $\tau I - G = R R^* + E \succeq -\|E\|$, hence
    $\|A\|_2^2 \le \tau + \|E\| + \|A^* A - G\|$. Float64 arithmetic with outward rounding bounds
    every term from above. If no factorization succeeds, the function returns the bound by Gram
    iteration.

    Args:
        matrix: A finite real or complex tensor of any dtype and device. It is converted to float64
            on the CPU, which is exact.

    Shape:
        matrix: (*batch, m, n)

    Guarantee:
        Upper bound of the exact norm of the given floats, whatever LAPACK returns. The proof
        assumes only the classical bound $|\mathrm{fl}(XY) - XY| \le \gamma_k |X| |Y|$ of a matrix
        product, in any order of summation, with or without fused multiplications. The excess is
        usually below 1e-9 relative; never more than the Frobenius norm allows.

    Raises:
        ValueError: `matrix` has fewer than two dims or contains NaN or infinity.

    Examples:
        >>> 1.0 <= spectral_norm_bound(torch.eye(3)) < 1.0 + 1e-11
        True

    References:
        S. M. Rump, Verification of positive definiteness, BIT 46 (2006).
        N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 3 and 10.
    """
    return _by_blocks(matrix, "spectral_norm_bound", _scaled_bound)


def gram_norm_bound(matrix: Tensor, *, niters: int = 8) -> float:
    r"""Prove an upper bound of $\|A\|_2$ by Gram iteration; over batch dims the largest.

    $G_0 = A$, $G_{k+1} = \mathrm{fl}(G_k^* G_k) / s_k$ with powers of two $s_k$. As
    $\|G_k\|^2 = \|G_k^* G_k\| \le s_k \|G_{k+1}\| + e_k$, where $e_k$ bounds the rounding of
    the product, the Frobenius norm of the last one bounds the norm of the first, computed backward
    with every term rounded outward. Only matrix products are needed;
    [`spectral_norm_bound`][orthonet.linalg.spectral_norm_bound] is tighter, and usually faster
    because a factorization replaces most products.

    Args:
        matrix: See `spectral_norm_bound`.
        niters: Number K of Gram products; 0 gives the Frobenius norm.

    Shape:
        matrix: (*batch, m, n)

    Guarantee:
        Upper bound of the exact norm of the given floats; at most $r^{2^{-K-1}}$ times the norm
        for rank r, up to rounding.

    Raises:
        ValueError: `matrix` has fewer than two dims or contains NaN or infinity.

    References:
        B. Delattre, Q. Barthelemy, A. Araujo, A. Allauzen, Efficient bound of Lipschitz constant
        for convolutional layers by Gram iteration, ICML 2023 (in exact arithmetic).
    """
    _checks.non_negative_int("gram_norm_bound", niters=niters)
    return _by_blocks(matrix, "gram_norm_bound", lambda blocks, floor: _gram_bound(blocks, niters))


def _by_blocks(matrix: Tensor, owner: str, bound: Callable[..., float]) -> float:
    """The largest bound of blocks that are scaled to entries of modulus at most about 2."""
    _checks.tensor(owner, matrix=matrix)
    _checks.require(
        matrix.ndim >= 2,
        owner,
        "matrix must have shape (*batch, m, n)",
        "Reshape the weight to a matrix first, e.g. weight.flatten(1)",
        matrix=matrix,
    )
    matrix = exact_float64(matrix, owner)
    blocks = matrix.reshape(-1, *matrix.shape[-2:]) if matrix.numel() else matrix.new_zeros(0, 1, 1)
    scale = power_of_two_scale(blocks)
    if scale == 0.0:
        return 0.0
    blocks = blocks / scale
    if blocks.shape[-2] < blocks.shape[-1]:
        blocks = blocks.mH
    size = blocks.shape[-1]
    largest = 0.0
    for chunk in blocks.split(max(1, _CHUNK // size**2)):
        largest = max(largest, bound(chunk, floor=largest))
    lost = sqrt_up(blocks.shape[-2] * size) * UNDERFLOW  # entries flushed by the scaling
    return mul_up(add_up(largest, lost), scale)


def exact_float64(tensor: Tensor, owner: str) -> Tensor:
    """The values in float64 or complex128, on the CPU; refused where an entry is not finite."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    _checks.require(
        not tensor.is_meta,
        owner,
        "a bound needs numbers, and a tensor on the meta device has none",
        "Fill the model first, e.g. model.to_empty(device='cpu') and load_state_dict",
        shape=tuple(tensor.shape),
    )
    tensor = tensor.detach().to("cpu", dtype)
    _checks.require(
        bool(tensor.isfinite().all()),
        owner,
        "every entry must be finite",
        "Look for the step of the training that made a NaN or an infinity",
        tensor=tensor,
    )
    return tensor


def _scaled_bound(blocks: Tensor, floor: float) -> float:
    """The bound for (b, m, n) blocks, m >= n, with entries of modulus at most about 2.

    `floor` is a number that the caller has to return at least anyway: proving less is no use.
    """
    m, n = blocks.shape[-2:]
    cost = _cost(blocks)
    norm2 = squared_norm_up(blocks, batch_dims=1)
    gram = blocks.mH @ blocks
    gram = (gram + gram.mH) * 0.5  # exactly Hermitian, with a real diagonal
    gram_error = add_up(mul_up(cost(m + 2), norm2), 4 * m * n * UNDERFLOW)

    estimate = floor * floor or _largest_eigenvalue(gram)
    margins = list(_MARGINS)
    while margins:
        margin = margins[0]
        tau = estimate * (1.0 + margin) + 8 * n * UNIT_ROUNDOFF * estimate + UNDERFLOW
        if tau >= norm2:
            break
        shifted = -gram
        diagonal = shifted.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(tau)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if bool((info != 0).any()):
            # A block that the screening passed over, or else a margin that was too small.
            higher = _largest_eigenvalue(gram[info != 0])
            if higher > estimate * (1.0 + margins[0]):
                estimate = higher
            else:
                margins.pop(0)
            continue
        residual = sqrt_up(squared_norm_up(shifted - factor @ factor.mH, batch_dims=1))
        rounding = add_up(
            mul_up(cost(n + 1), squared_norm_up(factor, batch_dims=1)),
            mul_up(2 * UNIT_ROUNDOFF, residual),
            mul_up(2 * UNIT_ROUNDOFF, up(float(diagonal.abs().max()))),
            4 * n * n * UNDERFLOW,
        )
        return sqrt_up(min(add_up(tau, residual, rounding, gram_error), norm2))
    return min(sqrt_up(norm2), _gram_bound(blocks, _PRODUCTS))


def _cost(blocks: Tensor) -> Callable[[int], float]:
    """The error of a product of k terms, relative to that of the absolute values.

    A complex product is at most a few real ones (also by Gauss's three-product scheme).
    """
    return (lambda k: mul_up(4.0, gamma(2 * k + 4))) if blocks.is_complex() else gamma


def _gram_bound(blocks: Tensor, niters: int) -> float:
    """The bound by Gram iteration for (b, m, n) blocks, with entries of modulus at most about 2."""
    cost = _cost(blocks)
    steps: list[tuple[Tensor, Tensor]] = []  # (scale of the product, error of the product)
    for _ in range(niters):
        m, n = blocks.shape[-2:]
        error = _squares(blocks) * cost(m + 2) + 4 * m * n * UNDERFLOW
        blocks = blocks.mH @ blocks
        exponent = torch.frexp(blocks.abs().amax(dim=(-2, -1)))[1] - 1
        scale = torch.ldexp(torch.ones_like(error), exponent)
        blocks = blocks / scale[:, None, None]
        lost = scale * (n * UNDERFLOW)  # entries flushed by the scaling
        steps.append((scale, (error + lost) * _OUTWARD + UNDERFLOW))
    bound = _squares(blocks).sqrt() * _OUTWARD
    for scale, error in reversed(steps):
        bound = ((scale * bound + error) * _OUTWARD).sqrt() * _OUTWARD
    return float(bound.max())


def _squares(blocks: Tensor) -> Tensor:
    """Not less than the squared Frobenius norm of each block, cf. `squared_norm_up`."""
    if blocks.is_complex():
        blocks = torch.view_as_real(blocks.resolve_conj())
    squares = blocks.square().flatten(1)
    count = squares.shape[1]
    return squares.sum(1) * up(1.0 + 2.0 * gamma(2 * count + 4)) + 2 * count * UNDERFLOW


def _largest_eigenvalue(gram: Tensor) -> float:
    """An estimate of the largest eigenvalue of (b, n, n) Hermitian blocks: nothing is proved."""
    n = gram.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, 1, dtype=torch.float64, generator=generator).to(gram.dtype)
    vector = start / start.norm()
    if gram.shape[0] > _CANDIDATES and n > _TINY:  # power iteration picks the blocks that matter
        trial = gram @ vector
        for _ in range(_SCREENING):
            trial = gram @ torch.nn.functional.normalize(trial, dim=1)
        lengths = torch.linalg.vector_norm(trial, dim=(1, 2))
        gram = gram[lengths.topk(_CANDIDATES).indices]
    if n <= _DIRECT:
        return float(torch.linalg.eigvalsh(gram)[:, -1].max())
    return _lanczos(gram, vector)


def _lanczos(gram: Tensor, vector: Tensor) -> float:
    """The largest Ritz value of (b, n, n) Hermitian blocks from a start vector (n, 1)."""
    batch, n = gram.shape[:2]
    steps = min(_KRYLOV, n)
    vector = vector.expand(batch, n, 1)
    basis = gram.new_zeros(batch, n, steps)
    projected = torch.zeros(batch, steps, steps, dtype=torch.float64)
    for j in range(steps):
        basis[:, :, j : j + 1] = vector
        image = gram @ vector
        projected[:, j, j] = (vector.mH @ image).real[:, 0, 0]
        for _ in range(2):  # full orthogonalization, twice
            image = image - basis @ (basis.mH @ image)
        length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        # A block whose Krylov space is exhausted goes on with the zero vector.
        alive = length > 1e-13 * projected[:, :1, :1].abs()
        if j + 1 == steps or not bool(alive.any()):
            break
        projected[:, j, j + 1] = projected[:, j + 1, j] = (length * alive)[:, 0, 0]
        vector = torch.where(alive, image / length.clamp_min(1e-300), 0.0).to(gram.dtype)
    return down(float(torch.linalg.eigvalsh(projected)[:, -1].max()))
