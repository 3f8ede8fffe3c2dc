"""Limited-memory BFGS on every space that has a gradient, a retraction and a transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from orthonet import _checks
from orthonet.manifolds import Manifold, Rn
from orthonet.optim._riemannian import RiemannianOptimizer
from orthonet.reparametrizers import REEVALUATING_OPTIMIZERS

__all__ = ["RiemannianLBFGS"]

Points = list[tuple[Tensor, Manifold]]
_DECREASE, _CURVATURE = 1e-4, 0.9  # of the weak Wolfe conditions
_PATIENCE = 8  # trials, from which on the first condition is enough
_TRIALS = 30  # halvings after which what is left is rounding


class RiemannianLBFGS(RiemannianOptimizer):
    r"""Limited-memory BFGS with a line search, on any space of `orthonet.manifolds`.

    Differences of gradients and steps are carried to the present point by the space's transport,
    where the two-loop recursion makes the direction d of them. The step length t satisfies
    the weak Wolfe conditions along \(t \mapsto R_x(t d)\), found by bisection (after eight trials,
    the condition of decrease is enough); where the curvature
    of a step is not positive, its pair is left out.

    Args:
        params: Parameters, or groups of them. A group may have its own `space`; the points of all
            groups are moved together, as one point of the product.
        lr: The first step length that is tried.
        max_iter: Iterations in one call of `step`.
        max_eval: Evaluations of the closure in one call; None for `4 * max_iter`.
        tolerance_grad: Stop when no entry of the Riemannian gradient is larger.
        tolerance_change: Stop when no entry of a parameter moves more, or the loss changes less.
        history_size: Pairs that are kept.
        space: The space of groups that name none.

    Guarantee:
        The loss never increases from one call of `step` to the next, for a closure without
        randomness. Parameters stay on their spaces as far as `space.retract` is exact.

    Raises:
        NotOnManifoldError: A parameter is off its space.
        ValueError: A value is out of range.

    Examples:
        >>> from orthonet.manifolds import Sphere
        >>> a = torch.diag(torch.arange(1.0, 6.0))
        >>> x = torch.nn.Parameter(Sphere().project(torch.ones(5)))
        >>> optimizer = RiemannianLBFGS([x], space=Sphere())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = x @ a @ x
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> abs(float(closure().detach()) - 1.0) < 1e-5  # the smallest eigenvalue
        True

    References:
        Huang, Gallivan & Absil, *A Broyden class of quasi-Newton methods for Riemannian
        optimization*, SIAM J. Optim. 25 (2015); Huang, Absil & Gallivan, *A Riemannian BFGS method
        without differentiated retraction*, SIAM J. Optim. 28 (2018) (cautious updates); Lewis &
        Overton, *Nonsmooth optimization via quasi-Newton methods*, Math. Program. 141 (2013), for
        the line search.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 10,
        *,
        space: Manifold | None = None,
    ) -> None:
        _checks.positive_int(self, max_iter=max_iter, history_size=history_size)
        self.max_iter, self.history_size = max_iter, history_size
        self.max_eval = 4 * max_iter if max_eval is None else max_eval
        self.tolerance_grad, self.tolerance_change = tolerance_grad, tolerance_change
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        defaults = {"lr": lr, "weight_decay": 0.0, "space": Rn() if space is None else space}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _checks.require(
            group["lr"] > 0.0, self, "lr must be positive", "Use 1.0", lr=float(group["lr"])
        )

    @property
    def _points(self) -> Points:
        return [
            (p, self.space_of(p, group))
            for group in self.param_groups
            for p in group["params"]
            if p.numel()
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Take up to `max_iter` iterations.

        Args:
            closure: Clears the gradients, evaluates the loss, calls `backward`, returns the loss.

        Returns:
            The loss at the beginning.

        Raises:
            ValueError: the loss or its gradient is not finite at the beginning.
        """
        points = self._points
        here = self._evaluate(closure, points)
        first, left = here.loss, self.max_eval - 1
        _checks.require(
            here.finite,
            self,
            "the loss and its gradient must be finite where a step begins",
            "Start from another point",
            loss=float(here.loss),
        )
        for _ in range(self.max_iter):
            grads = here.grads
            if left <= 0 or _largest(grads) <= self.tolerance_grad:
                break
            direction = self._direction(points, grads)
            slope = _inner(points, direction, grads)
            if not slope < 0.0:  # rounding, or a transport that spoils the pairs
                self._pairs = []
                direction = [-g for g in grads]
                slope = _inner(points, direction, grads)
            t = float(self.param_groups[0]["lr"])
            if not self._pairs:
                t *= min(1.0, 1.0 / max(sum(float(g.abs().sum()) for g in grads), 1e-30))
            line = _Line(points, [p.clone() for p, _ in points], direction)
            found, t, count = self._search(closure, line, float(here.loss), slope, t, left)
            left -= count
            if found is None:
                self._pairs = []  # the next call begins with the gradient
                break
            change = _largest([p - x for (p, _), x in zip(points, line.start, strict=True)])
            loss_change = abs(float(found.loss - here.loss))
            self._remember(line, t, found.grads, grads)
            here = found
            if change <= self.tolerance_change or loss_change <= self.tolerance_change:
                break
        return first

    def _evaluate(self, closure: Callable[[], Any], points: Points) -> _Evaluation:
        with torch.enable_grad():
            loss = torch.as_tensor(closure()).detach()
        grads = [
            space.gradient(p, torch.zeros_like(p) if p.grad is None else p.grad).clone()
            for p, space in points
        ]
        return _Evaluation(loss, grads)

    def _direction(self, points: Points, grads: list[Tensor]) -> list[Tensor]:
        """The two-loop recursion at the present point."""
        q, kept = [-g for g in grads], []
        for s, y in reversed(self._pairs):
            rho = 1.0 / _inner(points, s, y)
            alpha = rho * _inner(points, s, q)
            q = [a - alpha * b for a, b in zip(q, y, strict=True)]
            kept.append((s, y, rho, alpha))
        if self._pairs:
            s, y = self._pairs[-1]
            scale = _inner(points, s, y) / max(_inner(points, y, y), 1e-300)
            q = [a * scale for a in q]
        for s, y, rho, alpha in reversed(kept):
            beta = rho * _inner(points, y, q)
            q = [a + (alpha - beta) * b for a, b in zip(q, s, strict=True)]
        return [space.tangent(p, d) for (p, space), d in zip(points, q, strict=True)]

    def _search(
        self,
        closure: Callable[[], Any],
        line: _Line,
        loss: float,
        slope: float,
        t: float,
        budget: int,
    ) -> tuple[_Evaluation | None, float, int]:
        """Bisect for the weak Wolfe conditions; on failure the parameters are as they were.

        Returns where the parameters stand then, the step length, and the number of evaluations.
        """
        low, high, best, best_t = 0.0, float("inf"), None, 0.0
        for count in range(1, max(budget, 1) + 1):
            line.go(t)
            found = self._evaluate(closure, line.points)
            if not found.finite or float(found.loss) > loss + _DECREASE * t * slope:
                high = t
            else:
                carried = line.carry(line.direction)
                if _inner(line.points, carried, found.grads) >= _CURVATURE * slope:
                    return found, t, count
                if best is None or float(found.loss) < float(best.loss):
                    best, best_t = found, t
                low = t
            # the slope along a retraction is known for short steps only: what decreases will do
            if count >= (_TRIALS if best is None else _PATIENCE):
                break
            t = 2.0 * low if high == float("inf") else 0.5 * (low + high)
        line.go(best_t)
        return best, best_t, count

    def _remember(self, line: _Line, t: float, grads: list[Tensor], before: list[Tensor]) -> None:
        """Carry all pairs to the new point, and add the one of this step."""
        points, pairs = line.points, [(line.carry(s), line.carry(y)) for s, y in self._pairs]
        s = line.carry([t * d for d in line.direction])
        y = [new - old for new, old in zip(grads, line.carry(before), strict=True)]
        if _inner(points, s, y) > 1e-10 * _inner(points, s, s):
            pairs.append((s, y))
        pairs = [pair for pair in pairs if _inner(points, *pair) > 0.0]
        self._pairs = pairs[-self.history_size :]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": []}  # the history begins anew


REEVALUATING_OPTIMIZERS.add(RiemannianLBFGS)


class _Evaluation(NamedTuple):
    """The loss and the Riemannian gradients at some points."""

    loss: Tensor
    grads: list[Tensor]

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (self.loss, *self.grads))


class _Line(NamedTuple):
    """The curve of all points from `start` in `direction`, by their retractions."""

    points: Points
    start: list[Tensor]
    direction: list[Tensor]

    def go(self, t: float) -> None:
        """Move the parameters to the place of t; to that of 0, bit for bit."""
        for (p, space), x, d in zip(*self, strict=True):
            p.copy_(space.retract(x, t * d) if t else x)

    def carry(self, vectors: list[Tensor]) -> list[Tensor]:
        """Transport vectors from the start to where the parameters stand."""
        moved = zip(self.points, self.start, vectors, strict=True)
        return [space.transport(x, p, v) for (p, space), x, v in moved]


def _inner(points: Points, u: list[Tensor], v: list[Tensor]) -> float:
    """The inner product of the product of all spaces."""
    parts = zip(points, u, v, strict=True)
    return float(sum(space.inner(p, a, b).double().sum() for (p, space), a, b in parts))


def _largest(vectors: list[Tensor]) -> float:
    return max((float(v.abs().amax()) for v in vectors), default=0.0)
