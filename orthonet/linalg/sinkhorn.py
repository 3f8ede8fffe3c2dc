r"""Scaling of a positive matrix to given row and column sums."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet._torch import is_traced

__all__ = ["sinkhorn"]


def sinkhorn(logits: Tensor, niters: int = 1000) -> Tensor:
    r"""The doubly stochastic matrix \(\operatorname{diag}(u)\,e^L \operatorname{diag}(v)\).

    Alternating normalization of rows and columns in the logarithm, ended when the sums are right to
    rounding; at most `niters` rounds (100 where code is traced), after which rows are
    exact and columns as near as it got. The gradient is implicit: a solve with
    \(I - P P^\top\), independent of the number of rounds, of first order only.

    Shape:
        `logits`: (*batch, n, n). Output: the same.

    References:
        Sinkhorn, Ann. Math. Statist. 35 (1964); Eisenberger et al., *A unified framework for
        implicit Sinkhorn differentiation*, CVPR 2022.
    """
    n = logits.shape[-1]
    with torch.no_grad():
        x = logits.detach()
        for step in range(100 if is_traced() else niters):
            x = x - torch.logsumexp(x, -2, keepdim=True)
            rows = torch.logsumexp(x, -1, keepdim=True)
            x = x - rows
            enough = 4.0 * torch.finfo(x.dtype).eps
            look = step % 8 == 7 and not is_traced() and not x.is_meta
            if look and bool((rows.abs() <= enough).all()):
                break
        p = x.exp()
    if not logits.requires_grad:
        return p
    # d P = P * (dL + a + b'), with a and b such that the sums stay
    d = p * (logits - logits.detach())
    rows, columns = d.sum(-1, keepdim=True), d.sum(-2)[..., None]
    ones = torch.full_like(p, 1.0 / n)  # removes the common shift of a and -b
    identity = torch.eye(n, dtype=p.dtype, device=p.device)
    a = torch.linalg.solve(identity - p @ p.mT + ones, p @ columns - rows)
    b = -columns - p.mT @ a
    return p + d + p * (a + b.mT)
