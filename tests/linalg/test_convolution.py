import pytest
import torch
from torch.nn import functional as F

from orthonet import linalg


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_convolution_is_the_composition(dims, stride):
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    inner = torch.randn(4, 3, *(2, 3, 1)[:dims], dtype=torch.float64)
    outer = torch.randn(5, 4, *(3, 1, 2)[:dims], dtype=torch.float64)
    x = torch.randn(2, 3, *(7, 8, 6)[:dims], dtype=torch.float64)
    product = linalg.block_convolution(outer, inner, spatial_dims=dims)
    expected = conv(conv(x, inner), outer, stride=stride)
    torch.testing.assert_close(conv(x, product, stride=stride), expected)


def test_block_convolution_batches_and_refuses():
    outer, inner = torch.randn(2, 5, 4, 3), torch.randn(2, 4, 3, 2)
    both = linalg.block_convolution(outer, inner, spatial_dims=1)
    assert both.shape == (2, 5, 3, 4)
    one = linalg.block_convolution(outer[1], inner[1], spatial_dims=1)
    torch.testing.assert_close(both[1], one)
    with pytest.raises(ValueError, match="the inner channels of both kernels must agree"):
        linalg.block_convolution(outer, torch.randn(2, 3, 3, 2), spatial_dims=1)


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_paraunitary_factors_multiply_as_polynomials(rank):
    v = linalg.haar((1, 3, 4, 4), dtype=torch.float64)[..., :rank]
    kernel = torch.randn(1, 4, 2, 3, 5, dtype=torch.float64)
    ours = linalg.apply_projectors(kernel, v, taps=2, dim=0)
    expected = kernel[0].movedim(-1, 1)  # (c, n, *k)
    for base in v[0]:
        p = base @ base.mT
        factor = torch.stack([p, torch.eye(4, dtype=p.dtype) - p], -1).unsqueeze(-1)
        expected = linalg.block_convolution(factor, expected, spatial_dims=2)
    assert ours.shape == (1, 4, 5, 3, 5)
    torch.testing.assert_close(ours[0].movedim(-1, 1), expected)
