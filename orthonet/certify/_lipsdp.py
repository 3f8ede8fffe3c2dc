r"""Multipliers of LipSDP-neuron: a closed form, and a descent without a solver.

For differences of a chain $z_i = \Theta_i W_i z_{i-1}$ with slopes in $[\alpha, \beta]$ and
multipliers $\Lambda_i = \mathrm{diag}(\lambda_i) > 0$, let $a = \alpha\beta$,
$m = (\alpha + \beta) / 2$, $X_i = \Lambda_i m_i W_i$ and

$$S_0 = I + W_1^T \Lambda_1 a_1 W_1, \quad
S_i = \Lambda_i + W_{i+1}^T \Lambda_{i+1} a_{i+1} W_{i+1} - X_i S_{i-1}^{-1} X_i^T.$$

If all $S_i$ are positive definite, $\|C z_k\|^2 \le \lambda_{\max}(C S_k^{-1} C^T) \|z_0\|^2$ for
every $C$. What is found here is a proposal; `_proof` proves it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet.certify._chain import Chain

__all__ = ["closed_form", "descend"]

_LINEAR = 1e-2  # least half-width of an interval of slopes, relative to the largest slope
_WORK = 2e11  # floating-point operations that a descent may take
_STAGES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_MEMORY = 40


class _Layer(NamedTuple):
    """One layer of multipliers: a = lower * upper, m their mean, which group a unit belongs to."""

    weight: Tensor
    product: Tensor
    mean: Tensor
    sharp: bool  # whether `product` has an entry that is not zero
    walled: bool  # whether it has a negative one: then the optimum lies where S is singular


def _layers(chain: Chain) -> list[_Layer]:
    found = []
    for weight, low, high in zip(chain.weights[:-1], chain.lower, chain.upper, strict=True):
        product = low * high
        sharp, walled = bool((product != 0).any()), bool((product < 0).any())
        found.append(_Layer(weight, product, (low + high) / 2, sharp, walled))
    return found


def closed_form(chain: Chain, margin: float = 1e-4) -> list[Tensor] | None:
    r"""ECLipsE-Fast, for any slopes: one pass, always feasible in exact arithmetic.

    With $p = \lambda_{\max}(W S^{-1} W^T)$, $W (S + W^T \Lambda a W)^{-1} W^T \preceq
    (1/p + \Lambda a)^{-1}$, so that the next S is at least diagonal with the entries
    $\lambda (1 - r^2 p \lambda) / (1 + a p \lambda)$, $r = (\beta - \alpha) / 2$. Their maximum
    $1 / (L^2 p)$, $L = \max(|\alpha|, |\beta|)$, is at $\lambda = 1 / (p\,r\,L)$: the bound is
    never above the product of the norms. Where a < 0 the maximum may lie on the border of what
    is feasible; there `margin` is kept.

    References:
        Y. Xu, S. Sivaranjani, ECLipsE, NeurIPS 2024 (slopes in [0, beta], one number a layer).
    """
    multipliers: list[Tensor] = []
    layers = _layers(chain)
    current = torch.eye(chain.weights[0].shape[1], dtype=torch.float64)
    for layer, low, high in zip(layers, chain.lower, chain.upper, strict=True):
        root, info = torch.linalg.cholesky_ex(current)
        if int(info):
            return None
        half = torch.linalg.solve_triangular(root, layer.weight.mT, upper=False)
        largest = float(torch.linalg.matrix_norm(half, 2)) ** 2
        if not largest > 0.0 or not math.isfinite(largest):
            return None
        size = torch.maximum(low.abs(), high.abs())
        radius = torch.maximum((high - low) / 2, _LINEAR * size)
        step = torch.where(layer.product < 0, 1.0 - margin, 1.0)
        multiplier = step / (largest * radius * size)
        multipliers.append(multiplier)
        following = _next(current, layer, multiplier)
        if following is None:
            return None
        current = following[0]
    return multipliers


def _next(current: Tensor, layer: _Layer, multiplier: Tensor) -> tuple[Tensor, Tensor] | None:
    """From S_(i-1), without the term of layer i, to S_i without that of layer i + 1.

    Also the log-determinant of S_(i-1) with that term.
    """
    if layer.sharp:
        weight = layer.weight
        current = current + weight.mT @ ((multiplier * layer.product)[:, None] * weight)
    root, info = torch.linalg.cholesky_ex(current)
    if int(info):
        return None
    scaled = (multiplier * layer.mean)[:, None] * layer.weight
    half = torch.linalg.solve_triangular(root, scaled.mT, upper=False)
    return torch.diag(multiplier) - half.mT @ half, 2.0 * root.diagonal().log().sum()


def _value(
    chain: Chain, layers: list[_Layer], multipliers: list[Tensor], power: float
) -> tuple[Tensor, float] | None:
    """The log of the squared bound, smoothed and with a barrier, and the square itself.

    None where the multipliers are not feasible.
    """
    size = layers[0].weight.shape[1]
    current, volume = torch.eye(size, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    wall = torch.zeros((), dtype=torch.float64)
    for layer, multiplier in zip(layers, multipliers, strict=True):
        if layer.walled and layer is not layers[0]:
            root, info = torch.linalg.cholesky_ex(current)
            volume = 2.0 * root.diagonal().log().sum()
        following = _next(current, layer, multiplier)
        if following is None:
            return None
        current, inside = following
        if layer.walled:
            wall = wall + (volume - inside) / layer.weight.shape[1]
    root, info = torch.linalg.cholesky_ex(current)
    if int(info):
        return None
    half = torch.linalg.solve_triangular(root, chain.weights[-1].mT, upper=False)
    gram = half.mT @ half if half.shape[0] >= half.shape[1] else half @ half.mT
    values = torch.linalg.eigvalsh(gram).clamp_min(1e-300)
    top = values[-1]
    scaled = values / top.detach()
    smooth = top.detach().log() + (scaled**power).sum().log() / power
    return smooth + wall / power, float(top.detach())


def descend(chain: Chain, start: list[Tensor]) -> list[Tensor]:
    """Better multipliers than `start`, by L-BFGS on their logarithms, at a bounded cost."""
    layers = _reduced(_layers(chain))
    if any(layer.walled for layer in layers):
        start = closed_form(chain, 0.5) or start
    ids = [_ids(multiplier, group) for multiplier, group in zip(start, chain.groups, strict=True)]
    counts = [int(i.max()) + 1 for i in ids]
    search = _Search(chain, layers, ids, counts)
    x = torch.cat([
        torch.zeros(n, dtype=torch.float64).scatter(0, i, s.log())
        for n, i, s in zip(counts, ids, start, strict=True)
    ])  # fmt: skip
    widths = [layers[0].weight.shape[1], *(len(s) for s in start)]
    evaluations = int(min(600, max(30, _WORK / (30 * sum(w**3 for w in widths)))))
    stages = _STAGES if evaluations >= 300 else _STAGES[1::2]
    if chain.weights[-1].shape[0] == 1 and not any(layer.walled for layer in layers):
        stages = (1.0,)
    search.best_x = x
    for i, power in enumerate(stages):
        allowed = search.evaluations + (evaluations - search.evaluations) // (len(stages) - i)
        search.stage(search.best_x, power, allowed)
    return search.multipliers(search.best_x)


def _ids(multiplier: Tensor, group: Tensor | None) -> Tensor:
    """Which variable each multiplier is: units of a group share one."""
    if group is None:
        return torch.arange(len(multiplier))
    own = int(group.max()) + 1 + torch.arange(len(multiplier))
    return torch.unique(torch.where(group >= 0, group, own), return_inverse=True)[1]


def _reduced(layers: list[_Layer]) -> list[_Layer]:
    """The first weight as a square matrix with the same W W^T, if it is wide."""
    first = layers[0]
    if first.weight.shape[1] <= first.weight.shape[0]:
        return layers
    square = torch.linalg.qr(first.weight.mT, mode="r")[1].mT.contiguous()
    return [first._replace(weight=square), *layers[1:]]


class _Search:
    """L-BFGS with backtracking; an infeasible point counts as infinite."""

    def __init__(
        self, chain: Chain, layers: list[_Layer], ids: list[Tensor], counts: list[int]
    ) -> None:
        self.chain, self.layers, self.ids, self.counts = chain, layers, ids, counts
        self.best, self.best_x, self.evaluations = math.inf, torch.empty(0), 0

    def multipliers(self, x: Tensor) -> list[Tensor]:
        parts = x.split(self.counts)
        return [part.exp()[i] for part, i in zip(parts, self.ids, strict=True)]

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
