"""Short steps of square matrices: the polynomials, the bounds, and when the defect is looked at."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orthonet.linalg import haar, polar_svd
from orthonet.optim import StiefelAdam
from orthonet.optim import _rotations as rotations
from orthonet.testing import tolerances

PROMISE = tolerances.PROMISE[torch.float32]


def skew(n, scale, dtype=torch.float64):
    a = torch.randn(n, n, dtype=dtype)
    a = a - a.mT
    return a * (scale / torch.linalg.matrix_norm(a, 2))


def turn(x, b, look=False):
    return rotations.Turn(x.clone(), b, look, rotations.Workspace())


def sigma_error(x) -> float:
    return float((torch.linalg.svdvals(x.detach().double()) - 1).abs().max())


@pytest.mark.parametrize("reach", [0.0, 1e-9, 1e-6, 1e-4, 1.9e-3, 2.1e-3, 0.01, 0.029])
def test_polynomials_reach_rounding_where_they_say(reach, dtype):
    """|p^2 - s - 1|, what is left of R^T R - I, on [-reach, 0] in float64."""
    p = rotations.coefficients(reach, dtype)
    unit = torch.finfo(dtype).eps
    if not p:
        assert dtype == torch.float64 and reach > 1e-5
        return
    s = -torch.linspace(0.0, reach, 1001, dtype=torch.float64)
    value = sum(c * s**i for i, c in enumerate(p))
    left = (value.square() - s - 1).abs().max().item()
    assert left <= unit + 4.5e-16  # observed .96 units in float32, and the rounding of this line
    assert len(p) == (2 if dtype == torch.float32 and reach < 1.95e-3 else 3)


@pytest.mark.parametrize("reach", [0.06, 5.0, math.inf, math.nan])
def test_no_polynomial_is_claimed_for_long_steps(reach, dtype):
    assert rotations.coefficients(reach, dtype) == ()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 65])
def test_the_bound_is_above_the_norm(n):
    for scale in (0.0, 1e-8, 0.1, 1e6):
        for rank in (2, n):
            a = torch.randn(n, rank) @ torch.randn(rank, n)
            b = (a - a.mT) * scale
            truth = float(torch.linalg.matrix_norm(b.double(), 2)) ** 2
            bound = float(rotations.largest_of_pairs(b.mT @ b))
            assert bound >= truth * (1 - 1e-5)  # the square is rounded; observed 1 - 1e-7
    many = skew(64, 1.0)
    bound = float(rotations.largest_of_pairs(many.mT @ many))
    assert bound < 2.3 < float(torch.linalg.matrix_norm(many.mT @ many))  # observed 1.70 and 2.85


@pytest.mark.parametrize("shape", [(12, 12), (3, 12, 12), (384, 384)])
@pytest.mark.parametrize("length", [1e-4, 0.02, 0.1, 0.5, 3.0])
def test_every_step_ends_on_the_manifold_near_the_formula(shape, length, dtype):
    x, n = haar(shape, dtype=dtype), shape[-1]
    b = skew(n, length, dtype)
    if len(shape) > 2:
        b = torch.stack([b, 0.5 * b, -b])
    (moved,) = rotations.rotate([turn(x, b)])
    # eight products, the passes of the polar factor and the measuring included; observed 9.8e-7
    # and 2.7e-15 at n = 384, 1.8e-15 of 4.4e-15 at n = 12
    assert sigma_error(moved) <= tolerances.orthogonality_rounding(dtype, 8 * n)
    wanted = polar_svd(x.double() - x.double() @ (b.double() - 0.5 * b.double() @ b.double()))
    # sqrt(I + B^2) - B agrees to fifth order; b^5 / 8 where the polynomials are used, .17 at most
    close = 2e-6 + min(length, 0.17) ** 5 / 8
    assert torch.linalg.matrix_norm(moved.double() - wanted, 2).max() <= close


def test_what_has_grown_in_the_points_is_taken_away():
    x = haar((64, 64))
    drifted = x + 2e-6 * torch.randn(64, 64)
    before = sigma_error(drifted)
    b = skew(64, 0.05, torch.float32)
    (kept,) = rotations.rotate([turn(drifted, b)])
    (cleaned,) = rotations.rotate([turn(drifted, b, look=True)])
    assert sigma_error(kept) > 0.5 * before > 2 * PROMISE  # observed 2e-5
    assert sigma_error(cleaned) <= PROMISE  # observed 3e-7
    far = x + 1e-3 * torch.randn(64, 64)
    (cleaned,) = rotations.rotate([turn(far, b, look=True)])
    assert sigma_error(cleaned) <= PROMISE


def test_changes_from_outside_are_seen_at_once():
    layer = nn.Linear(48, 48, bias=False)
    nn.init.orthogonal_(layer.weight)
    optimizer = StiefelAdam(layer.parameters(), lr=1e-3)

    def step(optimizer, p):
        p.grad = torch.randn_like(p)
        optimizer.step()

    for _ in range(3):
        step(optimizer, layer.weight)
    with torch.no_grad():
        layer.weight.mul_(1.01)
    step(optimizer, layer.weight)
    assert sigma_error(layer.weight) <= PROMISE  # observed 3e-7
    twin = copy.deepcopy(layer)
    restored = StiefelAdam(twin.parameters(), lr=1e-3)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        twin.weight.add_(1e-3 * torch.randn(48, 48))
    step(restored, twin.weight)
    assert sigma_error(twin.weight) <= PROMISE
    layer.weight.data.mul_(1.001)  # not seen, until it is time
    for _ in range(rotations.EVERY):
        step(optimizer, layer.weight)
    assert sigma_error(layer.weight) <= PROMISE


def test_nothing_is_changed_by_gradients_that_are_not_finite():
    params = [nn.Parameter(haar((8, 8))) for _ in range(2)] + [nn.Parameter(haar((400, 400)))]
    optimizer = StiefelAdam(params, lr=0.01)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    params[-1].grad[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"StiefelAdam: gradients must be finite, got shape=.400"):
        optimizer.step()
    for p, old in zip(params, before[0], strict=True):
        assert torch.equal(p, old)
    for state, old in zip(
        optimizer.state_dict()["state"].values(), before[1].values(), strict=True
    ):
        assert torch.equal(state["exp_avg"], old["exp_avg"])


def test_a_step_takes_the_products_that_it_says():
    n = 512
    p = nn.Parameter(haar((n, n)))
    optimizer = StiefelAdam([p], lr=1e-3)
    counts = []
    for _ in range(rotations.EVERY + 2):
        p.grad = torch.randn(n, n)
        with FlopCounterMode(display=False) as flops:
            optimizer.step()
        counts.append(flops.get_total_flops() / (2 * n**3))
    # 1 + 10/16 + 1, 10/16 more for a longer step, and for a look; the first takes up the rounding
    # of where it starts by the way of long steps
    assert counts[0] <= 5 and max(counts[1:]) <= 3.875
    assert sum(counts[1:-1]) / (len(counts) - 2) < 3.3  # observed 2.7
