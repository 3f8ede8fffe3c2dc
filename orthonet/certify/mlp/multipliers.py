"""Proof of a bound from multipliers, in float64 with outward rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.certify.mlp.chain import Chain, frobenius_up
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    div_up,
    down,
    gamma,
    mul_up,
    sqrt_up,
    squared_norm_up,
    up,
)

__all__ = ["Proof", "prove"]

_LARGEST_DEFECT = 0.25


class Proof(NamedTuple):
    r"""What holds for a chain, without its scale.

    Attributes:
        constant: Bound of the Lipschitz constant.
        gram: A matrix F of floats, (outputs, outputs).
        error: $|c^T z|^2 \le c^T F c + e\,|c|^2$ for the outputs z of unit inputs and every c.
    """

    constant: float
    gram: Tensor
    error: float


class _Factor(NamedTuple):
    """B with T^-1 <= gain B^T B, and its spectral norm."""

    inverse: Tensor
    norm: float
    gain: float


def prove(chain: Chain, multipliers: list[Tensor]) -> Proof | None:
    r"""Prove the matrix inequality of `_lipsdp` for these multipliers; None if that fails.

    Units are scaled by powers of two, exactly, so that the matrices have diagonals of about 1.
    Upper bounds $(1 + \epsilon)(\hat\Sigma_i + \eta I)$ of the $\Sigma_i$ are carried on, which is
    enough, as every step is monotone. A bound of $T^{-1}$ comes from any matrix B (the computed
    inverse of a Cholesky factor): $B T B^T \succeq (1 - \delta) I$ with
    $\delta = \|B \hat T B^T - I\| + \|\hat T - T\| \|B\|^2$ gives
    $T^{-1} \preceq B^T B / (1 - \delta)$. Every norm and every rounding is bounded from above.

    Guarantee:
        The constant and the matrix hold whatever LAPACK returned. Assumed is only the classical
        bound of the error of a matrix product, see `spectral_norm_bound`.
    """
    current: Tensor | None = None
    radius, excess = 0.0, 0.0
    before = torch.ones(chain.weights[0].shape[1], dtype=torch.float64)
    for i, mu in enumerate(multipliers):
        low, high = chain.lower[i], chain.upper[i]
        mean, half = (low + high) / 2, (high - low) / 2
        free = half > 0
        base = chain.weights[i] * before
        spread = (base if current is None else base @ current).mul(base).sum(1).clamp_min(0.0)
        limit = torch.where(free, mu / half.square(), spread)
        inner = _power_of_two(limit)  # the scale of the units before the activation
        if inner is None:
            return None
        weight, error = _scaled(chain, i, 1.0 / inner, before)
        gram, gram_error = _congruence(weight, error, current, radius)
        core, core_error = gram, gram_error
        if bool(free.any()):
            found = _completed(gram, gram_error, excess, limit / inner.square(), free)
            if found is None:
                return None
            core, core_error, excess = found
            if not bool((mean != 0).any()):
                excess = 0.0  # T need only be positive: the rest is diag(mu)
        moved = (mean * inner).square() * core.diagonal()
        outer = _power_of_two(torch.where(free, torch.maximum(mu, moved), moved))
        if outer is None:
            return None
        gain = mean * (inner / outer)
        shift = torch.where(free, mu / outer.square(), 0.0)
        current = gain[:, None] * core * gain + torch.diag(shift)
        largest = up(float(gain.abs().max()))
        radius = add_up(
            mul_up(largest, largest, core_error),
            mul_up(16 * UNIT_ROUNDOFF, frobenius_up(current)),
            current.numel() * UNDERFLOW,
        )
        before = outer
    ones = torch.ones(chain.weights[-1].shape[0], dtype=torch.float64)
    last, error = _scaled(chain, len(multipliers), ones, before)
    gram, error = _congruence(last, error, current, radius)
    if not bool(gram.isfinite().all()) or not math.isfinite(error):
        return None
    error = add_up(error, mul_up(excess, add_up(frobenius_up(gram), error)))
    return Proof(sqrt_up(add_up(spectral_norm_bound(gram), error)), gram, error)


def _power_of_two(squares: Tensor) -> Tensor | None:
    """Powers of two near the roots; None if some number is out of range. A zero gets 1."""
    root = torch.exp2(torch.round(torch.log2(squares) / 2))
    root = torch.where(squares == 0, 1.0, root)
    good = (root > 1e-140) & (root < 1e140)  # also false for NaN
    return root if bool(good.all()) else None


def _scaled(chain: Chain, i: int, after: Tensor, before: Tensor) -> tuple[Tensor, float]:
    """The weight between scaled units, and the bound of what it is off."""
    weight = after[:, None] * chain.weights[i] * before
    grown = mul_up(chain.errors[i], float(after.max()), float(before.max()))
    return weight, add_up(grown, sqrt_up(weight.numel()) * UNDERFLOW)


def _congruence(
    weight: Tensor, error: float, current: Tensor | None, radius: float
) -> tuple[Tensor, float]:
    """W S W^T for S at most `current` + radius: a matrix and the bound of what lies above it."""
    norm = spectral_norm_bound(weight)
    if current is None:
        product, size = weight @ weight.mT, squared_norm_up(weight)
        middle, terms = 1.0, weight.shape[1]
    else:
        product = weight @ current @ weight.mT
        positive = weight.abs()
        size = frobenius_up(positive @ current.abs() @ positive.mT)
        middle, terms = add_up(frobenius_up(current), radius), 2 * weight.shape[1]
    gram = (product + product.mT) / 2
    return gram, add_up(
        mul_up(gamma(terms + 8), up(1.0 + 4.0 * gamma(terms + 8)), size),
        mul_up(radius, norm, norm),
        mul_up(middle, error, add_up(2.0 * norm, error)),
        (terms + 1) * gram.numel() * UNDERFLOW,
    )


def _completed(
    gram: Tensor, error: float, excess: float, limit: Tensor, free: Tensor
) -> tuple[Tensor, float, float] | None:
    """H + H U^T T^-1 U H for H at most (1 + excess) (gram + error), which is monotone in H.

    A matrix, the bound of what lies above it, and a new excess.
    """
    part = gram[free]
    target = torch.diag(limit[free]) - part[:, free]
    largest = up(float(limit[free].max()))
    rounding = mul_up(16 * UNIT_ROUNDOFF, add_up(largest, frobenius_up(part[:, free])))
    # What T may be below `target`; excess * gram <= excess * limit, for `target` is positive.
    below = add_up(
        mul_up(add_up(1.0, excess), error), rounding, mul_up(excess, add_up(largest, rounding))
    )
    factor = _factorized((target + target.mT) / 2, below)
    if factor is None:
        return None
    inverse, count = factor.inverse, len(factor.inverse)
    rows = inverse @ part
    row_error = add_up(
        mul_up(
            gamma(count + 4),
            up(1.0 + 4.0 * gamma(count + 4)),
            frobenius_up(inverse.abs() @ part.abs()),
        ),
        mul_up(error, factor.norm),
        rows.numel() * count * UNDERFLOW,
    )
    norm = spectral_norm_bound(rows)
    square = rows.mT @ rows
    core = gram + (square + square.mT) / 2
    core_error = add_up(
        error,
        mul_up(row_error, add_up(2.0 * norm, row_error)),
        mul_up(gamma(count + 8), squared_norm_up(rows)),
        mul_up(4 * UNIT_ROUNDOFF, frobenius_up(core)),
        core.numel() * UNDERFLOW,
    )
    grown = up(1.0 + excess)
    return core, core_error, up(mul_up(grown, grown, factor.gain) - 1.0)


def _factorized(target: Tensor, below: float) -> _Factor | None:
    """B for every symmetric T >= target - below."""
    size = len(target)
    if not bool(target.isfinite().all()) or not math.isfinite(below):
        return None
    eye = torch.eye(size, dtype=torch.float64)
    root, info = torch.linalg.cholesky_ex(target)
    if int(info):
        return None
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    if not bool(inverse.isfinite().all()) or float(inverse.abs().max()) > 1e150:
        return None
    positive, norm = inverse.abs(), spectral_norm_bound(inverse)
    rounding = frobenius_up(positive @ target.abs() @ positive.mT)
    defect = add_up(
        frobenius_up(inverse @ target @ inverse.mT - eye),
        mul_up(gamma(2 * size + 8), up(1.0 + 4.0 * gamma(2 * size)), rounding),
        mul_up(below, norm, norm),
        mul_up(2 * UNIT_ROUNDOFF, sqrt_up(size)),
        size * size * UNDERFLOW,
    )
    if not defect < _LARGEST_DEFECT:
        return None
    return _Factor(inverse, norm, div_up(1.0, down(1.0 - defect)))
