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


def test_power_iteration_has_no_state():
    module = BatchedPowerIteration((4, 5))
    w = torch.randn(4, 5)
    assert not module.state_dict()
    assert not list(module.buffers())
    values = [module.train(mode)(w) for mode in (True, True, False, False)]
    assert all(torch.equal(value, values[0]) for value in values)


def test_power_iteration_reaches_unit_norm():
    module = BatchedPowerIteration((2, 6, 4), power_it_niter=120).double()
    w = 1e-4 * torch.randn(2, 6, 4, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(module(w), 2)
    torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-6, rtol=0)  # observed 8e-13


def test_a_checkpoint_with_the_vectors_of_before_loads():
    module = BatchedPowerIteration((4, 5))
    module.load_state_dict({"u": torch.randn(4)})
    weight = OrthoWeight((4, 5))
    state = weight.state_dict()
    state["normalizer.u"] = torch.randn(4)
    weight.load_state_dict(state)
    assert "normalizer.u" not in weight.state_dict()


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_power_iteration_survives_a_bad_weight(bad):
    module = BatchedPowerIteration((3, 3), power_it_niter=200)
    module(torch.full((3, 3), bad))
    normalized = module(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    assert float(torch.linalg.matrix_norm(normalized, 2)) == pytest.approx(1.0, abs=1e-4)


def test_two_forwards_then_backward():
    weight = OrthoWeight((4, 4))
    (weight() * weight()).sum().backward()
    assert weight.original.grad is not None


def test_weight_is_read_at_full_precision():
    weight = OrthoWeight((8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = weight()
    assert w.dtype == torch.float32
    assert orthogonality_error(w) <= 2e-6  # observed 8e-8
    assert weight.double()().dtype == torch.float64
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
def test_value_and_gradients_of_power_iteration(shape):
    module = BatchedPowerIteration(shape, eps=1e-3).double()
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    sigma, _, _ = power_iteration(w, module.start(w), niters=3)
    scale = torch.linalg.matrix_norm(w.detach()) * min(shape[-2:]) ** -0.5
    torch.testing.assert_close(module(w), w / (sigma + 1e-3 * scale)[..., None, None])
    free = BatchedPowerIteration(shape, eps=0.0).double()  # eps has a scale that is a constant
    assert torch.autograd.gradcheck(free, (w,))
    assert torch.autograd.gradgradcheck(free, (w,))
    tiny = (1e-25 * w.detach()).float().requires_grad_()
    direction = torch.randn(shape)
    (gradient,) = torch.autograd.grad(free.float()(tiny), tiny, direction)
    (expected,) = torch.autograd.grad(free.double()(w), w, direction.double())
    # of degree -1 in w; twenty float32 operations an entry, so 1e-5 relative; 2e-6 was seen
    torch.testing.assert_close(gradient.double() * 1e-25, expected, rtol=0, atol=1e-5 * 10)
    zero = torch.zeros(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.float()(zero).sum(), zero)
    assert bool(gradient.isfinite().all())
