r"""Multipliers of LipSDP-neuron: a closed form, and a descent without a solver.

For differences of a chain $z_i = \Theta_i W_i z_{i-1}$ with slopes in $[m - r, m + r]$ and
multipliers $\lambda = 1 / \mu$ of the units with $r > 0$ (U selects their rows), let

$$\Sigma_0 = I, \quad H_i = W_i \Sigma_{i-1} W_i^T, \quad
T_i = \mathrm{diag}(\mu / r^2) - U H_i U^T, \quad \Sigma_i = U^T \mathrm{diag}(\mu)\,U
    + \mathrm{diag}(m)\,(H_i + H_i U^T T_i^{-1} U H_i)\,\mathrm{diag}(m).$$

If all $T_i$ are positive definite, $\|C z_k\|^2 \le \lambda_{\max}(C \Sigma_k C^T) \|z_0\|^2$ for
every C. These are the Schur complements of the matrix inequality of LipSDP, inverted: so units
whose slope is known need no multiplier, and any signs of slopes are alike. What is found here is
a proposal; `_proof` proves it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.certify.mlp.chain import Chain

__all__ = ["closed_form", "descend"]

_WORK = 2e11  # floating-point operations that a descent may take
_STAGES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_MEMORY = 40
_WALL = 0.01  # weight of the barrier where the optimum need not touch it


class _Layer(NamedTuple):
    """One layer: its matrix, and the slopes as means and half-widths."""

    weight: Tensor
    mean: Tensor
    half: Tensor
    free: Tensor  # the indices of the units whose slope is not known
    walled: bool  # whether slopes may have either sign: the optimum lies where T is singular


def _layers(chain: Chain) -> list[_Layer]:
    found = []
    for weight, low, high in zip(chain.weights[:-1], chain.lower, chain.upper, strict=True):
        half = (high - low) / 2
        walled = bool((low * high < 0).any())
        found.append(_Layer(weight, (low + high) / 2, half, half.nonzero()[:, 0], walled))
    return found


def closed_form(chain: Chain, margin: float = 1e-3) -> list[Tensor] | None:
    r"""ECLipsE-Fast, for any slopes: one pass, always feasible in exact arithmetic.

    With $p = \lambda_{\max}(H)$ the next matrix is at most diagonal with the entries
    $\mu + m^2 p / (1 - r^2 p / \mu)$. Their minimum $L^2 p$, $L = |m| + r$, is at
    $\mu = p\,r\,L$: the bound is never above the product of the norms. Where slopes of either sign
    are allowed the minimum may lie on the border of what is feasible; there `margin` is kept.

    Returns:
        The $\mu$ of every layer (1 where it is not used), or None if rounding got in the way.

    References:
        Y. Xu, S. Sivaranjani, ECLipsE, NeurIPS 2024 (slopes in [0, beta], one number a layer).
    """
    found: list[Tensor] = []
    current: Tensor | None = None
    for layer, low, high in zip(_layers(chain), chain.lower, chain.upper, strict=True):
        gram = _gram(layer.weight, current)
        largest = float(torch.linalg.eigvalsh(gram)[-1]) if bool(gram.isfinite().all()) else 0.0
        if not largest > 0.0 or not math.isfinite(largest):
            return None
        step = torch.where(low * high < 0, 1.0 + margin, 1.0)
        mu = largest * step * layer.half * torch.maximum(low.abs(), high.abs())
        found.append(torch.where(layer.half > 0, mu, 1.0))
        following = _next(gram, layer, found[-1])
        if following is None:
            return None
        current = following[0]
    return found


def _gram(weight: Tensor, current: Tensor | None) -> Tensor:
    gram = weight @ weight.mT if current is None else weight @ current @ weight.mT
    return (gram + gram.mT) / 2


def _next(gram: Tensor, layer: _Layer, mu: Tensor) -> tuple[Tensor, Tensor] | None:
    """The next matrix, and minus the log-determinant of T, scaled to unit diagonal without H."""
    free = layer.free
    core, wall = gram, gram.new_zeros(())
    shift = torch.zeros_like(mu)
    if len(free):
        limit = mu[free] / layer.half[free].square()
        root, info = torch.linalg.cholesky_ex(torch.diag(limit) - gram[free][:, free])
        if int(info):
            return None
        rows = torch.linalg.solve_triangular(root, gram[free], upper=False)
        core = core + rows.mT @ rows
        wall = (limit.log() - 2.0 * root.diagonal().log()).mean()
        shift = shift.index_add(0, free, mu[free])
    return torch.diag(shift) + layer.mean[:, None] * core * layer.mean, wall


def _value(
    chain: Chain, layers: list[_Layer], multipliers: list[Tensor], power: float
) -> tuple[Tensor, float] | None:
    """The log of the squared bound, smoothed and with a barrier, and the square itself.

    None where the multipliers are not feasible.
    """
    current: Tensor | None = None
    wall = torch.zeros((), dtype=torch.float64)
    for layer, mu in zip(layers, multipliers, strict=True):
        following = _next(_gram(layer.weight, current), layer, mu)
        if following is None:
            return None
        current = following[0]
        wall = wall + (1.0 if layer.walled else _WALL) * following[1]
    gram = _gram(chain.weights[-1], current)
    if not bool(gram.isfinite().all()):
        return None
    values = torch.linalg.eigvalsh(gram).clamp_min(1e-300)
    top = values[-1].detach()
    smooth = top.log() + ((values / top) ** power).sum().log() / power
    return smooth + wall / power, float(top)


def descend(chain: Chain, start: list[Tensor]) -> list[Tensor]:
    """Better multipliers than `start`, by L-BFGS on their logarithms, at a bounded cost."""
    layers = _layers(chain)
    if any(layer.walled for layer in layers):
        start = closed_form(chain, 0.5) or start
    ids = [_ids(layer.free, group) for layer, group in zip(layers, chain.groups, strict=True)]
    counts = [int(i.max()) + 1 if len(i) else 0 for i in ids]
    if not sum(counts):
        return start
    search = _Search(chain, layers, ids, counts)
    x = torch.cat(
        [
            torch.zeros(n, dtype=torch.float64).scatter(0, i, s[layer.free].log())
            for n, i, s, layer in zip(counts, ids, start, layers, strict=True)
        ]
    )
    evaluations = int(min(400, max(30, _WORK / (30 * sum(len(s) ** 3 for s in start)))))
    stages = _STAGES if evaluations >= 300 else _STAGES[1::2]
    if chain.weights[-1].shape[0] == 1 and not any(layer.walled for layer in layers):
        stages = (1.0,)
    search.best_x = x
    for i, power in enumerate(stages):
        allowed = search.evaluations + (evaluations - search.evaluations) // (len(stages) - i)
        search.stage(search.best_x, power, allowed)
    return search.multipliers(search.best_x)


def _ids(free: Tensor, group: Tensor | None) -> Tensor:
    """Which variable the multiplier of each free unit is: units of a group share one."""
    own = torch.arange(len(free))
    if group is None or not len(free):
        return own
    mine = group[free]
    own = own + int(mine.max()) + 1
    return torch.unique(torch.where(mine >= 0, mine, own), return_inverse=True)[1]


class _Search:
    """L-BFGS with backtracking; an infeasible point counts as infinite."""

    def __init__(
        self, chain: Chain, layers: list[_Layer], ids: list[Tensor], counts: list[int]
    ) -> None:
        self.chain, self.layers, self.ids, self.counts = chain, layers, ids, counts
        self.best, self.best_x, self.evaluations = math.inf, torch.empty(0), 0

    def multipliers(self, x: Tensor) -> list[Tensor]:
        found = []
        for part, i, layer in zip(x.split(self.counts), self.ids, self.layers, strict=True):
            ones = torch.ones_like(layer.half)
            found.append(ones.index_copy(0, layer.free, part.exp()[i]))
        return found

    def evaluate(self, x: Tensor, power: float) -> tuple[float, Tensor]:
        self.evaluations += 1
        variable = x.clone().requires_grad_()
        with torch.enable_grad():
            found = _value(self.chain, self.layers, self.multipliers(variable), power)
            if found is None:
                return math.inf, x
            value, squared = found
            (gradient,) = torch.autograd.grad(value, variable)
        if not bool(gradient.isfinite().all()) or not math.isfinite(squared):
            return math.inf, x
        if squared < self.best:
            self.best, self.best_x = squared, x
        return float(value.detach()), gradient

    def stage(self, x: Tensor, power: float, allowed: int) -> None:
        value, gradient = self.evaluate(x, power)
        if math.isinf(value):
            return
        steps: list[Tensor] = []
        changes: list[Tensor] = []
        stalled = 0
        while self.evaluations < allowed and stalled <= 5:
            direction = self._direction(gradient, steps, changes)
            slope = float(gradient @ direction)
            if slope >= 0.0:
                direction, slope, steps, changes = -gradient, -float(gradient @ gradient), [], []
            length = min(1.0, 2.0 / max(float(direction.abs().max()), 1e-300))
            for _ in range(25):
                trial, turned = self.evaluate(x + length * direction, power)
                if trial <= value + 1e-4 * length * slope:
                    break
                length *= 0.5
            else:
                return
            step, change = length * direction, turned - gradient
            if float(step @ change) > 1e-12 * float(step.norm() * change.norm()):
                steps, changes = [*steps, step][-_MEMORY:], [*changes, change][-_MEMORY:]
            stalled = stalled + 1 if value - trial < 1e-7 else 0
            x, value, gradient = x + step, trial, turned

    @staticmethod
    def _direction(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
        q = gradient.clone()
        if not steps:
            return -0.3 / max(float(q.norm()), 1e-12) * q
        weights = []
        for s, y in zip(reversed(steps), reversed(changes), strict=True):
            weights.append(float(s @ q) / float(s @ y))
            q -= weights[-1] * y
        s, y = steps[-1], changes[-1]
        q *= float(s @ y) / float(y @ y)
        for s, y, weight in zip(steps, changes, reversed(weights), strict=True):
            q += s * (weight - float(y @ q) / float(s @ y))
        return -q
