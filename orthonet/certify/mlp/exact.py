"""The Lipschitz constant of small piecewise linear networks, by branch and bound."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.certify._bound import Bound, norm_text
from orthonet.certify._radius import NORMS, Norm
from orthonet.certify.mlp.chain import Affine, Layer, frobenius_up, read_layers
from orthonet.certify.mlp.perceptron import mlp_bound
from orthonet.certify.mlp.regions import Dyadic, empty, nearest_point
from orthonet.certify.mlp.slopes import Activation, Pieces
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import add_up, gamma, mul_up, power_of_two_scale, up

__all__ = ["ExactConstant", "exact_constant"]

_ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
_DUAL = {"l1": math.inf, "l2": 2.0, "linf": 1.0}
_SAMPLES = 64
_EXACT = 1e-9


@dataclass(frozen=True)
class ExactConstant:
    """An enclosure of the Lipschitz constant of a network.

    Attributes:
        upper: The proved bound; of kind `"exact"` if `lower` is within a relative 1e-9 of it.
        lower: The norm of the Jacobian in a region that is proved to be there: the constant is not
            less. Rounding has been taken off.
        point: A point of this region.
        nodes: How many partial patterns were split.
        regions: How many whole patterns were looked at.
        undecided: How many of them could neither be shown to hold a point nor to be empty. They
            count for `upper`.
    """

    upper: Bound
    lower: float
    point: Tensor = field(repr=False)
    nodes: int
    regions: int
    undecided: int

    @property
    def exact(self) -> bool:
        """Whether both bounds agree."""
        return self.upper.kind == "exact"


def exact_constant(
    model: Layer | Iterable[Layer],
    *,
    norm: Norm = "l2",
    to: Norm | None = None,
    budget: int = 10_000,
) -> ExactConstant:
    r"""Find the Lipschitz constant of a small piecewise linear network.

    Where every unit stays on one side of its knots, the network is affine; the constant is the
    largest norm of the Jacobian of a region. The search splits units, the first layers first. It
    drops patterns that have no point, and those whose bound is below a norm that a region has. The
    region of a pattern holds a point that is found and verified, or is empty by multipliers that
    are verified in integer arithmetic, or it counts as if it held a point.

    With up to 4 inputs and 32 hidden units the constant is found within the default budget, as a
    rule; with more inputs, up to about 16 units. Larger networks get an enclosure. A split takes a
    few milliseconds.

    Args:
        model: An `nn.Sequential`, or an iterable of modules, `Affine` and `Activation`: linear
            layers and relu, leaky relu, prelu, abs, hardtanh, `MaxMin` or `GroupSort(2)`.
        norm: The norm of the input, `"l2"`, `"linf"` or `"l1"`.
        to: The norm of the output; None for the same one. Norms of matrices must be known: from l1,
            to l-infinity, or from l2 to l2.
        budget: The most patterns to split.

    Guarantee:
        `lower` <= the constant <= `upper`, in exact arithmetic with the weights as they are stored.

    Raises:
        ValueError: `budget` is not a positive int, or the norms have no formula.
        UncertifiableError: A layer is not piecewise linear.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> _ = model.requires_grad_(False)
        >>> _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> _ = model[0].bias.zero_(), model[2].weight.copy_(torch.tensor([[3.0, 2.0]]))
        >>> found = exact_constant(model)  # never both units at once, which would give 5
        >>> round(found.upper.value, 6), found.exact
        (3.0, True)

    References:
        Bhowmick, D'Souza & Raghavan, *LipBaB: computing exact Lipschitz constant of ReLU networks*,
        ICANN 2021, arXiv:2105.05495; *ExLipBaB*, arXiv:2602.15499, for piecewise linear networks.
    """
    _checks.one_of("exact_constant", NORMS, norm=norm)
    _checks.one_of("exact_constant", (None, *NORMS), to=to)
    _checks.positive_int("exact_constant", budget=budget)
    to = norm if to is None else to
    _checks.require(
        norm == "l1" or to == "linf" or norm == to == "l2",
        "exact_constant",
        "the norm of a matrix must have a formula: from l1, to linf, or from l2 to l2",
        "Choose other norms, or bound the constant with certify(..., norm=, to=)",
        norm=norm,
        to=to,
    )
    affine, activations = read_layers(model, "exact_constant", whole=True)
    pieces = []
    for activation in activations:
        found = activation.pieces
        if found is None or not _binary(found):
            _checks.fail(
                "exact_constant",
                "every activation must be piecewise linear, on single entries or pairs",
                "Bound the constant with mlp_bound or certify",
                UncertifiableError,
                activation=type(activation.function).__name__,
            )
        pieces.append(found)
    network = _Network(affine, activations, pieces, norm, to)
    with torch.no_grad():
        return _Search(network, budget).run()


def _binary(pieces: Pieces) -> bool:
    """Whether the pieces meet where float64 says that they do."""
    whole = bool((pieces.slopes == pieces.slopes.round()).all())
    return whole or all(knot == 0.0 for knot in pieces.knots)


class _Asked(NamedTuple):
    """A unit of a layer lies above (1) or below (-1) one of its knots."""

    layer: int
    unit: int
    knot: int
    sign: int


class _Network:
    """The maps of a network, its pieces, and bounds of what follows a layer."""

    def __init__(
        self,
        affine: Sequence[Affine],
        activations: Sequence[Activation],
        pieces: Sequence[Pieces],
        norm: str,
        to: str,
    ) -> None:
        self.affine, self.pieces, self.norm, self.to = affine, pieces, norm, to
        self.depth = len(pieces)
        self.sound = all(a.error == a.bias_error == 0.0 for a in affine)
        self.maps = [a.weight for a in affine]
        self.into = [
            w if p.before is None else p.before @ w for w, p in zip(self.maps, pieces, strict=False)
        ]
        """The maps to the entries that have knots."""
        self.onto = [
            w if p.after is None else w @ p.after
            for w, p in zip(self.maps[1:], pieces, strict=True)
        ]
        """The maps from them to the entries of the next affine map."""
        self.offsets = [_offsets(p) for p in pieces]
        self.lower = [p.slopes.amin(0) for p in pieces]
        self.upper = [p.slopes.amax(0) for p in pieces]
        self.slack = self._slack()
        self.rest = [1.0] * (self.depth + 1)
        self.layers = [x for pair in _joined(affine, activations) for x in pair]
        if norm == to == "l2":
            for k in range(1, self.depth):
                self.rest[k] = mlp_bound(self.layers[2 * k + 1 :], effort="fast").constant.value
        self.known: dict[tuple[tuple[int, ...], ...], Dyadic] = {}

    def _slack(self) -> float:
        """What rounding, and errors of the maps themselves, can add to the norm of a Jacobian."""
        plain = wrong = 1.0
        count = 0
        for i, a in enumerate(self.affine):
            size = frobenius_up(a.weight)
            count += sum(a.weight.shape) + 4
            plain, wrong = mul_up(plain, size), mul_up(wrong, add_up(size, a.error))
            if i < self.depth:
                p = self.pieces[i]
                steep = float(p.slopes.abs().max())
                around = [
                    1.0 if m is None else spectral_norm_bound(m.abs()) for m in (p.before, p.after)
                ]
                count += 4 + (0 if p.before is None else 4)
                plain, wrong = (mul_up(v, steep, *around) for v in (plain, wrong))
        # between other norms an l2 error counts as often as the roots of both widths
        wide = math.sqrt(self.affine[0].weight.shape[1] * self.affine[-1].weight.shape[0])
        ratio = 1.0 if self.norm == self.to == "l2" else up(wide)
        return mul_up(ratio, max(0.0, up(mul_up(wrong, up(1.0 + 4.0 * gamma(count))) - plain)))

    def size(self, matrix: Tensor, radius: Tensor | None = None) -> float:
        """Not less than the norm of all matrices within `radius` of one, entry by entry."""
        if self.norm == self.to == "l2":
            value = spectral_norm_bound(matrix)
            return value if radius is None else add_up(value, spectral_norm_bound(radius))
        matrix = matrix.abs() if radius is None else matrix.abs() + radius
        scale = power_of_two_scale(matrix)
        if not scale:
            return 0.0
        matrix = matrix / scale
        if self.norm == "l1":
            found = torch.linalg.vector_norm(matrix, _ORDER[self.to], dim=0)
        else:
            found = torch.linalg.vector_norm(matrix, _DUAL[self.norm], dim=1)
        rounded = up(1.0 + 4.0 * gamma(sum(matrix.shape) + 4))
        return mul_up(add_up(mul_up(float(found.max()), rounded), 2.0**-500), scale)

    def least(self, matrix: Tensor) -> float:
        """Not more than the norm of a Jacobian that was computed."""
        if self.norm == self.to == "l2":
            scale = power_of_two_scale(matrix) or 1.0
            direction = torch.linalg.svd(matrix / scale, full_matrices=False).Vh[0]
            length = float(torch.linalg.vector_norm(direction))
            value = scale * float(torch.linalg.vector_norm(matrix / scale @ direction)) / length
        else:
            value = self.size(matrix) * (1.0 - 16.0 * gamma(sum(matrix.shape) + 4))
        value *= 1.0 - 16.0 * gamma(sum(matrix.shape) + 4)
        return max(0.0, value - 2.0 * self.slack)

    def sides(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The piece of each unit at a point, -1 where rounding leaves it open; the Jacobian."""
        found = []
        value, error, size = x, torch.zeros_like(x), x.abs()
        jacobian = torch.eye(len(x), dtype=torch.float64)
        for k, (a, p) in enumerate(zip(self.affine, self.pieces, strict=False)):
            weight, bias = a.weight, a.offset()
            far = a.error * float(torch.linalg.vector_norm(size)) + a.bias_error
            error = weight.abs() @ error + far
            size = weight.abs() @ size + bias.abs()
            value = weight @ value + bias
            if p.before is not None:
                value, error, size = (
                    p.before @ value,
                    p.before.abs() @ error,
                    p.before.abs() @ size,
                )
            error = (error + gamma(weight.shape[1] + 16) * size) * 1.000001
            side = torch.zeros(len(value), dtype=torch.long)
            open_ = torch.zeros(len(value), dtype=torch.bool)
            for knot in p.knots:
                side += (value > knot).long()
                open_ |= (value - knot).abs() <= error + 1e-300
            steep = self.into[k] @ jacobian
            # one that does not move has no part in the Jacobian, whatever its slope
            open_ &= (p.slopes != p.slopes[:1]).any(0) & (steep != 0).any(1)
            found.append(torch.where(open_, -1, side))
            largest = p.slopes.abs().amax(0)
            slope = p.slopes.gather(0, side[None])[0]
            offset = self.offsets[k].gather(0, side[None])[0]
            value = slope * value + offset
            error, size = largest * error, largest * size + offset.abs()
            jacobian = slope[:, None] * steep
            if p.after is not None:
                value, error, size = (
                    m @ v
                    for m, v in zip(
                        (p.after, p.after.abs(), p.after.abs()), (value, error, size), strict=True
                    )
                )
                jacobian = p.after @ jacobian
            error = (error + gamma(16) * size) * 1.000001
        return found, self.maps[-1] @ jacobian

    def exact_rows(
        self, choices: tuple[tuple[int, ...], ...], asked: Sequence[_Asked]
    ) -> list[list[int]]:
        """The sides that a pattern asks for, (g, -h) with g x > h, as integers."""
        rows = []
        for k, unit, knot, sign in asked:
            values = self.exact_values(choices[:k])
            row = Dyadic([values.rows[unit]], values.exponent)
            rows.append(_shifted(row, -self.pieces[k].knots[knot], sign))
        return rows

    def constant_side(self, choices: tuple[tuple[int, ...], ...], unit: int) -> int | None:
        """The piece of a unit of the next layer that is constant in a region, else None."""
        values = self.exact_values(choices)
        row = Dyadic([values.rows[unit]], values.exponent)
        if not self.sound or any(row.rows[0][:-1]):
            return None
        knots = self.pieces[len(choices)].knots  # on a knot either piece will do
        return sum(_shifted(row, -knot, 1)[-1] > 0 for knot in knots)

    def exact_values(self, choices: tuple[tuple[int, ...], ...]) -> Dyadic:
        """The entries before the knots of a layer as integers, (n, inputs + 1), after a pattern."""
        if choices in self.known:
            return self.known[choices]
        k = len(choices)
        a = self.affine[k]
        if not k:
            values = Dyadic.of(torch.cat([a.weight, a.offset()[:, None]], 1))
        else:
            p, before = self.pieces[k - 1], self.exact_values(choices[:-1])
            side = torch.tensor(choices[-1]).clamp_min(0)
            slope, offset = (
                table.gather(0, side[None])[0] for table in (p.slopes, self.offsets[k - 1])
            )
            values = Dyadic.of(torch.diag(slope)).times(before)
            zeros = torch.zeros(len(slope), self.affine[0].weight.shape[1], dtype=torch.float64)
            values = values.plus(Dyadic.of(torch.cat([zeros, offset[:, None]], 1)))
            if p.after is not None:
                values = Dyadic.of(p.after).times(values)
            bias = torch.cat(
                [zeros.new_zeros(len(a.weight), zeros.shape[1]), a.offset()[:, None]], 1
            )
            values = Dyadic.of(a.weight).times(values).plus(Dyadic.of(bias))
        before_knots = self.pieces[k].before
        if before_knots is not None:
            values = Dyadic.of(before_knots).times(values)
        if len(self.known) > 4096:
            self.known.clear()
        self.known[choices] = values
        return values


def _joined(
    affine: Sequence[Affine], activations: Sequence[Activation]
) -> Iterable[tuple[Affine | Activation, ...]]:
    """The layers in turn."""
    for a, b in itertools.zip_longest(affine, activations):
        yield (a,) if b is None else (a, b)


def _offsets(p: Pieces) -> Tensor:
    """What is added to slope times entry on each piece, (pieces, n)."""
    rows = [p.value - p.slopes[0] * p.knots[0]]
    for i, knot in enumerate(p.knots):
        rows.append(rows[-1] + (p.slopes[i] - p.slopes[i + 1]) * knot)
    return torch.stack(rows)


def _shifted(row: Dyadic, amount: float, sign: int) -> list[int]:
    """The integers of a row of values whose last entry is moved by an amount, times a sign."""
    last = Dyadic.of(torch.tensor([[0.0] * (len(row.rows[0]) - 1) + [amount]], dtype=torch.float64))
    return [sign * v for v in row.plus(last).rows[0]]


@dataclass(eq=False)
class _Node:
    """A partial pattern: whole layers, and some units of the next one."""

    choices: tuple[tuple[int, ...], ...]
    values: Tensor  # of the present layer before its knots, (n, inputs + 1)
    rows: Tensor
    levels: Tensor
    point: Tensor | None
    asked: tuple[_Asked, ...] = ()
    bound: float = math.inf

    @property
    def layer(self) -> int:
        """The layer whose units are split."""
        return len(self.choices) - 1


class _Search:
    """Best first, by the bound of what a partial pattern can become."""

    def __init__(self, network: _Network, budget: int) -> None:
        self.network, self.budget = network, budget
        self.lower, self.point = 0.0, torch.zeros(network.affine[0].weight.shape[1]).double()
        self.nodes = self.regions = self.undecided = 0
        self.open = 0.0  # the largest bound of what is not decided
        self.heap: list[tuple[float, int, _Node]] = []
        self.count = itertools.count()

    def run(self) -> ExactConstant:
        network = self.network
        if not network.depth:
            matrix = network.maps[0]
            self.lower = network.least(matrix)
            self.open = add_up(network.size(matrix), network.slack)
        else:
            self._sample()
            inputs = network.affine[0].weight.shape[1]
            first = network.affine[0]
            values = torch.cat([first.weight, first.offset()[:, None]], 1)
            p = network.pieces[0]
            values = values if p.before is None else p.before @ values
            empty_rows = torch.zeros(0, inputs, dtype=torch.float64)
            start = _Node(
                (self._start(0),), values, empty_rows, empty_rows[:, :0].sum(1), self.point
            )
            start.bound = self._bound(start)
            self._push(start)
        while self.heap and self.nodes < self.budget:
            _, _, node = heapq.heappop(self.heap)
            if node.bound <= self.lower * (1.0 + _EXACT / 4):
                self.open = max(self.open, node.bound)
                break
            self.nodes += 1
            self._split(node)
        self.open = max([self.open, *(node.bound for _, _, node in self.heap)])
        upper = max(self.open, self.lower)
        open_ = upper > self.lower * (1.0 + _EXACT)
        if open_ and network.depth and network.norm == network.to == "l2":
            upper = min(upper, mlp_bound(network.layers).constant.value)
        good = upper <= self.lower * (1.0 + _EXACT) or upper == 0.0
        bound = Bound(upper, norm_text(network.norm, network.to), "exact" if good else "upper")
        return ExactConstant(
            bound, self.lower, self.point, self.nodes, self.regions, self.undecided
        )

    def _sample(self) -> None:
        """Norms of Jacobians at some points, to begin with."""
        generator = torch.Generator().manual_seed(0)
        size = (_SAMPLES, len(self.point))
        points = torch.randn(size, dtype=torch.float64, generator=generator)
        points = points * torch.logspace(-2, 2, _SAMPLES, dtype=torch.float64)[:, None]
        for x in points:
            self._try(x)

    def _try(self, x: Tensor) -> list[Tensor]:
        """Take the norm of the Jacobian at a point, if it has one; the pieces there."""
        sides, jacobian = self.network.sides(x)
        if all(bool((side >= 0).all()) for side in sides):
            value = self.network.least(jacobian)
            if value > self.lower:
                self.lower, self.point = value, x
        return sides

    def _start(self, k: int) -> tuple[int, ...]:
        """The pattern of a layer in which nothing is decided but units without a knot."""
        slopes = self.network.pieces[k].slopes
        bend = (slopes != slopes[:1]).any(0)
        return tuple(-1 if b else 0 for b in bend.tolist())

    def _push(self, node: _Node) -> None:
        if node.bound > self.lower * (1.0 + _EXACT / 4):
            heapq.heappush(self.heap, (-node.bound, next(self.count), node))
        else:
            self.open = max(self.open, node.bound)

    # bounds -----------------------------------------------------------------------------------

    def _slopes(self, node: _Node) -> tuple[Tensor, Tensor]:
        """Means and half widths of the slopes of the present layer."""
        network, k = self.network, node.layer
        side = torch.tensor(node.choices[-1])
        fixed = network.pieces[k].slopes.gather(0, side.clamp_min(0)[None])[0]
        low = torch.where(side < 0, network.lower[k], fixed)
        high = torch.where(side < 0, network.upper[k], fixed)
        return (low + high) / 2.0, (high - low) / 2.0

    def _bound(self, node: _Node) -> float:
        """The largest norm of a Jacobian that the pattern can become, or more."""
        network, k = self.network, node.layer
        middle, half = self._slopes(node)
        jacobian = node.values[:, :-1]
        center, radius = middle[:, None] * jacobian, half[:, None] * jacobian.abs()
        onto = network.onto[k]
        found = math.inf
        if network.norm == network.to == "l2":
            size = spectral_norm_bound(onto @ center)
            root = half.sqrt()
            spread = mul_up(
                spectral_norm_bound(onto * root), spectral_norm_bound(root[:, None] * jacobian)
            )
            size = add_up(size, mul_up(spread, up(1.0 + 2.0**-40)))
            found = mul_up(size, network.rest[k + 1])
        for j in range(k, network.depth):
            if j > k:
                p = network.pieces[j]
                if p.before is not None:
                    center, radius = p.before @ center, p.before.abs() @ radius
                mean = (network.lower[j] + network.upper[j])[:, None] / 2.0
                wide = (network.upper[j] - network.lower[j])[:, None] / 2.0
                radius = (mean.abs() + wide) * radius + wide * center.abs()
                center = mean * center
            center, radius = network.onto[j] @ center, network.onto[j].abs() @ radius
        whole = network.size(center, radius if bool((radius > 0).any()) else None)
        return add_up(min(found, whole), network.slack)

    # splits -----------------------------------------------------------------------------------

    def _split(self, node: _Node) -> None:
        unit = self._unit(node)
        if unit is None:
            self._next_layer(node)
            return
        network, k = self.network, node.layer
        pieces = network.pieces[k]
        row = node.values[unit]
        here = -1
        if node.point is not None:
            here = int(network.sides(node.point)[0][k][unit])
        for side in range(len(pieces.knots) + 1):
            layer = list(node.choices[-1])
            layer[unit] = side
            choices = (*node.choices[:-1], tuple(layer))
            rows, levels, asked = [node.rows], [node.levels], list(node.asked)
            if side > 0:
                asked.append(_Asked(k, unit, side - 1, 1))
                rows.append(row[None, :-1])
                levels.append((pieces.knots[side - 1] - row[-1])[None])
            if side < len(pieces.knots):
                asked.append(_Asked(k, unit, side, -1))
                rows.append(-row[None, :-1])
                levels.append((row[-1] - pieces.knots[side])[None])
            child = _Node(
                choices, node.values, torch.cat(rows), torch.cat(levels), None, tuple(asked)
            )
            child.bound = min(node.bound, self._bound(child))
            if child.bound <= self.lower * (1.0 + _EXACT / 4):
                self.open = max(self.open, child.bound)
                continue
            if side == here:
                child.point = node.point
            elif not self._holds(child):
                continue
            self._push(child)

    def _holds(self, node: _Node) -> bool:
        """Whether the region may hold a point; one that is found is kept."""
        point, guess = nearest_point(node.rows, node.levels)
        if point is not None and self._inside(node, self._try(point)):
            node.point = point
            return True
        if not self.network.sound:
            return True
        rows = self.network.exact_rows(node.choices, node.asked)
        told = [i for i, row in enumerate(rows) if any(row)]  # the others hold at every point
        last = len(rows)
        return not told or not empty([rows[i] for i in told], guess[[*told, last]])

    @staticmethod
    def _inside(node: _Node, sides: list[Tensor]) -> bool:
        """Whether the units at a point lie on the sides that are asked for."""
        found = [(int(sides[a.layer][a.unit]), a) for a in node.asked]
        return all(at >= 0 and (at > a.knot) == (a.sign > 0) for at, a in found)

    def _unit(self, node: _Node) -> int | None:
        """The unit that matters most among those that are not decided."""
        _, half = self._slopes(node)
        onto = self.network.onto[node.layer]
        weight = half * torch.linalg.vector_norm(node.values[:, :-1], dim=1)
        weight = weight * torch.linalg.vector_norm(onto, dim=0)
        best = int(weight.argmax())
        if float(weight[best]) > 0.0:
            return best
        if node.layer + 1 == self.network.depth:
            return None  # what is left has no weight
        left = [i for i, side in enumerate(node.choices[-1]) if side < 0]
        return left[0] if left else None

    def _next_layer(self, node: _Node) -> None:
        network, k = self.network, node.layer
        if k + 1 == network.depth:
            self.regions += 1
            if node.point is not None:
                # all units of weight are decided: the norm is that at the point, or of one nearby
                self._try(node.point)
            else:
                self.undecided += 1
            self.open = max(self.open, node.bound)
            return
        side = torch.tensor(node.choices[-1]).clamp_min(0)
        p, after = network.pieces[k], network.affine[k + 1]
        slope = p.slopes.gather(0, side[None])[0]
        offset = network.offsets[k].gather(0, side[None])[0]
        values = slope[:, None] * node.values
        values[:, -1] += offset
        values = network.onto[k] @ values
        values[:, -1] += after.offset()
        before = network.pieces[k + 1].before
        values = values if before is None else before @ values
        start = list(self._start(k + 1))
        for j in (values[:, :-1] == 0).all(1).nonzero()[:, 0].tolist():
            side = network.constant_side(node.choices, j) if start[j] < 0 else None
            start[j] = start[j] if side is None else side
        choices = (*node.choices, tuple(start))
        child = _Node(choices, values, node.rows, node.levels, node.point, node.asked)
        child.bound = min(node.bound, self._bound(child))
        self._push(child)
