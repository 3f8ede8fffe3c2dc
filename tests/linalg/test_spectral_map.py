"""Spectral functions: values and gradients, where values repeat or vanish too."""

import pytest
import torch

from orthonet.linalg.spectral_map import eigen_map, singular_map

F = {
    "square": lambda s: (s * s, 2 * s),
    "identity": lambda s: (s, torch.ones_like(s)),
    "sine": lambda s: (s.sin(), s.cos()),
    "clamp": lambda s: (s.clamp_max(1.0), (s <= 1.0).to(s.dtype)),
}


def frames(n, k):
    return (torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q for m in (n, k))


@pytest.mark.parametrize("name", F)
@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (4, 6), (1, 3)])
@pytest.mark.parametrize(
    "values", [(2.5, 2.5, 0.5, 0.5), (3.0, 2.0, 0.7, 0.3), (2.0, 0.5, 0.0, 0.0)]
)
def test_gradients_of_functions_of_singular_values(name, shape, values):
    if name == "square" and values[-1] == 0.0:
        return  # an even function of singular values is not smooth at 0
    u, v = frames(*shape)
    k = min(shape)
    x = ((u[:, :k] * torch.tensor(values[:k], dtype=torch.float64)) @ v[:, :k].T).requires_grad_()
    if name == "identity":
        assert torch.allclose(singular_map(x, F[name]), x, atol=1e-12)  # observed 2e-15
    assert torch.autograd.gradcheck(lambda t: singular_map(t, F[name]), x)


@pytest.mark.parametrize("name", F)
def test_gradients_of_functions_of_eigenvalues(name):
    q, _ = frames(4, 4)
    for values in ((2.0, 2.0, 0.5, 0.5), (3.0, 2.0, -1.0, 0.0), (0.0, 0.0, 0.0, 0.0)):
        x = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda t: eigen_map(t, F[name]), x)


def test_clusters_that_meet_to_rounding_give_finite_gradients():
    x = torch.eye(5).add(1e-9 * torch.randn(5, 5)).requires_grad_()
    singular_map(x, F["clamp"]).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() < 5.0
