"""Operations of torch written in operations that have rules, where its own way has none.

Those of torch read the size of the batch as a number, or merge the batch with other dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WRITTEN", "product_of"]


def _gates(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)


def _rnn_tanh(*args: Any) -> Tensor:
    a, b = _gates(*args)
    return (a + b).tanh()


def _rnn_relu(*args: Any) -> Tensor:
    a, b = _gates(*args)
    return (a + b).relu()


def _gru(x: Tensor, h: Tensor, *weights: Any) -> Tensor:
    (a, b, c), (d, e, f) = (t.chunk(3, 1) for t in _gates(x, h, *weights))
    reset, keep = (a + d).sigmoid(), (b + e).sigmoid()
    new = (c + reset * f).tanh()
    return new + keep * (h - new)


def _lstm(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    h, c = state
    a, b = _gates(x, h, *weights)
    i, f, g, o = (a + b).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _variance(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    if not dim:
        raise ValueError("the variance of a whole batch")
    dims = list(dim)
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    if not count > 0:
        raise ValueError("no degree of freedom")
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim) / count


def _variance_of_dim(
    x: Tensor, dim: Sequence[int] | None, unbiased: bool = True, keepdim: bool = False
) -> Tensor:
    return _variance(x, dim, correction=int(unbiased), keepdim=keepdim)


_aten = torch.ops.aten
WRITTEN: dict[Any, Callable[..., Any]] = {
    _aten.rnn_tanh_cell.default: _rnn_tanh,
    _aten.rnn_relu_cell.default: _rnn_relu,
    _aten.gru_cell.default: _gru,
    _aten.lstm_cell.default: _lstm,
    _aten.var.correction: _variance,
    _aten.var.dim: _variance_of_dim,
}
"""The functions, by the overload that they stand for."""


def product_of(equation: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the function of an einsum of two operands that share their first letter, the batch.

    None where a letter stands twice in a term, is summed in one operand alone, or is not named.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    terms = (first, second, out)
    if not arrow or not left.replace(",", "").isalpha() or any(len(set(t)) < len(t) for t in terms):
        return None
    if not out or {t[:1] for t in terms} != {out[0]}:
        return None
    shared = [c for c in out if c in first and c in second]
    summed = [c for c in first if c in second and c not in out]
    mine, other = ([c for c in t if c not in shared and c not in summed] for t in (first, second))
    if not set(mine + other) <= set(out):
        return None

    def product(a: Tensor, b: Tensor) -> Tensor:
        sizes = dict(zip(first, a.shape, strict=True)) | dict(zip(second, b.shape, strict=True))
        inside = [sizes[c] for c in shared[1:]]

        def count(letters: list[str]) -> int:
            return math.prod(sizes[c] for c in letters)

        a = a.permute([first.index(c) for c in (*shared, *mine, *summed)])
        b = b.permute([second.index(c) for c in (*shared, *summed, *other)])
        a = a.reshape(-1, *inside, count(mine), count(summed))
        b = b.reshape(-1, *inside, count(summed), count(other))
        found = torch.matmul(a, b).reshape(-1, *inside, *(sizes[c] for c in (*mine, *other)))
        order = [*shared, *mine, *other]
        return found.permute([order.index(c) for c in out])

    return product
