import pytest
import torch

from orthonet import layers
from orthonet.certify import certify
from orthonet.testing import singular_values


@pytest.mark.parametrize(
    "layer",
    [
        layers.OrthoConvTranspose2d(8, 2, 3, 2, 1, 1, padding_mode="circular"),
        layers.OrthoConvTranspose2d(8, 2, 3, 2, 1, 1),
        layers.OrthoConvTranspose2d(2, 8, (3, 2), 1, (1, 0)),
        layers.OrthoConvTranspose1d(4, 4, 4, 2, 1, padding_mode="circular"),
    ],
    ids=["circular", "cropped", "expanding", "1d"],
)
def test_orthogonal_transposed_convolutions(layer):
    layer = layer.double().eval()
    shape = (layer.in_channels, *(4,) * len(layer.kernel_size))
    truth = float(singular_values(layer, shape).max())
    bound = certify(layer, torch.zeros(2, *shape, dtype=torch.float64)).constant.value
    assert truth * (1 - 1e-12) <= bound <= truth * (1 + 1e-9)  # observed excess 3e-12
