"""The dense operator and what is derived from it, on maps whose matrix is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet.testing import (
    assert_lipschitz,
    assert_orthogonal,
    dense_operator,
    jacobian,
    orthogonality_error,
    singular_values,
)


def test_dense_operator_of_a_linear_layer_is_its_weight(dtype):
    layer = nn.Linear(5, 3, dtype=dtype)
    # the bias is added and subtracted: observed 3.0e-8 in float32, 5.6e-17 in float64
    atol = 4 * torch.finfo(dtype).eps
    assert (dense_operator(layer, (5,)) - layer.weight).abs().max() <= atol


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_dense_operator_of_a_convolution_in_chunks(batch):
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, dtype=torch.float64)
    matrix = dense_operator(layer, (2, 5, 4), batch=batch)
    assert matrix.shape == (3 * 3 * 2, 40)
    x = torch.randn(6, 2, 5, 4, dtype=torch.float64)
    expected = (layer(x) - layer.bias.view(3, 1, 1)).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ matrix.T, expected)


def test_dense_operator_takes_functions_and_scalars_per_sample():
    matrix = dense_operator(lambda x: x.sum(1) + 7, (4,), dtype=torch.float64)
    assert torch.equal(matrix, torch.ones(1, 4, dtype=torch.float64))
    assert torch.equal(dense_operator(lambda x: 0 * x, (2,)), torch.zeros(2, 2))


def test_dense_operator_restores_modes_buffers_and_gradients():
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(5, 5), nn.Dropout(0.5))
    layer[0].eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="dense_operator: the map must be affine"):
        dense_operator(layer, (3, 5), train=True)
    assert [module.training for module in layer.modules()] == [True, False, True, True]
    dense_operator(layer, (3, 5))
    assert [module.training for module in layer.modules()] == [True, False, True, True]
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fn", [torch.relu, torch.abs, lambda x: x * x, torch.sin])
def test_dense_operator_refuses_a_map_that_is_not_affine(fn):
    with pytest.raises(ValueError, match="must be affine"):
        dense_operator(fn, (6,))


def test_dense_operator_refuses_a_map_without_batch():
    with pytest.raises(ValueError, match="keep the batch dimension"):
        dense_operator(lambda x: x.sum(), (3,))
    with pytest.raises(ValueError, match="batch must be an integer >= 1"):
        dense_operator(torch.neg, (3,), batch=0)


def test_jacobian_of_a_map_that_is_not_affine():
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    expected = torch.diag(2 * x.flatten())
    torch.testing.assert_close(jacobian(torch.square, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(jacobian(torch.square, x), expected)


def test_singular_values_are_sorted_and_in_float64():
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    sigma = singular_values(layer, (3,))
    assert sigma.dtype == torch.float64
    torch.testing.assert_close(sigma, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))


def test_orthogonality_error_is_the_largest_deviation_of_a_batch():
    q = torch.linalg.qr(torch.randn(4, 6, 3, dtype=torch.float64)).Q
    assert orthogonality_error(q) <= 1e-14  # observed 3.4e-16
    assert orthogonality_error(q.mT) <= 1e-14
    q[2] *= 0.25
    assert orthogonality_error(q) == pytest.approx(0.75)
    assert orthogonality_error(torch.zeros(3, 3)) == 1
    assert orthogonality_error(torch.full((2, 2), float("nan"))) == float("inf")


def test_assert_orthogonal_passes_and_fails_with_numbers():
    assert_orthogonal(lambda x: x.flip(1), (5,))
    layer = nn.Linear(4, 4)
    nn.init.orthogonal_(layer.weight)
    assert_orthogonal(layer, (4,))
    with torch.no_grad():
        layer.weight *= 1.01
    with pytest.raises(AssertionError, match=r"not orthogonal on \(4,\).*1 \+ 1\.000e-02"):
        assert_orthogonal(layer, (4,))
    assert_orthogonal(layer, (4,), atol=0.02)
    with pytest.raises(AssertionError, match="not orthogonal"):
        assert_orthogonal(lambda x: x * float("nan"), (4,), atol=1.0)


@pytest.mark.parametrize("constant", [0.5, 1.0, 3.0])
def test_assert_lipschitz_finds_the_constant_of_known_maps(constant):
    assert_lipschitz(lambda x: constant * x, (4,), constant, 1e-6, attained=True)

    def sine(x):
        return torch.sin(constant * x)

    assert_lipschitz(sine, (1,), constant, 0.05, attained=True, samples=50)
    with pytest.raises(AssertionError, match="-Lipschitz"):
        assert_lipschitz(sine, (1,), 0.9 * constant, samples=50)


def test_assert_lipschitz_sees_kinks_far_away():
    assert_lipschitz(lambda x: F.relu(x - 8), (1,), attained=True)
    assert_lipschitz(torch.zeros_like, (3,), constant=0.0, attained=True)


def test_assert_lipschitz_passes_and_fails_with_numbers():
    assert_lipschitz(torch.relu, (4,))
    assert_lipschitz(lambda x: 2 * x, (4,), constant=2.0, attained=True)
    with pytest.raises(AssertionError, match=r"not 1.0-Lipschitz on \(4,\): found 2"):
        assert_lipschitz(lambda x: 2 * x, (4,))
    with pytest.raises(AssertionError, match=r"constant 1.0 is not attained on \(4,\): found 0.5"):
        assert_lipschitz(lambda x: x / 2, (4,), attained=True)
    with pytest.raises(AssertionError, match=r"not 0\.0001-Lipschitz"):
        assert_lipschitz(nn.Linear(3, 3).double(), (3,), constant=1e-4)


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    assert_lipschitz(torch.relu, (4,))
    assert torch.equal(torch.get_rng_state(), state)
