import pytest
import torch

from orthonet import linalg
from orthonet.testing import MATRIX_CASES, MATRIX_SHAPES, hard_matrix
from tests.each import each


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", MATRIX_CASES)
def test_estimate_and_bound_enclose_the_norm(case, shape):
    w = hard_matrix(case, shape, torch.float64)
    norm = torch.linalg.matrix_norm(w, 2)
    u = torch.nn.functional.normalize(torch.randn(shape[:-1], dtype=torch.float64), dim=-1)
    sigma, _, _ = linalg.power_iteration(w, u, niters=3)
    assert bool((sigma <= norm * (1 + 1e-14)).all())  # observed excess 4.5e-16
    bounds = [linalg.gram_iteration(w, niters=n) for n in (0, 3, 8)]
    for bound in bounds:
        assert bool((bound >= norm * (1 - 1e-13)).all())  # observed deficit 4e-15
    rank = min(shape[-2:])
    assert bool((bounds[2] <= norm * rank ** (2.0**-9) * (1 + 1e-12)).all())


def test_power_iteration_converges_and_keeps_a_bad_start():
    w = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    u = torch.ones(3, dtype=torch.float64) / 3**0.5
    estimates = [float(linalg.power_iteration(w, u, niters=n)[0]) for n in (1, 3, 20)]
    assert estimates[0] < estimates[1] < estimates[2]
    assert abs(estimates[2] - 3.0) < 1e-12
    for bad in (torch.zeros_like(w), torch.full_like(w, torch.nan)):
        assert torch.equal(linalg.power_iteration(bad, u)[1], u)


def test_gradients():
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: linalg.gram_iteration(w, niters=4), (w,))
    u, _s, vh = torch.linalg.svd(w.detach(), full_matrices=False)
    (grad,) = torch.autograd.grad(linalg.power_iteration(w, u[:, 0])[0], w)
    torch.testing.assert_close(grad, torch.outer(u[:, 0], vh[0]))
    zero = torch.zeros(3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(linalg.gram_iteration(zero), zero)
    assert torch.equal(grad, torch.zeros(3, 3))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="power_iteration: niters must be an integer >= 1, got"):
        linalg.power_iteration(torch.eye(2), torch.ones(2), niters=0)
    with pytest.raises(ValueError, match="gram_iteration: niters must be an integer >= 0"):
        linalg.gram_iteration(torch.eye(2), niters=-1)
