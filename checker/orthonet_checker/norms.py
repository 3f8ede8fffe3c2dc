r"""Proofs that the spectral norm of a linear map is small, from its numbers alone.

What they rest on: CPython integers and fractions, Arb for cosines, and IEEE-754 binary64 in NumPy
with sums in any order, with or without fused multiplications (but no Strassen in `cholesky`).
LAPACK is used and not trusted. Everything is scaled by powers of two to entries of at most 1, so
that all underflow together is below ETA, and every sum of non-negative floats that is an upper
bound has at most 2^23 terms, so that the exact sum is at most SLACK times the computed one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import flint
import numpy as np

from orthonet_checker.schema import Rejected, need

U = 2.0**-53
SLACK = 1 + 2.0**-29
ETA = 2.0**-400
TERMS = 2**22


def gamma(count: int) -> Fraction:
    """Relative error of a sum of products with so many roundings for each of its terms."""
    need(count < 2**40, "too many roundings")
    return Fraction(count) / (2**53 - count)


def root_up(square: Fraction) -> Fraction:
    """A rational number that is not below the root, and above it by less than 2^-80 of it."""
    shift = 2 * max(0, 90 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2)
    root = math.isqrt((square.numerator << shift) // square.denominator + 1) + 1
    return Fraction(root, 1 << (shift // 2))


def shorten(square: Fraction) -> Fraction:
    """Not below the number, with some 1000 digits at most: products in a row stay cheap.

    Up to 512 binary digits nothing is lost, and of more less than 2^-510 of the number, or 2^-8192.
    """
    size = square.numerator.bit_length() - square.denominator.bit_length()
    need(size < 8192, "gains too large to be multiplied")
    if square.numerator.bit_length() <= 512 and square.denominator.bit_length() <= 8192:
        return square
    shift = min(8192, 511 - size)
    scaled = square * Fraction(2) ** shift
    return Fraction(-(-scaled.numerator // scaled.denominator)) / Fraction(2) ** shift


def scale_of(a: np.ndarray) -> float:
    """The power of two that brings all entries into [-1, 1]; 1 for zeros."""
    largest = float(np.max(np.abs(a), initial=0.0))
    return math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0


def moderate(a: Any, low: int, high: int) -> bool:
    """Whether all numbers are 0 or lie between these powers of two, in absolute value."""
    size = np.abs(np.asarray(a, dtype=np.float64))
    return bool(np.all((size == 0) | ((size > 2.0**low) & (size < 2.0**high))))


def square_up(a: np.ndarray) -> Fraction:
    """Not below the sum of the squares of entries of at most 1."""
    need(a.size <= 2 * TERMS, "too many numbers for one sum")
    return Fraction(float(np.sum(a * a)) * SLACK + ETA)


# --- near-isometries: exact products, no witness -----------------------------------------------


def pieces_of(a: np.ndarray, terms: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(bits, h, l, rest) with a = h 2^-bits + l 2^-2bits + rest exactly, h and l integers.

    |h| <= 2^bits and |l| <= 2^(bits - 1), so that sums of `terms` products of them stay below
    2^51: exact in any order, and two bits are left for an algorithm that adds before it multiplies.
    """
    need(1 <= terms <= TERMS, "too many products for one exact sum")
    bits = (50 - math.ceil(math.log2(terms))) // 2
    h = np.rint(np.ldexp(a, bits))
    rest = a - np.ldexp(h, -bits)
    low = np.rint(np.ldexp(rest, 2 * bits))
    return bits, h, low, rest - np.ldexp(low, -2 * bits)


def products(a: tuple, b: tuple) -> list[np.ndarray]:
    """Exact pieces whose sum is A B^T, rests left out: of what `pieces_of` returned for each."""
    (bits, ah, al, _), (_, bh, bl, _) = a, b
    mixed = ah @ bl.swapaxes(-1, -2) + al @ bh.swapaxes(-1, -2)
    return [
        np.ldexp(ah @ bh.swapaxes(-1, -2), -2 * bits),
        np.ldexp(mixed, -3 * bits),
        np.ldexp(al @ bl.swapaxes(-1, -2), -4 * bits),
    ]


def rest_error(a: np.ndarray, rest: np.ndarray) -> Fraction:
    """|A A^T - M M^T| for M = A - rest, by A rest^T + rest A^T - rest rest^T."""
    lost = root_up(square_up(rest))
    return 2 * root_up(square_up(a)) * lost + lost * lost


def size_of(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Upper bounds of the entries of the exact sum of the parts; SLACK covers its own rounding."""
    total, size = parts[0], np.abs(parts[0])
    for part in parts[1:]:
        total, size = total + part, size + np.abs(part)
    return np.abs(total) + (4 * len(parts) * U) * size


def row_sum(rows: np.ndarray) -> Fraction:
    """The largest row sum of non-negative entries, upwards."""
    need(rows.shape[-1] <= TERMS, "too many numbers for one sum")
    return Fraction(float(np.max(np.sum(rows, axis=-1))) * SLACK + ETA)


def gram(a: np.ndarray) -> Fraction:
    """|A|^2 = |A A^T| <= the largest row sum of |A A^T|, for the shorter side of A."""
    a = a if a.shape[0] <= a.shape[1] else a.T
    s = scale_of(a)
    a = a / s
    parts = pieces_of(a, a.shape[1])
    return (row_sum(size_of(products(parts, parts))) + rest_error(a, parts[3])) * Fraction(s) ** 2


# --- any matrix: t I - A A* = R R* + F -----------------------------------------------------------


def cholesky(re: np.ndarray, im: np.ndarray, t: float) -> Fraction:
    """|A|^2 <= t + |F| for all matrices A = re + i im of a batch (count, m, n), m <= n.

    t I - A A* = R R* + F with whatever R LAPACK gives, as R R* is positive semidefinite. With k = n
    or m, each product of reals has 2 k terms, so that its error is at most gamma_2k |A| |A|^T entry
    by entry and gamma_2k |A|_F^2 in the Frobenius norm, for real and imaginary parts: root 2
    times that together. Forming F rounds twice: less than u (t m + |A|_F^2 + |F|_F).
    """
    need(re.ndim == 3 and re.shape == im.shape and re.shape[1] <= re.shape[2], "no batch")
    m, n = re.shape[1:]
    g_re, g_im = _hermitian(re, im)
    shift = t * np.eye(m)
    try:
        r = (
            np.linalg.cholesky(shift - g_re - 1j * g_im)
            if im.any()
            else (np.linalg.cholesky(shift - g_re))
        )
    except np.linalg.LinAlgError:
        raise Rejected(f"t I - A A* is not positive definite at t = {t!r}") from None
    r_re, r_im = np.ascontiguousarray(r.real), np.ascontiguousarray(r.imag)
    need(bool(np.isfinite(r_re).all() and np.isfinite(r_im).all()), "no factor")
    rr_re, rr_im = _hermitian(r_re, r_im)
    left = _largest(shift - g_re - rr_re, -g_im - rr_im)
    rounding = 2 * gamma(2 * n + 4) * _largest(re, im) + 2 * gamma(2 * m + 4) * _largest(r_re, r_im)
    rounding += Fraction(2 * m, 2**53) * Fraction(t)
    return Fraction(t) + root_up(left) * (1 + Fraction(1, 2**40)) + rounding + Fraction(ETA)


def spectral(a: np.ndarray) -> tuple[Fraction, Fraction]:
    """Bounds of |A| and of |A|_F for a matrix: the first is that of `cholesky`, without a witness.

    LAPACK finds t and R, and neither is trusted. Sums are taken row by row.
    """
    a = a if a.shape[0] <= a.shape[1] else a.T
    s = scale_of(a)
    a = np.ascontiguousarray(a / s)
    (m, n), scale = a.shape, Fraction(s)
    need(m <= 4096 and n <= TERMS, "too large a matrix")
    size = _squares(a)
    g, found = a @ a.T, size
    need(bool(np.isfinite(g).all()), "a matrix that is not finite")
    large = m > 1024
    top = _krylov(g) if large else float(np.linalg.eigvalsh(g)[-1])
    for room in (2.0**-10, 2.0**-7, 2.0**-4) if large else (2.0**-30, 2.0**-20, 2.0**-10):
        t = top * (1 + room)
        try:
            r = np.linalg.cholesky(t * np.eye(m) - g)
        except np.linalg.LinAlgError:
            continue
        if not (t > 0 and bool(np.isfinite(r).all())):
            continue
        left = root_up(_squares(t * np.eye(m) - g - r @ r.T))
        rounding = 2 * gamma(2 * n + 4) * size + 2 * gamma(2 * m + 4) * _squares(r)
        rounding += Fraction(2 * m, 2**53) * Fraction(t)
        found = min(found, Fraction(t) + left * (1 + Fraction(1, 2**40)) + rounding + Fraction(ETA))
        break
    return root_up(found) * scale, root_up(size) * scale


def _squares(a: np.ndarray) -> Fraction:
    """Not below the sum of the squares of entries that are at most about 1, row by row."""
    return Fraction(float(np.sum(np.sum(a * a, axis=1))) * SLACK + ETA)


def _krylov(g: np.ndarray) -> float:
    """About the largest eigenvalue of a symmetric matrix; nothing rests on it."""
    v, basis = np.random.default_rng(0).normal(size=len(g)), np.zeros((0, len(g)))
    for _ in range(40):
        for _ in range(2):
            v = v - (basis @ v) @ basis
        length = float(np.linalg.norm(v))
        if not 0 < length < math.inf:
            break
        basis = np.concatenate([basis, v[None] / length])
        v = basis[-1] @ g
    return float(np.linalg.eigvalsh(basis @ g @ basis.T)[-1]) if len(basis) else 0.0


def positive(q: np.ndarray, error: Fraction) -> bool:
    """Whether a symmetric matrix is proved positive semidefinite, known up to `error`.

    Q - s I = R R^T + F, so that the least eigenvalue is at least s - |F| - error; the roundings
    are those of `cholesky`, of one product. The diagonal of Q should be about 1.
    """
    need(q.ndim == 2 and q.shape[0] <= 4096 and bool(np.isfinite(q).all()), "too large a matrix")
    size, shift = q.shape[0], 2.0**-28
    try:
        r = np.linalg.cholesky(q - shift * np.eye(size))
    except np.linalg.LinAlgError:
        return False
    if not bool(np.isfinite(r).all()):
        return False
    zero = np.zeros((1, size, size))
    left = _largest((q - shift * np.eye(size) - r @ r.T)[None], zero)
    rounding = 2 * gamma(2 * size + 4) * _largest(r[None], zero)
    rounding += Fraction(2, 2**53) * (root_up(_largest(q[None], zero)) + size)
    return root_up(left) * (1 + Fraction(1, 2**40)) + rounding + error <= Fraction(shift)


def _hermitian(re: np.ndarray, im: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A A* in floats."""
    if not im.any():
        return re @ re.swapaxes(1, 2), np.zeros((len(re), re.shape[1], re.shape[1]))
    both, turned = np.concatenate([re, im], 2), np.concatenate([im, -re], 2)
    return both @ both.swapaxes(1, 2), turned @ both.swapaxes(1, 2)


def _largest(re: np.ndarray, im: np.ndarray) -> Fraction:
    """The largest squared Frobenius norm in a batch, upwards."""
    need(re[0].size <= TERMS, "too many numbers for one sum")
    squares = np.sum(re * re, axis=(1, 2)) + np.sum(im * im, axis=(1, 2))
    return Fraction(float(np.max(squares)) * SLACK + ETA)


def matrix(a: np.ndarray, t: Fraction, error: Fraction = Fraction(0)) -> Fraction:
    """|A|^2 for a matrix that is known up to `error` in the spectral norm, by `cholesky` with t."""
    a = a if a.shape[0] <= a.shape[1] else a.T
    s = scale_of(a)
    need(a.size <= 2 * TERMS, "too large a matrix")
    square = cholesky((a / s)[None], np.zeros((1, *a.shape)), scaled(t, s)) * Fraction(s) ** 2
    return square if not error else (root_up(square) + error) ** 2


def scaled(t: Fraction, s: float) -> float:
    """T / s^2 as a float (any t will do, so its rounding does not matter)."""
    found = float(t / Fraction(s) ** 2)
    need(2.0**-60 < found < 2.0**60, "t is far from the size of the map")
    return found


# --- convolutions --------------------------------------------------------------------------------


def polyphase(kernel: np.ndarray, stride: Sequence[int]) -> np.ndarray:
    """(groups, out, in, *k) with strides as (groups, out, in * prod(strides), *k') without any.

    The pixels of the input are sorted by their residues, which is a permutation.
    """
    for axis, s in enumerate(stride, 3):
        pad = [(0, 0)] * kernel.ndim
        pad[axis] = (0, -kernel.shape[axis] % s)
        kernel = np.pad(kernel, pad)
        shape = kernel.shape
        kernel = kernel.reshape(*shape[:axis], shape[axis] // s, s, *shape[axis + 1 :])
        kernel = np.moveaxis(kernel, axis + 1, 3)
        kernel = kernel.reshape(*shape[:2], -1, *kernel.shape[4:])
    return kernel


def _flat(kernel: np.ndarray, stride: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...], float]:
    """(groups, taps, c, inner) with c <= inner and entries of at most 1, the taps, the scale.

    If there are more outputs than inputs, the adjoint takes its place: it has the same norm, and so
    has its reflection, which is what exchanging the channels alone gives.
    """
    kernel = polyphase(kernel, stride)
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.swapaxes(1, 2)
    groups, c, inner, *taps = kernel.shape
    s = scale_of(kernel)
    flat = kernel.reshape(groups, c, inner, -1) / s
    return np.ascontiguousarray(np.moveaxis(flat, 3, 1)), tuple(taps), s


def gram_convolution(kernel: np.ndarray, stride: Sequence[int], squared: bool) -> Fraction:
    """|T|^2 on Z^d: T T* is a convolution with R_d = sum_t K_t K_{t+d}^T, a bound of any image.

    A zero-padded convolution is a part of T, a circular one has some of its frequencies. T T* is
    self-adjoint: its norm is at most the largest sum of |R_d| along a row. `squared`: of T T* = m I
    + E the norm of E by that of E E*, which is a convolution again.
    """
    flat, taps, s = _flat(kernel, stride)
    groups, count, c, inner = flat.shape
    need(count <= 4096, "too many taps for row sums")
    bits, high, low, rest = pieces_of(flat, count * inner)
    index = np.stack(np.unravel_index(np.arange(count), taps), 1)
    sums: dict[tuple[int, ...], list[np.ndarray]] = {}
    for t, u in itertools.product(range(count), repeat=2):
        a, b = ((bits, high[:, i], low[:, i], None) for i in (t, u))
        lag = tuple(int(x) for x in index[u] - index[t])
        found = products(a, b)
        sums[lag] = [x + y for x, y in zip(sums[lag], found, strict=True)] if lag in sums else found
    # what the rests do: for each lag a sum of at most `count` blocks of a matrix of that norm
    lost = max(rest_error(flat[g], rest[g]) for g in range(groups)) * count * len(sums)
    if not squared:
        rows = sum(size_of(parts) for parts in sums.values())
        return (row_sum(rows) + lost) * Fraction(s) ** 2
    zero = (0,) * len(taps)
    m = float(np.max(np.diagonal(sum(sums[zero]), axis1=1, axis2=2)))
    sums[zero].append(np.broadcast_to(-m * np.eye(c), (groups, c, c)))
    e = {lag: sum(parts[1:], start=parts[0]) for lag, parts in sums.items()}
    off = row_sum(sum((4 * len(p) * U) * sum(np.abs(x) for x in p) for p in sums.values()))
    z = max(scale_of(x) for x in e.values())
    lags = list(e)
    stack = np.concatenate([e[lag] / z for lag in lags], 1)  # (groups, lags * c, c)
    norm = row_sum(sum(np.abs(e[lag]) / z for lag in lags))
    second: dict[tuple[int, ...], np.ndarray] = {}
    for a in lags:  # (E E*)_d = sum_a E_a E_{a+d}^T
        block = (e[a] / z @ stack.swapaxes(1, 2)).reshape(groups, c, len(lags), c)
        for j, b in enumerate(lags):
            lag = tuple(y - x for x, y in zip(a, b, strict=True))
            second[lag] = second[lag] + block[:, :, j] if lag in second else block[:, :, j]
    square = row_sum(sum(np.abs(x) for x in second.values()))
    square += gamma(c + len(lags) + 2) * norm**2 + Fraction(ETA)
    return (Fraction(m) + root_up(square) * Fraction(z) + off + lost) * Fraction(s) ** 2


def roots_of_unity(count: int) -> np.ndarray:
    """exp(2 pi i j / count), real and imaginary parts proved within 2^-53 by Arb."""
    need(count <= 2**15, "too large an image for the torus")
    flint.ctx.prec = 100
    table = np.empty(count, complex)
    for j in range(count):
        angle = flint.arb(flint.fmpq(2 * j, count))
        cos, sin = angle.cos_pi(), angle.sin_pi()
        table[j] = complex(float(cos.mid()), float(sin.mid()))
        need(abs(cos - table[j].real) < U and abs(sin - table[j].imag) < U, "root of unity")
    return table


def torus(
    kernel: np.ndarray, stride: Sequence[int], circle: Sequence[int], t: Fraction
) -> Fraction:
    """|T|^2 on the torus of `circle` pixels behind the strides, frequency by frequency.

    S = sum_t w_t z^t with |z - fl(z)| <= u in each part and sums of `count` products: entry by
    entry each part is off by (u + gamma_(count + 2)) sum_t |w_t|.
    """
    flat, taps, s = _flat(kernel, stride)
    groups, count, c, inner = flat.shape
    whole = math.lcm(*circle)
    table = roots_of_unity(whole)
    half = (*circle[:-1], circle[-1] // 2 + 1)  # the kernel is real: the others are conjugate
    need(math.prod(half) * count <= 4 * TERMS, "too many taps and frequencies for the torus")
    frequency = np.indices(half).reshape(len(half), -1).T * (whole // np.array(circle))
    place = np.indices(taps).reshape(len(taps), -1)
    waves = table[(frequency @ place) % whole]
    weights = flat.transpose(1, 0, 2, 3).reshape(count, -1)
    majorant = np.sum(np.abs(weights), axis=0).reshape(groups, -1)
    relative = 2 * (Fraction(1, 2**53) + gamma(count + 2))  # 2 > root 2, and the sum's rounding
    off = relative * max(root_up(square_up(row)) for row in majorant / count) * count
    shift, square = scaled(t, s), Fraction(0)
    step = max(1, TERMS // (2 * groups * c * inner))
    for first in range(0, len(waves), step):
        part = waves[first : first + step]
        re = (np.ascontiguousarray(part.real) @ weights).reshape(-1, c, inner)
        im = (np.ascontiguousarray(part.imag) @ weights).reshape(-1, c, inner)
        square = max(square, cholesky(re, im, shift))
    return (root_up(square) + off) ** 2 * Fraction(s) ** 2
