"""Activations: values, all singular values of the Jacobian 1, the laws of a layer."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from orthonet import functional
from orthonet.layers import Abs, GroupSort, HouseholderActivation, MaxMin
from orthonet.testing import (
    LAYER_LAWS,
    assert_lipschitz,
    hard_matrix,
    jacobian,
    orthogonality_error,
    tolerances,
)

FACTORIES = {
    "MaxMin": MaxMin,
    "GroupSort": partial(GroupSort, 4),
    "Abs": Abs,
    "HouseholderActivation": partial(HouseholderActivation, 8),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(name, law):
    law(FACTORIES[name], (8, 3, 2))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("case", ["zero", "gaussian", "rank_deficient", "tiny", "huge"])
def test_jacobian_is_orthogonal(name, case, dtype):
    layer = FACTORIES[name]().to(dtype)
    x = hard_matrix(case, (8, 5), dtype)
    # Householder's v to two units and 2 v v^T z: 16 roundings; observed 1.2e-7 and 4.4e-16
    error = orthogonality_error(jacobian(layer, x))
    assert error <= tolerances.orthogonality_rounding(dtype, 16)


@pytest.mark.parametrize("name", FACTORIES)
def test_constant_is_one_and_attained(name):
    assert_lipschitz(FACTORIES[name](), (8, 3), attained=True)


def test_composition_with_orthogonal_layers_keeps_gradient_norms():
    torch.manual_seed(0)
    blocks = []
    for make in FACTORIES.values():
        linear = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8, dtype=torch.float64))
        blocks += [linear, make().double()]
    matrix = jacobian(nn.Sequential(*blocks), torch.randn(8, dtype=torch.float64))
    assert orthogonality_error(matrix) <= 2e-14  # observed 4.4e-16


def test_modules_compute_their_function():
    x = torch.randn(2, 8, 3)
    assert torch.equal(MaxMin()(x), functional.max_min(x))
    assert torch.equal(MaxMin(dim=-2)(x[0]), functional.max_min(x)[0])
    assert torch.equal(GroupSort()(x), functional.group_sort(x, 2))
    assert torch.equal(GroupSort(8)(x), x.sort(dim=1).values)
    assert torch.equal(Abs()(x), x.abs())


def test_householder_starts_as_max_min_and_trains():
    layer = HouseholderActivation(8, dtype=torch.float64)
    x = torch.randn(16, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), MaxMin()(x))
    target = functional.householder(x, torch.full((4,), 1.0, dtype=torch.float64))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]  # observed 4.7e-6
    layer.reset_parameters()
    assert torch.equal(layer.theta, torch.full((4,), torch.pi / 2, dtype=torch.float64))


def test_householder_takes_device_and_dtype():
    layer = HouseholderActivation(4, device="meta", dtype=torch.float64)
    assert layer.theta.is_meta
    assert layer.theta.dtype == torch.float64
    assert copy.deepcopy(layer).theta.shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaxMin()(torch.ones(2, 5)), "multiple of 2, got channels=5"),
        (lambda: GroupSort(0), "GroupSort: group_size must be an integer >= 1"),
        (lambda: GroupSort(3)(torch.ones(2, 8)), "multiple of 3, got channels=8"),
        (lambda: HouseholderActivation(5), "HouseholderActivation: channels must be even"),
        (lambda: HouseholderActivation(0), "channels must be an integer >= 1"),
        (lambda: HouseholderActivation(4)(torch.ones(2, 8)), "each of the 4 pairs"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_representations_are_one_line():
    assert repr(MaxMin()) == "MaxMin(dim=1)"
    assert repr(GroupSort(4, dim=-1)) == "GroupSort(group_size=4, dim=-1)"
    assert repr(HouseholderActivation(8)) == "HouseholderActivation(8, dim=1)"
