"""Residual connections: bounds that hold and are attained, the laws of a layer."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from orthonet.layers import AdditiveResidual, ConcatResidual, ConvexResidual, L2NormResidual
from orthonet.testing import LAYER_LAWS, assert_lipschitz, assert_orthogonal

CLASSES = [ConvexResidual, ConcatResidual, AdditiveResidual, L2NormResidual]


class Scale(nn.Module):
    """A branch of known constant."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x):
        return self.constant * x


def make(cls: type[nn.Module]) -> nn.Module:
    """A connection on 8 channels whose branch is an orthogonal layer."""
    width = 4 if cls is ConcatResidual else 8
    linear = nn.Linear(width, width)
    nn.init.orthogonal_(linear.weight)
    return cls(linear)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(cls, law):
    law(partial(make, cls), (8,))


@pytest.mark.parametrize("cls", CLASSES)
def test_one_lipschitz_with_a_one_lipschitz_branch(cls):
    for _ in range(3):
        layer = make(cls)
        assert_lipschitz(layer, (8,))
        layer.branch = nn.Sequential(layer.branch, nn.ReLU())
        assert_lipschitz(layer, (8,))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("constant", [0.5, 1.0, 3.0])
def test_bound_is_attained_by_a_multiple_of_the_identity(cls, constant):
    layer = cls(Scale(constant)).double()
    bound = layer.lipschitz_bound(constant)
    assert_lipschitz(layer, (8,), bound, attained=True, dtype=torch.float64)
    expected = {
        ConvexResidual: 0.5 + 0.5 * constant,
        ConcatResidual: max(1.0, constant),
        AdditiveResidual: 0.5 + 0.5 * constant,
        L2NormResidual: math.sqrt(0.5 + 0.5 * constant**2),
    }
    assert bound == pytest.approx(expected[cls], rel=1e-12)


@pytest.mark.parametrize("cls", CLASSES)
def test_bound_of_a_one_lipschitz_branch_is_exactly_one(cls):
    assert cls(Scale(1.0)).lipschitz_bound(1.0) == 1.0


@pytest.mark.parametrize("init", [0.01, 0.3, 0.99])
def test_convex_weight_is_learnable_and_stays_inside(init):
    layer = ConvexResidual(Scale(-1.0), init=init, dtype=torch.float64)
    assert layer.alpha.item() == pytest.approx(init, abs=1e-12)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), (1 - 2 * init) * x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(50):  # toward the largest alpha
        optimizer.zero_grad()
        layer(x).mul(x).sum().backward()
        optimizer.step()
    assert init < layer.alpha.item() <= 1
    assert_lipschitz(layer, (8,))
    layer.reset_parameters()
    assert layer.alpha.item() == pytest.approx(init, abs=1e-12)


def test_convex_weight_sums_to_one_in_bfloat16():
    layer = ConvexResidual(nn.Identity(), init=0.3, dtype=torch.bfloat16)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("shuffle", [False, True])
def test_concat_is_orthogonal_when_its_branch_is(shuffle):
    branch = orthogonal(nn.Linear(4, 4, bias=False, dtype=torch.float64))
    layer = ConcatResidual(branch, shuffle=shuffle)
    assert_orthogonal(layer, (8,), atol=1e-13)  # observed 8.9e-16


def test_concat_passes_the_first_half_and_shuffles_on_demand():
    x = torch.randn(2, 4, 3, 3)
    plain = ConcatResidual(Scale(2.0))(x)
    assert torch.equal(plain, torch.cat((x[:, :2], 2 * x[:, 2:]), 1))
    shuffled = ConcatResidual(Scale(2.0), dim=-3, shuffle=True)(x)
    assert torch.equal(shuffled, plain[:, [0, 2, 1, 3]])


def test_l2_norm_has_a_finite_gradient_at_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    L2NormResidual(nn.Identity())(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_branch_that_changes_the_shape_is_refused(cls):
    layer = cls(nn.Linear(4 if cls is ConcatResidual else 8, 1))
    with pytest.raises(ValueError, match=rf"{cls.__name__}: the branch must return the shape"):
        layer(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"branch must be a torch\.nn\.Module"):
        cls(torch.relu)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvexResidual(nn.Identity(), init=1.0), "strictly between 0 and 1, got init=1.0"),
        (lambda: ConvexResidual(nn.Identity(), init=0), "strictly between 0 and 1, got init=0"),
        (lambda: ConcatResidual(nn.Identity())(torch.ones(2, 5)), "must exist and be even"),
        (lambda: ConcatResidual(nn.Identity())(torch.ones(6)), "must exist and be even"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()
