"""Proof of a bound from multipliers, in float64 with outward rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.certify._chain import Chain, frobenius_up
from orthonet.linalg._rounding import (
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
from orthonet.linalg.enclosure import spectral_norm_bound

__all__ = ["Proof", "prove"]

_LARGEST_DEFECT = 0.25


class Proof(NamedTuple):
    """What holds for a chain: |c z| <= factor (|c B^T| + error |c|_row) for rows c of the last map.

    Attributes:
        constant: Bound of the Lipschitz constant, without the scale of the chain.
        rows: C B^T as floats, (outputs, n).
        row_error: Bound of the l2 norm of the error of each row.
        factor: What the norm of a row is multiplied by.
    """

    constant: float
    rows: Tensor
    row_error: float
    factor: float


class _Factor(NamedTuple):
    """B with S^-1 <= gain B^T B; `inverse` is None for the identity."""

    inverse: Tensor | None
    gain: float


def prove(chain: Chain, multipliers: list[Tensor]) -> Proof | None:
    r"""Prove the matrix inequality of `_lipsdp` for these multipliers; None if that fails.

    The layers are scaled by powers of two, exactly, so that every multiplier is about 1. Then
    lower bounds of the $S_i$ are carried on: with the computed $\hat S$,
    $\|S - \hat S\| \le \eta$, and any matrix B (the computed inverse of a Cholesky factor),
    $B S B^T \succeq (1 - \delta) I$ with $\delta = \|B \hat S B^T - I\| + \eta \|B\|^2$, so
    $S^{-1} \preceq B^T B / (1 - \delta)$, which is put into the next S. Every norm and every
    rounding is bounded from above.

    Guarantee:
        The constant and the rows hold whatever LAPACK returned. Assumed is only the classical
        bound of the error of a matrix product, see `spectral_norm_bound`.
    """
    size = chain.weights[0].shape[1]
    current, radius = torch.eye(size, dtype=torch.float64), 0.0
    before = torch.ones(size, dtype=torch.float64)
    pristine = True  # S_0 = I, nothing to factorize
    for i, multiplier in enumerate(multipliers):
        root = torch.exp2(torch.round(torch.log2(multiplier) / 2))
        usable = bool((root > 1e-140).all() and (root < 1e140).all())
        if not usable:  # also for NaN
            return None
        scaled = multiplier / root.square()
        weight, error = _scaled(chain, i, root, before)
        product = scaled * (chain.lower[i] * chain.upper[i])
        mean = scaled * ((chain.lower[i] + chain.upper[i]) / 2)
        if bool((product != 0).any()):
            current, radius = _added(current, radius, weight, error, product)
            pristine = False
        factor = _Factor(None, 1.0) if pristine else _factorized(current, radius)
        if factor is None:
            return None
        current, radius = _complement(factor, weight, error, scaled, mean)
        before, pristine = root, False
    factor = _Factor(None, 1.0) if pristine else _factorized(current, radius)
    if factor is None:
        return None
    ones = torch.ones(chain.weights[-1].shape[0], dtype=torch.float64)
    last, error = _scaled(chain, len(multipliers), ones, before)
    rows, row_error = _multiplied(last, error, factor)
    root_gain = sqrt_up(factor.gain)
    if not bool(rows.isfinite().all()) or not math.isfinite(row_error):
        return None
    return Proof(
        mul_up(add_up(spectral_norm_bound(rows), row_error), root_gain), rows, row_error, root_gain
    )


def _scaled(chain: Chain, i: int, root: Tensor, before: Tensor) -> tuple[Tensor, float]:
    """The weight between scaled layers, and the bound of what it is off."""
    weight = root[:, None] * chain.weights[i] / before[None]
    grown = mul_up(chain.errors[i], div_up(float(root.max()), float(before.min())))
    return weight, add_up(grown, sqrt_up(weight.numel()) * UNDERFLOW)


def _added(
    current: Tensor, radius: float, weight: Tensor, error: float, product: Tensor
) -> tuple[Tensor, float]:
    """S + W^T diag(product) W."""
    change = weight.mT @ (product[:, None] * weight)
    norm, largest = frobenius_up(weight), up(float(product.abs().max()))
    result = current + (change + change.mT) / 2
    radius = add_up(
        radius,
        mul_up(gamma(len(product) + 8), largest, norm, norm),
        mul_up(largest, error, add_up(2 * norm, error)),
        mul_up(2 * UNIT_ROUNDOFF, frobenius_up(result)),
        weight.numel() * UNDERFLOW,
    )
    return result, radius


def _complement(
    factor: _Factor, weight: Tensor, error: float, scaled: Tensor, mean: Tensor
) -> tuple[Tensor, float]:
    """A lower bound of diag(scaled) - X S^-1 X^T, X = diag(mean) W: a matrix and the radius."""
    largest = up(float(mean.abs().max()))
    half, half_error = _multiplied(mean[:, None] * weight, mul_up(largest, error), factor)
    norm = frobenius_up(half)
    gram = half @ half.mT
    result = torch.diag(scaled) - (gram + gram.mT) / 2
    whole = add_up(norm, half_error)
    radius = add_up(
        mul_up(up(factor.gain - 1.0), whole, whole),
        mul_up(half_error, add_up(2 * norm, half_error)),
        mul_up(gamma(half.shape[1] + 4), norm, norm),
        mul_up(2 * UNIT_ROUNDOFF, up(float(result.diagonal().abs().max()))),
        half.numel() * UNDERFLOW,
    )
    return result, radius


def _multiplied(x: Tensor, error: float, factor: _Factor) -> tuple[Tensor, float]:
    """X B^T, X with a few roundings in each entry, and the bound of the spectral error."""
    inverse = factor.inverse
    if inverse is None:
        return x, add_up(error, mul_up(gamma(6), frobenius_up(x)))
    moved = mul_up(gamma(x.shape[1] + 8), frobenius_up(x.abs() @ inverse.abs().mT))
    product = x @ inverse.mT
    return product, add_up(
        mul_up(up(1.0 + 2.0 * gamma(x.shape[1] + 2)), moved),
        mul_up(error, frobenius_up(inverse)),
        x.numel() * inverse.shape[0] * UNDERFLOW,
    )


def _factorized(current: Tensor, radius: float) -> _Factor | None:
    size = len(current)
    if not bool(current.isfinite().all()) or not math.isfinite(radius):
        return None
    eye = torch.eye(size, dtype=torch.float64)
    root, info = torch.linalg.cholesky_ex(current)
    if int(info):
        return None
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    if not bool(inverse.isfinite().all()) or float(inverse.abs().max()) > 1e150:
        return None
    positive = inverse.abs()
    rounding = frobenius_up(positive @ current.abs() @ positive.mT)
    defect = add_up(
        frobenius_up(inverse @ current @ inverse.mT - eye),
        mul_up(gamma(2 * size + 8), up(1.0 + 4.0 * gamma(2 * size)), rounding),
        mul_up(radius, squared_norm_up(inverse)),
        mul_up(2 * UNIT_ROUNDOFF, sqrt_up(size)),
        size * size * UNDERFLOW,
    )
    if not defect < _LARGEST_DEFECT:
        return None
    return _Factor(inverse, div_up(1.0, down(1.0 - defect)))
