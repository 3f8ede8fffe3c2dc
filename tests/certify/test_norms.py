"""Bounds in l1, l-infinity and between norms, against dense matrices, Jacobians and secants."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import layers
from orthonet.certify import Bound, attack_certificate, certify, evaluate
from orthonet.certify.norms import effort as with_effort
from orthonet.certify.walk.entries import Moves, vector_norm_up
from orthonet.certify.walk.mixed import mixed_bound
from orthonet.errors import UncertifiableError
from orthonet.testing._fuzz import _draw_graph, _noise, _samplers, _traced
from tests.certify.functions import Lambda
from tests.references import jacobian_reference

ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
PAIRS = list(itertools.product(ORDER, repeat=2))
KNOWN = [(p, q) for p, q in PAIRS if p == "l1" or q == "linf"]
COMPLEX = ("as_pairs", "fourier", "half_to_real", "times")
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
    # complex values cannot be traced without an export: see the test of transforms below
    records = [pair for pair in _samplers() if pair[0] not in COMPLEX]
    ratios, operations = [], Counter()
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
    ratios, operations = fuzz(range(12))
    assert len(operations) > 10  # observed 21
    assert sorted(ratios)[len(ratios) // 2] < 3.0  # of bound and slope; observed 1.04


@pytest.mark.slow
def test_many_random_graphs_over_all_records_are_bounded():
    ratios, operations = fuzz(range(1000, 2500))
    assert len(operations) > 85  # observed 94
    assert sorted(ratios)[len(ratios) // 2] < 1.5  # observed 1.003


def test_affine_models_have_the_norms_of_their_matrices():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.BatchNorm2d(3),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).eval()
    x = torch.randn(2, 2, 5, 5)
    matrix = jacobian_reference(
        lambda z: model(z.float()).double(), x[0].double()
    )  # the weights are of float32, and so is the rounding of this reference
    for norm, to in (("l1", "l1"), ("linf", "linf"), ("l1", "l2")):
        found = certify(model, x, norm=norm, to=to)
        truth = operator_norm(matrix, norm, to)
        assert found.constant.kind == "exact"
        assert found.constant.value == pytest.approx(truth, rel=1e-5)
        assert found.lower.value == pytest.approx(truth, rel=1e-6)
        assert (found.norm, found.to) == (norm, to)
    for norm, to in (("l2", "l1"), ("linf", "l2"), ("linf", "l1")):
        found = certify(model, x, norm=norm, to=to, lower=False)
        assert operator_norm(matrix, norm, to) <= found.constant.value * (1 + 1e-5)
        assert found.constant.kind == "upper"
        assert any(text in found.rows[-1].method for text in ("sum of", "norm of", "l2 constant"))


def test_large_convolutions_need_no_matrix():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1).eval()
    x = torch.zeros(1, 3, 40, 40)  # 61 million entries as a matrix
    kernel = conv.weight.detach().double()
    rows, columns = kernel.flatten(1), kernel.transpose(0, 1).flatten(1)
    for (norm, to), truth in {
        ("linf", "linf"): rows.abs().sum(1).max(),
        ("l1", "l1"): columns.abs().sum(1).max(),
        ("l2", "linf"): rows.norm(dim=1).max(),
    }.items():
        found = certify(conv, x, norm=norm, to=to, lower=False).constant.value
        assert float(truth) <= found <= float(truth) * (1 + 1e-9)


def test_branches_are_combined_in_the_norm():
    x = torch.zeros(1, 4, dtype=torch.float64)
    cases = [  # the constants in l-infinity and in l1
        (lambda z: torch.cat([z.relu(), 2.0 * z.relu()], 1), 2.0, 3.0),
        (lambda z: z.relu() + 2.0 * z.relu(), 3.0, 3.0),
        (lambda z: torch.cat([z[:, :2].relu(), z[:, 2:].relu()], 1), 1.0, 1.0),
        (lambda z: z.relu().sum(1, keepdim=True), 4.0, 1.0),
        (lambda z: z.relu().mean(1, keepdim=True), 1.0, 0.25),
        (lambda z: z.reshape(-1, 2, 2).amax(2), 1.0, 1.0),
        (lambda z: F.softmax(z, 1), 0.5, 0.5),
        (lambda z: z.sort(1).values, 1.0, 1.0),
        (lambda z: z.reshape(-1, 2, 2).norm(dim=2), math.sqrt(2.0), 1.0),
        (lambda z: (z.relu(), z.relu()), 1.0, 2.0),
        (lambda z: torch.maximum(z, 2.0 * z.flip(1)), 2.0, 3.0),
    ]
    for i, (function, largest, total) in enumerate(cases):
        walker = certify(Lambda(function).eval(), x, lower=False)._graph()
        for norm, truth in (("linf", largest), ("l1", total)):
            found = mixed_bound(walker, norm, norm, None).bound.value
            assert truth <= found <= truth * (1 + 1e-9), (i, norm, found)


def test_a_linear_classifier_has_its_exact_radius():
    torch.manual_seed(0)
    model = nn.Linear(20, 3).double().eval()
    x = torch.randn(6, 20, dtype=torch.float64)
    weight = model.weight.detach()
    with torch.no_grad():
        logits = model(x)
    top = logits.argmax(1)
    for norm in ORDER:
        found = certify(model, x[:1], norm=norm, lower=False)
        rows = weight[:, None] - weight
        dual = {"l1": math.inf, "l2": 2.0, "linf": 1.0}[norm]
        lengths = torch.linalg.vector_norm(rows, dual, dim=2)
        margins = logits.gather(1, top[:, None]) - logits
        truth = (margins / lengths[top]).nan_to_num(nan=math.inf).amin(1)
        radii = found.radius(model, x)
        assert bool((radii <= truth).all())
        assert bool((radii >= truth * (1 - 1e-9)).all())
        report = attack_certificate(model, found, x, top, bounds=None)
        assert report.broken == 0
        assert bool((report.distances <= report.radii).all())


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        layers.MaxMin(),
        nn.Linear(8, 3),
    ).eval()


def test_radii_are_not_below_those_of_l2_and_hold_against_attacks():
    model, x = small_net(), torch.rand(20, 1, 4, 4)
    with torch.no_grad():
        labels = model(x).argmax(1)
    plain = certify(model, x[:1], lower=False)
    for norm in ("linf", "l1"):
        found = certify(model, x[:1], norm=norm, lower=False)
        radii = found.radius(model, x)
        assert bool((radii >= plain.radius(model, x, norm=norm) * (1 - 1e-6)).all())
        assert found.pairs is not None
        assert float(found.pairs.max()) <= {"linf": 2.0, "l1": 1.0}[norm] * found.lipschitz
        assert attack_certificate(model, found, x, labels, bounds=None).broken == 0
        in_l2 = found.radius(model, x, norm="l2")
        assert bool((in_l2 <= radii).all())  # a ball in l2 is inside of one in linf, not around it
        assert found.band(0.5) == pytest.approx(0.5 * found.lipschitz, rel=1e-12)
        assert bool((radii > 0).all())
    result = evaluate(model, [(x, labels)], [0.0, 1e-3], norm="linf", steps=5)
    assert result.broken == 0
    assert result.curve.norm == "linf"
    assert "(linf, " in result.table()


def test_what_has_no_proof_in_the_norm_is_refused():
    model, x = small_net(), torch.rand(2, 1, 4, 4)
    found = certify(model, x, norm="linf", lower=False)
    for call in (
        lambda: found.local_radius(model, x),
        lambda: found.local_bound(x, 0.1),
        lambda: found.save("x.json"),
    ):
        with pytest.raises(UncertifiableError, match="needs a certificate in l2"):
            call()
    with pytest.raises(ValueError, match="norm must be one of"):
        certify(model, x, norm="l3")
    with pytest.raises(ValueError, match="to must be one of"):
        certify(model, x, to="max")


def test_bounds_combine_in_their_norm():
    three, four = Bound(3.0, "linf"), Bound(4.0, "linf")
    assert Bound.hypot(three, four).value == 4.0
    assert 7.0 <= Bound.hypot(Bound(3.0, "l1"), Bound(4.0, "l1")).value < 7.0 + 1e-12
    assert (three * four).norm == "linf"
    with pytest.raises(UncertifiableError, match="same norm"):
        _ = three * Bound(1.0)
    with pytest.raises(UncertifiableError, match="from one norm to the same one"):
        _ = Bound(1.0, "l1->linf") * Bound(1.0, "l1->linf")


def test_layers_without_a_rule_for_entries_count_by_equivalence():
    model = nn.Sequential(layers.SLLLinear(6, 6), nn.Linear(6, 2)).eval()
    x = torch.zeros(1, 6)
    found = certify(model, x, norm="linf")
    assert any("equivalence" in row.method for row in found.rows)
    assert found.lower.value <= found.lipschitz
    with torch.no_grad(), with_effort("default"):
        moves = Moves(certify(model, x)._graph(), "linf")
    largest = max(vector_norm_up(v, "linf") for v in moves.values.values())
    assert largest < 10.0


@pytest.mark.slow
def test_transforms_and_complex_constants_are_bounded():
    torch.manual_seed(0)
    x, factors = torch.randn(1, 4, dtype=torch.float64), torch.randn(3, dtype=torch.complex128)
    for function in (
        lambda z: torch.view_as_real(torch.fft.rfft(z, norm="ortho")).flatten(1),
        lambda z: torch.fft.irfft(torch.fft.rfft(z) * factors),
        lambda z: torch.fft.fft(z).abs(),
    ):
        model = Lambda(function).eval()
        jacobian = jacobian_reference(model, x[0])
        for norm, to in KNOWN:
            found = certify(model, x, norm=norm, to=to, lower=False).constant.value
            assert operator_norm(jacobian, norm, to) <= found * (1 + 1e-9)
