import functools
import itertools
import math

import pytest
import torch
from torch import nn

from orthonet.layers import (
    OrthoConv1d,
    OrthoConv2d,
    OrthoConv3d,
    OrthoConvTranspose1d,
    OrthoConvTranspose2d,
    OrthoConvTranspose3d,
)
from orthonet.testing import LAYER_LAWS, singular_values, tolerances

# observed 4.3e-7 and 8e-15
ALLOWED = tolerances.OPERATOR_PROMISE
FACTORIES = {
    "circular": functools.partial(OrthoConvTranspose2d, 8, 2, 3, 2, 1, 1, padding_mode="circular"),
    "plain": functools.partial(OrthoConvTranspose2d, 8, 2, (3, 2), 2, groups=2),
}


def circular_padding(k: int, s: int, d: int) -> tuple[int, int]:
    """Padding and output padding that give stride times the input size."""
    reach = d * (k - 1) + 1
    extra = (s - reach) % 2
    return (reach + extra - s) // 2, extra


def random_bias(layer):
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", ["circular", "full", "cropped"])
def test_table_of_configurations(mode, stride):
    channels = [(3, 5), (4, 4), (8, 2), (2, 8), (18, 2)]
    checked = 0
    for k, (ci, co), g, d in itertools.product((1, 2, 3, 4, 5), channels, (1, 2), (1, 2)):
        if k < stride or ci % g or co % g or math.gcd(d, stride) > 1:
            continue
        padding, extra = circular_padding(k, stride, d) if mode == "circular" else (0, 0)
        if mode == "cropped":
            padding = 1
        if extra >= max(stride, d) or padding < 0:
            continue
        if mode == "circular" and d * (k - 1) > 4 * stride:
            continue  # wraps around four pixels more than once, which is refused
        if mode == "cropped" and d * (k - 1) + 3 * stride < 2:
            continue  # cropping leaves nothing
        layer = OrthoConvTranspose2d(
            ci,
            co,
            k,
            stride,
            padding,
            extra,
            g,
            True,
            d,
            "circular" if mode == "circular" else "zeros",
            dtype=torch.float64,
        )
        sigma = singular_values(random_bias(layer), (ci, 4, 4))
        row = (k, stride, ci, co, g, d)
        assert float(sigma.max()) <= 1 + ALLOWED[torch.float64], row
        if mode == "circular" or (mode == "full" and ci <= co * stride**2):
            assert float(sigma.min()) >= 1 - ALLOWED[torch.float64], row
        checked += 1
    assert checked >= {1: 30, 2: 10, 3: 8}[stride]


@pytest.mark.parametrize(
    ("cls", "arguments", "shape"),
    [
        (OrthoConvTranspose1d, (6, 2, 4, 2, 1), (6, 4)),
        (OrthoConvTranspose2d, (8, 2, (4, 3), 2, 1, (0, 1)), (8, 3, 3)),
        (OrthoConvTranspose3d, (4, 4, (3, 1, 2), (1, 1, 2), (1, 0, 0)), (4, 3, 2, 2)),
    ],
)
def test_dimensions_after_training(cls, arguments, shape, dtype):
    layer = cls(*arguments, padding_mode="circular", dtype=dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for steps in (0, 30):
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.randn(2, *shape, dtype=dtype)).pow(3).sum().backward()
            optimizer.step()
        sigma = singular_values(layer, shape)
        assert float((sigma - 1).abs().max()) <= ALLOWED[dtype]


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, factory):
    law(factory, (8, 3, 3))


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("shape", [(8, 4, 4), (3, 8, 5, 4)], ids=str)
def test_export_is_stock_modules_with_equal_outputs(factory, shape):
    layer = random_bias(factory()).eval()
    plain = layer.to_plain()
    stock = {module.__class__.__module__.partition(".")[0] for module in plain.modules()}
    assert stock == {"torch"}
    assert not any(module.training for module in plain.modules())
    x = torch.randn(shape)
    torch.testing.assert_close(plain(x), layer(x), atol=1e-6, rtol=0)  # observed 0


def test_output_size_is_honored():
    layer = OrthoConvTranspose2d(4, 2, 3, 2, 1)
    x = torch.randn(1, 4, 3, 3)
    assert layer(x).shape[-2:] == (5, 5)
    assert layer(x, [6, 6]).shape[-2:] == (6, 6)
    circular = FACTORIES["circular"]()
    assert circular(torch.randn(1, 8, 3, 3), [6, 6]).shape[-2:] == (6, 6)
    with pytest.raises(ValueError, match="the output size is stride times the input size"):
        circular(torch.randn(1, 8, 3, 3), [5, 5])
    with pytest.raises(ValueError, match=r"^OrthoConvTranspose2d: with circular padding every out"):
        OrthoConvTranspose2d(8, 2, 3, 2, 1, padding_mode="circular")


LAYERS = [
    (OrthoConv1d(3, 5, 4, 2, 1), (3, 9)),
    (OrthoConv2d(4, 6, 3, padding=1), (4, 5, 6)),
    (OrthoConv2d(4, 16, 3, 2, 1, padding_mode="circular"), (4, 6, 6)),
    (OrthoConv3d(2, 2, 2, padding="same", padding_mode="circular"), (2, 3, 2, 4)),
    (OrthoConvTranspose1d(3, 5, 4, 2, 1), (3, 5)),
    (OrthoConvTranspose2d(16, 4, 3, 2, 1, 1, padding_mode="circular"), (16, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_adjoint_of_every_layer(layer, shape):
    layer = random_bias(layer).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    linear = layer(x) - layer(torch.zeros_like(x))
    y = torch.randn_like(linear)
    back = layer.adjoint(y, shape[1:])
    torch.testing.assert_close((linear * y).sum(), (x * back).sum())
    torch.testing.assert_close(layer.adjoint(y[0], shape[1:]), back[0])
    with pytest.raises(ValueError, match="y must have the shape that the layer returns"):
        layer.adjoint(y, tuple(3 * n for n in shape[1:]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (OrthoConv2d(4, 4, 3, padding="same", padding_mode="circular"), (4, 5, 5)),
        (OrthoConv2d(4, 16, 3, 2, 1, padding_mode="circular"), (4, 6, 6)),
        (OrthoConv2d(3, 12, 2, 2), (3, 4, 4)),
        (OrthoConvTranspose2d(16, 4, 3, 2, 1, 1, padding_mode="circular"), (16, 3, 3)),
        (OrthoConvTranspose1d(4, 2, 2, 2), (4, 5)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_inverse_of_square_layers(layer, shape):
    layer = random_bias(layer).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    torch.testing.assert_close(layer.inverse(layer(x[0])), x[0])


@pytest.mark.parametrize(
    "layer",
    [
        OrthoConv2d(4, 4, 3, padding=1),
        OrthoConv2d(4, 6, 3, padding=1, padding_mode="circular"),
        OrthoConvTranspose2d(8, 4, 2, 2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_inverse_is_refused_where_there_is_none(layer):
    y = layer(torch.randn(1, layer.in_channels, 4, 4))
    with pytest.raises(ValueError, match=r"can be inverted, got .* Use padding_mode='circular'"):
        layer.inverse(y)
