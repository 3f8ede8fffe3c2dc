"""Bounds in l1, l-infinity and between norms, against dense matrices, Jacobians and secants."""

import itertools
import math
from collections import Counter

import torch

from orthonet.certify.norms import effort as with_effort
from orthonet.certify.walk.mixed import mixed_bound
from orthonet.errors import UncertifiableError
from orthonet.testing._fuzz import _draw_graph, _noise, _samplers, _traced
from tests.references import jacobian_reference

ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
PAIRS = list(itertools.product(ORDER, repeat=2))
KNOWN = [(p, q) for p, q in PAIRS if p == "l1" or q == "linf"]
SHAPES = ((6,), (4,), (3, 4), (2, 4, 4), (4, 3, 3), (1, 5, 3), (8, 4))


def operator_norm(matrix, norm, to):
    """The norm of a matrix where it has a formula, else a bound from below by signs."""
    matrix = matrix.double()
    if norm == "l1":
        return float(torch.linalg.vector_norm(matrix, ORDER[to], dim=0).max())
    if to == "linf":
        dual = {"l1": math.inf, "l2": 2.0, "linf": 1.0}[norm]
        return float(torch.linalg.vector_norm(matrix, dual, dim=1).max())
    if (norm, to) == ("l2", "l2"):
        return float(torch.linalg.matrix_norm(matrix, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[1], 64, generator=generator, dtype=torch.float64)
    x = x.sign() if norm == "linf" else x / torch.linalg.vector_norm(x, dim=0)
    return float(torch.linalg.vector_norm(matrix @ x, ORDER[to], dim=0).max())


def fuzz(seeds):
    """The ratios of bounds and slopes of random graphs over all records, and what they held."""
    ratios, operations, records = [], Counter(), _samplers()
    for seed in seeds:
        graph = _draw_graph(seed, SHAPES[seed % len(SHAPES)], records)
        if not graph.steps:
            continue
        try:
            with torch.no_grad(), with_effort(("default", "fast")[seed % 2]):
                walker = _traced(graph.eval(), torch.zeros(1, *graph.shape, dtype=torch.float64))
                if walker is None or any(s is None for s in walker.outputs):
                    continue
                bounds = {pair: mixed_bound(walker, *pair, None).bound.value for pair in PAIRS}
        except UncertifiableError:
            continue
        operations.update(name for name, *_ in graph.steps)
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(4, *graph.shape, dtype=torch.float64, generator=generator)
        points = points + 1000.0 * graph.blind
        scale = torch.tensor([1e-3, 0.1, 1.0, 10.0]).double()[(..., *[None] * len(graph.shape))]
        other = points + scale * torch.randn(points.shape, dtype=torch.float64, generator=generator)
        noise = 4.0 * _noise(graph, torch.cat([points, other])) * 300.0
        with torch.no_grad():
            rise = graph.joined(other) - graph.joined(points)
        run = (other - points).flatten(1)
        for x in points[:2]:
            jacobian = jacobian_reference(lambda z, g=graph: g.joined(z), x)
            if not bool(jacobian.isfinite().all()):
                continue
            for pair in PAIRS:
                slope = operator_norm(jacobian, *pair)
                assert slope <= bounds[pair] * (1 + 1e-9) + noise, (seed, pair, graph.text())
                if slope > 1e-100 and pair in KNOWN:
                    ratios.append(bounds[pair] / slope)
        for norm, to in PAIRS:
            up = torch.linalg.vector_norm(rise, ORDER[to], dim=1)
            along = torch.linalg.vector_norm(run, ORDER[norm], dim=1)
            bound = bounds[norm, to]
            good = up <= bound * along * (1 + 1e-9) + noise
            assert bool(good.all()) or not math.isfinite(noise), (seed, norm, to, graph.text())
    return ratios, operations


def test_random_graphs_over_all_records_are_bounded():
    ratios, operations = fuzz(range(120))
    assert len(operations) > 50
    assert sorted(ratios)[len(ratios) // 2] < 3.0
