"""The Fréchet mean: the point of least sum of squared distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.manifolds._base import Manifold

__all__ = ["frechet_mean"]


def frechet_mean(
    space: Manifold,
    points: Tensor,
    weights: Tensor | None = None,
    *,
    tol: float | None = None,
    max_iter: int = 100,
) -> Tensor:
    r"""Return the weighted Fréchet (Karcher) mean along the first dimension.

    It minimizes \(\sum_i w_i\,d(x, x_i)^2\), by steps \(x \leftarrow \exp_x(\tau \sum_i w_i
    \log_x x_i)\) from the projected arithmetic mean. The first \(\tau\) is 1, the next ones are
    those of Barzilai and Borwein, halved where neither the sum nor the cost decreases.

    The mean is unique where curvature is not positive (`PSD`, `Hyperbolic`, `PoincareBall`, flat
    spaces), and for points in a small enough ball elsewhere.

    Args:
        space: A space with `exp` and `log`.
        points: Points of it.
        weights: Nonnegative weights, normalized to sum 1; None for equal ones.
        tol: Stop when the sum is shorter, relative to the longest logarithm or 1. The default is 8
            rounding units, times the root of the number of entries.
        max_iter: Largest number of steps.

    Shape:
        `points`: `(count, *shape)`. `weights`: `(count,)`. Output: `shape`.

    Guarantee:
        Differentiable by the unrolled iteration, with an error of the gradient like that of the
        value.

    Raises:
        ValueError: the space has no logarithm, or the weights are not nonnegative with a positive
            sum, one for each point.

    Examples:
        >>> from orthonet.manifolds import PSD, frechet_mean
        >>> points = torch.stack([torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2)])
        >>> frechet_mean(PSD(), points).diagonal()  # geometric means
        tensor([1.0000, 2.0000])

    References:
        Moakher, SIAM J. Matrix Anal. Appl. 26 (2005); Afsari, Tron & Vidal, *On the convergence of
        gradient descent for finding the Riemannian center of mass*, SIAM J. Control Optim. 51
        (2013).
    """
    geodesic: Any = space
    _checks.require(
        isinstance(space, Manifold) and hasattr(space, "log") and hasattr(space, "exp"),
        "frechet_mean",
        "the space must have a logarithm and an exponential",
        "Use one whose geodesics have a closed form, such as PSD()",
        space=space,
    )
    _checks.floating("frechet_mean", points=points)
    _checks.require(
        points.ndim > space.event_ndim and points.shape[0] > 0,
        "frechet_mean",
        "points must be stacked along the first dimension, at least one",
        "Use torch.stack",
        shape=tuple(points.shape),
    )
    _checks.positive_int("frechet_mean", max_iter=max_iter)
    if tol is not None:
        _checks.in_range("frechet_mean", 0.0, 1.0, tol=tol)
    count = points.shape[0]
    w = points.new_ones(count) if weights is None else weights.to(points)
    good = w.shape == (count,) and bool((w >= 0).all()) and bool(w.sum() > 0)
    _checks.require(
        good,
        "frechet_mean",
        f"weights must be {count} nonnegative numbers, not all zero",
        "Pass one for each point",
        weights=weights,
    )
    w = (w / w.sum()).reshape(count, *[1] * (points.ndim - 1))
    allowed = 8.0 * torch.finfo(points.dtype).eps * max(points[0].numel(), 1) ** 0.5
    allowed = allowed if tol is None else tol
    x = space.project((w * points).sum(0))
    now = _Pull(geodesic, x, points, w)
    tau = torch.ones_like(now.size)
    for _ in range(max_iter):
        if bool((now.size <= allowed * now.far.clamp_min(1.0)).all()):
            break
        y = geodesic.exp(now.x, _wide(tau, x) * now.v)
        new = _Pull(geodesic, y, points, w)
        better = (new.size <= now.size) | (new.cost < now.cost)
        tau = torch.where(better, _barzilai_borwein(space, now, new, tau), 0.5 * tau)
        now = now.where(better, new)
        if not bool((tau > 1e-6).any()):  # rounding
            break
    return now.x


class _Pull:
    """The weighted sum v of logarithms at x, and how far the points are."""

    def __init__(self, space: Any, x: Tensor, points: Tensor, w: Tensor) -> None:
        stacked = x.expand_as(points)
        logs = space.log(stacked, points)
        self.x, self.v = x, (w * logs).sum(0)
        with torch.no_grad():
            self.size = space.norm(x, self.v)
            lengths = space.norm(stacked, logs)
            self.far = lengths.amax(0)
            self.cost = (w.reshape(-1, *[1] * (lengths.ndim - 1)) * lengths.square()).sum(0)

    def where(self, better: Tensor, new: _Pull) -> _Pull:
        """Return `new` where it is better, otherwise this one."""
        wide = _wide(better, self.x)
        self.x, self.v = torch.where(wide, new.x, self.x), torch.where(wide, new.v, self.v)
        self.size, self.cost = (
            torch.where(better, a, b) for a, b in ((new.size, self.size), (new.cost, self.cost))
        )
        return self


def _wide(numbers: Tensor, x: Tensor) -> Tensor:
    """Return one number for each point, shaped to be multiplied with points."""
    return numbers.reshape(*numbers.shape, *[1] * (x.ndim - numbers.ndim))


@torch.no_grad()
def _barzilai_borwein(space: Manifold, now: _Pull, new: _Pull, tau: Tensor) -> Tensor:
    """Return the inverse of the curvature of the cost along the step that was taken."""
    old = space.transport(now.x, new.x, now.v)
    bent = space.inner(new.x, old, old - new.v)
    found = tau * space.inner(new.x, old, old) / torch.where(bent > 0, bent, 1.0)
    return torch.where(bent > 0, found.clamp(0.01, 2.0), 1.0)
