r"""Retractions: bring batches of matrices back to a multiple of an orthogonal matrix.

A parameter of a constrained weight stands at the *center*, \(M = c\,U\) with \(U\) semi-orthogonal
and \(c = \|M\|_F / \sqrt n\). A step of an optimizer moves it off by little. `retract` moves every
matrix back to the center, to the same point of the manifold that its map gives for it and with the
same norm. At the center, the pull-back of a gradient is exact in closed form.

Two maps have it: the polar factor and the orthogonal factor of a QR decomposition. Matrices may be
tall or wide; each product is of the small side.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.linalg.factorization import cholesky_qr
from orthonet.linalg.matrix import (
    add_identity,
    cholesky,
    divide_triangular,
    minus_product,
    minus_transpose,
    symmetric_product,
)
from orthonet.linalg.polar import polar
from orthonet.linalg.polar_factor import series
from orthonet.linalg.polar_factor.gradient import centered_gradient
from orthonet.linalg.polar_factor.steps import near_pass, recentered_polar

__all__ = ["POLAR", "QR", "CenteredMap", "Moved", "center", "read", "retract"]


class _Measured(NamedTuple):
    r"""A batch with its defect \(E = X^\top X / c^2 - I\), on the device."""

    x: Tensor
    e: Tensor
    mean: Tensor | None  # c^2, the mean eigenvalue of the Gram matrix, (*batch, 1, 1); None: 1
    square: Tensor | None  # E^2


def _wide(x: Tensor) -> bool:
    return x.shape[-2] < x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    tall = x.mT if _wide(x) else x
    return symmetric_product(tall, tall)


def _times(x: Tensor, p: Tensor) -> Tensor:
    """X p for tall X, p X for wide X and symmetric p."""
    return p @ x if _wide(x) else x @ p


def _measure(x: Tensor, unit: bool = False) -> _Measured:
    """The defect of a batch; with `unit`, that from c = 1."""
    gram, mean = _gram(x), None
    if not unit:
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).unsqueeze(-1)
        gram.div_(mean)
    return _Measured(x, add_identity(gram, -1.0), mean, None)


def _norms(a: Tensor) -> Tensor:
    """Frobenius norms of a batch, (k,)."""
    if not a.is_contiguous():  # rows lie apart: by rows first, which is five times faster
        a = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(a, dim=(-2, -1)).reshape(-1)


class CenteredMap(abc.ABC):
    r"""A map from matrices to semi-orthogonal ones that is invariant under positive factors.

    Attributes:
        name: "polar" or "qr".
        squares: Whether bounds of \(\|E\|_2\) below \(\|E\|_F\) are worth a product.
        limit: The largest bound of \(\|E\|_2\) that `finish` takes.
    """

    name: str
    squares: bool
    limit: float

    @abc.abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """The semi-orthogonal matrices of any finite ones: the cold map, differentiable."""

    @abc.abstractmethod
    def finish(self, measured: _Measured, bound: float) -> Tensor:
        """The centered matrices c U, by a program that `bound` alone decides; nothing is read."""

    @abc.abstractmethod
    def far(self, x: Tensor) -> Tensor:
        """The centered matrices of any finite ones; the host reads as often as it must."""

    @abc.abstractmethod
    def turned(self, s: Tensor) -> Tensor:
        r"""The K of the pull-back \((G - U (S - K)) / c\) for \(S = U^\top G\)."""

    def pull_back(self, u: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
        r"""The gradient of M = c U from that of U, at the center, exactly.

        \((G - U (S - K(S))) / c\) with \(S = U^\top G\), and \(U K / c\) for square U; wide
        matrices by transposition.
        """
        if _wide(u):
            return self.pull_back(u.mT, scale, grad.mT).mT
        s = u.mT @ grad
        if u.shape[-2] == u.shape[-1]:
            return self.turn(u, scale, s)
        s = s.sub_(self.turned(s))
        return minus_product(grad, u, s).div_(scale)

    def turn(self, u: Tensor, scale: Tensor, s: Tensor) -> Tensor:
        r"""\(U K(S) / c\): the pull-back for square U, of which only \(S = U^\top G\) is needed."""
        return (u @ self.turned(s)).div_(scale)

    def __repr__(self) -> str:
        return f"<the {self.name} map>"


class _Polar(CenteredMap):
    r"""\(U = M (M^\top M)^{-1/2}\): \(M p(E)\) with a polynomial of certified error."""

    name, squares, limit = "polar", True, 0.62

    def value(self, x: Tensor) -> Tensor:
        return polar(x)

    def finish(self, measured: _Measured, bound: float) -> Tensor:
        x, e, mean, square = measured
        kept = mean
        tolerance = series.tolerance(x.dtype)
        floor = 16.0 * torch.finfo(x.dtype).eps * min(x.shape[-2:]) ** 0.5
        while True:
            degrees = (1, 2, 4) if square is not None else (1,)
            degree = next((q for q in degrees if bound <= series.reach(q, tolerance)), 0)
            # On an interval rounded up to a power of 2^(1/2), or 2^(1/8) without a certified end:
            # the coefficients are remembered, and their error is mostly far below rounding.
            if degree:
                reach = _rounded_up(max(bound, 1e-9), 2.0, series.reach(degree, tolerance))
            else:
                reach = _rounded_up(bound, 8.0, self.limit)
            c, error = series.near(degree or 4, reach)
            p, _ = near_pass(e, square, degree or 4, c)
            # a pass from far has changed the norm
            if kept is not None and mean is not None and mean is not kept:
                p = p.mul_((kept / mean).sqrt_())
            x = _times(x, p)
            if degree:
                return x
            _, e, mean, _ = _measure(x, mean is None)
            square = symmetric_product(e, e)
            bound = 1.1 * error * (2.0 + error) + floor

    def far(self, x: Tensor) -> Tensor:
        tall = x.mT if _wide(x) else x
        u, scale, _ = recentered_polar(tall)
        y = u * scale
        return y.mT.contiguous() if _wide(x) else y

    def turned(self, s: Tensor) -> Tensor:
        return minus_transpose(s).mul_(0.5)

    def turn(self, u: Tensor, scale: Tensor, s: Tensor) -> Tensor:
        return (u @ minus_transpose(s)).mul_(0.5 / scale)

    def pull_back(self, u: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
        if _wide(u):
            return centered_gradient(u.mT, scale, grad.mT).mT
        return centered_gradient(u, scale, grad)


def _rounded_up(bound: float, steps: float, limit: float) -> float:
    """The next power of 2^(1/steps), or the limit."""
    return min(limit, 2.0 ** (math.ceil(steps * math.log2(bound)) / steps))


class _QR(CenteredMap):
    r"""Q of \(M = Q R\) with a positive diagonal of R (wide: \(M = L Q\)), by Cholesky.

    One round \(L L^\top = M^\top M / c^2\), \(M L^{-\top}\), is accurate to rounding times the
    condition number squared, which is at most 1.9 for \(\|E\|_F \le 0.3\); a second round to first
    order in its defect reaches 0.9.
    """

    name, squares, limit = "qr", False, 0.9

    def value(self, x: Tensor) -> Tensor:
        return cholesky_qr(x)

    def finish(self, measured: _Measured, bound: float) -> Tensor:
        x, e, *_ = measured
        lower, _ = cholesky(add_identity(e, 1.0))
        if _wide(x):
            y = torch.linalg.solve_triangular(lower, x, upper=False)
        else:
            y = divide_triangular(x, lower.mT)
        if bound > 0.3:
            e = _measure(y).e.triu_()
            e.diagonal(dim1=-2, dim2=-1).mul_(0.5)
            y = minus_product(y, e.mT, y) if _wide(x) else minus_product(y, y, e)
        return y

    def far(self, x: Tensor) -> Tensor:
        q = cholesky_qr(x)
        scale = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * min(x.shape[-2:]) ** -0.5
        return q * scale

    def turned(self, s: Tensor) -> Tensor:
        return minus_transpose(s).tril_(-1)


POLAR: CenteredMap = _Polar()
QR: CenteredMap = _QR()


class Moved(NamedTuple):
    """What `retract` has made of one batch.

    Attributes:
        point: (*batch, m, n), the centered matrices c U; the input itself where nothing moves.
        written: For each matrix, whether it differs from the input.
        good: For each matrix, whether it is centered. A zero or non-finite one is not.
        squared: Whether the square of the defect was needed.
    """

    point: Tensor
    written: list[bool]
    good: list[bool]
    squared: bool


def center(point: Tensor) -> tuple[Tensor, Tensor]:
    r"""U and c of centered matrices: \(c = \|M\|_F / \sqrt n\), (*batch, 1, 1), and \(U = M / c\).

    A function of the matrix alone, so that it gives the same bits for the matrix that a step has
    left and for the one that a checkpoint has kept.
    """
    # by rows first: one sum over all entries of a large matrix is off by up to 1e-5 in float32
    norm = torch.linalg.vector_norm(point, dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(norm, dim=-2, keepdim=True)
    scale = norm.div_(min(point.shape[-2:]) ** 0.5)
    return point / scale, scale


@torch.no_grad()
def retract(
    batches: Sequence[tuple[Tensor, CenteredMap]],
    *,
    move: bool = True,
    squares: Sequence[bool] = (),
    unit: bool = False,
) -> list[Moved]:
    r"""Bring all matrices of all batches to the center; the host reads once.

    The bounds of \(\|E\|_2\), \(E = M^\top M / c^2 - I\), of all batches are read together. They
    choose the shortest program that reaches rounding for each batch, so the result depends on the
    matrices alone. Matrices beyond the reach of the programs (a jump) take the general way, which
    reads more. What is centered to rounding already is left as it is, bit for bit.

    Args:
        batches: Matrices (*batch, m, n) of float32 or float64, each with its map.
        move: Whether to move anything. If not, the matrices are only looked at.
        squares: For each batch, whether \(E^2\) is expected to be needed. A wrong guess costs time
            on the CPU and nothing else; accelerators always compute it.
        unit: Whether to bring matrices of the polar map to U itself, which is c = 1.

    Guarantee:
        \(\max|\sigma / c - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) wherever
        `good`.
    """
    measured: list[_Measured] = []
    asked: list[Tensor] = []
    wanted = list(squares) or [True] * len(batches)
    for (x, way), square in zip(batches, wanted, strict=True):
        found = _measure(x, unit)
        if (way.squares and (square or not x.is_cpu)) or not move:
            found = found._replace(square=symmetric_product(found.e, found.e))
        measured.append(found)
        asked.append(_in_range(_norms(found.e), found.mean))
        if found.square is not None:
            asked.append(_norms(found.square))
    told = iter(read(asked))
    results: list[Moved] = []
    for (_, way), found in zip(batches, measured, strict=True):
        first = next(told)
        second = None if found.square is None else next(told)
        results.append(_moved(way, found, first, second, move))
    return results


def _in_range(norms: Tensor, mean: Tensor | None) -> Tensor:
    """The norms, infinite where the Gram matrix has left the range of its dtype."""
    if mean is None:
        return norms
    limits, flat = torch.finfo(norms.dtype), mean.reshape(-1)
    return torch.where(flat == flat.clamp(limits.tiny**0.7, limits.max**0.7), norms, torch.inf)


def read(tensors: list[Tensor]) -> list[list[float]]:
    """The numbers of all tensors: the one place where the host waits."""
    sizes = [len(t) for t in tensors]
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) > 1:
        tensors = [t.to(tensors[0].device, torch.float64) for t in tensors]
    numbers = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).tolist()
    found = []
    for size in sizes:
        found.append(numbers[:size])
        numbers = numbers[size:]
    return found


def _moved(
    way: CenteredMap,
    measured: _Measured,
    first: list[float],
    second: list[float] | None,
    move: bool,
) -> Moved:
    x, count = measured.x, len(first)
    low = 30.0 * torch.finfo(x.dtype).eps  # then |sigma - 1| is half of that
    rounding = 0.8 * low * min(x.shape[-2:]) ** 0.5  # of all singular values together
    near = series.reach(1, series.tolerance(x.dtype)) if way.squares else way.limit
    squared = way.squares and not max(_finite(first), default=math.inf) <= near
    # To U itself a small step is taken at once: no place has to be found again.
    unclear = measured.mean is not None and any(low < bound <= rounding for bound in first)
    if second is None and (squared or unclear):  # a wrong guess, on the CPU
        square = symmetric_product(measured.e, measured.e)
        measured = measured._replace(square=square)
        (second,) = read([_norms(square)])
    both = first if second is None else _lower(first, second)
    centered = [bound <= low for bound in both]
    for i, bound in enumerate(() if measured.mean is None else both):
        if low < bound <= 4.0 * low and min(x.shape[-2:]) >= _NOISY:
            one = x if x.ndim == 2 else x.reshape(-1, *x.shape[-2:])[i]
            centered[i] = _bound_in_double(one) <= low
    if not move or all(centered):
        return Moved(x, [False] * count, centered, False)
    bounds = both if squared else first
    if not squared:
        measured = measured._replace(square=None)
    reached = [bound <= way.limit for bound in bounds]  # false for NaN
    if all(reached):
        y = way.finish(measured, max(bounds)).contiguous()
        if not any(centered):
            return Moved(y, [True] * count, [True] * count, squared)
        return Moved(_chosen(centered, x, y), [not c for c in centered], [True] * count, squared)
    y, good = _one_by_one(x, way, reached, measured.mean is None)
    return Moved(y, good, good, squared)


def _lower(first: list[float], second: list[float]) -> list[float]:
    """The smaller of the bounds ||E||_F and ||E^2||_F^(1/2); infinite for NaN."""
    pairs = zip(first, second, strict=True)
    return [min(a, b**0.5) if b == b and a < math.inf else math.inf for a, b in pairs]


_NOISY = 128  # side from which rounding in E may be as large as what it is to show


def _bound_in_double(x: Tensor) -> float:
    r"""The bound \(\|E^8\|_F^{1/8}\) of \(\|E\|_2\) of one matrix, in float64.

    By a smaller power, an error that all singular values share looks like a larger one of a few.
    """
    e = _measure(x.double()).e
    first, power = _norms(e), e
    for _ in range(3):
        power = symmetric_product(power, power)
    (found,) = read([torch.minimum(first, _norms(power) ** 0.125)])
    return found[0] if found[0] == found[0] else math.inf


def _finite(bounds: list[float]) -> list[float]:
    return [b for b in bounds if b == b]


def _chosen(left: list[bool], x: Tensor, y: Tensor) -> Tensor:
    """`y`, but for the matrices that are to be left as they are in `x`."""
    flat, kept = y.view(-1, *y.shape[-2:]), x.reshape(-1, *x.shape[-2:])
    for i, stays in enumerate(left):
        if stays:
            flat[i] = kept[i]
    return y


def _one_by_one(
    x: Tensor, way: CenteredMap, reached: list[bool], unit: bool
) -> tuple[Tensor, list[bool]]:
    """Every matrix by its own program, after a jump of at least one of them."""
    flat = x.reshape(-1, *x.shape[-2:])
    y, good, limits = flat.clone(), [False] * len(flat), torch.finfo(x.dtype)
    for i, near in enumerate(reached):
        if near:
            (found,) = retract([(flat[i], way)], unit=unit)
            y[i], good[i] = found.point, found.good[0]
            continue
        norm = float(torch.linalg.vector_norm(flat[i]))
        if not limits.tiny**0.4 < norm < limits.max**0.4:  # its squares leave the range; or NaN
            continue
        y[i] = way.value(flat[i]) if unit else way.far(flat[i])
        good[i] = True
    return y.view(x.shape), good
