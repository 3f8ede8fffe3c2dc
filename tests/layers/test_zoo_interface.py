"""The zoo as one interface: registry, constants, checkpoints, arguments, odd inputs."""

from functools import partial
from pathlib import Path

import pytest
import torch

from orthonet import layers
from orthonet.certify import certify
from orthonet.convert import to_plain
from orthonet.errors import NotOnManifoldError
from orthonet.layers import available, make_conv, make_linear, method
from orthonet.testing import singular_values
from tests.layers.test_zoo import CIRCULAR, CONVS, SIZE, conv


def test_registry():
    assert {"aol", "bro", "cayley", "cpl", "lot", "sll", "soc", "sandwich"} <= set(available())
    assert set(available("conv")) | set(available("linear")) == set(available())
    for name in available("conv"):
        layer = make_conv(name, 4, 4, 1 if name == "cholesky" else 3, lipschitz=2.0, **CIRCULAR)
        bound = certify(layer.eval(), torch.zeros(1, *SIZE), lower=False).constant.value
        assert bound <= 2 * (1 + 1e-5)
    for name in available("linear"):
        layer = make_linear(name, 4, 3, lipschitz=2.0)
        bound = certify(layer.eval(), torch.zeros(1, 4), lower=False).constant.value
        assert bound <= 2 * (1 + 1e-5) * (3**0.5 if name == "unit_norm" else 1)
    with pytest.raises(ValueError, match="name must be one of"):
        make_conv("eco", 4, 4, 3)
    with pytest.raises(ValueError, match="its own name"):
        layers.register_method(method("aol"))


@pytest.mark.parametrize("name", available())
def test_a_checkpoint_fits_every_constant(name):
    builders = []
    if method(name).linear is not None:
        builders.append((partial(make_linear, name, 4, 4), (4,)))
    if method(name).conv is not None:
        taps = 1 if name == "cholesky" else 3
        builders.append((partial(make_conv, name, 4, 4, taps, **CIRCULAR), SIZE))
    for build, shape in builders:
        one, half = build(), build(lipschitz=0.5)
        assert list(half.state_dict()) == list(one.state_dict())
        half.load_state_dict(one.state_dict())
        x = torch.randn(2, *shape)
        torch.testing.assert_close(half(x), 0.5 * one(x))
        assert half.lipschitz == 0.5 == 0.5 * one.lipschitz


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (partial(layers.OrthoLinear, 4, 4), None),
        (partial(layers.OrthoConv1d, 4, 4, 3, padding=1, padding_mode="circular"), (4, 6)),
        (partial(layers.OrthoConv2d, 4, 4, 3, padding=1, padding_mode="circular"), SIZE),
        (
            partial(
                layers.OrthoConv2d,
                4,
                4,
                3,
                padding=1,
                padding_mode="circular",
                apply_by="factors",
            ),
            SIZE,
        ),
        (
            partial(layers.OrthoConvTranspose2d, 4, 4, 3, padding=1, padding_mode="circular"),
            SIZE,
        ),
    ],
)
def test_scaled_orthogonal_layers(build, shape):
    layer = build(lipschitz=3.0, dtype=torch.float64)
    values = singular_values(layer, shape or (4,))
    assert float((values - 3).abs().max()) < 1e-12  # observed 2.7e-15
    if shape is not None:
        x = torch.randn(2, *shape, dtype=torch.float64)
        torch.testing.assert_close(layer.inverse(layer(x)), x, atol=1e-12, rtol=1e-12)
    other = build(lipschitz=3.0, dtype=torch.float64)
    other.weight = layer.weight
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-12)  # observed 9e-16
    assert other.project_(1.5 * layer.weight) == pytest.approx(1 / 3)
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-12)  # observed 9e-16
    plain, x = to_plain(layer.eval()), torch.randn(2, *(shape or (4,)), dtype=torch.float64)
    assert not any("_factor" in vars(part) for part in plain.modules())
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=1e-12)  # observed 1.8e-15
    assert "lipschitz=3" in repr(layer)
    # the names that K != 1 had before
    start = "parametrization."
    old = {
        f"{start}weight.{key.removeprefix(start)}" if key.startswith(start) else key: value
        for key, value in layer.state_dict().items()
    }
    other = build(lipschitz=3.0, dtype=torch.float64)
    other.load_state_dict(old)
    torch.testing.assert_close(other.weight, layer.weight, rtol=0, atol=1e-12)  # observed 1e-15
    with pytest.raises(NotOnManifoldError):
        other.weight = layer.weight / 3
    with pytest.raises(ValueError, match="lipschitz must be"):
        build(lipschitz=0.0)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("soc", {"padding": 0}, "keeps the image size"),
        ("cpl", {"stride": 2, "padding": 0}, "keeps the image size"),
        ("sll", {"padding_mode": "reflect"}, "padding_mode must be one of"),
        ("aol", {"padding_mode": "replicate"}, "padding_mode must be one of"),
        ("aol", {"groups": 3}, "groups must divide"),
        ("cayley", {"stride": (1, 2), "padding": 0}, "the same in both dims"),
        ("bro", {"rank": 9}, "rank must be at most"),
        ("lipnext", {"stride": 2}, "kernel_size must be 3"),
        ("lot", {"image_size": (3, 4, 5)}, "image_size must be"),
        ("spectral", {"lipschitz": -1.0}, "lipschitz must be"),
        ("sandwich", {"activation": "max"}, "activation must be one of"),
    ],
)
def test_bad_arguments(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_conv(name, 4, 4, 3, **options)


def test_bad_inputs():
    for name in ("soc", "sll"):
        with pytest.raises(ValueError, match=r"multiple of the stride.*PadToStride"):
            make_conv(name, 4, 4, 3, 2)(torch.zeros(1, 4, 5, 6))
    with pytest.raises(ValueError, match="output_padding must be stride - 1"):
        layers.SOCConvTranspose2d(4, 4, 3, 2, output_padding=0)
    with pytest.raises(ValueError, match="as large as the padding"):
        layers.SOCConvTranspose2d(4, 4, 7, padding_mode="circular")(torch.zeros(1, 4, 2, 2))
    layer = make_conv("cayley", 4, 4, 3, image_size=6)
    with pytest.raises(ValueError, match="made for images of"):
        layer(torch.zeros(1, 4, 5, 6))
    for name in ("cayley", "soc", "cpl", "lipnext"):
        with pytest.raises(ValueError, match="the input must be"):
            conv(name)(torch.zeros(1, 3, 6, 6))
    with pytest.raises(ValueError, match="kernel_size must be 1"):
        make_conv("cholesky", 4, 4, 3)


@pytest.mark.parametrize("name", [n for n in available("conv") if n != "cholesky"])
def test_an_empty_batch_gives_an_empty_batch(name):
    """As nn.Conv2d; some transforms refuse no image at all."""
    layer = make_conv(name, 4, 6, 3, padding="same", padding_mode="circular")
    y = layer(torch.zeros(0, 4, 5, 6))
    assert y.shape == (0, 6, 5, 6)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", CONVS)
def test_unbatched_input(name):
    layer = conv(name)
    x = torch.randn(*SIZE)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0))[0])


def test_table_of_the_guide_is_that_of_the_registry():
    page = Path(__file__).parents[2] / "docs" / "guide" / "zoo.md"
    assert layers.table() in page.read_text()
