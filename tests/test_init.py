import pytest
import torch
from torch import nn

from orthonet import init
from orthonet.testing import orthogonality_error, singular_values, tolerances

# observed over three seeds: 8.9e-7 and 1.2e-15
ALLOWED = tolerances.OPERATOR_PROMISE


def test_orthogonal_fills_any_weight(dtype):
    for shape in ((5, 3), (3, 5), (4, 2, 3, 3), (1, 7)):
        w = init.orthogonal_(torch.empty(shape, dtype=dtype), gain=2.0)
        allowed = tolerances.PROMISE[dtype]
        assert orthogonality_error(w.flatten(1) / 2) <= allowed  # observed 2.5e-7 and 4.4e-16
    half = init.orthogonal_(torch.empty(4, 4, dtype=torch.bfloat16))
    assert orthogonality_error(half) <= 1e-2  # rounded once; observed 2.2e-3
    with pytest.raises(ValueError, match=r"orthogonal_: tensor must have at least two dimensions"):
        init.orthogonal_(torch.empty(3))
    draw = [
        init.orthogonal_(torch.empty(3, 3), generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*draw)


CASES = [
    (nn.Conv1d, (3, 5, 4), {}, (3, 9)),
    (nn.Conv2d, (4, 4, 3), {"groups": 2}, (4, 7, 6)),
    (nn.Conv2d, (6, 4, (3, 2)), {}, (6, 5, 7)),
    (nn.Conv2d, (4, 8, 3), {"stride": 2}, (4, 8, 6)),
    (nn.Conv2d, (4, 4, 1), {"stride": 2}, (4, 7, 6)),
    (nn.Conv2d, (4, 4, 3), {"stride": 2, "dilation": 2}, (4, 9, 9)),
    (nn.Conv3d, (2, 2, (1, 3, 2)), {}, (2, 3, 4, 3)),
    (nn.ConvTranspose1d, (3, 5, 4), {"stride": 2}, (3, 5)),
    (nn.ConvTranspose2d, (8, 2, 3), {"stride": 2}, (8, 3, 4)),
]


@pytest.mark.parametrize("method", ["delta", "aoc"])
@pytest.mark.parametrize(("cls", "arguments", "keywords", "shape"), CASES)
def test_convolution_is_orthogonal(cls, arguments, keywords, shape, method, dtype):
    layer = cls(*arguments, bias=False, dtype=dtype, **keywords)
    keywords = {**keywords, "method": method, "gain": 3.0}
    init.conv_orthogonal_(layer.weight, **keywords)
    sigma = singular_values(layer, shape) / 3
    assert float(sigma[0]) <= 1 + ALLOWED[dtype]
    narrow = layer.weight.shape[0] <= layer.weight.shape[1] * keywords.get("groups", 1)
    if narrow or keywords.get("stride", 1) > 1:  # contracting, so that cutting borders is harmless
        assert float(sigma[-1]) >= 1 - ALLOWED[dtype]
    filled = float((layer.weight != 0).double().mean())
    if method == "aoc":
        assert filled == 1.0
    elif max(layer.kernel_size) > max(layer.stride):
        assert filled < 1.0


def test_expanding_convolution_is_isometric_on_the_torus():
    for stride, size in ((1, 5), (2, 6)):
        layer = nn.Conv2d(2, 11, 3, stride, 1, padding_mode="circular", dtype=torch.float64)
        init.conv_orthogonal_(layer.weight, stride=stride, method="aoc")
        sigma = singular_values(layer, (2, size, size))
        assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float64]


def test_what_is_refused_and_what_is_left_alone():
    with pytest.raises(ValueError, match=r"conv_orthogonal_: kernel_size must be >= stride"):
        init.conv_orthogonal_(torch.empty(8, 4, 1, 1), stride=2)
    with pytest.raises(ValueError, match=r"tensor must be a kernel"):
        init.conv_orthogonal_(torch.empty(8, 4))
    with pytest.raises(ValueError, match="groups must divide"):
        init.conv_orthogonal_(torch.empty(8, 4, 3), groups=3)
    assert init.conv_orthogonal_(torch.empty(8, 4, 3, device="meta")).is_meta
