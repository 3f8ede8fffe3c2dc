"""Strides and transposed layers of the zoo: promises on the dense operator, and the laws."""

from functools import partial

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import certify
from orthonet.convert import to_plain
from orthonet.testing import LAYER_LAWS, jacobian, singular_values
from tests.layers.test_zoo import ALLOWED, train

LAYERS = {
    "soc": (partial(layers.SOCConv2d, 4, 6, 3, 2), (4, 4, 6)),
    "soc_transpose": (partial(layers.SOCConvTranspose2d, 6, 2, 3, 2), (6, 2, 3)),
    "aol_transpose": (partial(layers.AOLConvTranspose2d, 4, 3, 3, 2, 1, 1), (4, 3, 4)),
    "spectral_transpose": (partial(layers.SpectralConvTranspose2d, 4, 3, 3, 2), (4, 3, 2)),
    "sll": (partial(layers.SLLConv2d, 3, 8, 3, 2), (3, 4, 6)),
    "cpl": (partial(layers.CPLConv2d, 4, 3, 3, (1, 2), padding_mode="circular"), (4, 3, 4)),
}
CONFIGURATIONS = [  # channels in, channels out, stride, groups, mode
    (4, 6, 2, 1, "zeros"),
    (2, 9, 2, 1, "circular"),
    (4, 4, (2, 3), 2, "zeros"),
    (4, 32, 2, 2, "circular"),
    (4, 2, 1, 1, "zeros"),
]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_laws(law, name):
    law(*LAYERS[name])


@pytest.mark.parametrize("name", LAYERS)
def test_norm_is_at_most_one_at_first_and_after_steps_and_the_certificate_agrees(name, dtype):
    build, shape = LAYERS[name]
    layer = build(dtype=dtype)
    for steps in (0, 5):
        train(layer, shape, steps)
        if name in ("sll", "cpl"):
            points = torch.randn(2, *shape, dtype=dtype)
            values = torch.cat([torch.linalg.svdvals(jacobian(layer, x)) for x in points])
        else:
            values = singular_values(layer, shape)
        assert float(values.max()) <= 1 + ALLOWED[dtype]
        if name.startswith("soc"):
            assert float(values.min()) >= 1 - ALLOWED[dtype]
    if dtype == torch.float64 or name not in ("cpl", "aol_transpose", "spectral_transpose"):
        return  # tests/certify/test_zoo_rules.py has the others
    bound = certify(layer.eval(), torch.zeros(1, *shape, dtype=dtype), lower=False).constant.value
    # roundings in float32 of what forward multiplies by; observed 1 + 2e-7
    assert float(values.max()) * (1 - 1e-6) <= bound <= 1 + 1e-5


def test_strided_soc_is_orthogonal_in_every_configuration():
    for ci, co, stride, groups, mode in CONFIGURATIONS:
        options = {"groups": groups, "padding_mode": mode, "dtype": torch.float64}
        layer = layers.SOCConv2d(ci, co, 3, stride, **options)
        twin = layers.SOCConvTranspose2d(co, ci, 3, stride, **options)
        with torch.no_grad():
            for parameter in (*layer.parameters(), *twin.parameters()):
                parameter.mul_(30.0)
        height, width = layer.stride
        values = singular_values(layer, (ci, 2 * height, 2 * width))
        back = singular_values(twin, (co, 2, 2))
        if stride == 1:  # channels are dropped in front of L, or behind it
            assert float(values.max()) <= 1 + ALLOWED[torch.float64]
            values = values[:0]
        for sigma in (values, back):
            assert float((sigma - 1).abs().max().item() if len(sigma) else 0) <= 1e-12, (ci, co)


def test_transposed_layers_have_the_shapes_of_torch_and_are_adjoints():
    aol = layers.AOLConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dtype=torch.float64)
    twin = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert aol(x).shape == twin(x.float()).shape
    assert aol(x, output_size=[5, 9]).shape[2:] == (5, 9)
    torch.testing.assert_close(aol.to_plain()(x), aol(x))
    assert type(aol.to_plain()) is nn.ConvTranspose2d
    down = layers.AOLConv2d(6, 4, 3, 2, 1, groups=2, bias=False, dtype=torch.float64)
    aol.bias.data.zero_()
    aol.weight = down.weight
    y = torch.randn(2, 6, 6, 10, dtype=torch.float64)
    torch.testing.assert_close((down(y) * x).sum(), (y * aol(x)).sum())
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        layers.AOLConvTranspose2d(4, 4, 3, padding_mode="circular")
    for stride, groups in ((1, 1), (2, 2), ((2, 3), 1)):
        soc = layers.SOCConvTranspose2d(
            4,
            2,
            3,
            stride,
            groups=groups,
            padding_mode="circular",
            image_size=(3, 4),
            lipschitz=1.5,
            dtype=torch.float64,
        )
        with torch.no_grad():
            soc.bias.normal_()
        y = torch.randn(2, 4, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(to_plain(nn.Sequential(soc))(y), soc(y))
    with pytest.raises(ValueError, match="image_size"):
        layers.SOCConvTranspose2d(4, 2, 3, padding_mode="circular").to_plain()
