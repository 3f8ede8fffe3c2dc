"""What an activation may do to a difference of its inputs: intervals of slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthonet import layers
from orthonet.linalg.bounds.rounding import UNIT_ROUNDOFF, gamma

__all__ = [
    "Activation",
    "Chords",
    "Kinks",
    "Narrow",
    "PLACE",
    "Pieces",
    "Turns",
    "reflections",
    "sech2",
    "sorting",
]

Narrow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Chords = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Pieces:
    r"""A piecewise linear activation, $\phi(u) = R\,\psi(P u)$ with $\psi$ entry by entry.

    Attributes:
        before: P, (n, n), of few binary digits; None for the identity.
        after: R, likewise.
        knots: Where the pieces of each entry meet.
        slopes: One row for each piece, (pieces, n).
        value: The value of each entry at the first knot, (n,).
    """

    before: Tensor | None
    after: Tensor | None
    knots: tuple[float, ...]
    slopes: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Activation:
    r"""An activation of a vector, seen through the slopes of its chords.

    With an orthogonal basis $Q$ (the identity if None),
    $Q\,(\phi(u) - \phi(v)) = \Theta\,Q\,(u - v)$ with $\Theta$ diagonal and
    $\alpha_j \le \Theta_{jj} \le \beta_j$. Entries of one group (ids from 0, -1 for none) share
    only the bound $\|\Theta_g\| \le \beta$ of a matrix block, with slopes [-beta, beta].

    Attributes:
        function: The map of the last dim, in float64; for the values at the center of a ball.
        lower: The smallest slopes, (n,), float64.
        upper: The largest slopes, (n,), float64.
        basis: Q, (n, n), float64, or None.
        basis_error: Bound of the spectral norm of the rounding in `basis`.
        groups: Ids of groups, (n,), or None.
        narrow: The slopes on intervals of the inputs in the basis, (low, high) -> (lower, upper),
            or None where they cannot be narrowed.
        chords: The slopes of chords that start in one interval and end in another one around it,
            (start_low, start_high, low, high) -> (lower, upper), or None where `narrow` has to do.
        value_error: Relative error of `function` as it is computed.
        pieces: The activation as a piecewise linear one, or None.
    """

    function: Callable[[Tensor], Tensor]
    lower: Tensor
    upper: Tensor
    basis: Tensor | None = None
    basis_error: float = 0.0
    groups: Tensor | None = None
    narrow: Narrow | None = None
    chords: Chords | None = None
    value_error: float = 16 * UNIT_ROUNDOFF
    pieces: Pieces | None = None

    @property
    def largest(self) -> Tensor:
        """Return the largest modulus of each slope, (n,)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())


@dataclass(frozen=True, eq=False)
class Kinks:
    """The slopes of a piecewise linear function: `slopes[i]` left of `knots[i]`."""

    knots: tuple[float, ...]
    slopes: tuple[float | Tensor, ...]

    def __call__(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest slope on intervals."""
        least = torch.full_like(low, math.inf)
        most = torch.full_like(low, -math.inf)
        for i, slope in enumerate(self.slopes):
            left = self.knots[i - 1] if i else -math.inf
            right = self.knots[i] if i < len(self.knots) else math.inf
            touched = (high >= left) & (low <= right)
            value = torch.as_tensor(slope, dtype=low.dtype).expand_as(low)
            least = torch.where(touched, torch.minimum(least, value), least)
            most = torch.where(touched, torch.maximum(most, value), most)
        return least, most

    def chords(
        self, start_low: Tensor, start_high: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the least and the largest slope of chords from a start in one of two intervals.

        With one knot a chord has the slope a + (b - a) t, where t is the part of it that lies to
        the right of the knot.
        """
        if len(self.knots) != 1:
            return self(low, high)
        (knot,), (left, right) = self.knots, self.slopes
        # From the right at least (start - knot) / (start - low) lies right, from the left at most
        # (high - knot) / (high - start). Four roundings each.
        before, behind = (knot - start_high).clamp_min(0.0), (start_low - knot).clamp_min(0.0)
        under, over = (knot - low).clamp_min(0.0), (high - knot).clamp_min(0.0)
        least = torch.where(behind > 0, behind / (behind + under) * (1 - 8 * UNIT_ROUNDOFF), 0.0)
        most = torch.where(before > 0, over / (over + before) * (1 + 8 * UNIT_ROUNDOFF), 1.0)
        least = torch.where((behind > 0) & (under == 0), 1.0, least)
        least, most = torch.minimum(least, most.clamp(0.0, 1.0)), most.clamp(0.0, 1.0)
        left, right = (torch.as_tensor(s, dtype=low.dtype).expand_as(low) for s in (left, right))
        ends = [
            torch.where(t == 0, left, torch.where(t == 1, right, left + (right - left) * t))
            for t in (least, most)
        ]
        slack = 8 * UNIT_ROUNDOFF * torch.maximum(left.abs(), right.abs())
        slack = torch.where((least == most) & ((least == 0) | (least == 1)), 0.0, slack)
        lower, upper = torch.minimum(*ends) - slack, torch.maximum(*ends) + slack
        bottom, top = torch.minimum(left, right), torch.maximum(left, right)
        return torch.maximum(lower, bottom), torch.minimum(upper, top)


@dataclass(frozen=True, eq=False)
class Turns:
    """The slopes of a function whose derivative is monotone between a few places.

    Attributes:
        derivative: In float64.
        turns: Pairs of a place, known to `PLACE`, and an extreme value of the derivative there;
            also the place and each extreme value of a jump.
        ends: The least and the largest slope on the whole line.
        period: The distance after which each turn comes back, or 0.
        relative: A bound of the relative rounding of `derivative`.
        absolute: The same, of what is absolute; four times what was observed, or more.
    """

    derivative: Callable[[Tensor], Tensor]
    turns: tuple[tuple[float, float], ...] = ()
    ends: tuple[float, float] = (-math.inf, math.inf)
    period: float = 0.0
    relative: float = 1e-14
    absolute: float = 1e-14

    def __call__(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest slope on intervals."""
        values = self.derivative(low), self.derivative(high)
        least, most = torch.minimum(*values), torch.maximum(*values)
        for place, value in self.turns:
            touched = self._touched(low, high, place)
            least = torch.where(touched, least.clamp(max=value), least)
            most = torch.where(touched, most.clamp(min=value), most)
        least = least - self.relative * least.abs() - self.absolute
        most = most + self.relative * most.abs() + self.absolute
        least = least.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        most = most.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        return least.clamp(*self.ends), most.clamp(*self.ends)

    def _touched(self, low: Tensor, high: Tensor, place: float) -> Tensor:
        """Whether intervals come near a turn."""
        near = PLACE * (1.0 + torch.maximum(low.abs(), high.abs()))
        low, high = low - near - place, high + near - place
        if not self.period:
            return (low <= 0.0) & (high >= 0.0)
        return ~((high / self.period).floor() < (low / self.period).ceil())  # also if not finite

    def chords(
        self, start_low: Tensor, start_high: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the least and the largest slope of chords from a start in one of two intervals.

        The slope of a chord is the mean of the derivative along it. Both ways are cut into parts
        of one length; a chord that ends in part j has at most the larger one of the means of the
        largest derivatives on the first j - 1 and on the first j parts.
        """
        least, most = self(low, high)
        found = []
        for end, first, last in ((high, start_low, start_high), (low, start_high, start_low)):
            total = torch.zeros_like(low), torch.zeros_like(low)
            bounds = torch.full_like(low, math.inf), torch.full_like(low, -math.inf)
            for part in range(1, _PARTS + 1):
                # Of all starts, one at the near end of the part and one at its far end.
                ends = (
                    first + (end - first) * ((part - 1) / _PARTS),
                    last + (end - last) * (part / _PARTS),
                )
                slack = 8 * UNIT_ROUNDOFF * (end.abs() + first.abs() + last.abs())
                near = (torch.minimum(*ends) - slack).clamp(low, high)
                far = (torch.maximum(*ends) + slack).clamp(low, high)
                total = tuple(t + v for t, v in zip(total, self(near, far), strict=True))
                bounds = (
                    torch.minimum(bounds[0], total[0] / part),
                    torch.maximum(bounds[1], total[1] / part),
                )
            found.append(bounds)
        lower, upper = torch.minimum(*(f[0] for f in found)), torch.maximum(*(f[1] for f in found))
        slack = 4 * _PARTS * UNIT_ROUNDOFF * torch.maximum(least.abs(), most.abs())
        return torch.maximum(lower - slack, least), torch.minimum(upper + slack, most)


PLACE = 2.0**-20
"""How near turns are known, relative to 1 plus the modulus of the interval."""
_PARTS = 8
"""Parts of the way to each side on which the slopes of chords are bounded."""


def sech2(x: Tensor) -> Tensor:
    """The derivative of tanh, to a small relative error everywhere."""
    # 1 - tanh^2 cancels; this form has a small relative error, and underflows to a sound 0.
    e = (-2.0 * x.abs()).exp()
    return 4.0 * e / (1.0 + e).square()


def sorting(module: layers.MaxMin | layers.GroupSort, width: int) -> Activation | None:
    """Sorting moves the mean of a group as it is, and what is left shrinks: a basis of both.

    In pairs what is left is one difference, whose modulus is taken; of larger groups it is a
    vector with a Lipschitz map (Pauli et al. 2024 bound the same two parts).
    """
    size = 2 if isinstance(module, layers.MaxMin) else module.group_size
    if width % size:
        return None
    count = width // size
    helmert = torch.zeros(size, size, dtype=torch.float64)
    helmert[0] = 1.0 / math.sqrt(size)
    for j in range(1, size):
        helmert[j, :j] = 1.0 / math.sqrt(j * (j + 1))
        helmert[j, j] = -j / math.sqrt(j * (j + 1))
    place = torch.arange(width).reshape(count, size)
    if isinstance(module, layers.MaxMin):
        place = torch.arange(width).reshape(size, count).T
    basis = torch.zeros(width, width, dtype=torch.float64)
    rows = torch.arange(width).reshape(count, size)
    for group, row in zip(place, rows, strict=True):
        basis[row[:, None], group[None]] = helmert
    kept = torch.arange(width) % size == 0
    lower = torch.where(kept, 1.0, -1.0).double()
    groups = torch.where(kept, -1, torch.arange(width) // size) if size > 2 else None
    # Of a pair (a, b) the maximum comes first, or last: (a - b) becomes |a - b| or its negative.
    modulus = Kinks((0.0,), (-1.0, 1.0) if isinstance(module, layers.MaxMin) else (1.0, -1.0))
    narrow, chords = _beside(kept, modulus)
    return Activation(
        _on_last_dim(module),
        lower,
        torch.ones(width, dtype=torch.float64),
        basis,
        size * gamma(4),  # entries of one block, each with at most four roundings
        groups,
        narrow if size == 2 else None,
        chords if size == 2 else None,
        0.0,
        _sums(place, kept, modulus.slopes) if size == 2 else None,
    )


def _beside(kept: Tensor, modulus: Kinks) -> tuple[Narrow, Chords]:
    """The slopes of moduli, with the slope 1 where entries are kept."""

    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least, most = modulus(low, high)
        return torch.where(kept, 1.0, least), torch.where(kept, 1.0, most)

    def chords(*ends: Tensor) -> tuple[Tensor, Tensor]:
        least, most = modulus.chords(*ends)
        return torch.where(kept, 1.0, least), torch.where(kept, 1.0, most)

    return narrow, chords


def _sums(place: Tensor, kept: Tensor, slopes: Sequence[float | Tensor]) -> Pieces:
    """Sorting of pairs: their sums stay, and of the differences the modulus is taken."""
    width = len(kept)
    sums = torch.zeros(width, width, dtype=torch.float64)
    rows = torch.arange(width).reshape(-1, 2)
    sums[rows[:, :1], place] = 1.0
    sums[rows[:, 1:], place] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    sides = torch.stack([torch.where(kept, 1.0, float(slope)).double() for slope in slopes])
    return Pieces(sums, sums.mT / 2.0, (0.0,), sides, torch.zeros(width, dtype=torch.float64))


def _on_last_dim(module: layers.MaxMin | layers.GroupSort) -> Callable[[Tensor], Tensor]:
    """The map of a sorting module on the last dim."""
    if isinstance(module, layers.MaxMin):
        return layers.MaxMin(dim=-1)
    return layers.GroupSort(module.group_size, dim=-1)


def reflections(module: layers.HouseholderActivation, width: int) -> Activation | None:
    """Each pair is kept along one direction, and the modulus is taken along the other."""
    if module.channels != width:
        return None
    half = module.theta.detach().to("cpu", torch.float64) / 2
    count = width // 2
    basis = torch.zeros(width, width, dtype=torch.float64)
    j = torch.arange(count)
    basis[j, j], basis[j, j + count] = half.cos(), half.sin()
    basis[j + count, j], basis[j + count, j + count] = half.sin(), -half.cos()
    kept = torch.arange(width) < count
    own = layers.HouseholderActivation(width, dim=-1, dtype=torch.float64).requires_grad_(False)
    own.theta.copy_(2 * half)  # doubling is exact
    lower = torch.where(kept, 1.0, -1.0).double()
    narrow, chords = _beside(kept, Kinks((0.0,), (-1.0, 1.0)))
    return Activation(
        own,
        lower,
        torch.ones(width).double(),
        basis,
        2 * gamma(8),
        narrow=narrow,
        chords=chords,
    )
