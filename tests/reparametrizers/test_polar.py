"""The polar orthogonalizer: its promise at every step of a run, its gradient, what it writes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import orthonet
from orthonet import linalg
from orthonet.layers import OrthoLinear
from orthonet.linalg import _polar_series
from orthonet.reparametrizers import (
    BatchedAutoOrthogonalization,
    BatchedIdentity,
    BatchedPolarOrthogonalization,
    OrthoWeight,
)
from orthonet.testing import MATRIX_CASES, hard_matrix, orthogonality_error, tolerances
from tests.references import polar_gradient_reference, polar_reference

SHAPES = [(24, 24), (40, 12), (12, 40), (3, 10, 10)]
POLAR, WARM = orthonet.POLAR_ORTHO_PARAMS, orthonet.POLAR_WARM_ORTHO_PARAMS
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
params = pytest.mark.parametrize("ortho_params", [POLAR, WARM], ids=["cold", "warm"])


def relative_gradient_error(weight: OrthoWeight) -> float:
    """Gradient of a random linear function against the closed form at the parameter as it is."""
    w = weight()
    direction = torch.randn_like(w)
    (ours,) = torch.autograd.grad(w, weight.original, direction)
    truth = polar_gradient_reference(weight.original.detach(), direction)
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (3, 10, 10)], ids=str)
@params
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_orthogonal_at_every_step_in_train_and_eval(optimizer, ortho_params, shape, dtype):
    weight = OrthoWeight(shape, ortho_params, dtype=dtype)
    optimizer = optimizer(weight.parameters())
    target = torch.randn(shape, dtype=dtype)
    worst = gradient = 0.0
    for step in range(200):
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
    if ortho_params is WARM:  # H is a multiple of I, whatever the run did before
        assert gradient <= (5e-6 if dtype == torch.float32 else 1e-14)  # observed 8.7e-7, 1.5e-15


@shapes
def test_warm_training_is_training(shape):
    ends = {}
    for name, ortho_params in {"cold": POLAR, "warm": WARM}.items():
        torch.manual_seed(1)
        weight = OrthoWeight(shape, ortho_params)
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
@pytest.mark.parametrize("case", MATRIX_CASES)
def test_jumps(case, shape, dtype):
    weight = OrthoWeight(shape, WARM, dtype=dtype)
    weight().sum().backward()
    jump = hard_matrix(case, shape, dtype)
    other = OrthoWeight(shape, WARM, dtype=dtype)
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
@params
def test_gradient_against_closed_form(ortho_params, shape, dtype):
    for case in ("identity", "gaussian", "orthogonal", "repeated"):
        weight = OrthoWeight(shape, ortho_params, dtype=dtype)
        for moved in (0.0, 1e-3, 3e-2, 0.3):
            with torch.no_grad():
                weight.original.copy_(hard_matrix(case, shape, dtype))
                weight.original.add_(moved * torch.randn(shape, dtype=dtype))
            allowed = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]  # observed 1.2e-5, 3e-14
            assert relative_gradient_error(weight) <= allowed


def test_centred_parameter_is_a_multiple_of_the_weight():
    weight = OrthoWeight((20, 8), WARM, dtype=torch.float64)
    with torch.no_grad():
        weight.original.copy_(torch.randn(20, 8))
    norm = weight.original.detach().norm()
    w = weight()
    torch.testing.assert_close(weight.original.detach(), w.detach() * norm / 8**0.5)


@shapes
def test_two_forwards_before_one_backward(shape, dtype):
    weight = OrthoWeight(shape, WARM, dtype=dtype)
    with torch.no_grad():
        weight.original.add_(torch.randn(shape, dtype=dtype))
    first = weight()
    version = weight.original._version
    second = weight()
    assert weight.original._version == version  # nothing was left to re-centre
    direction = torch.randn(shape, dtype=dtype)
    (together,) = torch.autograd.grad(first + second, weight.original, direction)
    truth = 2.0 * polar_gradient_reference(weight.original.detach(), direction)
    allowed = 1e-5 if dtype == torch.float32 else 1e-13  # observed 1.9e-7, 1e-15
    assert float((together.double() - truth).norm() / truth.norm()) <= allowed


def test_checkpointing_gives_the_same_gradient():
    layer = OrthoLinear(16, 16, ortho_params=WARM)
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


def test_differentiable_twice_while_warm():
    weight = OrthoWeight((5, 3), WARM, dtype=torch.float64)
    with torch.no_grad():
        weight.original.add_(torch.randn(5, 3))
    direction = torch.randn(5, 3, dtype=torch.float64)
    values = []
    for mode in (True, False):  # eval mode is the stateless function at the same parameter
        w = weight.train(mode)()
        (g,) = torch.autograd.grad(w, weight.original, direction, create_graph=True)
        values.append(torch.autograd.grad(g.square().sum(), weight.original)[0])
    torch.testing.assert_close(*values, atol=1e-12, rtol=1e-12)  # observed 0


@params
def test_round_trips(ortho_params):
    weight = OrthoWeight((7, 5), ortho_params)
    with torch.no_grad():
        weight.original.add_(torch.randn(7, 5))
    weight()
    other = OrthoWeight((7, 5), ortho_params)
    other.load_state_dict(weight.state_dict())
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), other):
        assert twin.original is not weight.original
        # computed anew, from the parameter as it has been re-centred: the same bits
        torch.testing.assert_close(twin(), weight.evaluate(), atol=0, rtol=0)


def test_kept_for_backward():
    for shape, spread in (((64, 64), 0.0), ((64, 64), 0.3), ((96, 32), 0.3)):
        w = nn.Parameter(linalg.haar(shape) + spread * torch.randn(shape) / shape[0] ** 0.5)
        for warm in (False, True):
            kept = {}
            module = BatchedPolarOrthogonalization(shape, warm=warm)

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


def test_auto_tells_its_choice_and_makes_it(monkeypatch):
    for shape, warm, method in (
        ((64, 64), False, "cholesky"),
        ((64, 64), True, "polar"),
        ((4, 512, 600), True, "polar"),
        ((1024, 1024), True, "polar"),
    ):
        module = BatchedAutoOrthogonalization(shape, warm=warm)
        assert module.method("cpu") == method
        assert module.method("cuda") == ("polar" if warm else "shifted cholesky")
        assert f"cpu: {method}" in repr(module)
    w = torch.randn(9, 6, dtype=torch.float64)
    module = BatchedAutoOrthogonalization((9, 6))
    torch.testing.assert_close(module(w), linalg.cholesky_qr(w), atol=0, rtol=0)
    monkeypatch.setattr(module, "method", lambda device: "shifted cholesky")
    shifted = linalg.cholesky_qr(w, shifted=True)
    torch.testing.assert_close(module(w), shifted, atol=0, rtol=0)
    torch.testing.assert_close(shifted, linalg.qr(w))  # the same map
    warm = BatchedAutoOrthogonalization((9, 6), warm=True)
    torch.testing.assert_close(warm(w), polar_reference(w))
    with pytest.raises(ValueError, match="BatchedPolarOrthogonalization: warm must be one of"):
        BatchedPolarOrthogonalization((3, 3), warm=2)


@pytest.mark.parametrize("early", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kappa", [3.0, 10.0, 1e6])
@pytest.mark.parametrize("shape", [(48, 48), (16, 80), (2, 24, 24)], ids=str)
def test_early_products_in_a_short_dtype(shape, kappa, early):
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    sigma = torch.linspace(1.0, 1.0 / kappa, min(shape[-2:]), dtype=torch.float64)
    w = ((u * sigma) @ vh).float().requires_grad_()
    result = linalg.polar(w, early_dtype=early)
    assert orthogonality_error(result) <= 2e-6  # observed 8e-7
    if kappa > 10.0:  # what is nearest is ill-defined to the short precision then
        return
    unit, direction = torch.finfo(early).eps, torch.randn(shape)
    turned = float((result.detach() - polar_reference(w.detach())).abs().max())
    # the short products have been taken, and turn a little; observed 2e-4 to 4e-3
    assert 1e-5 < turned <= 0.5 * unit * kappa
    (ours,) = torch.autograd.grad(result, w, direction)
    truth = polar_gradient_reference(w.detach(), direction)
    # observed 0.12 of what is allowed
    assert float((ours.double() - truth).norm() / truth.norm()) <= unit * kappa


def test_early_products_leave_warm_training_exact():
    params = orthonet.OrthoParams(
        spectral_normalizer=BatchedIdentity,
        orthogonalizer=orthonet.ClassParam(
            BatchedPolarOrthogonalization, warm=True, early_dtype=torch.bfloat16
        ),
    )
    weight = OrthoWeight((32, 32), params)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    for step in range(20):
        if step == 10:  # a jump: the early products are taken
            with torch.no_grad():
                weight.original.normal_()
        w = weight()
        assert orthogonality_error(w) <= 2e-6  # observed 5e-7
        assert relative_gradient_error(weight) <= 1e-5  # observed 4e-7
        optimizer.zero_grad()
        (w * torch.linspace(-1, 1, 32)).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"early_dtype must be one of None, torch\.bfloat16"):
        BatchedPolarOrthogonalization((3, 3), early_dtype=torch.float32)
    with pytest.raises(ValueError, match="early_dtype goes with the way"):
        linalg.polar(weight().detach(), niters=3, early_dtype=torch.bfloat16)
