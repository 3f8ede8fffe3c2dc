"""Arguments that a user puts in the wrong place are refused by one sentence."""

import pytest

import orthonet
from orthonet import layers
from orthonet.layers import available, make_conv, make_linear

PRESET = orthonet.CHOLESKY_ORTHO_PARAMS
MAKERS = {
    "OrthoLinear": lambda bias: layers.OrthoLinear(4, 4, bias),
    "UnitNormLinear": lambda bias: layers.UnitNormLinear(4, 4, bias),
    "OrthoConv1d": lambda bias: layers.OrthoConv1d(4, 4, 3, bias=bias),
    "OrthoConvTranspose2d": lambda bias: layers.OrthoConvTranspose2d(4, 4, 2, 2, bias=bias),
    "OrthoGRU": lambda bias: layers.OrthoGRU(4, 4, 1, bias),
    "OrthoLSTMCell": lambda bias: layers.OrthoLSTMCell(4, 4, bias),
    "BatchCentering": lambda bias: layers.BatchCentering(4, bias=bias),
    **{f"linear {n}": lambda bias, n=n: make_linear(n, 4, 4, bias) for n in available("linear")},
    **{
        f"conv {n}": lambda bias, n=n: make_conv(
            n, 4, 4, 1 if n == "cholesky" else 3, padding="same", bias=bias
        )
        for n in available("conv")
    },
}


@pytest.mark.parametrize("bias", [PRESET, "no", None, 2], ids=["preset", "no", "None", "2"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_bias_must_be_true_or_false(make, bias):
    with pytest.raises(ValueError, match=r"bias must be True or False, got bias=.*ortho_params="):
        make(bias)


def test_so_must_the_flags_of_recurrent_layers():
    with pytest.raises(ValueError, match="batch_first must be True or False"):
        layers.OrthoRNN(4, 4, batch_first=PRESET)
    assert layers.OrthoLinear(4, 4, 1).bias is not None
    assert layers.OrthoLinear(4, 4, 0).bias is None
