"""Random graphs over all records of `certify`, against secants and dense Jacobians.

A graph applies operations with random arguments to an input and to what it computed before. The
claim of its certificate is tried by Jacobians and by secants at several scales, which are halved
where the output changes most, so that jumps are found.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from orthonet import _checks
from orthonet._torch import mutates, without_values
from orthonet.certify import certify
from orthonet.certify.graph.decompose import decompose
from orthonet.certify.graph.fold import fold, moving
from orthonet.certify.graph.marks import mark_of, marked_copy
from orthonet.certify.graph.pairs import write_pairs
from orthonet.certify.graph.program import BATCH, Program, op_name
from orthonet.certify.norms import effort as with_effort
from orthonet.certify.rules import RECORDS
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError

__all__ = ["FuzzReport", "Violation", "fuzz_certificates"]

_SHAPES = ((6,), (4,), (3, 4), (4, 6), (4, 5, 6), (2, 4, 4), (4, 3, 3), (1, 5, 3), (8, 4))
_LARGEST = 300  # entries of a sample
_POINTS, _PAIRS, _HALVINGS = 4, 24, 24
_FAR = 1000.0  # where the blinded graphs begin to move
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, OverflowError)


@dataclass(frozen=True)
class Violation:
    """A claim that does not hold, or an exception that is no refusal.

    Attributes:
        seed: It makes the same graph again.
        graph: The operations, in order.
        claimed: The bound.
        found: What was found, larger than it.
        what: How it was found.
    """

    seed: int
    graph: str
    claimed: float
    found: float
    what: str


@dataclass
class FuzzReport:
    """What a run of `fuzz_certificates` found.

    Attributes:
        graphs: The number of graphs.
        certified: How many have a bound.
        refused: How many were refused.
        operations: How often each operation was in a certified graph.
        gaps: The bounds over the largest slopes that were found.
        violations: The claims that do not hold.
    """

    graphs: int = 0
    certified: int = 0
    refused: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def __str__(self) -> str:
        gaps = sorted(self.gaps)
        middle = gaps[len(gaps) // 2] if gaps else math.nan
        text = (
            f"{self.graphs} graphs, {self.certified} certified, {self.refused} refused, "
            f"{len(self.operations)} operations, median gap {middle:.3g}, "
            f"{len(self.violations)} violations"
        )
        return "\n".join([text, *map(str, self.violations)])


class _Graph(nn.Module):
    """Operations on the input and on earlier results; the last ones are the output."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.seed, self.shape = seed, shape
        self.steps: list[tuple[str, Callable[..., Any], int, int]] = []
        self.outputs: tuple[int, ...] = (0,)
        self.blind = False

    def values(self, x: Tensor) -> list[Tensor]:
        found = [x - _FAR if self.blind else x]
        if self.blind:
            found[0] = found[0].relu()
        for _, function, i, j in self.steps:
            found.append(function(found[i], found[j]))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.values(x)
        return tuple(found[place] for place in self.outputs)

    def joined(self, x: Tensor) -> Tensor:
        """Return all outputs in one row for each sample."""
        return torch.cat([y.flatten(1) for y in self(x)], 1)

    def text(self) -> str:
        start = ["x - 1000, relu"] if self.blind else []
        steps = [f"{name}({i}, {j})" for name, _, i, j in self.steps]
        return f"{self.shape}: " + " -> ".join([*start, *steps]) + f" -> {self.outputs}"


def _samplers() -> list[tuple[str, Any]]:
    """Return the records that draw arguments, with a readable name."""
    found: dict[int, tuple[str, Any]] = {}
    for name, record in RECORDS.items():
        if record.samples is not None:
            readable = name if isinstance(name, str) else name.__name__
            found.setdefault(id(record), (readable.partition(".")[0], record))
    return list(found.values())


def _draw_graph(seed: int, shape: tuple[int, ...], records: list[tuple[str, Any]]) -> _Graph:
    draw = random.Random(seed)
    graph = _Graph(seed, shape)
    graph.blind = draw.random() < 0.3
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=generator) + _FAR * graph.blind
    length = draw.choice([1, 1, 2, 3, 4])
    for _ in range(60):
        if len(graph.steps) == length:
            break
        values = graph.values(x)
        i = draw.choice([len(values) - 1, len(values) - 1, draw.randrange(len(values))])
        alike = [j for j, v in enumerate(values) if v.shape == values[i].shape]
        j = draw.choice(alike)
        name, record = draw.choice(records)
        try:
            function = record.samples(draw, tuple(values[i].shape[1:]))
            if function is None:
                continue
            with warnings.catch_warnings():  # of arguments that are slow
                warnings.simplefilter("ignore")
                again = [function(values[i], values[j]) for _ in range(2)]
        except _FAILURES:  # arguments that do not suit the shape
            continue
        y = again[0]
        if _suits(y, x):
            graph.steps.append((name, function, i, j))
    last = len(graph.steps)
    graph.outputs = draw.choice([(last,)] * 4 + [(last, draw.randrange(last + 1)), (last, last)])
    return graph


def _suits(y: Any, x: Tensor) -> bool:
    """Return whether a result can be read by further operations."""
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.ndim < 2 or len(y) != len(x):
        return False
    return 0 < y[0].numel() <= _LARGEST and bool(y.isfinite().all())


def fuzz_certificates(
    graphs: int | None = None,
    *,
    seconds: float | None = None,
    seed: int = 0,
    operations: Sequence[str] | None = None,
    direct: bool = False,
    progress: Callable[[FuzzReport], None] | None = None,
) -> FuzzReport:
    """Try the bounds of random graphs over all operations that `certify` knows.

    Arguments of the operations are random, some at extremes of scale or beyond the ends of a
    tensor; outputs are shared and repeated; three graphs of ten are constant near the example, so
    that no search from there sees what they do. A claim is tried by Jacobians and by secants.

    Args:
        graphs: How many graphs to try; None for as many as the time allows.
        seconds: How long to try; None for as long as the graphs take.
        seed: The first seed; graph i is drawn from seed + i.
        operations: The names of the operations to draw from; None for all.
        direct: Trace the graphs without `torch.export` where they can be, which takes a tenth of
            the time and leaves out the checks around the export.
        progress: It is called with the report after every few graphs.

    Returns:
        The report; a sound `certify` leaves its `violations` empty.

    Raises:
        ValueError: Neither `graphs` nor `seconds` is given, or no record has one of the names.

    Examples:
        >>> fuzz_certificates(2, seed=3).violations
        []
    """
    _checks.require(
        graphs is not None or seconds is not None,
        "fuzz_certificates",
        "the number of graphs or the time must be given",
        "Pass graphs=100 or seconds=60",
        graphs=graphs,
        seconds=seconds,
    )
    owner, samplers = "fuzz_certificates", _samplers()
    if graphs is not None:
        _checks.positive_int(owner, graphs=graphs)
    if seconds is not None:
        _checks.in_range(owner, 0.0, float("inf"), seconds=seconds)
    _checks.integer(owner, seed=seed)
    _checks.require(
        progress is None or callable(progress),
        owner,
        "progress must be a function of the report",
        "Pass e.g. print, or None",
        progress=progress,
    )
    listed = isinstance(operations, (tuple, list, set, frozenset))
    _checks.require(
        operations is None or (listed and {*operations} <= {name for name, _ in samplers}),
        owner,
        "operations must list names of records with random arguments",
        "Leave it out for all of them",
        operations=operations,
    )
    records = [pair for pair in samplers if operations is None or pair[0] in operations]
    report = FuzzReport()
    start, number = time.monotonic(), 0
    while (graphs is None or number < graphs) and (
        seconds is None or time.monotonic() - start < seconds
    ):
        shape = random.Random(f"{seed}, {number}").choice(_SHAPES)
        _try(_draw_graph(seed + number, shape, records), report, direct)
        number += 1
        if progress is not None:
            progress(report)
    return report


def _try(graph: _Graph, report: FuzzReport, direct: bool) -> None:
    """Certify a graph and try what is claimed."""
    report.graphs += 1
    try:
        bounds, exact = _certified(graph, direct)
    except UncertifiableError:
        report.refused += 1
    except _FAILURES as error:
        found = f"{type(error).__name__}: {error}"[:300]
        report.violations.append(Violation(graph.seed, graph.text(), 0.0, 0.0, found))
    else:
        report.certified += 1
        report.operations.update({name for name, *_ in graph.steps})
        _attack(graph, math.hypot(*bounds), exact, report)


def _certified(graph: _Graph, direct: bool) -> tuple[list[float], bool]:
    """Return the bounds of all outputs, and whether the whole is said to be exact."""
    model = graph.eval()
    effort = ("default", "fast", "tight")[graph.seed % 3]
    x = torch.zeros(1, *graph.shape, dtype=torch.float64)
    if direct:
        with torch.no_grad(), with_effort(effort):
            walker = _traced(model, x)
            if walker is not None:
                bounds = [0.0 if s is None else walker.bound_of(s).value for s in walker.outputs]
                return bounds, walker.bound.kind == "exact"
    found = certify(model, x, effort=effort, lower=False)
    return [bound.value for bound in found.outputs], found.constant.kind == "exact"


def _traced(model: nn.Module, x: Tensor) -> Walker | None:
    """Walk the graph of a model as it runs on one batch; None where that cannot be done."""
    generator = torch.Generator().manual_seed(0)
    batch = 0.1 * torch.randn(BATCH, *x.shape[1:], dtype=x.dtype, generator=generator)
    twin, marker = marked_copy(model)
    try:
        with marker.functions(twin):
            traced = make_fx(twin, tracing_mode="real", pre_dispatch=True)(batch)
    except _FAILURES:  # some decompositions of torch run on fewer arguments than their operations
        return None
    graph = traced.graph
    nodes = list(graph.nodes)
    if any(mutates(n.target) for n in nodes):
        return None
    for node in nodes:  # any number of samples
        if op_name(node) in ("view", "reshape", "_unsafe_view", "expand"):
            before = node.args[0].meta["val"]
            alike = before.ndim == node.meta["val"].ndim and before.shape[0] == BATCH
            if op_name(node) == "expand" and not alike:
                return None  # a constant for each sample
            node.args = (node.args[0], [-1, *node.meta["val"].shape[1:]])
    inputs = [n for n in nodes if n.op == "placeholder"]
    outputs = nodes[-1].args[0]
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    constants = {n: getattr(traced, str(n.target)) for n in nodes if n.op == "get_attr"}
    program = Program([], inputs, outputs, constants, marker.calls, samples=(batch,))
    program.graph, program.batch = graph, str(BATCH)
    for node in nodes:
        mark = mark_of(node)
        if mark is not None and mark[1] >= 0:
            program.entries.setdefault(mark[0], {})[mark[1]] = node
    program.moving = moving(graph.nodes, inputs)
    together = without_values()  # each node was traced in a mode of its own
    for node in nodes:
        if isinstance(node.meta.get("val"), Tensor):
            value = node.meta["val"]
            with together:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    write_pairs(graph, [n for n in nodes if n in program.moving and n.op == "call_function"])
    program.moving = moving(graph.nodes, inputs)
    calls = [n for n in graph.nodes if n in program.moving and n.op == "call_function"]
    decompose(graph, calls)
    outputs = list(graph.nodes)[-1].args[0]
    program.outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    program.moving = moving(graph.nodes, inputs)
    seen, stack = set(), list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += program.parents(node)
    program.nodes = [n for n in graph.nodes if n in seen]
    fold(program)
    walker = Walker(model, program)
    walker.walk()
    return walker


def _attack(graph: _Graph, claimed: float, exact: bool, report: FuzzReport) -> None:
    """Search for slopes above the claim."""
    slope, what, noise = _largest_slope(graph)
    if slope > claimed:
        report.violations.append(Violation(graph.seed, graph.text(), claimed, slope, what))
    if claimed > 0.0 and 1e-200 < slope < 1e200:
        report.gaps.append(claimed / slope)
    attained = slope + 2.0 * noise >= claimed * (1.0 - 1e-6)
    if exact and not attained and _is_affine(graph):
        text = "said to be exact, and the map is affine"
        report.violations.append(Violation(graph.seed, graph.text(), claimed, slope, text))


def _largest_slope(graph: _Graph) -> tuple[float, str, float]:
    """Return the largest slope, less what the rounding of float64 may add to it, and that."""
    generator = torch.Generator().manual_seed(graph.seed + 1)
    size = (_POINTS * 4, *graph.shape)
    points = torch.randn(size, dtype=torch.float64, generator=generator)
    points *= torch.logspace(-3, 2, _POINTS, dtype=torch.float64).repeat(4)[
        (..., *[None] * len(graph.shape))
    ]
    if graph.blind:
        points += _FAR
    noise = _noise(graph, points)
    best, what = 0.0, "Jacobian"
    for point in points[:_POINTS]:
        norm = _jacobian_norm(graph, point)
        best = max(best, norm - 2.0**-36 * norm - noise)
    norms = torch.randn(_PAIRS, *graph.shape, dtype=torch.float64, generator=generator)
    for scale in (1e-6, 1e-3, 1.0, 30.0):
        at = points.repeat(-(-_PAIRS // len(points)), *[1] * len(graph.shape))[:_PAIRS]
        slope = _steepest(graph, at, at + scale * norms, noise)
        if slope > best:
            best, what = slope, f"secant, beginning with distances of {scale:g}"
    return best, what, noise


def _noise(graph: _Graph, points: Tensor) -> float:
    """Return what the rounding of float64 may add to an output, in units of the largest value."""
    with torch.no_grad():
        values = graph.values(points)
    largest = max(float(v.abs().max()) for v in values if v.numel())
    growth = 1.0
    for before, after in pairwise(values):
        size = float(after.norm()) / max(float(before.norm()), 1e-300)
        growth *= max(1.0, size)
    return 2.0**-44 * largest * min(growth, 1e150)


def _jacobian_norm(graph: _Graph, point: Tensor) -> float:
    """Return the norm of the Jacobian: one copy of the point for each of its rows."""
    with torch.no_grad():
        rows = graph.joined(point[None]).shape[1]
    x = point.expand(rows, *point.shape).clone().requires_grad_(True)
    y = graph.joined(x)
    if not y.requires_grad:
        return 0.0
    (matrix,) = torch.autograd.grad(y.diagonal().sum(), x)
    matrix = matrix.reshape(rows, -1)
    if not bool(matrix.isfinite().all()):
        return 0.0
    scale = float(matrix.abs().max())
    return scale * float(torch.linalg.matrix_norm(matrix / scale, 2)) if scale else 0.0


@torch.no_grad()
def _steepest(graph: _Graph, left: Tensor, right: Tensor, noise: float) -> float:
    """Return the largest secant while the segments are halved where the output changes more."""
    a, b = graph.joined(left), graph.joined(right)
    best = 0.0
    for _ in range(_HALVINGS):
        change = (a - b).norm(dim=1) - noise
        length = (left - right).flatten(1).norm(dim=1)
        slopes = torch.where(length > 0, change / length, 0.0)
        slopes = slopes[slopes.isfinite()]
        best = max(best, float(slopes.max()) * (1.0 - 2.0**-36) if len(slopes) else 0.0)
        middle = (left + right) / 2
        m = graph.joined(middle)
        first = (a - m).norm(dim=1) >= (m - b).norm(dim=1)
        wide = first.reshape(-1, *[1] * (left.ndim - 1))
        left, right = torch.where(wide, left, middle), torch.where(wide, middle, right)
        a, b = torch.where(first[:, None], a, m), torch.where(first[:, None], m, b)
    return best


@torch.no_grad()
def _is_affine(graph: _Graph) -> bool:
    generator = torch.Generator().manual_seed(graph.seed + 2)
    for scale in (1.0, 1e3):
        x, y = torch.randn((2, 8, *graph.shape), dtype=torch.float64, generator=generator) * scale
        sums = graph.joined(x) + graph.joined(y)
        both = graph.joined(x + y) + graph.joined(torch.zeros_like(x))
        if not torch.allclose(sums, both, rtol=1e-9, atol=1e-9 * float(sums.abs().max())):
            return False
    return True
