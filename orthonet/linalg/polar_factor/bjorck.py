"""The polar factor by Björck steps, which certified polynomials end as soon as they reach."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthonet.linalg.matrix import gram_defect, rms_scale, symmetric_product
from orthonet.linalg.polar_factor.steps import Factors, by_polynomials, finish_by_svd, newton_schulz

__all__ = ["bjorck_polar"]

_WITHIN = 0.35  # root mean square of the eigenvalues of E from where its norm is worth measuring


def bjorck_polar(w: Tensor, beta: float, niters: int) -> Factors:
    """Polynomials and, where they do not reach, `niters` Björck steps at most until they do.

    What is not within their reach then is finished by plain steps while these make progress, and by
    an SVD otherwise.
    """
    if 0 in w.shape:
        return Factors.bare(w.clone())
    # closer than elsewhere: the errors of the factors of a convolution add up
    unit = torch.finfo(w.dtype).eps
    found = by_polynomials(w, keep_inverse=True, tolerance=unit)
    if found.u is not None:
        return Factors.bare(found.u, found.inverse)
    n, x = w.shape[-1], w / rms_scale(w)
    gram = symmetric_product(x, x)
    # sigma_max^2 <= the smaller of two norms of the Gram matrix; the iteration keeps signs (and
    # contracts) below (1 + beta) / beta, so scale down only what might lie above.
    row_sum = gram.abs().sum(-1).amax(-1)
    bound = torch.minimum(row_sum, torch.linalg.matrix_norm(gram))[..., None, None]
    shrink = (0.95 * (1.0 + beta) / beta / bound).clamp(max=1.0)
    x, gram = x * shrink.sqrt(), gram * shrink
    previous = math.inf
    for step in range(niters + 40):
        defect = float(gram_defect(gram).amax())
        if step and defect <= _WITHIN * n**0.5:
            u = by_polynomials(x, far=False, gram=gram.clone(), tolerance=unit).u
            if u is not None:
                return Factors.bare(u)
        late = step >= niters
        if not defect < math.inf or (late and defect > 0.75 * previous and defect > 0.5):
            break
        previous = defect
        x = newton_schulz(x, gram, 0.5 if late else beta)
        gram = symmetric_product(x, x)
    return Factors.bare(finish_by_svd(w, x, gram))
