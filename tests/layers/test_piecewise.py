"""Piecewise isometries, shifts and 1-Lipschitz batch norm: Jacobians, laws, certificates."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import certify
from orthonet.testing import LAYER_LAWS, assert_lipschitz, jacobian

ISOMETRIES = {
    "full_sort": layers.FullSort,
    "beta_abs": partial(layers.BetaAbs, 0.75),
    "n": partial(layers.NActivation, 8),
    "householder2": partial(layers.HouseholderActivation2, 8),
    "shuffle": partial(layers.ChannelShuffle, 4),
    "shift": partial(layers.SpatialShift2d, 1.0),
}
OTHERS = {
    "soft_huber": layers.SoftHuber,
    "zero_shift": partial(layers.SpatialShift2d, 1.0, "zeros"),
    "scale": partial(layers.Scale, 1.0),
    "lip_norm": partial(layers.BatchLipNorm, 8),
    "prescaled": partial(layers.PrescaledResidual, nn.Identity()),
}
SHAPE = (8, 3, 2)


@pytest.mark.parametrize("name", ISOMETRIES)
def test_every_jacobian_is_orthogonal(name):
    layer = ISOMETRIES[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=2.0)
    for _ in range(5):
        matrix = jacobian(layer.double(), torch.randn(*SHAPE, dtype=torch.float64))
        values = torch.linalg.svdvals(matrix)
        assert float((values - 1).abs().max()) <= 1e-12  # observed 5e-16


@pytest.mark.parametrize("name", {**ISOMETRIES, **OTHERS})
def test_lipschitz_and_certified(name):
    layer = {**ISOMETRIES, **OTHERS}[name]().eval()
    assert_lipschitz(layer, SHAPE)
    bound = certify(layer, torch.zeros(1, *SHAPE), lower=False).constant.value
    assert bound <= 1 + 1e-6


@pytest.mark.parametrize("name", ["n", "householder2", "lip_norm", "prescaled"])
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, name):
    law({**ISOMETRIES, **OTHERS}[name], SHAPE)


def test_order_two_is_continuous_and_contains_order_one():
    angles = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    circle = torch.stack((angles.cos(), angles.sin()), 1)
    layer = layers.HouseholderActivation2(2).double()
    for values in ((0.3, 1.0, 2.0), (-2.0, 0.0, 3.0), (1.0, 3.1, 0.1)):
        with torch.no_grad():
            layer.theta.copy_(torch.tensor(values)[:, None])
            y = layer(circle)
        step = (y[1:] - y[:-1]).norm(dim=1)
        assert float(step.max()) <= 1.0001 * 2 * math.pi / 20000
    with torch.no_grad():
        layer.theta.copy_(torch.tensor([-0.75 * math.pi, math.pi, 1.0])[:, None])
        torch.testing.assert_close(layer(circle), layers.MaxMin()(circle), atol=1e-6, rtol=0)


def test_batch_lip_norm_reloads_and_has_constant_one():
    layer = layers.BatchLipNorm(4)
    for _ in range(3):
        layer(torch.randn(6, 4, 3, 3) * torch.tensor([0.1, 1.0, 3.0, 9.0]).view(-1, 1, 1))
    twin = layers.BatchLipNorm(4)
    twin.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(layer.eval()(x), twin.eval()(x))
    values = torch.linalg.svdvals(jacobian(layer, x[0]))
    assert float(values.max()) == pytest.approx(1.0, abs=1e-6)
    assert float(values.min()) < 0.5


def test_batch_lip_norm_takes_the_checkpoint_of_batch_norm():
    """With weights of 1 the two differ by one factor, the largest gain."""
    plain, layer = nn.BatchNorm2d(4).double(), layers.BatchLipNorm(4).double()
    for _ in range(3):
        plain(torch.randn(6, 4, 3, 3, dtype=torch.float64) * 3)
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    gain = (plain.running_var + plain.eps).rsqrt().max()
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x) / gain, rtol=1e-12, atol=1e-12)
    state = plain.state_dict()
    del state["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        layer.load_state_dict(state)


def test_batch_lip_norm_as_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer = layers.BatchLipNorm(4)
    layer(torch.randn(6, 4, 3, 3) * 3)
    layer.eval()
    x = torch.randn(2, 4, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-6, atol=1e-6)
