"""Layers of constant 1 in l1 and l-infinity, and monotone models, on dense matrices."""

import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from orthonet.certify import certify, prove_monotone
from orthonet.layers import GroupSort, L1Linear, LinfLinear, MaxMin, Monotone
from orthonet.linalg.rescaling import bounded_columns, bounded_rows
from tests.references import jacobian_reference

DUAL = {"l1": math.inf, "l2": 2.0, "linf": 1.0}
NORM = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def test_rows_and_columns_are_bounded_without_tolerance():
    generator = torch.Generator().manual_seed(0)
    for n, dtype, scale in itertools.product(
        (1, 3, 50, 2000), (torch.float32, torch.float64), (1e-30, 0.1, 1.0, 1e30)
    ):
        w = scale * torch.randn(4, n, dtype=dtype, generator=generator)
        for norm, order in DUAL.items():
            rows = bounded_rows(w, norm).double()
            sizes = torch.linalg.vector_norm(rows, order, 1)
            # float64 rounds this norm itself: n roundings of 1.1e-16 at most, observed 2e-16
            assert float(sizes.max()) <= 1.0 + (n + 2) * 2.0**-53 * (dtype == torch.float64)
            long = torch.linalg.vector_norm(w.double(), order, 1) >= 1.0
            least = 1.0 - 16 * torch.finfo(dtype).eps - n * 4 * 2.0**-52
            assert bool((sizes[long] >= least).all())
        for to, order in NORM.items():
            columns = bounded_columns(w.mT.contiguous(), to).double()
            sizes = torch.linalg.vector_norm(columns, order, 0)
            assert float(sizes.max()) <= 1.0 + (n + 2) * 2.0**-53 * (dtype == torch.float64)
    inside = torch.full((2, 4), 0.125)
    torch.testing.assert_close(bounded_rows(inside), inside, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_keep_their_constant_through_training(dtype):
    same = (("linf", "linf"), ("l1", "l1"))
    for make, norm, to in (
        (lambda: LinfLinear(6, 5, dtype=dtype), "linf", "linf"),
        (lambda: LinfLinear(6, 5, dtype=dtype, norm="l1", lipschitz=2.0), "l1", "linf"),
        (lambda: LinfLinear(6, 5, dtype=dtype, norm="l2"), "l2", "linf"),
        (lambda: L1Linear(6, 5, dtype=dtype), "l1", "l1"),
        (lambda: L1Linear(6, 5, dtype=dtype, to="linf"), "l1", "linf"),
    ):
        layer = make()
        x, y = torch.randn(16, 6, dtype=dtype), torch.randn(16, 5, dtype=dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        layer.eval()
        found = certify(layer, x[:1], norm=norm, to=to, lower=False)
        assert found.constant.kind == "exact"
        # the matrix of the proof is rounded outward by 1e-13; K = 2 multiplies without rounding
        assert found.lipschitz <= layer.lipschitz * (1 + 1e-12)
        weight = layer.weight.detach().double()
        sizes = torch.linalg.vector_norm(weight, DUAL[norm], 1)
        if norm == "l1":
            sizes = torch.linalg.vector_norm(weight, NORM[to], 0)
        assert found.lipschitz == pytest.approx(float(sizes.max()), rel=1e-12)
        before = layer.weight.detach().clone()
        assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, before)
        layer.weight = before
        torch.testing.assert_close(layer.weight, before, rtol=1e-6, atol=0.0)
        assert ("norm=" in str(layer) or "to=" in str(layer)) == ((norm, to) not in same)


def test_networks_of_such_layers_have_constant_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        LinfLinear(8, 16), MaxMin(), LinfLinear(16, 16), GroupSort(4), LinfLinear(16, 3)
    ).eval()
    found = certify(model, torch.zeros(1, 8), norm="linf", lower=False)
    assert found.lipschitz <= 1.0 + 1e-12
    in_l2 = certify(model, torch.zeros(1, 8), lower=False).lipschitz
    assert found.lipschitz < in_l2 * math.sqrt(8)
    wide = nn.Sequential(L1Linear(8, 16), MaxMin(), L1Linear(16, 3)).eval()
    assert certify(wide, torch.zeros(1, 8), norm="l1", lower=False).lipschitz <= 1.0 + 1e-12


def monotone(directions, lipschitz=1.0, scale=1.0):
    n = len(directions)
    f = nn.Sequential(
        LinfLinear(n, 12, norm="l1", lipschitz=scale),
        MaxMin(),
        LinfLinear(12, 8),
        nn.ReLU(),
        LinfLinear(8, 2),
    )
    return Monotone(f, directions, lipschitz).double().eval()


def test_proved_models_are_monotone_at_points_and_along_secants():
    torch.manual_seed(0)
    directions = (1, -1, 0, 1)
    model = monotone(directions)
    slopes = prove_monotone(model, torch.zeros(1, 4).double())
    signs = torch.tensor(directions).double()
    assert bool((slopes[signs != 0] >= 0.0).all())
    assert float(slopes[2]) <= 0.0
    x = 3.0 * torch.randn(200, 4, dtype=torch.float64)
    for point in x[:40]:
        jacobian = jacobian_reference(model, point)
        assert bool((jacobian * signs >= slopes.where(signs != 0, -9.0) - 1e-12).all())
        assert bool((jacobian[:, 2].abs() <= -slopes[2] + 1e-12).all())
    with torch.no_grad():
        for i, sign in enumerate(directions):
            moved = x.clone()
            moved[:, i] += torch.rand(200, dtype=torch.float64) * 10.0
            rise = sign * (model(moved) - model(x))
            # float64: 30 roundings of values below 100, less than 1e-12; observed 4e-15
            assert sign == 0 or bool((rise >= -1e-12).all())


def test_models_that_are_too_steep_are_not_proved():
    torch.manual_seed(0)
    steep = monotone((1, 1), scale=4.0)
    assert float(prove_monotone(steep, torch.zeros(1, 2).double()).min()) < 0.0
    assert float(prove_monotone(monotone((1, 1), 4.5, 4.0), torch.zeros(1, 2).double()).min()) > 0.0
    flat = Monotone(nn.Linear(2, 1).double().requires_grad_(False), (1, 1)).eval()
    flat.function.weight.copy_(torch.tensor([[0.5, -1.5]]))
    slopes = prove_monotone(flat, torch.zeros(1, 2).double())
    assert slopes.tolist() == pytest.approx([0.5, -0.5], abs=1e-12)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="norm must be one of"):
        LinfLinear(2, 2, norm="l3")
    with pytest.raises(ValueError, match="to must be one of"):
        L1Linear(2, 2, to="max")
    with pytest.raises(ValueError, match="directions must be one of 1, 0 and -1"):
        Monotone(nn.Linear(2, 1), (1, 2))
    with pytest.raises(ValueError, match=r"the input must be \(N, 2\)"):
        Monotone(nn.Linear(2, 1), (1, 1))(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"must be an orthonet\.layers\.Monotone"):
        prove_monotone(nn.Linear(2, 1).eval(), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lipschitz", [0.7, 1.0, 3.3, 1e-5, 3e4])
def test_the_rise_is_not_below_the_constant_after_a_change_of_dtype(lipschitz, dtype):
    # It was a buffer, 0.69999999 in float32: a slope of -0.7 made the model fall in float64.
    falling = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    model = Monotone(falling.float(), (1,), lipschitz).to(dtype).eval()
    nn.init.zeros_(falling.weight)
    rise = model(torch.ones(1, 1, dtype=dtype)).item()
    assert lipschitz <= rise <= lipschitz * (1.0 + 2.0 * torch.finfo(dtype).eps) + 2.0**-24
