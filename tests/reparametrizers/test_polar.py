"""The polar orthogonalizer: its promise at every step of a run and after jumps, its gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import orthonet
from orthonet import linalg
from orthonet.layers import OrthoLinear
from orthonet.linalg.polar_factor import series as _polar_series
from orthonet.reparametrizers import BatchedPolarOrthogonalization, OrthoWeight
from orthonet.testing import MATRIX_CASES, hard_matrix, orthogonality_error, tolerances
from tests.each import each
from tests.references import polar_gradient_reference, polar_reference

SHAPES = [(24, 24), (40, 12), (12, 40), (3, 10, 10)]
POLAR = orthonet.POLAR_ORTHO_PARAMS
RESIDUAL = tolerances.PROMISE
OPTIMIZERS = {
    "adam 1e-4": lambda p: torch.optim.Adam(p, lr=1e-4),
    "adam 1e-2": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam 1": lambda p: torch.optim.Adam(p, lr=1.0),
    "sgd 0.3": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "sgd 10": lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9),
    "decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
}

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def relative_gradient_error(weight: OrthoWeight) -> float:
    """Gradient of a random linear function against the closed form at the parameter as it is."""
    w = weight()
    direction = torch.randn_like(w)
    (ours,) = torch.autograd.grad(w, weight.original, direction)
    truth = polar_gradient_reference(weight.original.detach(), direction)
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (3, 10, 10)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_orthogonal_at_every_step_in_train_and_eval(optimizer, shape, dtype):
    weight = OrthoWeight(shape, POLAR, dtype=dtype)
    optimizer = optimizer(weight.parameters())
    target = torch.randn(shape, dtype=dtype)
    worst = gradient = 0.0
    for step in range(100):
        optimizer.zero_grad()
        w = weight.train()()
        worst = max(worst, orthogonality_error(w.detach()))
        (w * target).sin().sum().backward()
        optimizer.step()
        worst = max(worst, orthogonality_error(weight.eval()().detach()))
        if step % 20 == 0:
            weight.train()
            gradient = max(gradient, relative_gradient_error(weight))
    assert worst <= RESIDUAL[dtype]  # observed 4.3e-7 and 1.1e-15
    # H is a multiple of I, whatever the run did before
    assert gradient <= (5e-6 if dtype == torch.float32 else 1e-14)  # observed 8.7e-7, 1.5e-15


@shapes
def test_training_with_retractions_is_training(shape):
    ends = {}
    for name, caching in {"cold": False, "warm": True}.items():
        torch.manual_seed(1)
        weight = OrthoWeight(shape, POLAR)
        weight.caching = caching
        target = linalg.haar(shape)
        optimizer = torch.optim.Adam(weight.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (weight() - target).square().sum()
            loss.backward()
            optimizer.step()
        ends[name] = float(loss.detach()) / 2**0.5 / min(shape[-2:])
    assert ends["warm"] < ends["cold"] + 0.05  # observed 0.007 above at most


@shapes
@each("case", MATRIX_CASES)
def test_jumps(case, shape, dtype):
    weight = OrthoWeight(shape, POLAR, dtype=dtype)
    weight().sum().backward()
    jump = hard_matrix(case, shape, dtype)
    other = OrthoWeight(shape, POLAR, dtype=dtype)
    with torch.no_grad():
        other.original.copy_(jump)
        weight.original.copy_(jump)
    assert orthogonality_error(weight()) <= RESIDUAL[dtype]  # observed 2.0e-7 and 8e-16
    weight.load_state_dict(other.state_dict())
    w = weight()
    assert orthogonality_error(w) <= RESIDUAL[dtype]
    if case in ("identity", "gaussian", "orthogonal", "repeated"):
        allowed = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]  # observed 1.4e-6, 4e-15
        torch.testing.assert_close(w.double(), polar_reference(jump), atol=allowed, rtol=0)
    norm = weight.original.detach().double().norm()
    torch.testing.assert_close(norm, jump.double().norm(), rtol=1e-5, atol=0)  # observed 8e-8
    assigned = linalg.haar(shape, dtype=dtype)
    weight.assign_(assigned)
    torch.testing.assert_close(weight(), assigned, atol=RESIDUAL[dtype], rtol=0)


@shapes
def test_gradient_against_closed_form(shape, dtype):
    for case in ("identity", "gaussian", "orthogonal", "repeated"):
        weight = OrthoWeight(shape, POLAR, dtype=dtype)
        for moved in (0.0, 1e-3, 3e-2, 0.3):
            with torch.no_grad():
                weight.original.copy_(hard_matrix(case, shape, dtype))
                weight.original.add_(moved * torch.randn(shape, dtype=dtype))
            allowed = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]  # observed 1.2e-5, 3e-14
            assert relative_gradient_error(weight) <= allowed


def test_centered_parameter_is_a_multiple_of_the_weight():
    weight = OrthoWeight((20, 8), POLAR, dtype=torch.float64)
    optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
    weight().sum().backward()
    weight.original.grad.normal_()
    norm = (weight.original.detach() - weight.original.grad).norm()
    optimizer.step()
    w = weight()
    torch.testing.assert_close(weight.original.detach(), w.detach() * norm / 8**0.5)


@shapes
def test_two_forwards_before_one_backward(shape, dtype):
    weight = OrthoWeight(shape, POLAR, dtype=dtype)
    with torch.no_grad():
        weight.original.add_(torch.randn(shape, dtype=dtype))
    first = weight()
    version = weight.original._version
    second = weight()
    assert weight.original._version == version  # nothing is written
    direction = torch.randn(shape, dtype=dtype)
    (together,) = torch.autograd.grad(first + second, weight.original, direction)
    truth = 2.0 * polar_gradient_reference(weight.original.detach(), direction)
    allowed = 1e-5 if dtype == torch.float32 else 1e-13  # observed 1.9e-7, 1e-15
    assert float((together.double() - truth).norm() / truth.norm()) <= allowed


def test_checkpointing_gives_the_same_gradient():
    layer = OrthoLinear(16, 16, ortho_params=POLAR)
    with torch.no_grad():
        layer.parametrization.original.add_(0.1 * torch.randn(16, 16))
    x = torch.randn(4, 16)
    plain = copy.deepcopy(layer)
    plain(x).square().sum().backward()
    plain.zero_grad()
    checkpoint(layer, x, use_reentrant=False).sin().sum().backward()
    plain(x).sin().sum().backward()
    ours, theirs = layer.parametrization.original.grad, plain.parametrization.original.grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # observed 9.5e-7


def test_differentiable_twice():
    weight = OrthoWeight((5, 3), POLAR, dtype=torch.float64)
    with torch.no_grad():
        weight.original.add_(torch.randn(5, 3))
    direction = torch.randn(5, 3, dtype=torch.float64)
    values = []
    for mode in (True, False):  # eval mode is the stateless function at the same parameter
        w = weight.train(mode)()
        (g,) = torch.autograd.grad(w, weight.original, direction, create_graph=True)
        values.append(torch.autograd.grad(g.square().sum(), weight.original)[0])
    torch.testing.assert_close(*values, atol=1e-12, rtol=1e-12)  # observed 0


def test_round_trips():
    weight = OrthoWeight((7, 5), POLAR)
    with torch.no_grad():
        weight.original.add_(torch.randn(7, 5))
    weight()
    other = OrthoWeight((7, 5), POLAR)
    other.load_state_dict(weight.state_dict())
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), other):
        assert twin.original is not weight.original
        # computed anew from the same parameter: the same bits
        torch.testing.assert_close(twin(), weight.evaluate(), atol=0, rtol=0)


def test_kept_for_backward():
    for shape, spread in (((64, 64), 0.0), ((64, 64), 0.3), ((96, 32), 0.3)):
        w = nn.Parameter(linalg.haar(shape) + spread * torch.randn(shape) / shape[0] ** 0.5)
        kept = {}
        module = BatchedPolarOrthogonalization(shape)

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(w)
        kept.pop(w.untyped_storage().data_ptr())
        assert sum(kept.values()) <= 1.1 * w.numel()  # observed 1.02


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_bound_of_the_polynomials_holds(degree):
    for b in (1e-3, 1e-2, 0.1, 0.35, 0.6):
        e = torch.linspace(-b, b, 2001, dtype=torch.float64)
        c, bound = _polar_series.near(degree, b)
        value = sum(factor * e**power for power, factor in enumerate(c))
        error = float((value * (1.0 + e).sqrt() - 1.0).abs().max())
        assert error <= bound * (1 + 1e-9) + 1e-15
        assert bound <= 4 * error + 1e-15  # observed 2.2 times
