"""Bounds in a ball: sound in it, never above the global ones, and radii that attacks respect."""

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import (
    Activation,
    Affine,
    certify,
    local_bound,
    local_radius,
    mlp_bound,
    pgd_l2,
)
from tests.certify.test_mlp import ACTIVATIONS, SIZES, jacobians, perceptron

NAMES = [
    "relu",
    "leaky",
    "negative leaky",
    "prelu",
    "tanh",
    "sigmoid",
    "softplus",
    "gelu",
    "hardtanh",
    "softshrink",
    "abs",
    "max_min",
    "group_sort",
    "sort of four",
    "householder",
]


def ball(center, radius, norm, count):
    """Points of the ball, half of them on its border."""
    direction = torch.randn(count, len(center), dtype=torch.float64)
    if norm == "linf":
        direction = torch.where(
            torch.rand_like(direction) < 0.5, direction.sign(), direction.tanh()
        )
    else:
        direction = direction / direction.norm(dim=1, keepdim=True)
    length = torch.rand(count, 1, dtype=torch.float64)
    length[: count // 2] = 1.0
    return center + radius * direction * length


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NAMES)
def test_never_below_a_jacobian_in_the_ball(name, norm):
    model = perceptron(SIZES["narrow"], ACTIVATIONS[name])
    whole = mlp_bound(model, effort="default")
    for radius in (0.0, 1e-3, 0.1, 1.0, 1e3):
        center = torch.randn(3, dtype=torch.float64)
        found = local_bound(model, center, radius, norm=norm, effort="default")
        points = ball(center, radius, norm, 100)
        truth = torch.linalg.matrix_norm(jacobians(model, points), 2).max()
        assert found.constant.value >= truth * (1 - 1e-13)
        secants = (model(points) - model(center[None])).detach().norm(dim=1)
        assert bool((secants <= found.constant.value * (points - center).norm(dim=1) + 1e-13).all())
        # The slopes of fewer points; another closed form: 1.06 observed (never in the descent).
        assert found.constant.value <= 1.2 * whole.constant.value


def test_a_small_ball_gives_the_jacobian_and_a_large_one_the_whole_space():
    model = perceptron((6, 16, 16, 4), nn.ReLU)
    center = torch.randn(6, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(jacobians(model, center[None]), 2))
    small = local_bound(model, center, 1e-9)
    assert truth * (1 - 1e-13) <= small.constant.value <= truth * 1.01  # 1.0007 observed
    assert "of 32 units linear" in small.method
    large = local_bound(model, center, 1e6).constant.value
    assert large == pytest.approx(mlp_bound(model).constant.value, rel=1e-6)
    values = [local_bound(model, center, r).constant.value for r in (1e-3, 0.03, 0.3, 3.0)]
    assert values[0] < 0.95 * values[2] and values == sorted(values)


def test_matrices_with_errors_and_biases_move_the_slopes():
    weight, relu = torch.eye(2, dtype=torch.float64), nn.ReLU()
    act = Activation(
        torch.relu,
        torch.zeros(2).double(),
        torch.ones(2).double(),
        narrow=lambda low, high: ((low > 0).double(), (high > 0).double()),
    )
    center = torch.tensor([1.0, -1.0])
    for error, bias, expected in (
        (0.0, 0.0, 1.0),
        (0.0, -3.0, 0.0),
        (0.9, 0.0, 1.9),
        (0, 3.0, 1.0),
    ):
        first = Affine(weight, torch.full((2,), bias), error)
        found = local_bound([first, act, Affine(weight)], center, 0.5).constant.value
        assert expected <= found <= expected + 0.02
    dead = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2)).eval()
    nn.init.constant_(dead[0].bias, -1e6)
    assert local_bound(dead, center, 0.5).constant.value == 0.0


@pytest.mark.parametrize("activation", [nn.ReLU, layers.MaxMin, nn.Tanh])
def test_local_radii_are_larger_and_hold_against_an_attack(activation):
    model = perceptron((6, 16, 16, 4), activation)
    x = torch.rand(12, 6, dtype=torch.float64)
    whole = certify(model, x).radius(model(x).detach())
    radius = local_radius(model, x, steps=4)
    assert bool((radius >= whole * (1 - 1e-9)).all())
    assert radius.median() > 1.1 * whole.median()
    y = model(x).argmax(1)
    points = pgd_l2(model, x, y, radius, restarts=4, bounds=None)
    assert torch.equal(model(points).argmax(1), y)
    tie = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    for layer in (tie[0], tie[2]):
        nn.init.zeros_(layer.bias)
        nn.init.zeros_(layer.weight)
    assert local_radius(tie, torch.ones(1, 2)).item() == 0.0


def test_bad_balls_are_refused():
    model = perceptron(SIZES["narrow"], nn.ReLU)
    with pytest.raises(ValueError, match="radius must be finite"):
        local_bound(model, torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match="norm must be one of"):
        local_bound(model, torch.zeros(3), 1.0, norm="l1")
    with pytest.raises(ValueError, match="3 entries"):
        local_bound(model, torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match="2 to 4096 classes"):
        local_radius(model[:2].append(nn.Linear(8, 1).double().eval()), torch.zeros(1, 3))
