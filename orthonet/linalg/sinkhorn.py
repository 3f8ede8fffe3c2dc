r"""Scaling of a positive matrix to given row and column sums."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet._torch import in_forward_mode, is_traced

__all__ = ["sinkhorn"]


def sinkhorn(logits: Tensor, niters: int = 1000) -> Tensor:
    r"""The doubly stochastic matrix \(\operatorname{diag}(u)\,e^L \operatorname{diag}(v)\).

    Alternating normalization of rows and columns in the logarithm, ended when the sums are right to
    rounding; after `niters` rounds (100 where code is traced, with columns as near as they got) by
    Newton steps. Derivatives of first and second order are implicit: solves
    with \(I - P P^\top\), independent of the number of rounds.

    Shape:
        `logits`: (*batch, n, n). Output: the same.

    References:
        Sinkhorn, Ann. Math. Statist. 35 (1964); Eisenberger et al., *A unified framework for
        implicit Sinkhorn differentiation*, CVPR 2022.
    """
    with torch.no_grad():
        x = logits.detach()
        for step in range(1 if x.is_meta else 100 if is_traced() else niters):
            x = x - torch.logsumexp(x, -2, keepdim=True)
            rows = torch.logsumexp(x, -1, keepdim=True)
            x = x - rows
            enough = 4.0 * torch.finfo(x.dtype).eps
            look = step % 8 == 7 and not is_traced()
            if look and bool((rows.abs() <= enough).all()):
                break
        p = x.exp() if x.is_meta or is_traced() else _finished(x.exp(), enough)
    if not logits.requires_grad and not in_forward_mode():
        return p
    # Newton steps, from p, keep its sums while the logits move: each gives one order of derivatives
    q = p * (logits - logits.detach()).exp()
    inverse = _inverse(p)
    for _ in range(2):
        q = _step(q, p, inverse, (p - q).sum(-1, keepdim=True), (p - q).sum(-2)[..., None])
    return q


def _inverse(p: Tensor) -> Tensor:
    """The inverse of I - P P^T, with 1 instead of 0 for the common shift of rows and columns.

    A matrix that falls apart has a shift for each part. They cancel in every step, so that any
    value other than 0 will do: that of rounding.
    """
    n = p.shape[-1]
    identity = torch.eye(n, dtype=p.dtype, device=p.device)
    lifted = identity * (1.0 + 4.0 * torch.finfo(p.dtype).eps) - p @ p.mT
    return torch.linalg.inv_ex(lifted + torch.full_like(p, 1.0 / n)).inverse


def _step(q: Tensor, p: Tensor, inverse: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A Newton step toward sums that are larger by `rows` and `columns`, both (*batch, n, 1)."""
    a = inverse @ (rows - p @ columns)
    return q * (a + (columns - p.mT @ a).mT).exp()


def _finished(p: Tensor, enough: float) -> Tensor:
    """Newton steps for matrices that nearly fall apart, on which the rounds of scaling crawl."""
    worst = torch.inf
    for _ in range(20):
        rows, columns = 1.0 - p.sum(-1, keepdim=True), 1.0 - p.sum(-2)[..., None]
        off = max(float(rows.abs().amax()), float(columns.abs().amax())) if p.numel() else 0.0
        if off <= enough or not off < worst:
            break
        last, worst = p, off
        p = _step(p, p, _inverse(p), rows, columns)
    return p if off <= worst else last
