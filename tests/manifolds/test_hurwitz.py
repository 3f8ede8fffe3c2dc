"""Hurwitz matrices: the Lyapunov equation behind the parametrization, and hard inputs."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from orthonet.linalg.packing import unpack_skew
from orthonet.manifolds import Hurwitz
from tests.manifolds.common import relative

double = torch.float64


def test_coordinates_solve_the_lyapunov_equation():
    r"""With \(W = L L^\top\) and \(A = W (S - I / 2)\): \(A^\top W^{-1} + W^{-1} A = -I\)."""
    p = Hurwitz().parametrization((3, 6, 6)).double()
    c = 0.3 * torch.randn(p.coordinate_shape, dtype=double)
    a = p(c)
    # each matrix has one set of coordinates; observed 5e-15, times a condition number of 100
    assert relative(p.right_inverse(a), c) <= 1e-11
    diagonal, below = c[..., :6], c[..., 6:21]
    lower = torch.diag_embed(softplus(diagonal)) + unpack_skew(below, 6).tril(-1)
    inverse = torch.cholesky_inverse(lower)
    gap = a.mT @ inverse + inverse @ a + torch.eye(6, dtype=double)
    assert float(gap.abs().max()) <= 1e-11


@pytest.mark.parametrize(
    "matrix",
    [
        [[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0], [0.0, 0.0, -1.0]],  # a Jordan block
        [[-1e-4, 1.0], [-1.0, -1e-4]],  # slow decay, next to the axis
        [[-1e3, 0.0], [0.0, -1e-3]],
        [[-0.5]],
    ],
)
def test_defective_stiff_and_slow_matrices_are_assigned(matrix):
    a = torch.tensor(matrix, dtype=double)
    p = Hurwitz().parametrization(a.shape).double()
    assert relative(p(p.right_inverse(a)), a) <= 1e-11


def test_projection_moves_only_what_is_not_stable():
    x = torch.randn(50, 4, 4, dtype=double)
    x[0] -= 9.0 * torch.eye(4, dtype=double)
    for alpha in (0.0, 2.0):
        y = Hurwitz(alpha).project(x)
        assert bool((torch.linalg.eigvals(y).real.amax(-1) < -alpha).all())
        inside = torch.linalg.eigvals(x).real.amax(-1) < -alpha
        assert inside[0]
        assert not inside.all()
        assert torch.equal(y[inside], x[inside])
    assert Hurwitz().contains(Hurwitz().project(torch.zeros(3, 3)))
    assert not Hurwitz().contains(torch.eye(3))
    assert not Hurwitz(1.0).contains(-0.5 * torch.eye(3))


def test_solutions_decay_at_the_rate():
    x = Hurwitz(0.7).sample((20, 5, 5), dtype=double)
    late = torch.linalg.matrix_norm(torch.linalg.matrix_exp(60.0 * x))
    assert float(late.max()) <= 1e6 * math.exp(-0.7 * 60.0)  # e^-42, and room for a transient
