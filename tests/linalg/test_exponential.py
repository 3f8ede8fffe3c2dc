import pytest
import torch

from orthonet import linalg
from orthonet.linalg import exponential
from orthonet.linalg import rotation as _rotation
from orthonet.linalg.packing import pack_skew, unpack_skew
from orthonet.testing import orthogonality_error, tolerances
from tests.references import rotation_reference


@pytest.mark.parametrize("degree", [1, 2, 3, 7, 12, 18])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 0.3, 3.0, 40.0])
def test_matrix_exponential(degree, scale, dtype):
    a = scale * linalg.skew(torch.randn(3, 7, 7, dtype=torch.float64)).to(dtype)
    # the more squarings, the more rounding; observed per degree, in float32 and float64:
    # 1.4e-2, 4.8e-4, 1.9e-4, 8.2e-6 (7 and more) and 6.3e-7, 1.2e-9, 3.9e-11, 2.2e-13
    low = {1: (1e-1, 5e-6), 2: (5e-3, 1e-8), 3: (2e-3, 5e-10)}.get(degree, (1e-4, 5e-12))
    allowed = low[dtype == torch.float64]
    error = linalg.matrix_exponential(a, degree=degree) - torch.matrix_exp(a.double())
    assert float(error.abs().max()) <= allowed


def test_exponential_of_any_matrix():
    a = torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(linalg.matrix_exponential(a), torch.matrix_exp(a))


def test_matrix_exponential_gradcheck():
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(linalg.matrix_exponential, (a.requires_grad_(),))


def test_cayley_is_a_rotation_and_inverts():
    a = linalg.skew(torch.randn(5, 6, 6, dtype=torch.float64))
    q = linalg.cayley(a)
    assert orthogonality_error(q) <= 1e-12  # observed 7e-16
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.solve(q + eye, q - eye), a)
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("products_to", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 30.0])  # the large one is polished
def test_rotated_cayley_is_the_map_by_dense_solves(monkeypatch, products_to, dtype, batch, scale):
    monkeypatch.setattr(_rotation, "_PRODUCTS_TO", products_to)
    a = scale * torch.randn(*batch, 6, 6, dtype=dtype)
    coordinates = pack_skew(a - a.mH).requires_grad_()
    base = torch.linalg.qr(torch.randn(6, 6, dtype=dtype)).Q
    direction = torch.randn(*batch, 6, 6, dtype=dtype)
    q = _rotation.rotated_cayley(base, coordinates)
    (gradient,) = torch.autograd.grad((q * direction).real.sum(), coordinates)
    half, eye = unpack_skew(coordinates, 6) / 2, torch.eye(6, dtype=dtype)
    expected = base @ torch.linalg.solve(eye - half, eye + half)
    (reference,) = torch.autograd.grad((expected * direction).real.sum(), coordinates)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-12)  # observed 6e-15
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)  # observed 4e-15


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (6, 4), (4, 6), (12, 3), (3, 12), (2, 9, 3)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_rotate_base(shape, scale, dtype):
    w = scale * torch.randn(shape, dtype=dtype)
    base = linalg.haar(shape, dtype=dtype)
    q = linalg.rotate_base(w, base)
    # observed 1.1e-7 and 5e-16
    assert orthogonality_error(q) <= tolerances.PROMISE[dtype]
    error = float((q - rotation_reference(w, base)).abs().max())
    # observed 1.8e-4 and 6.1e-13 at scale 20, where the exponent has norm up to about 200
    assert error <= {torch.float32: 2e-3, torch.float64: 1e-11}[dtype]


@pytest.mark.parametrize("shape", [(4, 4), (9, 2), (2, 9)])
def test_rotate_base_reaches_the_tangent_space_at_the_base(shape):
    base = linalg.haar(shape, dtype=torch.float64)
    torch.testing.assert_close(linalg.rotate_base(base, base), base)
    jacobian = torch.func.jacrev(lambda w: linalg.rotate_base(w, base))(base)
    rank = torch.linalg.matrix_rank(jacobian.reshape(base.numel(), -1), rtol=1e-8)
    small = min(shape)
    assert int(rank) == base.numel() - small * (small + 1) // 2  # dimension of the manifold


def test_rotate_base_gradcheck():
    for shape in ((4, 4), (7, 2)):
        base = linalg.haar(shape, dtype=torch.float64)
        w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda w, base=base: linalg.rotate_base(w, base), (w,))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="matrix_exponential: the matrix must be square"):
        linalg.matrix_exponential(torch.ones(2, 3))
    with pytest.raises(ValueError, match="the matrix must be finite, got norm=nan"):
        linalg.matrix_exponential(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="w and base must have one shape"):
        linalg.rotate_base(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(5, 5), (5, 3), (8, 2), (2, 8), (2, 4, 4)], ids=str)
def test_rotate_base_keeps_two_matrices_and_differentiates_twice(shape):
    base = linalg.haar(shape, dtype=torch.float64)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with_base = base.clone().requires_grad_()

    def squared(w, base):
        # the map on and off the manifold: the base is moved by gradcheck too
        return linalg.rotate_base(w, base).square()

    assert torch.autograd.gradcheck(squared, (w, base))
    assert torch.autograd.gradgradcheck(squared, (w, base))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q = linalg.rotate_base(w, with_base)
    own = {t.untyped_storage().data_ptr() for t in (w, with_base)}
    new = {t.untyped_storage().data_ptr(): t.numel() for t in kept}
    # the result, and a scale for each matrix; the coordinates and the base are the caller's
    assert sum(n for place, n in new.items() if place not in own) <= q.numel() + 4


def test_powers_bound_the_squarings(monkeypatch):
    """A spread spectrum is not squared as often as its largest column sum asks for."""
    a = linalg.skew(torch.randn(64, 64, dtype=torch.float64))
    products = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda x, y: products.append(1) or original(x, y)
    )
    w = linalg.rotate_base(a / 8, torch.eye(64, dtype=torch.float64))
    few = len(products)
    products.clear()
    monkeypatch.setattr(exponential, "_bound", lambda powers, norm, normal: norm)
    linalg.rotate_base(a / 8, torch.eye(64, dtype=torch.float64))
    assert few < len(products)  # observed 10 and 11
    truth = torch.matrix_exp((a - a.mT) / 8)
    torch.testing.assert_close(w, truth, rtol=0, atol=1e-12)  # observed 2e-14
