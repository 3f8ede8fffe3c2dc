r"""Short steps of square matrices: X times a rotation made by a polynomial of the step.

For skew-symmetric B with \(\|B\|_2 < 1\), \(R(B) = \sqrt{I + B^2} - B\) is orthogonal: the rotation
by the angles \(\arcsin b\). With the root replaced by a polynomial p of \(B^2\),
\(R^\top R = p(B^2)^2 - B^2\) is as near to I as p is to the root, whatever X is. So no product
is spent on looking at X in most steps: what rounding leaves there is measured and taken away every
`EVERY` steps, in the same product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.linalg import polar
from orthonet.linalg.matrix import add_identity, symmetric_product
from orthonet.linalg.retraction import read
from orthonet.optim._stiefel_steps import retracted

__all__ = ["EVERY", "Turn", "Workspace", "coefficients", "rotate"]

EVERY = 16  # steps from one look at the defect to the next


class Workspace:
    """Memory that the matrices of a step use one after the other: new memory is slow to touch."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor | None:
        """Memory for a single large matrix on the CPU; None for others."""
        if like.ndim > 2 or not like.is_cpu or torch.compiler.is_compiling():
            return None
        key = (name, like.shape, like.dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty(like.shape, dtype=like.dtype)
        return self._kept[key]


class Turn(NamedTuple):
    """A step of square matrices.

    Attributes:
        x: The points, (n, n) or (count, n, n); changed in place on the CPU.
        b: Skew-symmetric matrices B: the step is X R(B), about X - X B.
        look: Whether to measure the defect of X and take it away.
        work: Memory; `b` may lie in it where a step is done before the next is made.
    """

    x: Tensor
    b: Tensor
    look: bool
    work: Workspace


def rotate(turns: Sequence[Turn]) -> list[Tensor]:
    r"""The new point of every step; the host reads once.

    Guarantee:
        With R(B) where a polynomial of degree 1 or 2 in \(B^2\) is proved to reach rounding: in
        float32 for \(\|B\|_2^2 \le 0.03\), as far as the bound by two norms sees it. For longer
        steps, under a compiler, and where X is far from orthogonal, the polar factor of
        \(X (I - B + B^2/2)\), which agrees with R(B) to fifth order.
    """
    if torch.compiler.is_compiling():
        return [polar(_taylor(turn.x, turn.b, turn.b.mT @ turn.b)) for turn in turns]
    found = [(turn, *_measure(turn)) for turn in turns]
    bounds = read([bounds for *_, bounds in found])
    return [
        _turned(turn, square, defect, *both)
        for (turn, square, defect, _), both in zip(found, bounds, strict=True)
    ]


def _measure(turn: Turn) -> tuple[Tensor, Tensor | None, Tensor]:
    r"""\(B^\top B = -B^2\), the defect of X, and bounds of their norms."""
    take = turn.work.take
    square = symmetric_product(turn.b, turn.b, take("square", turn.b))
    bound = largest_of_pairs(square)
    if not turn.look:
        return square, None, torch.stack([bound, torch.zeros_like(bound)])
    defect = add_identity(symmetric_product(turn.x, turn.x, take("defect", turn.x)), -1.0)
    norm = torch.linalg.vector_norm(defect, dim=(-2, -1)).amax()
    return square, defect, torch.stack([bound, norm])


def largest_of_pairs(square: Tensor) -> Tensor:
    r"""An upper bound of the eigenvalues of \(B^\top B\), the largest over the batch.

    They are at least 0 and come in pairs, so that with their mean \(\mu\) and deviation
    \(\sigma\), \(\lambda \le \mu + \sigma \sqrt{(n - 2) / 2}\); the Frobenius norm bounds them too.

    References:
        Wolkowicz & Styan, *Bounds for eigenvalues using traces*, Linear Algebra Appl. 29 (1980),
        for single eigenvalues.
    """
    n = square.shape[-1]
    norm = torch.linalg.vector_norm(square, dim=(-2, -1))
    mean = square.diagonal(dim1=-2, dim2=-1).sum(-1) / n
    # in units of the norm; 1e-5, since norm and trace are rounded
    share = mean / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    deviation = ((1.0 + 1e-5) / n - share.square()).clamp_min(0.0).sqrt()
    apart = mean + norm * deviation * math.sqrt(max(n - 2, 0) / 2.0)
    return torch.minimum(norm, apart).amax() * (1.0 + 1e-5)


def coefficients(reach: float, dtype: torch.dtype) -> tuple[float, ...]:
    r"""Of the p with \(p(s) \approx \sqrt{1 + s}\) on [-reach, 0] of the lowest degree, or none.

    \(|p^2 - s - 1|\) is at most the rounding unit of `dtype` there. In float32 p interpolates at
    the Chebyshev points, with an error of the root up to reach^2/64 (degree 1) and reach^3/512
    (degree 2), times \((1 - reach)^{-5/2}\); in float64, where differences of values would lose
    it, p is Taylor's.
    """
    unit = torch.finfo(dtype).eps
    if not 0.0 <= reach < 0.05:
        return ()
    grown = (1.0 - reach) ** -2.5
    if dtype == torch.float64:
        return (1.0, 0.5, -0.125) if reach**3 / 8.0 * grown <= unit else ()
    center, half = -reach / 2.0, reach / 2.0
    if reach**2 / 32.0 * grown <= unit:
        low, high = (math.sqrt(1.0 + center + sign * half * math.sqrt(0.5)) for sign in (-1, 1))
        slope = 1.0 / (low + high)  # (high - low) / (high^2 - low^2)
        return (low + high) / 2.0 - slope * center, slope
    if reach**3 / 256.0 * grown <= unit:
        offset = half * math.sqrt(0.75)
        low, middle, high = (math.sqrt(1.0 + center + sign * offset) for sign in (-1, 0, 1))
        slope, bend = 1.0 / (low + high), (high - 2.0 * middle + low) / (2.0 * offset**2)
        constant = middle - slope * center + bend * center**2
        return constant, slope - 2.0 * bend * center, bend
    return ()


def _turned(turn: Turn, square: Tensor, defect: Tensor | None, reach: float, off: float) -> Tensor:
    x, b = turn.x, turn.b
    p = coefficients(reach, x.dtype)
    # What the first order in the defect leaves, with half the commutator of defect and B. The
    # bound of the defect is that of Frobenius, many times too large for rounding.
    left = off * (off + 0.5 * math.sqrt(max(reach, 0.0)))
    if not p or not left <= 4.0 * torch.finfo(x.dtype).eps:
        return retracted([_taylor(x, b, square)])[0]
    if len(p) == 2:
        change = square.mul_(-p[1])
    else:
        room = turn.work.take("change", x)
        change = symmetric_product(square, square, room, plus=square, alpha=p[2], beta=-p[1])
    add_identity(change, p[0] - 1.0)
    if defect is not None:
        change.sub_(defect, alpha=0.5)
    change.sub_(b)
    moved = torch.matmul(x, change, out=turn.work.take("moved", x))
    return x.add_(moved) if x.is_cpu else moved.add_(x)


def _taylor(x: Tensor, b: Tensor, square: Tensor) -> Tensor:
    """X (I - B + B^2 / 2)."""
    return x - x @ torch.add(b, square, alpha=0.5)
