"""Bounds of a convolution by its kernel, reshaped to matrices: no grid of frequencies at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from orthonet.linalg.bounds.axis import Axis
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import mul_up, sqrt_up

__all__ = ["unfolding_bound"]


def _reads(axis: Axis) -> int:
    """How many pairs of an output and a tap read one and the same input, at most.

    Where stride and dilation are s and d, and the circle, if there is one, is a multiple of s, the
    taps that read an input lie in one residue class modulo s / gcd(s, d).
    """
    if axis.circular and axis.size % axis.stride:
        return axis.kernel * axis.repeats
    period = axis.stride // math.gcd(axis.stride, axis.dilation)
    return math.ceil(axis.kernel / period) * axis.repeats


def unfolding_bound(weight: Tensor, axes: Sequence[Axis], largest: int | None = None) -> float:
    r"""The least of $\sqrt{c}\,\|R\|_2$ over all unfoldings R of a kernel (groups, out, in, *k).

    $y = \sum_t S_t K_t x$ with selections $S_t$ of entries, which are tensor products over the
    dims. In each dim the taps stand either next to the input channels, and the vector of all
    $S_t x$ is at most $\sqrt{c_t}$ times as long as x, where $c_t$ counts how often an input is
    read; or next to the output channels, where $c_t = k$ taps are added up for each output. R has
    the same entries as the kernel.

    Args:
        weight: The kernel in float64.
        axes: Its dims.
        largest: Matrices whose shorter side is longer are left out; infinity if all are.

    References:
        S. Singla, S. Feizi, Fantastic four, ICLR 2021 (stride 1, two dims, four unfoldings).
    """
    dims = len(axes)
    best = math.inf
    for beside_input in itertools.product((True, False), repeat=dims):
        counts, inner, outer = [], [2], [1]
        for place, (axis, inside) in enumerate(zip(axes, beside_input, strict=True)):
            counts.append(_reads(axis) if inside else axis.kernel * axis.repeats)
            (inner if inside else outer).append(3 + place)
        sides = [math.prod(weight.shape[d] for d in part) for part in (outer, inner)]
        if largest is not None and min(sides) > largest:
            continue
        matrix = weight.permute(0, *outer, *inner).reshape(weight.shape[0], *sides)
        factor = sqrt_up(float(math.prod(counts)))
        best = min(best, mul_up(factor, spectral_norm_bound(matrix)))
    return best
