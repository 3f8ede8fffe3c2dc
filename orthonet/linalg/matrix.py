"""Small tools shared by the matrix functions: which side is small, safe scales, dtypes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from orthonet import _checks

__all__ = [
    "add_identity",
    "batches",
    "cholesky",
    "compute_dtype",
    "divide_triangular",
    "gram_defect",
    "high",
    "minus_product",
    "minus_transpose",
    "on_tall",
    "require_finite",
    "rms_scale",
    "split",
    "stacked",
    "symmetric_product",
]

T = TypeVar("T")

_BLOCKS_FROM = 384  # below, the calls cost more than the products saved
_PADDING = 16  # see `cholesky`


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix function of `dtype` input works: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def high(x: Tensor) -> Tensor:
    """The tensor in float64, where the device has it."""
    return x if x.device.type == "mps" else x.to(torch.promote_types(x.dtype, torch.float64))


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
        if w.is_meta:
            return torch.empty_like(w)
        x = w.to(compute_dtype(w.dtype))
        if w.shape[-2] >= w.shape[-1]:
            return function(x, *args, **kwargs).to(w.dtype)
        return function(x.mT, *args, **kwargs).mT.to(w.dtype)

    return wrapper


def divide_triangular(x: Tensor, t: Tensor, *, upper: bool = True) -> Tensor:
    """X T^-1 for triangular T, of which the other triangle is not read.

    Large single systems are solved transposed, from the left: 0.7 of the time from the right at
    2048 x 256 and 0.8 to 0.9 at 256 and 512; 1.3 of it at 64, batched or not.
    """
    if t.ndim == 2 and t.shape[-1] > 128:
        return torch.linalg.solve_triangular(t.mT, x.mT, upper=not upper).mT
    return torch.linalg.solve_triangular(t, x, upper=upper, left=False)


def minus_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A - B C."""
    if a.ndim > 3:
        return a - b @ c
    return (torch.addmm if a.ndim == 2 else torch.baddbmm)(a, b, c, alpha=-1.0)


def add_identity(a: Tensor, scale: float = 1.0) -> Tensor:
    """Add `scale` times the identity to `a` in place and return it."""
    a.diagonal(dim1=-2, dim2=-1).add_(scale)
    return a


def symmetric_product(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    *,
    plus: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """The symmetric alpha a^T b + beta plus; without `plus`, a^T b, which must be symmetric.

    For large matrices, only the blocks on and above the diagonal are computed, ten of sixteen. The
    blocks below are copied.
    """
    n = b.shape[-1]
    if a.ndim > 2 or n < _BLOCKS_FROM or n % 4 or not a.is_cpu:
        if plus is None:
            return torch.matmul(a.mT, b, out=out)
        add = torch.addmm if a.ndim == 2 else torch.baddbmm
        return add(plus, a.mT, b, beta=beta, alpha=alpha, out=out)
    out = _rows_apart(b, n) if out is None else out
    if plus is None:
        plus, beta = out, 0.0  # then it is not read
    width = n // 4
    for i in range(0, n, width):
        rows = slice(i, i + width)
        part = out[rows, i:]
        torch.addmm(plus[rows, i:], a[:, rows].T, b[:, i:], beta=beta, alpha=alpha, out=part)
        if i:
            out[rows, :i].copy_(out[:i, rows].T)
    return out


def _rows_apart(like: Tensor, n: int) -> Tensor:
    """An empty (n, n) matrix, whose columns the processor's cache can hold: see `cholesky`."""
    width = n if n % 128 else n + _PADDING
    return like.new_empty(n, width)[:, :n]


def cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular L with L L^T = `gram`, and what `torch.linalg.cholesky_ex` says of it.

    Where the side is a multiple of 128, on the CPU, it is done with 16 more rows and columns of the
    identity, in half of the time: `cholesky_ex` begins with a copy of the triangle into columns,
    all entries of a row of which are then at one place of the processor's cache.
    """
    n = gram.shape[-1]
    if gram.ndim > 2 or n % 128 or not gram.is_cpu:
        return torch.linalg.cholesky_ex(gram)
    padded = gram.new_zeros(n + _PADDING, n + _PADDING)
    padded[:n, :n] = gram
    padded.diagonal()[n:] = 1.0
    lower, info = torch.linalg.cholesky_ex(padded)
    return lower[:n, :n], info


def minus_transpose(s: Tensor, out: Tensor | None = None) -> Tensor:
    """S - s^T for square s; the transpose is copied first where that is faster."""
    if s.ndim > 2 or s.shape[-1] <= 128 or not s.is_cpu:
        return torch.sub(s, s.mT, out=out)
    transposed = s.T.contiguous() if out is None else out.copy_(s.T)
    return torch.sub(s, transposed, out=transposed)


def require_finite(owner: str, w: Tensor) -> None:
    """Raise unless every entry is finite; the error names `owner`."""
    _checks.require(
        bool(torch.isfinite(w).all()),
        owner,
        "w must be finite",
        "Lower the learning rate or clip gradients; the weight holds NaN or Inf, and "
        "[n for n, p in model.named_parameters() if not p.isfinite().all()] names it",
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


_ALONE_FROM = 384  # smaller side from which one matrix fills a processor


def batches(
    items: Sequence[T],
    matrices: Callable[[T], Tensor],
    kind: Callable[[T], object] = lambda _: None,
    largest: float = math.inf,
) -> Iterator[list[T]]:
    """Yield items whose matrices make one batch: of one shape, dtype, device and kind.

    A batch has at most about `largest` entries. On the CPU large matrices stay alone: a batch of
    them gains nothing and is copied.
    """
    groups: dict[object, list[T]] = {}
    for item in items:
        p = matrices(item)
        groups.setdefault((p.shape[-2:], p.dtype, p.device, kind(item)), []).append(item)
    for group in groups.values():
        p = matrices(group[0])
        alone = p.device.type == "cpu" and min(p.shape[-2:]) >= _ALONE_FROM
        batch: list[T] = []
        size = 0
        for item in group:
            size += matrices(item).numel()
            if batch and (alone or size > largest):
                yield batch
                batch, size = [], matrices(item).numel()
            batch.append(item)
        yield batch


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return all matrices of some tensors as one batch, (k, m, n); a single one as (m, n)."""
    if len(tensors) > 1:
        return torch.cat([t.reshape(-1, *t.shape[-2:]) for t in tensors])
    sizes = tensors[0].shape[-2:]
    return tensors[0].reshape(sizes if tensors[0].shape[:-2].numel() == 1 else (-1, *sizes))


def split(batch: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the inverse of `stacked`: a tensor of the batch shape of each of `like`."""
    sizes = batch.shape[-2:]
    pieces = batch.reshape(-1, *sizes).split([t.shape[:-2].numel() for t in like])
    return [p.reshape(*t.shape[:-2], *sizes) for p, t in zip(pieces, like, strict=True)]
