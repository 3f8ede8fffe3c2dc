"""Scalar arithmetic that rounds outward, in float64.

Hardware rounds every operation to nearest, so the exact result lies within one `nextafter` of the
computed one: each function here returns a float that is not smaller than the exact result on the
given floats (`down`: not larger). Assumed: IEEE 754 double precision with gradual underflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "UNDERFLOW",
    "UNIT_ROUNDOFF",
    "add_up",
    "div_up",
    "down",
    "gamma",
    "hypot_up",
    "mul_up",
    "power_of_two_scale",
    "sqrt_up",
    "squared_norm_up",
    "up",
]

UNIT_ROUNDOFF = 2.0**-53
UNDERFLOW = 2.0**-1022
"""At least the error that one product makes by underflow (even if it is flushed to zero)."""


def up(x: float) -> float:
    """The next float above."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """The next float below."""
    return math.nextafter(x, -math.inf)


def add_up(*terms: float) -> float:
    """Not less than the exact sum of non-negative terms (a zero adds nothing, not even an ulp)."""
    total = 0.0
    for term in terms:
        if term:
            total = up(total + term) if total else term
    return total


def mul_up(*factors: float) -> float:
    """Not less than the exact product of non-negative factors (exact for the factors 0 and 1)."""
    product = 1.0
    for factor in factors:
        if not factor:
            return 0.0
        if product == 1.0:
            product = factor
        elif factor != 1.0:
            product = up(product * factor)
    return product


def div_up(a: float, b: float) -> float:
    """Not less than the exact quotient a / b, for a >= 0 and b > 0."""
    return up(a / b) if a and b != 1.0 else a


def sqrt_up(x: float) -> float:
    """Not less than the exact square root; exact where the root is a short float."""
    root = math.sqrt(x)
    if root * root == x and root < 2.0**26 and root == int(root):
        return root
    return up(root)


def hypot_up(*terms: float) -> float:
    """Not less than the exact root of the sum of squares, safe from overflow and underflow."""
    largest = max(terms, default=0.0)
    if len(terms) == 1 or largest == 0.0 or math.isinf(largest):
        return largest
    ratios = (div_up(term, largest) for term in terms)
    return mul_up(largest, sqrt_up(add_up(*(mul_up(ratio, ratio) for ratio in ratios))))


def gamma(k: int) -> float:
    """Higham's k u / (1 - k u), rounded up: the relative error of k roundings in any order."""
    error = up(k * UNIT_ROUNDOFF)
    return div_up(error, down(1.0 - error))


def power_of_two_scale(tensor: Tensor) -> float:
    """The power of two s with max |tensor / s| in [1, 2); 0 for a zero tensor.

    Dividing by it is exact, except for entries that underflow: those move by less than 2^-1074.
    """
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0


def squared_norm_up(tensor: Tensor, batch_dims: int = 0) -> float:
    """Not less than the sum of |t|^2, real or complex float64; the largest over the batch dims.

    The entries must be far from overflow (see `power_of_two_scale`).
    """
    if tensor.numel() == 0:
        return 0.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    squares = tensor.square().reshape(*tensor.shape[:batch_dims], -1)
    count = squares.shape[-1]
    return add_up(
        mul_up(float(squares.sum(-1).max()), up(1.0 + gamma(2 * count + 4))), count * UNDERFLOW
    )
