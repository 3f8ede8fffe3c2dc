"""Arguments that a user puts in the wrong place are refused by one sentence."""

import inspect
import re

import pytest
import torch
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
            if "Residual" not in name and name != "FinalState":  # these hold a network
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


ATTENTION = {"embed_dim": 4, "num_heads": 2, "max_length": 3}


@pytest.mark.parametrize(
    ("name", "wrong", "layer", "given"),
    [
        ("padding", "same", "OrthoConvTranspose1d", (4, 4, 3)),
        ("padding", "valid", "OrthoConvTranspose2d", (4, 4, 3)),
        ("padding", "same", "SpectralConvTranspose2d", (4, 4, 3)),
        ("batch_first", "abc", "CosineAttention", ATTENTION),
        ("add_zero_attn", None, "DistanceAttention", ATTENTION),
        ("dropout", torch.zeros(2), "DistanceAttention", ATTENTION),
        ("affine", "no", "BatchLipNorm", (4,)),
        ("rnn", "lstm", "FinalState", ()),
        ("mean", None, "Normalize", {"std": 1.0}),
        ("mean", float("nan"), "Normalize", {"std": 1.0}),
        ("std", 1j, "Normalize", {"mean": 1.0}),
        ("dim", "channels", "Normalize", (0.0, 1.0)),
        ("dtype", "float32", "Normalize", (0.0, 1.0)),
        ("kernel_size", b"xy", "L2NormPool", ()),
        ("dims", None, "GlobalL2NormPool", ()),
        ("dims", torch.ones(3), "ScaledAvgPool", (2,)),
        ("padding_mode", {}, "OrthoConv2d", (4, 4, 3)),
        ("stride", torch.ones(2), "CayleyConv2d", (4, 4, 3)),
        ("out_features", 2**63, "OrthoLinear", (4,)),
    ],
)
def test_what_an_argument_cannot_use_is_refused_when_the_layer_is_made(name, wrong, layer, given):
    positional, given = ((), given) if isinstance(given, dict) else (given, {})
    with pytest.raises(ValueError, match=rf"^{layer}: {name}?.*, got .*{name}=.*\. .*\.$"):
        getattr(layers, layer)(*positional, **given, **{name: wrong})


@pytest.mark.parametrize("layer", ["BROConv2d", "SandwichConv2d"])
def test_a_layer_names_all_that_it_takes(layer):
    cls, base = getattr(layers, layer), inspect.signature(layers.CayleyConv2d).parameters
    assert dict(base).items() <= dict(inspect.signature(cls).parameters).items()
    with pytest.raises(TypeError, match=rf"^{layer}\.__init__\(\) missing 3 required"):
        cls()


SENTENCE = re.compile(r"[\w.]+: [^\n]+, got [^\n]+\. [^\n]+\.")
NEEDED = {
    "attention": "distance",
    "channels": 4,
    "directions": [1],
    "downscale_factor": 2,
    "embed_dim": 4,
    "factor": 1.0,
    "function": nn.ReLU(),
    "groups": 2,
    "hidden_size": 4,
    "in_channels": 4,
    "in_features": 4,
    "input_size": 4,
    "kernel_size": 1,
    "max_length": 4,
    "mean": 0.5,
    "num_features": 4,
    "num_heads": 2,
    "out_channels": 4,
    "out_features": 4,
    "output_size": 2,
    "pad": (1, 1),
    "std": 0.5,
    "stride": 1,
}
MODULES = ("block", "branch", "function", "layer", "rnn")
FOREIGN = ("nonsense", None, [1, "a"], {}, torch.zeros(3), nn.ReLU, 10**30)
# By the annotation of an argument: values that none of its kind takes.
WRONG = {
    "bool": (*FOREIGN, 3.5, -1),
    "str": (*FOREIGN, 3, True),
    "float": (*FOREIGN[:-1], float("nan"), 1j),
    "int": (*FOREIGN[:-1], 3.5, 1j),
    "int | None": (*(v for v in FOREIGN if v is not None), 3.5),
    "torch.dtype | None": ("float32", torch.int64, torch.float8_e4m3fn, 3, nn.ReLU),
    "OrthoParams | str": (*FOREIGN, 3, True),
    "nn.Module": ("nonsense", None, 3, nn.ReLU),
    "int | tuple[int, ...]": (*FOREIGN[:-1], 3.5, -1, "same", (1, 2, 3, 4)),
    "int | tuple[int, int]": (*FOREIGN[:-1], 3.5, -1, "same", (1, 2, 3, 4)),
    "str | int | tuple[int, int]": (*FOREIGN[:-1], 3.5, -1, (1, 2, 3, 4)),
}


@pytest.mark.slow
def test_every_argument_of_every_layer_refuses_what_it_cannot_use_by_one_sentence():
    tried, silent, unlike = 0, [], []
    for layer in layers.__all__:
        cls = getattr(layers, layer)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            continue
        parameters = inspect.signature(cls).parameters
        assert layer == "Abs" or "args" not in parameters, f"{layer} hides what it takes"
        modules = {name: nn.RNN(3, 3) for name in MODULES if name in parameters}
        given = {name: NEEDED[name] for name in NEEDED if name in parameters} | modules
        for name, parameter in parameters.items():
            kind = parameter.annotation
            wrong = WRONG.get("str" if name == "padding_mode" else kind, ())
            for value in wrong:
                if value is parameter.default:
                    continue
                tried += 1
                place = f"{layer}({name}={value!r})"
                try:
                    cls(**{**given, name: value})
                except ValueError as error:
                    if not SENTENCE.fullmatch(str(error)) or name not in str(error):
                        unlike.append(f"{place}: {error}")
                except Exception as error:
                    unlike.append(f"{place}: {error!r}")
                else:
                    silent.append(place)
    assert tried > 3000
    assert not silent, "\n".join(silent)
    assert not unlike, "\n".join(unlike)
