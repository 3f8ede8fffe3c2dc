"""Arguments that a user puts in the wrong place are refused by one sentence."""

import pytest
from torch import nn

import orthonet
from orthonet import layers, models, reparametrizers
from orthonet.convert import on_manifold, trivialize
from orthonet.layers import available, make_conv, make_linear
from orthonet.reparametrizers.recorded import RecordedWeight

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


EXTRA = {"ChannelShuffle": (2,), "CholeskyConv2d": (4, 4, 1), "LayerCentering": ()}


def test_every_layer_prints_as_one_line_without_the_modules_of_its_weights():
    arguments = ((), (4, 4), (4, 4, 3), (4,), (nn.Identity(),), (4, 4, 4))
    shown = []
    for name in layers.__all__:
        cls = getattr(layers, name)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            continue
        for given in (EXTRA.get(name, ()), *arguments):
            try:
                text = repr(cls(*given))
            except (TypeError, ValueError):
                continue
            shown.append(name)
            if "Residual" not in name:  # these hold a network
                assert "\n" not in text and "(parametrization)" not in text
                assert len(text) < 250
            break
    assert len(shown) > 70
    layer = layers.OrthoConv2d(4, 8, 3, ortho_params=reparametrizers.QR_ORTHO_PARAMS)
    assert repr(layer) == "OrthoConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), ortho_params='qr')"
    assert "triv=cayley" in repr(layers.OrthoRNN(3, 4, triv="cayley"))
    assert repr(layers.CPLLinear(4, 4)) == "CPLLinear(4, 4, activation=ReLU())"


def test_presets_are_taken_by_name_everywhere():
    known = orthonet.presets()
    assert next(iter(known)) == "default" and len(str(known).splitlines()) == len(known)
    constants = {n for n in reparametrizers.__all__ if n.endswith("_ORTHO_PARAMS")}
    assert {f"{name.upper()}_ORTHO_PARAMS" for name in known} == constants
    for name, preset in known.items():
        assert preset is getattr(orthonet, f"{name.upper()}_ORTHO_PARAMS")
    made = [
        layers.OrthoLinear(4, 4, ortho_params="cholesky"),
        layers.OrthoLinear(4, 4, ortho_params="CHOLESKY_ORTHO_PARAMS"),
        layers.OrthoConv2d(4, 4, 3, ortho_params="cholesky"),
        layers.OrthoConv2d(4, 4, 3, method="rko", ortho_params="cholesky"),
        layers.OrthoConvTranspose1d(4, 4, 3, ortho_params="cholesky"),
        layers.LipNeXtBlock2d(4, 4, ortho_params="cholesky"),
        layers.OrthoLSTM(4, 4, ortho_params="cholesky"),
        layers.OrthoGRUCell(4, 4, ortho_params="cholesky"),
        layers.ContractiveRNN(4, 4, ortho_params="cholesky"),
        layers.make_linear("ortho", 4, 4, ortho_params="cholesky"),
        models.mlp(4, 3, ortho_params="cholesky"),
        orthonet.orthogonalize(
            nn.Sequential(nn.Linear(4, 4)),
            weights="reset",
            rules={"0": {"ortho_params": "cholesky"}},
        ),
        trivialize(on_manifold(layers.OrthoLinear(4, 4)), "cholesky"),
    ]
    for model in made:
        weights = [w for w in model.modules() if isinstance(w, RecordedWeight)]
        assert weights and {w.preset for w in weights} <= {"CHOLESKY_ORTHO_PARAMS"}
    other = layers.OrthoLinear(4, 4)
    with pytest.raises(RuntimeError, match="made with DEFAULT_ORTHO_PARAMS"):
        other.load_state_dict(made[0].state_dict())
    made[1].load_state_dict(made[0].state_dict())
    expected = r"OrthoLinear: .* default, .*cholesky, .*, got ortho_params='choleski'\. Pass"
    with pytest.raises(ValueError, match=expected):
        layers.OrthoLinear(4, 4, ortho_params="choleski")
