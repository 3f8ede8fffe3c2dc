"""The tolerances of the tests: what is allowed, and what was observed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from orthonet import _checks

__all__ = [
    "OPERATOR_PROMISE",
    "OUTPUT",
    "PRESETS",
    "PROMISE",
    "ROUNDING",
    "Tolerance",
    "orthogonality_rounding",
    "rounding",
]


class Tolerance(NamedTuple):
    """An error that tests allow, beside the largest one that was observed.

    Attributes:
        allowed: Largest error that passes.
        observed: Largest error seen when the table was made.
    """

    allowed: float
    observed: float

    @property
    def headroom(self) -> float:
        """How many times the observed error the allowed one is."""
        return self.allowed / self.observed if self.observed else float("inf")


PROMISE: dict[torch.dtype, float] = {torch.float64: 1e-12, torch.float32: 2e-6}
r"""The largest \(|\sigma - 1|\) promised of a weight and of an optimizer's step."""

OPERATOR_PROMISE: dict[torch.dtype, float] = {torch.float64: 1e-12, torch.float32: 1e-5}
r"""The largest \(|\sigma - 1|\) promised of a convolution, whose kernel is composed of weights."""


def rounding(dtype: torch.dtype, operations: int, size: float = 1.0) -> float:
    r"""Return a bound of the rounding in one entry of a chain of sums, on any processor.

    With the unit roundoff u of `dtype` and N `operations`, the bound is
    \(4 \sqrt N\, u \cdot \text{size}\). Kernels differ in the order of summation only, and the
    bound holds for every order: if roundings are independent and of mean zero, an entry exceeds
    it with probability at most \(2 e^{-8}\), in practice never, since most partial sums are
    smaller than `size`.

    Args:
        dtype: The dtype that the sums are accumulated in.
        operations: Additions on the way to one entry: the lengths of the sums that follow one
            another, added up; both ways, where two ways of computing an entry are compared.
        size: The largest magnitude of the partial sums.

    Returns:
        The bound, absolute.

    References:
        Higham & Mary, *A new approach to probabilistic rounding error analysis*, SIAM J. Sci.
        Comput. 41 (2019).

    Examples:
        >>> x, y = torch.randn(2, 100)
        >>> error = abs(float(x @ y) - float(x.double() @ y.double()))
        >>> error <= rounding(torch.float32, 100, size=float(x.norm() * y.norm()))
        True
    """
    _checks.require(
        isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        "rounding",
        "dtype must be a real floating-point dtype",
        "Pass e.g. torch.float32",
        dtype=dtype,
    )
    _checks.positive_int("rounding", operations=operations)
    _checks.in_range("rounding", 0.0, math.inf, size=size)
    return 2.0 * torch.finfo(dtype).eps * math.sqrt(operations) * size


def orthogonality_rounding(dtype: torch.dtype, operations: int) -> float:
    r"""Return a bound of \(\max|\sigma - 1|\) after a chain of products of orthonormal factors.

    It is `rounding`, and never above `PROMISE`. For n x n matrices and p products, `operations`
    is p n: each entry of a product errs by about \(u / \sqrt 6\) (n roundings of partial sums that
    grow to \(1/\sqrt n\)), and a matrix of p such errors has a spectral norm of about
    \(2 \sqrt{p n}\, u / \sqrt 6\), a fifth of the bound.

    Args:
        dtype: The dtype that the products are accumulated in.
        operations: Additions on the way to one entry, as in `rounding`; where the singular
            values are measured in the same `dtype`, count one product more.

    Examples:
        >>> q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
        >>> error = float((torch.linalg.svdvals(q @ q) - 1).abs().max())
        >>> error <= orthogonality_rounding(torch.float64, 4 * 64)
        True
    """
    return min(rounding(dtype, operations), PROMISE.get(dtype, math.inf))


ROUNDING: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(5e-14, 2.7e-15),
    torch.float32: Tolerance(1e-5, 1.1e-6),
    torch.bfloat16: Tolerance(1.5e-2, 2.5e-3),
    torch.float16: Tolerance(2e-3, 3.3e-4),
}
"""|sigma - 1| of a layer that is exact up to rounding, by the dtype of its parameters.

Observed on linear layers up to 512 x 512 and circular convolutions up to 16 channels and 5 x 5.
"""

PRESETS: dict[tuple[torch.dtype, str], Tolerance] = {
    (torch.float64, "DEFAULT"): Tolerance(2e-14, 1.6e-15),
    (torch.float64, "DEFAULT_TEST"): Tolerance(2e-14, 1.6e-15),
    (torch.float64, "BJORCK_PASS_THROUGH"): Tolerance(2e-14, 1.3e-15),
    (torch.float64, "EXP"): Tolerance(2e-14, 1.3e-15),
    (torch.float64, "QR"): Tolerance(2e-14, 2.0e-15),
    (torch.float64, "CHOLESKY"): Tolerance(1e-12, 1.1e-13),
    (torch.float64, "CHOLESKY_STABLE"): Tolerance(1e-12, 1.1e-13),
    (torch.float64, "POLAR"): Tolerance(2e-14, 1.8e-15),
    (torch.float64, "POLAR_WARM"): Tolerance(2e-14, 1.6e-15),
    (torch.float64, "AUTO"): Tolerance(2e-14, 1.4e-15),
    (torch.float32, "DEFAULT"): Tolerance(2e-6, 4.9e-7),
    (torch.float32, "DEFAULT_TEST"): Tolerance(2e-6, 3.9e-7),
    (torch.float32, "BJORCK_PASS_THROUGH"): Tolerance(2e-6, 3.9e-7),
    (torch.float32, "EXP"): Tolerance(2e-6, 4.6e-7),
    (torch.float32, "QR"): Tolerance(2e-6, 8.2e-7),
    (torch.float32, "CHOLESKY"): Tolerance(2e-6, 8.3e-7),
    (torch.float32, "CHOLESKY_STABLE"): Tolerance(2e-6, 8.3e-7),
    (torch.float32, "POLAR"): Tolerance(2e-6, 4.6e-7),
    (torch.float32, "POLAR_WARM"): Tolerance(2e-6, 4.6e-7),
    (torch.float32, "AUTO"): Tolerance(2e-6, 8.4e-7),
}
"""|sigma - 1| of the weight that a preset makes of any matrix of `orthonet.testing.cases`.

Allowed is `PROMISE`, and in float64 for most presets what four products of 512 x 512 round,
`orthogonality_rounding(torch.float64, 4 * 512)`.

Observed over 64 x 64, 256 x 256, 10 x 512, 512 x 10 and 96 x 256, at the layer's own init, on the
hard matrices, and after 20 Adam steps; the largest values of the Cholesky presets come from
rank-deficient parameters.
"""

OUTPUT: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-5, 4.3e-7),
    torch.float32: Tolerance(1.5e-6, 5.4e-8),
    torch.bfloat16: Tolerance(5e-2, 4.6e-3),
    torch.float16: Tolerance(6e-3, 5.9e-4),
}
"""Relative error of a layer's output in a dtype (or compiled), against it in float32, eager."""
