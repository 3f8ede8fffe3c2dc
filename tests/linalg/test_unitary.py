"""Semi-unitary matrices under the transforms of torch.func."""

import pytest
import torch
from torch.func import grad, vmap

from orthonet import linalg


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (3, 3)], ids=str)
def test_unitary_polar_of_each_sample(shape, dtype):
    w, direction = torch.randn(2, 3, *shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype)
    w[1, 0] = 0  # done again by a singular value decomposition

    def inner(w):
        return (linalg.unitary_polar(w) * direction).real.sum()

    each = vmap(linalg.unitary_polar, in_dims=1, out_dims=1)(w)
    assert torch.equal(each, linalg.unitary_polar(w))
    u, _, vh = torch.linalg.svd(w[0], full_matrices=False)
    torch.testing.assert_close(each[0], u @ vh, rtol=0, atol=1e-12)  # observed 1e-14
    samples = w.clone().requires_grad_()
    sum(inner(sample) for sample in samples).backward()
    torch.testing.assert_close(vmap(grad(inner))(w), samples.grad)
    assert torch.isfinite(samples.grad).all()
    with pytest.raises(RuntimeError, match="first derivatives only"):  # they were wrong
        grad(lambda w: grad(inner)(w).abs().sum())(w[0])
