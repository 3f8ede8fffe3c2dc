"""What to_plain returns is made of torch alone: traced, scripted, pickled without this library."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from orthonet import certify, layers
from orthonet.convert import ConvexSum, orthogonalize, to_plain
from orthonet.convert._stock import _TWINS
from orthonet.testing import tolerances
from tests.convert.test_residual import Net

IMAGE, VECTOR = (2, 4, 6, 6), (3, 8)
SHAPES = {1: (2, 4, 6), 2: IMAGE, 3: (2, 4, 4, 6, 4)}


def learned(layer, spread=1.0):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return layer


def statistics(layer):
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name else 0.0))
    return layer


def each(dims):
    """One of each kind with this number of spatial dimensions."""
    yield from (layers.L2NormPool(2, dims=dims), layers.L2NormPool(3, 1, 1, dims=dims))
    yield layers.L2NormPool((2,) * dims)
    yield from (layers.ScaledAvgPool(2, dims=dims), layers.ScaledAvgPool(3, 2, 1, dims=dims))
    yield layers.AdaptiveL2NormPool(2, dims=dims)
    yield layers.AdaptiveScaledAvgPool(2, dims=dims)
    for keepdim in (False, True):
        yield layers.GlobalL2NormPool(keepdim, dims=dims)
        yield layers.GlobalScaledAvgPool(keepdim, dims=dims)
    yield getattr(layers, f"SpaceToDepth{dims}d")(2)
    yield from (layers.PadToStride(3, 2, dims), layers.PadToStride(2, 1, dims))
    yield from (statistics(layers.BatchCentering(4)), layers.BatchCentering(4, bias=False))
    yield from (statistics(layers.BatchLipNorm(4)), layers.BatchLipNorm(4, affine=False))


MODULES = [
    *((m, VECTOR) for m in (
        layers.MaxMin(-1), layers.MaxMin(1), layers.Abs(), layers.GroupSort(4, -1),
        layers.FullSort(), layers.SoftHuber(0.5), layers.BetaAbs(0.3), layers.BetaAbs(0.9375, -1),
        learned(layers.HouseholderActivation(8)), learned(layers.NActivation(8)),
        learned(layers.HouseholderActivation2(8)), layers.Scale(3.0), layers.FirstChannels(3),
        learned(layers.ConvexResidual(nn.Linear(8, 8))), layers.AdditiveResidual(nn.Tanh()),
        learned(layers.PrescaledResidual(layers.Abs())), layers.L2NormResidual(nn.Linear(8, 8)),
        layers.ConcatResidual(nn.Tanh(), -1), layers.ConcatResidual(layers.Abs(), 1, True),
        layers.Normalize(0.5, 0.2), layers.LayerCentering(-1), layers.ChannelShuffle(2, -1),
        nn.Sequential(layers.OrthoLinear(8, 8), layers.MaxMin()),
    )),
    *((m, IMAGE) for m in (
        layers.MaxMin(), layers.MaxMin(-3), layers.GroupSort(), layers.GroupSort(2, -3),
        learned(layers.HouseholderActivation(4, -3)), learned(layers.NActivation(4)),
        layers.Normalize([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]), layers.LayerCentering(),
        layers.ChannelShuffle(2), layers.SpatialShift2d(), layers.FirstChannels(2),
        layers.SpatialShift2d(1.0, "zeros"), layers.CPLConv2d(4, 4, 3),
        layers.LipNeXtBlock2d(4, 4), layers.BetaAbs(0.625), layers.SymmetricPad((1, 2, 0, 3)),
        layers.OrthoConv2d(4, 4, 3, padding=1, padding_mode="symmetric"),
    )),
    *((m, shape) for dims, shape in SHAPES.items() for m in each(dims)),
]  # fmt: skip


def ours(model):
    return {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("orthonet")}


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        return torch.jit.script(model)


SLOW = pytest.param(True, marks=pytest.mark.slow)


@pytest.mark.parametrize("train", [False, SLOW])
def test_every_module_has_a_stock_twin_that_computes_the_same(train):
    torch.manual_seed(0)
    for layer, shape in MODULES:
        layer.train(train)
        x = torch.randn(shape)
        plain, y = to_plain(layer), layer(x).detach()
        assert not ours(plain), layer
        assert plain.training is train
        if not (train or hasattr(layer, "to_plain") or list(layer.children())):
            assert list(plain.state_dict()) == list(layer.state_dict())
        # few sums of at most 144 terms; observed 5e-7 of 1.8e-5
        allowed = tolerances.rounding(torch.float32, 144, float(y.abs().max()))
        torch.testing.assert_close(
            plain(x), y, atol=allowed, rtol=0, msg=lambda m, k=layer: f"{k}: {m}"
        )
        other = torch.randn(2 * len(x), *shape[1:])  # no size was written down
        assert plain(other).shape == layer(other).shape
        torch.testing.assert_close(
            torch.fx.symbolic_trace(nn.Sequential(plain))(x), plain(x), atol=0, rtol=0
        )
    tried = {type(m) for layer, _ in MODULES for m in layer.modules()}
    assert set(_TWINS) - tried == {
        ConvexSum,
        *{k for k in _TWINS if "Sum" in k.__name__},
        *{k for k in _TWINS if "Gain" in k.__name__},
    }  # the next test


def test_layers_that_contain_their_activation_are_scripted():
    """The graphs that these layers export themselves name types that TorchScript does not know."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    layer = nn.Sequential(layers.CPLConv2d(4, 4, 3), layers.LipNeXtBlock2d(4, 4)).eval()
    plain = to_plain(layer)
    torch.testing.assert_close(scripted(plain)(x), plain(x), atol=1e-6, rtol=1e-6)


def test_pairs_are_exported_without_a_sort_and_certified_as_tightly():
    torch.manual_seed(0)
    for act in (layers.MaxMin(), layers.MaxMin(-3), layers.GroupSort()):
        model = nn.Sequential(
            layers.OrthoConv2d(4, 4, 1), act, nn.Flatten(), layers.OrthoLinear(36, 3)
        ).eval()
        x = torch.randn(2, 4, 3, 3)
        plain = to_plain(model)
        assert "sort" not in plain[1].code
        assert torch.equal(plain[1](x), act(x))
        live, exported = (certify(m, x, lower=False).constant.value for m in (model, plain))
        assert exported == pytest.approx(live, rel=1e-9)  # a product of the same norms: 1e-12


@pytest.mark.parametrize("everything", [False, SLOW])
def test_models_are_traced_scripted_and_pickled_without_this_library(everything, tmp_path):
    torch.manual_seed(0)
    stock = nn.Sequential(*(layer.eval() for layer, shape in MODULES if shape == VECTOR
                            and type(layer) not in (layers.FirstChannels,)))  # fmt: skip
    images = nn.Sequential(layers.OrthoConv2d(3, 8, 3, padding=1), layers.MaxMin(),
                           layers.PadToStride(2), layers.SpaceToDepth2d(2), layers.L2NormPool(2),
                           layers.GlobalScaledAvgPool()).eval()  # fmt: skip
    inputs = {"vector": torch.randn(VECTOR), "images": torch.randn(2, 3, 7, 8)}
    plain = {"vector": to_plain(stock), "images": to_plain(images)}
    for kind in ("convex", "prescaled") if everything else ("prescaled",):
        options = {"norm": "lip", "pool": "average", "activation": "max_min", "weights": "reset"}
        new, _ = orthogonalize(Net().eval(), residual=kind, return_report=True, **options)
        flat = to_plain(new)
        assert flat._get_name() == "Net" and not ours(flat)
        plain[kind], inputs[kind] = flat, torch.randn(2, 3, 8, 8)
        # 8 layers of at most 72 terms; observed 1e-8 of 3e-6
        allowed = tolerances.rounding(torch.float32, 2 * 8 * 72, 1.0)
        torch.testing.assert_close(flat(inputs[kind]), new(inputs[kind]), atol=allowed, rtol=0)
    for name, model in plain.items():
        x, y = inputs[name], model(inputs[name])
        assert torch.equal(torch.fx.symbolic_trace(model)(x), y)
        if everything or name != "vector":
            torch.testing.assert_close(scripted(model)(x), y, atol=1e-5, rtol=1e-5)
    saved = {
        name: (plain[name], inputs[name], plain[name](inputs[name]).detach()) for name in plain
    }
    torch.save(saved, tmp_path / "models.pt")
    code = """
import sys, torch
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("orthonet", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
saved = torch.load(sys.argv[1], weights_only=False)
for name, (model, x, y) in saved.items():
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
print("equal", *saved)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "models.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["equal", *saved], done.stderr[-2000:]


def test_shared_modules_stay_shared():
    act, pool = layers.MaxMin(), layers.L2NormPool(2)
    plain = to_plain(nn.ModuleList([act, nn.Sequential(act, pool), pool]))
    assert plain[0] is plain[1][0]
    assert plain[2] is plain[1][1]
    file = io.BytesIO()
    torch.save(plain, file)


@pytest.mark.slow
def test_onnx_of_a_rewritten_network():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    new, _ = orthogonalize(Net().eval(), residual="convex", activation="max_min", pool="l2",
                           norm="centering", weights="reset", return_report=True)  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(to_plain(new), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), new(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx_of_a_live_layer_names_to_plain():
    pytest.importorskip("onnxscript")
    for layer in (layers.OrthoLinear(4, 4), layers.OrthoConv2d(4, 4, 3)):
        x = torch.randn(2, 4, 4, 4)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with pytest.raises(torch.onnx.errors.OnnxExporterError):
                torch.onnx.export(layer.eval(), (x,), dynamo=True, verbose=False)
        assert any("Export orthonet.to_plain(model.eval())" in str(w.message) for w in seen)
