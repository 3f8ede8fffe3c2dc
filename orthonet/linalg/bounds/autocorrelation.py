"""Bounds of a convolution whose kernel is close to a multiple of an isometry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional as F

from orthonet.linalg.bounds.axis import Axis
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    add_up,
    down,
    gamma,
    mul_up,
    sqrt_up,
    squared_norm_up,
)

__all__ = ["autocorrelation_bound"]


def autocorrelation_bound(weight: Tensor, axes: Sequence[Axis], excess: float) -> float:
    r"""Bound the norm of a convolution by its autocorrelation, or return infinity.

    The convolution is a selection of rows and columns of the one on all integers, A. With strides
    moved into the channels, $A A^*$ (or $A^* A$) is a convolution with the kernel
    $P_u = \sum_t K_{t + u} K_t^*$, so that for any number c

    $$ \|A\|_2^2 \le c + \|P_0 - c I\|_2 + 2 \sum_{u > 0} \|P_u\|_2. $$

    The mean eigenvalue c of $P_0$ is also a lower bound of $\|A\|_2^2$. No frequency is visited,
    and the cost does not depend on the size of the image.

    Args:
        weight: The kernel in float64 (groups, out, in, *kernel), with entries of modulus at most 2.
        axes: Its dims.
        excess: The function gives up, and returns infinity, as soon as the bound would be more
            than `1 + excess` times the root of c.
    """
    if any(axis.stride > 1 and axis.dilation > 1 for axis in axes):
        return math.inf
    if any(axis.circular and axis.outputs * axis.stride != axis.size for axis in axes):
        return math.inf  # rows are repeated
    kernel = _without_strides(weight, axes)
    side, terms = kernel.shape[1], kernel[0, 0].numel()
    mean = allowed = least = 0.0
    found: list[tuple[float, Tensor, float, float]] = []
    for factor, a, b in _lags(kernel):
        product = a @ b.mT
        sizes = (sqrt_up(squared_norm_up(x, 1)) for x in (a, b))
        error = add_up(mul_up(gamma(terms + 4), *sizes), 4 * side * terms * UNDERFLOW)
        if factor == 1.0:  # the lag 0
            diagonal = product.diagonal(dim1=-2, dim2=-1)
            mean = float(diagonal.mean())
            allowed = mean * (2.0 * excess + excess * excess)
            if not mean > 0.0:
                return math.inf
            diagonal.sub_(mean)
            # entries of modulus at most 2: a row of the kernel has at most 4 for each term
            error = add_up(error, mul_up(8.0, gamma(2), terms))
        size = sqrt_up(squared_norm_up(product, 1))
        found.append((factor, product, size, error))
        least += factor * size / math.sqrt(side)  # no spectral norm is less than that
        if least > allowed:
            return math.inf
    rest = add_up(*(mul_up(factor, add_up(size, error)) for factor, _, size, error in found))
    if rest > allowed / 100.0:  # a Frobenius norm is up to sqrt(side) times larger
        norms = (add_up(spectral_norm_bound(p), error) for _, p, _, error in found)
        rest = add_up(*(mul_up(f, norm) for (f, *_), norm in zip(found, norms, strict=True)))
    bound = sqrt_up(add_up(mean, rest))
    return bound if bound <= (1.0 + excess) * math.sqrt(down(mean)) else math.inf


def _without_strides(weight: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The kernel with stride 1, whose input has the pixels of a block as channels."""
    for place, axis in enumerate(axes, 3):  # tap s q + r becomes tap q of channel r
        short = -axis.kernel % axis.stride
        weight = F.pad(weight.movedim(place, -1), (0, short)).movedim(-1, place)
        weight = weight.unflatten(place, (-1, axis.stride)).movedim(place + 1, 3).flatten(2, 3)
    return weight if weight.shape[1] <= weight.shape[2] else weight.transpose(1, 2)


def _lags(kernel: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
    """The two factors of each P_u, and 1 for lag 0, 2 for one of each pair u and -u."""
    taps = kernel.shape[3:]
    lags = list(itertools.product(*(range(1 - k, k) for k in taps)))
    for lag in lags[len(lags) // 2 :]:
        a = b = kernel
        for place, (u, k) in enumerate(zip(lag, taps, strict=True), 3):
            a = a.narrow(place, max(u, 0), k - abs(u))
            b = b.narrow(place, max(-u, 0), k - abs(u))
        yield 2.0 if any(lag) else 1.0, a.flatten(2), b.flatten(2)
