import copy

import pytest
import torch

from orthonet.errors import NotOnManifoldError
from orthonet.linalg import power_iteration
from orthonet.reparametrizers import (
    BatchedIdentity,
    BatchedPowerIteration,
    L2Normalize,
    OrthoWeight,
)
from orthonet.testing import orthogonality_error


def test_identity():
    w = torch.randn(2, 3, 4)
    module = BatchedIdentity((2, 3, 4))
    assert module(w) is w
    assert module.right_inverse(w) is w


def test_power_iteration_state_moves_in_training_only():
    module = BatchedPowerIteration((4, 5))
    w = torch.randn(4, 5)
    before = copy.deepcopy(module.state_dict())
    module.eval()
    first, second = module(w), module(w)
    assert torch.equal(first, second)
    assert torch.equal(before["u"], module.u)
    module.train()
    module(w)
    assert not torch.equal(before["u"], module.u)


def test_power_iteration_reaches_unit_norm():
    module = BatchedPowerIteration((2, 6, 4)).double()
    w = 1e-4 * torch.randn(2, 6, 4, dtype=torch.float64)
    for _ in range(40):
        normalized = module(w)
    norm = torch.linalg.matrix_norm(normalized, 2)
    torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-6, rtol=0)  # observed 8e-13


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_power_iteration_survives_a_bad_weight(bad):
    module = BatchedPowerIteration((3, 3))
    module(torch.full((3, 3), bad))
    w = torch.randn(3, 3)
    for _ in range(60):
        normalized = module(w)
    assert float(torch.linalg.matrix_norm(normalized, 2)) == pytest.approx(1.0, abs=1e-4)


def test_two_forwards_then_backward():
    weight = OrthoWeight((4, 4))
    (weight() * weight()).sum().backward()  # the buffer moved between the two reads
    assert weight.original.grad is not None


def test_state_follows_dtype_and_weight_is_read_at_full_precision():
    weight = OrthoWeight((8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = weight()
    assert w.dtype == torch.float32
    assert orthogonality_error(w) <= 2e-6  # observed 8e-8
    assert weight.double().normalizer.u.dtype == torch.float64
    assert weight().dtype == torch.float64
    half = OrthoWeight((8, 8), dtype=torch.bfloat16)
    assert half().dtype == torch.bfloat16
    # the rounding of the storage alone: observed 1.9e-3
    assert orthogonality_error(half()) <= 2e-2
    assert orthogonality_error(half.compute()) <= 2e-6


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_l2_normalize(dim, dtype):
    module = L2Normalize(torch.float32, dim=dim)
    for scale in (1e-30, 1.0, 1e25):
        w = scale * torch.randn(4, 5, dtype=dtype)
        out = module(w)
        norm = torch.linalg.vector_norm(out.double(), dim=dim)
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-6, rtol=0)
        torch.testing.assert_close(module(out), module.right_inverse(out))
    zero = torch.zeros(4, 5, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(module(zero)[0, 0], zero)
    assert bool(torch.isfinite(grad).all())
    norm = torch.linalg.vector_norm(module(zero.detach()), dim=dim)
    assert float(norm.min()) == pytest.approx(1.0)
    with pytest.raises(NotOnManifoldError, match="L2Normalize: vectors must have unit norm"):
        module.right_inverse(torch.full((4, 5), 2.0))


def test_l2_normalize_reads_its_dtype():
    w = torch.tensor([1.0, 1e-5], dtype=torch.float32)
    wide = L2Normalize(torch.float64)(w).double()
    truth = w.double() / w.double().norm()
    # rounded once, after a float64 computation
    assert torch.equal(wide.float(), truth.float())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(L2Normalize(torch.float64, dim=1), (x,))
    assert torch.autograd.gradcheck(L2Normalize(torch.float64), (x,))
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype"):
        L2Normalize(torch.int64)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 3, 5)], ids=str)
def test_gradient_of_power_iteration_is_that_of_its_estimate(shape):
    module = BatchedPowerIteration(shape, eps=1e-3).double().eval()
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def slow(w):
        sigma, _, _ = power_iteration(w, module.u, niters=3)
        scale = torch.linalg.matrix_norm(w.detach()) * min(shape[-2:]) ** -0.5
        return w / (sigma + 1e-3 * scale)[..., None, None]

    direction = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(module(w), slow(w))
    first = [torch.autograd.grad(f(w), w, direction, create_graph=True)[0] for f in (module, slow)]
    torch.testing.assert_close(*first)
    second = [torch.autograd.grad(g, w, direction)[0] for g in first]
    torch.testing.assert_close(*second)
    tiny = (1e-25 * w.detach()).float().requires_grad_()  # the divisor is a constant there
    (gradient,) = torch.autograd.grad(module.float()(tiny), tiny, direction.float())
    floor = torch.finfo(torch.float32).tiny ** 0.5
    torch.testing.assert_close(gradient, direction.float() / floor)
