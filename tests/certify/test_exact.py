"""The exact constant of small networks, against every region of an arrangement of lines."""

import itertools
import math

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import Affine, certify, exact_constant, mlp_bound
from orthonet.certify.mlp.regions import Dyadic, empty, nearest_point
from orthonet.errors import UncertifiableError
from tests.references import jacobian_reference

ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
KNOWN = [("l2", "l2"), ("linf", "linf"), ("l1", "l1"), ("l1", "l2"), ("l2", "linf"), ("l1", "linf")]


def matrix_norm(matrix, norm, to):
    if norm == to == "l2":
        return torch.linalg.matrix_norm(matrix, 2)
    if norm == "l1":
        return torch.linalg.vector_norm(matrix, ORDER[to], dim=-2).amax(-1)
    dual = {"l1": math.inf, "l2": 2.0, "linf": 1.0}[norm]
    return torch.linalg.vector_norm(matrix, dual, dim=-1).amax(-1)


def network(seed, sizes, activation, bias=True):
    torch.manual_seed(seed)
    found = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        found += [nn.Linear(a, b, bias=bias or i + 2 == len(sizes))]
        found += [activation()] if i + 2 < len(sizes) else []
    return nn.Sequential(*found).double().eval().requires_grad_(False)


def jacobians(model, points):
    """The Jacobians at many points at once."""
    x = points.clone().requires_grad_()
    y = model(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack(rows, 1)


def every_region(model, lines):
    """A point of every region of an arrangement of lines in the plane, and some beside."""
    normals, offsets = lines
    points = [torch.randn(50, 2, dtype=torch.float64) * 10.0**k for k in range(-1, 4)]
    turns = torch.arange(16, dtype=torch.float64) * (math.pi / 8) + 0.1
    circle = torch.stack([turns.cos(), turns.sin()], 1)
    for i, j in itertools.combinations(range(len(normals)), 2):
        pair = normals[[i, j]]
        if abs(float(torch.linalg.det(pair))) < 1e-9:
            continue
        corner = torch.linalg.solve(pair, -offsets[[i, j]])
        along = torch.linalg.solve(pair, torch.eye(2, dtype=torch.float64))
        wedge = torch.cat([circle, *(s * along.mT for s in (1, -1)), (along @ circle.mT).mT])
        points += [corner + scale * wedge for scale in (1e-6, 1e-3)]
    return torch.cat(points)


@pytest.mark.parametrize(
    ("activation", "seeds"),
    [
        (nn.ReLU, 1),
        (layers.MaxMin, 1),
        pytest.param(nn.ReLU, 10, marks=pytest.mark.slow),
        pytest.param(layers.MaxMin, 10, marks=pytest.mark.slow),
        pytest.param(lambda: nn.LeakyReLU(-0.5), 10, marks=pytest.mark.slow),
        pytest.param(layers.Abs, 10, marks=pytest.mark.slow),
    ],
)
def test_one_hidden_layer_has_the_largest_norm_of_a_region(activation, seeds):
    for seed in range(seeds):
        bias = seed % 2 == 0
        model = network(seed, (2, 6, 3), activation, bias)
        weight, offset = model[0].weight, model[0].bias
        offset = torch.zeros(6).double() if offset is None else offset
        if isinstance(model[1], layers.MaxMin):
            weight, offset = weight[:3] - weight[3:], offset[:3] - offset[3:]
        points = every_region(model, (weight, offset))
        matrices = jacobians(model, points)
        for norm, to in KNOWN:
            found = exact_constant(model, norm=norm, to=to)
            truth = float(matrix_norm(matrices, norm, to).max())
            assert found.exact
            assert found.undecided == 0
            # 1e-9 is what `exact` promises; observed 2e-12
            assert truth * (1 - 1e-9) <= found.upper.value <= truth * (1 + 2e-9)
            at = matrix_norm(jacobian_reference(model, found.point)[None], norm, to)
            assert float(at) >= found.lower


@pytest.mark.parametrize(
    ("activation", "width"),
    [
        (nn.ReLU, 4),
        (layers.MaxMin, 4),
        pytest.param(nn.ReLU, 10, marks=pytest.mark.slow),
        pytest.param(lambda: layers.GroupSort(2), 8, marks=pytest.mark.slow),
        pytest.param(nn.Hardtanh, 6, marks=pytest.mark.slow),
    ],
)
def test_deep_networks_lie_between_points_and_the_other_bounds(activation, width):
    for seed in range(1 if width < 6 else 2):
        model = network(seed, (2, width, width, 2), activation)
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(20_000, 2, dtype=torch.float64, generator=generator)
        points = points * 10.0 ** (4 * torch.rand(20_000, 1, generator=generator).double() - 2)
        matrices = jacobians(model, points)
        for norm, to in KNOWN[:3]:
            found = exact_constant(model, norm=norm, to=to)
            assert found.exact
            assert float(matrix_norm(matrices, norm, to).max()) <= found.upper.value
            at = matrix_norm(jacobian_reference(model, found.point)[None], norm, to)
            assert found.lower <= float(at) <= found.upper.value * (1 + 1e-12)
            bound = certify(model, torch.zeros(1, 2).double(), norm=norm, to=to, lower=False)
            assert found.upper.value <= bound.constant.value * (1 + 1e-9)
        assert exact_constant(model).upper.value <= mlp_bound(model).constant.value


def test_patterns_without_a_point_do_not_count():
    """Two units that are never on at once; and one layer behind them that is never on."""
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    last = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    relu = nn.ReLU().eval()
    layers_ = [Affine(first, torch.tensor([-1.0, -1.0]).double()), relu, Affine(last)]
    assert exact_constant(layers_).upper.value == pytest.approx(3.0, rel=1e-9)
    dead = [
        Affine(first),
        relu,
        Affine(-last, torch.tensor([-1.0]).double()),
        relu,
        Affine(last.mT),
    ]
    found = exact_constant(dead)
    assert found.upper.value < 1e-9
    assert found.exact or found.upper.value > 0
    ends = exact_constant([Affine(first), relu])  # one of both units is off everywhere
    assert ends.exact
    assert ends.upper.value == pytest.approx(1.0, rel=1e-9)
    # a unit that is constant on its knot must not take a region away
    flat = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    still = [Affine(flat), relu, Affine(flat), relu, Affine(flat)]
    assert exact_constant(still).upper.value == pytest.approx(1.0, rel=1e-9)


def test_a_budget_that_ends_gives_an_enclosure():
    model = network(0, (4, 12, 12, 2), nn.ReLU)
    few, more = (exact_constant(model, norm="linf", budget=n) for n in (3, 60))
    assert few.nodes == 3
    assert not few.exact
    assert few.upper.kind == "upper"
    assert few.lower <= more.lower <= more.upper.value <= few.upper.value
    linear = exact_constant([nn.Linear(3, 2).eval()])
    assert linear.exact
    assert linear.nodes == 0


def test_a_convolution_written_out_is_a_layer():
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 2, 3, padding=1).double().requires_grad_(False)
    matrix = jacobian_reference(
        lambda x: conv(x.reshape(-1, 1, 4)).flatten(1), torch.zeros(4).double()
    )
    bias = conv.bias.repeat_interleave(4)
    last = torch.randn(2, 8, dtype=torch.float64)
    found = exact_constant([Affine(matrix, bias), nn.ReLU().eval(), Affine(last)])
    model = nn.Sequential(
        conv, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False).double()
    ).eval()
    model[3].weight.data.copy_(last)
    assert found.exact
    x = found.point.reshape(1, 1, 4)
    jacobian = jacobian_reference(lambda z: model(z.reshape(-1, 1, 4)), x.reshape(-1))
    assert float(torch.linalg.matrix_norm(jacobian, 2)) >= found.lower
    assert found.upper.value <= certify(model, x).constant.value * (1 + 1e-9)


def test_what_has_no_pieces_is_refused():
    with pytest.raises(UncertifiableError, match="must be piecewise linear"):
        exact_constant(network(0, (2, 4, 1), nn.Tanh))
    with pytest.raises(UncertifiableError, match="must be piecewise linear"):
        exact_constant(network(0, (2, 4, 1), lambda: layers.GroupSort(4)))
    with pytest.raises(ValueError, match="must have a formula"):
        exact_constant(network(0, (2, 4, 1), nn.ReLU), norm="linf", to="l1")


def test_points_and_multipliers_decide_about_regions():
    generator = torch.Generator().manual_seed(0)
    decided = [0, 0]
    for trial in range(60):
        rows = torch.randn(5, 2, dtype=torch.float64, generator=generator)
        levels = torch.randn(5, dtype=torch.float64, generator=generator)
        if trial % 4 == 0:
            rows[4], levels[4] = -rows[0], -levels[0] + 0.5 * (trial % 8 == 0)
        point, guess = nearest_point(rows, levels)
        whole = Dyadic.of(torch.cat([rows, -levels[:, None]], 1)).rows
        if point is None:
            assert empty(whole, guess)
            decided[0] += 1
        else:
            assert bool((rows @ point > levels).all())
            assert not empty(whole, guess)
            decided[1] += 1
    assert min(decided) > 10


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_constant_function_has_a_constant_of_0_from_below(norm):
    model = network(0, (2, 4, 1), nn.ReLU)
    nn.init.zeros_(model[0].weight)
    found = exact_constant(model, norm=norm)
    assert found.lower == 0.0  # it was 2^-500, which bounds underflow from above
    assert found.upper.value <= 2.0**-1000
