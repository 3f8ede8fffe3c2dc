"""Limited-memory BFGS on every space that has a gradient, a retraction and a transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        loss, grads = self._evaluate(closure, points)
        first, evaluations = loss, 1
        finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
        _checks.require(
            finite,
            self,
            "the loss and its gradient must be finite where a step begins",
            "Start from another point",
            loss=float(loss),
        )
        for _ in range(self.max_iter):
            if evaluations >= self.max_eval or _largest(grads) <= self.tolerance_grad:
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
            budget = self.max_eval - evaluations
            found = self._search(closure, points, loss, direction, slope, t, budget)
            evaluations += found.evaluations
            if found.moved is None:
                self._pairs = []  # the next call begins with the gradient
                break
            change, loss_change = _largest(found.moved), abs(float(found.loss - loss))
            self._remember(points, found, direction, grads)
            loss, grads = found.loss, found.grads
            if change <= self.tolerance_change or loss_change <= self.tolerance_change:
                break
        return first

    def _evaluate(self, closure: Callable[[], Any], points: Points) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            loss = torch.as_tensor(closure()).detach()
        grads = [
            space.gradient(p, torch.zeros_like(p) if p.grad is None else p.grad).clone()
            for p, space in points
        ]
        return loss, grads

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
        points: Points,
        loss: Tensor,
        direction: list[Tensor],
        slope: float,
        t: float,
        budget: int,
    ) -> _Found:
        """Bisect for the weak Wolfe conditions; on failure the parameters are as they were."""
        before = [p.clone() for p, _ in points]
        low, high = 0.0, float("inf")
        best: _Found | None = None
        for count in range(1, max(budget, 1) + 1):
            for (p, space), x, d in zip(points, before, direction, strict=True):
                p.copy_(space.retract(x, t * d))
            new, grads = self._evaluate(closure, points)
            good = bool(new.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
            if not good or float(new) > float(loss) + _DECREASE * t * slope:
                high = t
            else:
                moved = [p - x for (p, _), x in zip(points, before, strict=True)]
                if best is None or float(new) < float(best.loss):
                    best = _Found(new, grads, t, before, moved, count)
                carried = [
                    space.transport(x, p, d)
                    for (p, space), x, d in zip(points, before, direction, strict=True)
                ]
                if _inner(points, carried, grads) >= _CURVATURE * slope:
                    return best
                low = t
            # the slope along a retraction is known for short steps only: what decreases will do
            if count >= (_TRIALS if best is None else _PATIENCE):
                break
            t = 2.0 * low if high == float("inf") else 0.5 * (low + high)
        evaluations = count
        if best is None:
            for (p, _), x in zip(points, before, strict=True):
                p.copy_(x)
            return _Found(loss, [], 0.0, before, None, evaluations)
        for (p, space), x, d in zip(points, before, direction, strict=True):
            p.copy_(space.retract(x, best.t * d))
        best.evaluations = evaluations
        return best

    def _remember(
        self,
        points: Points,
        found: _Found,
        direction: list[Tensor],
        grads: list[Tensor],
    ) -> None:
        """Carry all pairs to the new point, and add the one of this step."""

        def carry(vectors: list[Tensor]) -> list[Tensor]:
            return [
                space.transport(x, p, v)
                for (p, space), x, v in zip(points, found.before, vectors, strict=True)
            ]

        self._pairs = [(carry(s), carry(y)) for s, y in self._pairs]
        s = carry([found.t * d for d in direction])
        y = [new - old for new, old in zip(found.grads, carry(grads), strict=True)]
        if _inner(points, s, y) > 1e-10 * _inner(points, s, s):
            self._pairs.append((s, y))
        pairs = [pair for pair in self._pairs if _inner(points, *pair) > 0.0]
        self._pairs = pairs[-self.history_size :]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": []}  # the history begins anew


REEVALUATING_OPTIMIZERS.add(RiemannianLBFGS)


@dataclass
class _Found:
    """The end of a line search: the loss, gradients and step there, and where it began."""

    loss: Tensor
    grads: list[Tensor]
    t: float
    before: list[Tensor]
    moved: list[Tensor] | None
    evaluations: int


def _inner(points: Points, u: list[Tensor], v: list[Tensor]) -> float:
    """The inner product of the product of all spaces."""
    parts = zip(points, u, v, strict=True)
    return float(sum(space.inner(p, a, b).double().sum() for (p, space), a, b in parts))


def _largest(vectors: list[Tensor]) -> float:
    return max((float(v.abs().amax()) for v in vectors), default=0.0)
