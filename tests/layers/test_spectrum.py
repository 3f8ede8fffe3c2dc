"""`singular_values` and `stable_rank` of every layer that holds a linear map."""

from functools import partial

import pytest
import torch

from orthonet import layers
from orthonet.layers import available, make_linear
from orthonet.testing import singular_values

CIRCULAR = {"padding": "same", "padding_mode": "circular"}
LAYERS = {
    "conv": (partial(layers.OrthoConv2d, 2, 4, 3, 2, 1, padding_mode="circular"), (2, 4, 6)),
    "zeros": (partial(layers.OrthoConv2d, 2, 4, 3, 2, 1, groups=2), (2, 5, 6)),
    "rko": (partial(layers.OrthoConv2d, 4, 2, 3, method="rko", **CIRCULAR), (4, 3, 4)),
    "one": (partial(layers.OrthoConv1d, 2, 4, 3, **CIRCULAR), (2, 5)),
    "three": (partial(layers.OrthoConv3d, 2, 2, 3, **CIRCULAR), (2, 3, 2, 3)),
    "transpose": (
        partial(layers.OrthoConvTranspose2d, 6, 2, 3, 2, 1, 1, padding_mode="circular"),
        (6, 2, 3),
    ),
    "aol": (partial(layers.AOLConv2d, 4, 6, 3, groups=2, **CIRCULAR), (4, 4, 3)),
    "spectral": (partial(layers.SpectralConv2d, 2, 3, 3, 2, 1), (2, 5, 4)),
    "aol_transpose": (partial(layers.AOLConvTranspose2d, 3, 2, 3, 2, 1, 1), (3, 4, 3)),
    "cayley": (partial(layers.CayleyConv2d, 2, 3, 3), (2, 4, 5)),
    "lot": (partial(layers.LOTConv2d, 2, 3, 3, padding=1, padding_mode="zeros"), (2, 4, 3)),
    "bro": (partial(layers.BROConv2d, 2, 9, 3, 2), (2, 4, 6)),
    "soc": (partial(layers.SOCConv2d, 2, 9, 3, 2, padding_mode="circular"), (2, 4, 6)),
    "soc_transpose": (partial(layers.SOCConvTranspose2d, 6, 2, 3, 2), (6, 2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_singular_values_are_those_of_the_dense_operator(name):
    build, shape = LAYERS[name]
    layer = build(dtype=torch.float64, lipschitz=1.5)
    with torch.no_grad():  # away from orthogonality, where the method allows it, and a bias
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dense = singular_values(layer, shape)
    found = layer.singular_values(shape[1:])
    # two decompositions of matrices of norm 1.5; observed 3e-15
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-13)
    rank = float(dense.square().sum() / dense.max() ** 2)
    assert layer.stable_rank(shape[1:]) == pytest.approx(rank, rel=1e-12)


def test_linear_layers_need_no_size():
    for name in available("linear"):
        layer = make_linear(name, 5, 3, dtype=torch.float64)
        if not hasattr(layer, "weight"):
            continue  # a layer with its activation inside
        values = layer.singular_values()
        torch.testing.assert_close(values, singular_values(layer, (5,)), rtol=0, atol=1e-13)
        assert layer.stable_rank() == pytest.approx(
            float(values.square().sum() / values.max() ** 2)
        )
    assert layers.OrthoLinear(8, 3).stable_rank() == pytest.approx(3.0, rel=1e-5)
    zero = layers.FrobeniusLinear(3, 3)
    with torch.no_grad():
        zero.parametrization.original.zero_()
    assert zero.stable_rank() == 0.0
    assert layers.OrthoConv2d(2, 2, 3, **CIRCULAR).singular_values(4).shape == (32,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.OrthoLinear(2, 2).singular_values(3), "needed by convolutions alone"),
        (lambda: layers.OrthoConv2d(2, 2, 3).stable_rank(), "needed by convolutions alone"),
        (lambda: layers.OrthoConv2d(2, 2, 3).stable_rank((3,)), "an integer or 2 of them"),
        (lambda: layers.SandwichConv2d(2, 2, 3).singular_values(4), "activation inside"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_constant_can_be_assigned():
    for layer, size in (
        (layers.OrthoLinear(4, 4), None),
        (layers.AOLConv2d(2, 2, 3, lipschitz=2.0, **CIRCULAR), 4),
        (layers.OrthoConv2d(2, 2, 3, **CIRCULAR), 4),
    ):
        before = layer.singular_values(size) / layer.lipschitz
        layer.lipschitz = 3.0
        assert layer.lipschitz == pytest.approx(3.0)
        # the factor rounds the weight in float32
        torch.testing.assert_close(layer.singular_values(size), 3.0 * before, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match="lipschitz must be"):
            layer.lipschitz = 0.0
