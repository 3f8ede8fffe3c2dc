r"""The far part of the way to the polar factor by products in a short dtype.

A polynomial step multiplies X by a matrix that only has to bring the singular values near 1: what
rounding does to them the next step sees. The last steps are those of the full precision, so the
result is as orthogonal as ever; but rounding turns it a little, and that remains: it is the polar
factor of a matrix that differs from W by some units of rounding of the short dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthonet.linalg import _polar_series as series
from orthonet.linalg._matrix import add_identity
from orthonet.linalg._polar_steps import Approach, by_polynomials, largest_norm

__all__ = ["polynomials_with_early"]

_STEPS = 6
_FARTHEST = 2.4  # estimated norm of E from which its polynomials do not reach


def polynomials_with_early(w: Tensor, early: torch.dtype) -> Approach:
    """As `by_polynomials`, where W is far after steps whose products are in `early`."""
    found = by_polynomials(w, far=False)
    if found.u is not None or found.defect >= math.inf:
        return found
    x = _approach(found.x, early)
    return found if x is None else found._replace(u=by_polynomials(x, far=False).u)


def _approach(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """X of singular values near 1, to the rounding of `dtype`; None where it does not arrive."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

    near = 8.0 * torch.finfo(dtype).eps * x.shape[-1] ** 0.5
    for _ in range(_STEPS):
        gram = product(x.mT, x)
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        e = add_identity(gram / mean, -1.0)
        norm = largest_norm(e)
        if norm <= near:
            return x
        square = product(e, e)
        # the largest eigenvalue, about, of a spread spectrum; see `by_polynomials`
        norms = torch.linalg.vector_norm(torch.stack([square, e]), dim=(-2, -1))
        guess = min(norm, 1.65 * float((norms[0] / norms[1]).nan_to_num().amax()))
        if not guess <= _FARTHEST:
            return None
        c = series.near(4, guess)[0] if guess <= 0.62 else series.wide(round(1.0 + guess, 1))
        p = e.mul(c[1]).add_(square, alpha=c[2])
        p.add_(product(square, e.mul(c[3]).add_(square, alpha=c[4])))
        x = product(x, add_identity(p, c[0]) * mean.rsqrt())
    return x
