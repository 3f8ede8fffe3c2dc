"""The hard matrices are what their names say."""

import pytest
import torch

from orthonet.testing import (
    MATRIX_CASES,
    MATRIX_SHAPES,
    hard_matrix,
    orthogonality_error,
    tolerances,
)


@pytest.mark.parametrize("name", MATRIX_CASES)
@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
def test_shape_dtype_and_seed(name, shape, dtype):
    state = torch.get_rng_state()
    w = hard_matrix(name, shape, dtype, seed=3)
    assert w.shape == shape
    assert w.dtype == dtype
    assert torch.isfinite(w).all()
    assert torch.equal(w, hard_matrix(name, shape, dtype, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    if name not in ("zero", "identity") and w.norm() > 0:
        assert not torch.equal(w, hard_matrix(name, shape, dtype, seed=4))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (3, 2, 8, 12)])
def test_spectra(shape):
    def sigma(name):
        return torch.linalg.svdvals(hard_matrix(name, shape, torch.float64))

    k = min(shape[-2:])
    # two factors of 16 reflections and three products, of 24 terms; observed 4.9e-15 of 1.3e-14
    allowed = tolerances.rounding(torch.float64, (2 * 16 + 3) * 24)
    assert sigma("zero").max() == 0
    assert orthogonality_error(hard_matrix("identity", shape, torch.float64)) == 0
    assert orthogonality_error(hard_matrix("orthogonal", shape, torch.float64)) <= allowed
    assert (sigma("rank_deficient")[..., k - k // 2 :] <= allowed).all()
    assert (sigma("rank_deficient")[..., : k - k // 2] >= 1 - allowed).all()
    assert (sigma("repeated")[..., k - k // 2 :] - 0.5).abs().max() <= allowed
    for name, kappa in (("kappa_1e3", 1e3), ("kappa_1e6", 1e6), ("kappa_1e8", 1e8)):
        measured = sigma(name)[..., 0] / sigma(name)[..., -1]
        torch.testing.assert_close(measured, torch.full_like(measured, kappa), rtol=1e-6, atol=0)
    assert 1e-20 < sigma("tiny").max() < 1e-18
    assert 1e15 < sigma("huge").max() < 1e17


def test_errors_say_what_is_required():
    with pytest.raises(ValueError, match="hard_matrix: name must be one of 'zero', "):
        hard_matrix("nice")
    with pytest.raises(ValueError, match=r"weight_shape must be \(\*batch, m, n\)"):
        hard_matrix("zero", (3,))
    with pytest.raises(ValueError, match="shape must not be empty"):
        hard_matrix("zero", (3, 0))
