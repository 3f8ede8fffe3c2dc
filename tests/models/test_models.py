"""Every model: its shape, its constant, its registry entry and its errors."""

import math
import pickle

import pytest
import torch
from torch import nn

from orthonet import models
from orthonet.certify import certify
from orthonet.convert import to_plain
from orthonet.layers import OrthoLinear, UnitNormLinear, available
from orthonet.reparametrizers import QR_ORTHO_PARAMS
from tests.references import jacobian_reference


def test_a_model_is_told_the_sizes_that_its_builder_names():
    for name in models.list_models():
        sizes = models.arguments_for(name, (3, 8, 8), 7)
        if name in ("convnet_digits", "convnet_mnist", "mlp_digits"):
            assert sizes == {}
        elif name == "mlp":
            assert sizes == {"in_features": 192, "num_classes": 7}
        else:
            assert sizes == {"in_shape": (3, 8, 8), "num_classes": 7}
    with pytest.raises(ValueError, match="arguments_for: name must be one of"):
        models.arguments_for("vgg", (3, 8, 8), 7)
    expected = r"create: arguments must be those of orthonet.models.mlp_digits, got .*'num_classes'"
    with pytest.raises(ValueError, match=expected):
        models.create("mlp_digits", num_classes=3)


MODELS = {
    "mlp": ({"in_features": 64, "num_classes": 10, "hidden": (16,)}, (1, 8, 8)),
    "mlp_digits": ({}, (1, 8, 8)),
    "convnet": (
        {
            "in_shape": (2, 9, 7),
            "num_classes": 3,
            "channels": (8, 8),
            "kernel_sizes": (3, 3),
            "strides": (2, 1),
            "hidden": (6,),
        },
        (2, 9, 7),
    ),
    "convnet_digits": ({}, (1, 8, 8)),
    "convnet_mnist": ({"channels": (8, 8, 8), "hidden": (16,)}, (1, 28, 28)),
    "convnet_images": (
        {"in_shape": (3, 14, 9), "num_classes": 4, "width": 4, "patch": 2, "smallest": 2},
        (3, 14, 9),
    ),
    "convnet_zoo": ({"width": 8, "hidden": 16}, (1, 8, 8)),
    "convnet_series": ({"in_shape": (3, 12), "num_classes": 4, "width": 6}, (3, 12)),
    "convnet_xs": ({"in_shape": (2, 4, 4), "width": 4, "depth": 1}, (2, 4, 4)),
}
CASES = [(name, arguments, shape) for name, (arguments, shape) in MODELS.items()]


def test_perceptrons_of_other_norms_have_their_constant_there():
    x = torch.zeros(1, 12)
    for norm in ("linf", "l1"):
        model = models.create("mlp", in_features=12, num_classes=3, hidden=(8, 6), norm=norm)
        found = certify(model.eval(), x, norm=norm, lower=False).constant.value
        # Rows and columns are scaled to 1 in float32; observed 0.9999986 to 0.9999995.
        assert 1 - 1e-5 < found <= 1
        for wrong in ({"head": "unit_norm"}, {"ortho_params": "qr"}):
            with pytest.raises(ValueError, match="default ones unless norm is 'l2'"):
                models.mlp(12, 3, norm=norm, **wrong)
    with pytest.raises(ValueError, match="norm must be one of"):
        models.mlp(12, 3, norm="l3")


def test_every_model_is_in_the_table():
    assert models.list_models() == sorted(MODELS)
    assert set(MODELS) <= set(models.__all__)


@pytest.mark.parametrize(("name", "arguments", "shape"), CASES)
def test_model_is_1_lipschitz(name, arguments, shape):
    """The singular values of the Jacobian at random points, in float64."""
    model = models.create(name, **arguments).double().eval()
    for x in (torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)):
        largest = torch.linalg.matrix_norm(jacobian_reference(model, x), ord=2).item()
        assert largest <= 1 + 1e-12  # observed 1 at most, with three seeds
        # A random projection from many features to few classes loses most of it; observed .28 to 1.
        assert largest > 0.1


@pytest.mark.parametrize(("name", "arguments", "shape"), CASES)
def test_model_trains_pickles_and_becomes_plain(name, arguments, shape):
    model = models.create(name, **arguments, ortho_params=QR_ORTHO_PARAMS)
    x = torch.rand(4, *shape)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    y = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    plain = to_plain(model)
    # The same weights in the same operations; observed difference 0.
    torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-6)
    kinds = {nn.Linear, nn.Conv1d, nn.Conv2d}
    assert {type(m) for m in plain.modules() if hasattr(m, "weight")} <= kinds


def test_head_may_have_rows_of_unit_norm():
    model = models.create("mlp_digits", head="unit_norm")
    assert isinstance(model.get_submodule("head"), UnitNormLinear)
    assert isinstance(models.create("mlp_digits").get_submodule("head"), OrthoLinear)


@pytest.mark.parametrize("activation", ["max_min", "group_sort", "abs"])
def test_activation_by_name(activation):
    model = models.create("convnet_digits", activation=activation)
    kind = type(model.get_submodule("activation_conv1")).__name__
    assert kind.lower() == activation.replace("_", "")
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_ortho_params_reach_every_layer():
    model = models.create("convnet_digits", ortho_params=QR_ORTHO_PARAMS)
    names = [type(m).__name__ for m in model.modules() if "Orthogonalization" in type(m).__name__]
    assert len(names) >= 4
    assert set(names) == {"BatchedQROrthogonalization"}


def test_stride_divides_the_image():
    for kernel in (2, 3, 4, 5):
        model = models.create(
            "convnet",
            in_shape=(1, 8, 8),
            num_classes=2,
            channels=(8,),
            kernel_sizes=(kernel,),
            strides=(2,),
            hidden=(),
        )
        assert model.get_submodule("head").in_features == 8 * 4 * 4


def test_register_makes_a_model_known(monkeypatch):
    from orthonet.models import _registry

    monkeypatch.setattr(_registry, "_MODELS", dict(_registry._MODELS))

    @models.register
    def halves(scale: float = 0.5) -> nn.Module:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, scale)
        return layer

    assert models.create("halves", scale=0.25)(torch.ones(1, 1)).item() == 0.25
    assert models.register(halves) is halves

    def other() -> nn.Module:
        return nn.Identity()

    other.__name__ = "halves"
    with pytest.raises(ValueError, match="every model needs its own name"):
        models.register(other)
    with pytest.raises(ValueError, match="must be a function with a name"):
        models.register(type("Other", (), {"__name__": "halves"})())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet", {}, "create: name must be one of 'convnet'"),
        ("mlp_digits", {"head": "soft"}, "head must be one of 'ortho', 'unit_norm'"),
        ("mlp_digits", {"activation": "relu"}, "activation must be one of"),
        ("mlp_digits", {"hidden": (3,)}, "hidden must be even"),
        ("mlp_digits", {"hidden": (0,)}, "hidden must be an integer >= 1"),
        ("convnet_digits", {"strides": (1,)}, "one entry for every convolution"),
        ("convnet_digits", {"channels": (3, 4)}, "channels must be even"),
        ("convnet", {"in_shape": (8, 8), "num_classes": 2}, "in_shape must be"),
        (
            "convnet",
            {"in_shape": (1, 2, 2), "num_classes": 2},
            "the image must survive convolution 2",
        ),
    ],
)
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **arguments)


def test_odd_widths_are_fine_without_pairs():
    model = models.create("mlp_digits", hidden=(5,), activation="abs")
    assert math.isfinite(model(torch.rand(1, 64)).sum().item())


@pytest.mark.parametrize("lipschitz", [0.25, 3.0])
@pytest.mark.parametrize(("name", "arguments", "shape"), CASES)
def test_the_constant_is_what_was_asked_for(name, arguments, shape, lipschitz):
    """The dense Jacobian, the certificate, and the same network with K = 1."""
    torch.manual_seed(0)
    one = models.create(name, **arguments).double().eval()
    torch.manual_seed(0)
    model = models.create(name, **arguments, lipschitz=lipschitz).double().eval()
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), lipschitz * one(x), rtol=1e-14, atol=0)  # observed 0
    largest = torch.linalg.matrix_norm(jacobian_reference(model, x[0]), ord=2).item()
    constant = certify(model, x[:1], lower=False).constant.value
    assert largest <= constant
    assert constant == pytest.approx(lipschitz, rel=1e-6)  # observed 2.3e-8 at most


def test_a_constant_that_is_none_is_refused():
    with pytest.raises(ValueError, match="lipschitz"):
        models.mlp_digits(lipschitz=0.0)


# One of each kind by default: tests/layers/test_zoo.py has the laws of all of them.
_KINDS = ("ortho", "aol", "cpl", "lot", "soc")


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(name, marks=() if name in _KINDS else pytest.mark.slow)
        for name in available("conv")
    ],
)
def test_the_network_of_the_zoo_with_each_layer(layer):
    """Jacobian within the certificate, the certificate within K, gradients everywhere."""
    torch.manual_seed(0)
    model = models.convnet_zoo((2, 6, 10), 3, layer=layer, width=8, hidden=8, depth=2, lipschitz=2)
    x = torch.rand(3, 2, 6, 10)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model = model.double().eval()
    largest = torch.linalg.matrix_norm(jacobian_reference(model, x[0].double()), ord=2).item()
    constant = certify(model, x[:1].double(), lower=False).constant.value
    assert 0 < largest <= constant <= 2 * (1 + 1e-6)  # observed 2 (1 + 1.1e-9) at most


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer": "unit_norm"}, "layer"),
        ({"width": 7}, "even"),
        ({"in_shape": (8, 8)}, "in_shape"),
        ({"in_shape": (1, 18, 18)}, "divisible by 4"),
    ],
)
def test_the_network_of_the_zoo_says_what_it_cannot(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.convnet_zoo(**arguments)
