"""Samples of an image at a constant grid: their matrix, their norm, what jumps is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet.certify import certify
from orthonet.certify.ops.sampling import sampling_matrix
from orthonet.errors import UncertifiableError


class Sampled(nn.Module):
    def __init__(self, grid, **options):
        super().__init__()
        self.register_buffer("grid", grid)
        self.options = options

    def forward(self, x):
        grid = self.grid.expand(x.shape[0], -1, -1, -1)
        return F.grid_sample(x, grid.to(x.dtype), **self.options)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "border"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0])
def test_the_matrix_is_that_of_torch_and_its_norm_is_the_constant(mode, corners, spread):
    grid = spread * torch.randn(1, 4, 5, 2, dtype=torch.float64)
    grid[0, 0, 0] = torch.tensor([1.0, -1.0])  # a corner, exactly
    images = torch.eye(42, dtype=torch.float64).reshape(42, 1, 6, 7)
    everywhere = grid.expand(42, -1, -1, -1)
    truth = F.grid_sample(images, everywhere, padding_mode=mode, align_corners=corners)
    found = sampling_matrix(grid[0], (6, 7), border=mode == "border", corners=corners)
    # Coordinates of size 5 * 7 see 8 roundings: 7e-15; observed 4e-15.
    torch.testing.assert_close(found, truth.flatten(1).mT, rtol=0, atol=1e-13)
    model = Sampled(grid, padding_mode=mode, align_corners=corners).eval()
    certificate = certify(model, torch.randn(2, 3, 6, 7, dtype=torch.float64))
    norm = float(torch.linalg.matrix_norm(truth.flatten(1), 2))
    assert norm <= certificate.constant.value <= norm * (1 + 1e-9) + 1e-9


def test_the_rounding_of_float32_is_covered():
    torch.manual_seed(3)
    model = Sampled(2.0 * torch.randn(1, 6, 6, 2), align_corners=False).eval()
    x = torch.randn(4, 3, 9, 8)
    certificate = certify(model, x)
    error = (model(x).double() - model(x.double())).flatten(1).norm(dim=1)
    assert bool((error <= certificate.rounding(x)).all())
    assert bool((error > 0).all())


def test_grids_that_move_and_modes_that_jump_are_refused():
    x = torch.randn(2, 3, 6, 7)
    for options in ({"mode": "nearest"}, {"padding_mode": "reflection"}):
        with pytest.raises(UncertifiableError, match="bilinear"):
            certify(Sampled(torch.rand(1, 3, 3, 2), align_corners=False, **options).eval(), x)

    class Moving(nn.Module):
        def forward(self, x):
            grid = x[:, :2].movedim(1, -1).tanh()
            return F.grid_sample(x, grid, align_corners=False)

    with pytest.raises(UncertifiableError, match="grid must be a constant"):
        certify(Moving().eval(), x)
