r"""Scaling of a positive matrix to given row and column sums."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet._torch import in_forward_mode, is_traced

__all__ = ["sinkhorn"]


def sinkhorn(logits: Tensor, niters: int = 1000) -> Tensor:
    r"""The doubly stochastic matrix \(\operatorname{diag}(u)\,e^L \operatorname{diag}(v)\).

    Alternating normalization of rows and columns in the logarithm, ended when the sums are right to
    rounding; at most `niters` rounds (100 where code is traced), after which rows are
    exact and columns as near as it got. Derivatives of first and second order are implicit: solves
    with \(I - P P^\top\), independent of the number of rounds.

    Shape:
        `logits`: (*batch, n, n). Output: the same.

    References:
        Sinkhorn, Ann. Math. Statist. 35 (1964); Eisenberger et al., *A unified framework for
        implicit Sinkhorn differentiation*, CVPR 2022.
    """
    n = logits.shape[-1]
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
        p = x.exp()
    if not logits.requires_grad and not in_forward_mode():
        return p
    # Newton steps, from p, keep its sums while the logits move: each gives one order of derivatives
    q = p * (logits - logits.detach()).exp()
    ones = torch.full_like(p, 1.0 / n)  # removes the common shift of a and -b
    identity = torch.eye(n, dtype=p.dtype, device=p.device)
    inverse = torch.linalg.inv(identity - p @ p.mT + ones)
    for _ in range(2):
        change = p - q
        rows, columns = change.sum(-1, keepdim=True), change.sum(-2)[..., None]
        a = inverse @ (rows - p @ columns)
        q = q * (a + (columns - p.mT @ a).mT).exp()
    return q
