import pytest
import torch

from orthonet import linalg
from orthonet.linalg.polar_factor import bjorck as _polar_bjorck
from orthonet.linalg.polar_factor import series as _polar_series
from orthonet.testing import (
    MATRIX_CASES,
    MATRIX_SHAPES,
    hard_matrix,
    orthogonality_error,
    tolerances,
)
from tests.each import each
from tests.references import polar_gradient_reference, polar_reference

# observed over all cases and shapes: 2.2e-7 and 7e-16
RESIDUAL = tolerances.PROMISE


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", MATRIX_CASES)
def test_result_is_orthogonal_and_gradient_finite(case, shape, dtype):
    w = hard_matrix(case, shape, dtype).requires_grad_()
    u = linalg.polar(w)
    assert u.shape == w.shape
    assert u.dtype == dtype
    assert orthogonality_error(u) <= RESIDUAL[dtype]
    (grad,) = torch.autograd.grad(u, w, torch.randn_like(u))
    # the derivative of a "tiny" matrix is of order 1e20, still finite
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", ["identity", "gaussian", "orthogonal", "repeated", "kappa_1e3"])
def test_is_the_polar_factor(case, shape):
    w = hard_matrix(case, shape, torch.float64)
    # observed 5.1e-14 (condition 1e3 times rounding)
    torch.testing.assert_close(linalg.polar(w), polar_reference(w), atol=1e-11, rtol=0)
    torch.testing.assert_close(linalg.polar_svd(w), polar_reference(w), atol=1e-11, rtol=0)


@pytest.mark.parametrize("case", ["rank_deficient", "zero", "kappa_1e8"])
def test_deficient_rank_keeps_the_product_semi_definite(case):
    w = hard_matrix(case, (12, 7), torch.float64)
    h = linalg.polar(w).mT @ w
    assert float((h - h.mT).abs().max()) <= 1e-12  # observed 4e-16
    assert float(torch.linalg.eigvalsh(h).min()) >= -1e-12  # observed -2e-16


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 1.0])
def test_every_beta_and_budget_arrive(beta):
    w = hard_matrix("gaussian", (10, 6), torch.float64)
    for niters in (0, 1, 40):
        u = linalg.polar(w, beta=beta, niters=niters)
        torch.testing.assert_close(u, polar_reference(w), atol=1e-11, rtol=0)  # observed 8e-16


def test_budget_and_step_size_are_read(monkeypatch):
    steps = []
    original = _polar_bjorck.newton_schulz

    def counting(x, gram, beta):
        steps.append(beta)
        return original(x, gram, beta)

    monkeypatch.setattr(_polar_bjorck, "newton_schulz", counting)
    w = hard_matrix("kappa_1e3", (8, 8), torch.float64)
    linalg.polar(w, beta=0.25, niters=3)
    assert steps[:3] == [0.25] * 3
    assert 0.25 not in steps[3:]


def test_bjorck_runs_exactly_its_steps():
    w = 0.5 * hard_matrix("orthogonal", (5, 9), torch.float64)
    one = 1.25 * w - 0.25 * w @ w.mT @ w
    torch.testing.assert_close(linalg.bjorck(w, beta=0.25, niters=1), one)
    torch.testing.assert_close(linalg.bjorck(w, beta=0.25, niters=0), w)
    error = [orthogonality_error(linalg.bjorck(w, niters=n)) for n in (1, 3, 8)]
    assert error[0] > error[1] > 1e-6 > 1e-12 > error[2]


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 3), (3, 6), (2, 4, 3), (5, 1)])
def test_gradcheck_twice(shape):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linalg.polar, (w,))
    assert torch.autograd.gradgradcheck(linalg.polar, (w,))


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 6), (2, 4, 3)])
@pytest.mark.parametrize("moved", [0.0, 1e-6, 3e-3, 0.05, 0.2])
def test_gradcheck_twice_near_the_manifold(moved, shape):
    w = 3.0 * (linalg.haar(shape, dtype=torch.float64) + moved * torch.randn(shape))
    w.requires_grad_()
    assert torch.autograd.gradcheck(linalg.polar, (w,))
    assert torch.autograd.gradgradcheck(linalg.polar, (w,))


@pytest.mark.parametrize("kappa", [1.0, 2.0, 8.0, 30.0, 1e2, 1e4])
@pytest.mark.parametrize("shape", [(48, 48), (64, 20)])
def test_every_way_leads_to_the_polar_factor(kappa, shape, dtype):
    w = hard_matrix("gaussian", shape, torch.float64, seed=1)  # not that of `direction`
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    s = kappa ** -torch.linspace(0, 1, s.shape[-1], dtype=torch.float64)
    w = ((u * s) @ vh).to(dtype).requires_grad_()
    result, direction = linalg.polar(w), torch.randn(shape, dtype=dtype)
    (grad,) = torch.autograd.grad(result, w, direction)
    eps = torch.finfo(dtype).eps
    distance = (result.detach().double() - polar_reference(w.detach())).abs().max()
    assert float(distance) <= 5 * eps * max(kappa, 10.0)  # observed 0.51
    truth = polar_gradient_reference(w.detach(), direction)
    error = float((grad.double() - truth).norm() / truth.norm())
    assert error <= 20 * eps * max(kappa, 10.0)  # observed 2.75


def test_vectorized_jacobian_and_operator():
    w = hard_matrix("gaussian", (5, 4), torch.float64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(linalg.polar, w, vectorize=True), jacobian(linalg.polar, w), atol=1e-13, rtol=0
    )  # observed 0
    for arguments in ((w, None, None), (w.mT.contiguous().mT, 0.5, 3)):
        torch.library.opcheck(
            torch.ops.orthonet.polar.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gradient_at_repeated_singular_values():
    w = (3.0 * hard_matrix("orthogonal", (7, 4), torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(linalg.polar, (w,))


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
# observed relative errors in float32: 5.9e-7, 3.9e-6, 2.1e-5
@pytest.mark.parametrize(
    ("case", "allowed"), [("orthogonal", 1e-5), ("gaussian", 1e-4), ("kappa_1e3", 5e-4)]
)
def test_float32_gradient_against_closed_form(case, allowed, shape):
    w = hard_matrix(case, shape).requires_grad_()
    grad = torch.randn(shape)
    (ours,) = torch.autograd.grad(linalg.polar(w), w, grad)
    truth = polar_gradient_reference(w.detach(), grad)
    assert float((ours.double() - truth).norm() / truth.norm()) <= allowed


def test_backward_keeps_two_matrices():
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    w = torch.randn(32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linalg.polar(w)
    assert saved == 2 * w.numel()  # the parameter itself and the result


def test_batch_equals_loop():
    w = torch.stack([hard_matrix(c, (6, 4), torch.float64) for c in MATRIX_CASES])
    loop = torch.stack([linalg.polar(one) for one in w])
    regular = [i for i, c in enumerate(MATRIX_CASES) if c not in ("zero", "rank_deficient")]
    # observed 6e-11 for condition 1e8, where the factor itself is that sensitive
    torch.testing.assert_close(linalg.polar(w)[regular], loop[regular], atol=1e-7, rtol=0)


def test_transforms_and_compile():
    w = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(linalg.polar)(w), linalg.polar(w))

    def loss(x):
        return linalg.polar(x).square().sum() + linalg.polar(x)[0, 0]

    per_sample = torch.func.vmap(torch.func.grad(loss))(w)
    loop = torch.stack([torch.func.grad(loss)(one) for one in w])
    torch.testing.assert_close(per_sample, loop)


def test_bad_input_is_refused():
    w = torch.full((3, 3), torch.nan)
    with pytest.raises(ValueError, match=r"polar: w must be finite.*learning rate"):
        linalg.polar(w)
    with pytest.raises(ValueError, match=r"polar: w must be a matrix .* got shape=\(3,\)"):
        linalg.polar(torch.ones(3))
    with pytest.raises(ValueError, match="real floating-point"):
        linalg.polar(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\], got beta=0.0"):
        linalg.polar(torch.eye(3), beta=0.0)


def test_empty_matrices():
    assert linalg.polar(torch.empty(0, 3)).shape == (0, 3)
    assert linalg.polar(torch.empty(2, 4, 0)).shape == (2, 4, 0)


def test_half_precision_is_computed_in_float32():
    w = torch.randn(8, 8, dtype=torch.bfloat16)
    expected = polar_reference(w).to(torch.bfloat16)
    # the only rounding is the last cast: half a unit in the last place of entries below 1
    torch.testing.assert_close(linalg.polar(w), expected, atol=2**-8, rtol=0)


# PyTorch scripts its own forward-mode formulas when it is first asked for one
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("function", [linalg.polar, linalg.qr, linalg.cholesky_qr])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (2, 4, 3)], ids=str)
def test_forward_mode(function, shape):
    w = torch.randn(shape, dtype=torch.float64)
    forward, backward = torch.func.jacfwd(function)(w), torch.func.jacrev(function)(w)
    torch.testing.assert_close(forward, backward, atol=1e-11, rtol=1e-11)  # observed 9e-14
    assert torch.autograd.gradcheck(function, (w.requires_grad_(),), check_forward_ad=True)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_no_polynomial_changes_a_sign(degree):
    e = torch.linspace(-1.0, 30.0, 20001, dtype=torch.float64)
    polynomials = [_polar_series.wide(1.0 + top / 10) for top in range(1, 25)]
    if degree > 1:
        polynomials = [_polar_series.near(degree, b)[0] for b in (1e-3, 0.1, 0.3, 0.62)]
    for c in polynomials:
        assert float(sum(factor * e**power for power, factor in enumerate(c)).min()) > 0.0


@pytest.mark.parametrize("function", [linalg.polar, linalg.qr, linalg.cholesky_qr])
@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e2, 1e3])
def test_gradients_against_float64(function, kappa):
    shape = (96, 96)
    u, v = linalg.haar(shape, dtype=torch.float64), linalg.haar(shape, dtype=torch.float64)
    w = (u * kappa ** -torch.linspace(0, 1, 96, dtype=torch.float64)) @ v
    direction = torch.randn(shape)
    w32 = w.float().requires_grad_()
    w64 = w32.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(function(w32), w32, direction)
    if function is linalg.polar:
        truth = polar_gradient_reference(w64.detach(), direction)
    else:
        q, r = torch.linalg.qr(w64)
        signed = q * r.diagonal().sign()
        (truth,) = torch.autograd.grad(signed, w64, direction.double())
    error = float((ours.double() - truth).norm() / truth.norm())
    assert error <= 3e-5 * max(1.0, kappa / 10)
