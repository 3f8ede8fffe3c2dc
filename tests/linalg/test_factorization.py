import pytest
import torch

from orthonet import linalg
from orthonet.linalg import matrix as _matrix
from orthonet.testing import (
    MATRIX_CASES,
    MATRIX_SHAPES,
    hard_matrix,
    orthogonality_error,
    tolerances,
)
from tests.each import each
from tests.references import qr_reference

METHODS = {
    "qr": linalg.qr,
    "cholesky": linalg.cholesky_qr,
    "shifted": lambda w: linalg.cholesky_qr(w, shifted=True),
}
# observed over all cases, shapes and methods: 9.2e-7 and 9e-16
RESIDUAL = tolerances.PROMISE


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", MATRIX_CASES)
def test_result_is_orthogonal_and_gradient_finite(method, case, shape, dtype):
    w = hard_matrix(case, shape, dtype).requires_grad_()
    q = method(w)
    assert q.shape == w.shape
    assert orthogonality_error(q) <= RESIDUAL[dtype]
    (grad,) = torch.autograd.grad(q, w, torch.randn_like(q))
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", ["identity", "gaussian", "orthogonal", "repeated", "kappa_1e3"])
def test_all_methods_are_gram_schmidt(method, case, shape):
    w = hard_matrix(case, shape, torch.float64)
    # observed 4.8e-14, condition 1e3 times rounding
    torch.testing.assert_close(method(w), qr_reference(w), atol=1e-10, rtol=0)


def test_sign_of_a_negative_diagonal():
    w = -torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(linalg.qr(w), w)  # R = I, not -I
    torch.testing.assert_close(linalg.cholesky_qr(w), w)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 3), (3, 6), (2, 4, 3)])
def test_gradcheck_twice(method, shape):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(method, (w,))
    assert torch.autograd.gradgradcheck(method, (w,))


@pytest.mark.parametrize("case", ["kappa_1e8", "rank_deficient", "zero"])
def test_cholesky_falls_back_for_the_failing_matrix(case):
    good, bad = hard_matrix("gaussian", (9, 5)), hard_matrix(case, (9, 5))
    q = linalg.cholesky_qr(torch.stack([good, bad]))
    # observed 3e-8: the good matrix only sees one more round
    torch.testing.assert_close(q[0], linalg.cholesky_qr(good), atol=1e-6, rtol=0)
    assert orthogonality_error(q) <= 2e-6  # observed 4e-7


def test_only_the_factor_is_kept_for_backward():
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    w = torch.randn(64, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linalg.cholesky_qr(w)
    assert saved == 2 * 64 * 16  # the parameter itself and Q


def test_transforms():
    w = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(linalg.qr)(w), linalg.qr(w))
    jacobian = torch.func.jacrev(linalg.cholesky_qr)(w[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(linalg.qr, w[0]))


def test_not_finite_is_refused(method):
    with pytest.raises(ValueError, match="w must be finite"):
        method(torch.full((4, 2), torch.inf))


def test_haar_is_seeded_orthogonal_and_has_both_determinants():
    generator = torch.Generator().manual_seed(1)
    q = linalg.haar((64, 5, 5), dtype=torch.float64, generator=generator)
    assert orthogonality_error(q) <= 1e-12
    again = linalg.haar((64, 5, 5), dtype=torch.float64, generator=generator.manual_seed(1))
    assert torch.equal(q, again)
    share = float((torch.linalg.det(q) > 0).double().mean())
    assert 0.25 < share < 0.75  # 64 fair coins; outside with probability 4e-5
    # the first entry has variance 1/n: mean of squares of 64 * 25 entries is exactly 1/5
    assert abs(float(q[:, 0, 0].square().mean()) - 0.2) < 0.08


@pytest.mark.parametrize("n", [127, 128, 256])
def test_padded_cholesky_is_the_plain_one(n, dtype):
    w = torch.randn(2 * n, n, dtype=dtype)
    gram = w.mT @ w
    lower, info = _matrix.cholesky(gram)
    assert int(info) == 0
    torch.testing.assert_close(lower, torch.linalg.cholesky(gram))
    gram[5, 5] = -1.0
    assert int(_matrix.cholesky(gram)[1]) == 6  # the row at which it stops


@pytest.mark.parametrize("shape", [(130, 130), (300, 200)])
def test_large_systems_from_the_left(shape):
    w = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(w)
    q = linalg.cholesky_qr(w)
    (gradient,) = torch.autograd.grad((q * direction).sum(), w)
    expected = qr_reference(w)
    (reference,) = torch.autograd.grad((expected * direction).sum(), w)
    torch.testing.assert_close(q, expected, atol=1e-12, rtol=0)  # observed 4e-15
    torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=1e-10)  # observed 4e-13
