"""Every rule against the truth: dense Jacobians of linear maps, slopes of the others."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import functional
from orthonet.certify import certify
from tests.certify.functions import Lambda
from tests.references import jacobian_reference

LINEAR = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear on the last of two dims": (nn.Linear(6, 4), (3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 9)),
    "conv2d circular": (nn.Conv2d(3, 4, 3, 1, 1, padding_mode="circular"), (3, 6, 5)),
    "conv2d same": (nn.Conv2d(3, 4, (5, 3), padding="same", dilation=(1, 2)), (3, 7, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, 2, dilation=1), (2, 4, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, (3, 2), 2, 1, (0, 1), dilation=(1, 2)), (3, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, 1), (2, 3, 3, 3)),
    "average": (nn.AvgPool2d(2), (2, 6, 6)),
    "average, overlap": (nn.AvgPool2d(3, 2, 1), (2, 7, 6)),
    "average, ceil": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 6, 8)),
    "average, inside": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 5, 6)),
    "average 1d": (nn.AvgPool1d(3, 2), (2, 9)),
    "average 3d": (nn.AvgPool3d(2, 1), (1, 3, 4, 3)),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "global average": (nn.AdaptiveAvgPool2d(1), (3, 5, 4)),
    "zero pad": (nn.ZeroPad2d((1, 2, 0, 1)), (2, 3, 4)),
    "circular pad": (nn.CircularPad2d((2, 1, 1, 3)), (1, 3, 4)),
    "reflection pad": (nn.ReflectionPad2d((2, 1, 2, 2)), (1, 3, 4)),
    "replication pad": (nn.ReplicationPad1d((2, 3)), (2, 4)),
    "shuffle": (nn.Sequential(nn.PixelUnshuffle(2), nn.ChannelShuffle(2)), (2, 4, 4)),
    "unflatten": (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 3))), (2, 6)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_modules_have_their_norm(name):
    module, shape = LINEAR[name]
    module = module.double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(jacobian_reference(module, x), 2))
    bound = certify(module, x[None], lower=False).constant
    # allowed 1e-9 above the norm, observed 4e-12
    assert truth * (1 - 1e-12) <= bound.value <= truth * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_other_padding_modes_are_sound(mode):
    module = nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode).double().eval()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(jacobian_reference(module, x), 2))
    # the padding and the convolution are bounded apart; observed 1.6
    assert truth <= certify(module, x[None], lower=False).constant.value <= 2.5 * truth


LAMBDAS = {
    "x + x": lambda x: x + x,
    "2 - 3 x": lambda x: 2 - 3 * x,
    "x / c": lambda x: x / torch.tensor([0.5, -4.0, 2.0, 1.0, 1.0, 1.0]),
    "sub alpha": lambda x: torch.sub(x, x[:, :1], alpha=2.0),
    "broadcast": lambda x: x[:, :, None] + torch.ones(3),
    "broadcast scale": lambda x: x.unsqueeze(2) * torch.tensor([[1.0, -2.0, 0.5]]),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1),
    "mean": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.view(x.shape[0], 2, 3).sum((1, 2)),
    "cat": lambda x: torch.cat([x, 2 * x], dim=1),
    "stack": lambda x: torch.stack((x, -x), -1),
    "chunk": lambda x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1),
    "select": lambda x: x[:, 2:5],
    "last": lambda x: x[..., -1:],
    "matmul": lambda x: x @ torch.arange(12.0).reshape(6, 2).double(),
    "flip": lambda x: x.flip(1).roll(2, 1),
    "permute": lambda x: x.reshape(-1, 2, 3).permute(0, 2, 1).flatten(1),
    "lerp free": lambda x: 0.25 * x + 0.75 * x.flip(-1),
    "functional conv": lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3).double(), padding=1),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "iadd": lambda x: x.clone().add_(1.0).mul_(2.0),
    "sorted": lambda x: x.sort(1).values,
    "largest": lambda x: x.max(1, keepdim=True)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "clamp by a larger constant": lambda x: x[:, :1].clamp(min=-torch.arange(3.0).double()),
    "attributes": lambda x: x[:, None].mT,
    "clamp": lambda x: x.clamp(-1, 1).clamp(min=0.0),
    "maximum": lambda x: torch.maximum(x[:, :3], x[:, 3:]),
    "max_min": lambda x: functional.max_min(x, 1),
    "group_sort": lambda x: functional.group_sort(x, 3, dim=1),
    "shape checks": lambda x: x * 2 if x.ndim == 2 and x.shape[1] % 2 == 0 else x.sum(),
    "loop over parts": lambda x: sum(part * i for i, part in enumerate(x.split(2, 1))),
    "padded with zeros": lambda x: torch.cat([x, x.new_zeros(x.shape[0], 3)], 1) + x.new_ones(1),
    "read after writing": lambda x: torch.add(y := x * 1, y.mul_(3)),
    "index with repetition": lambda x: x[:, [0, 0, 1]],
    "static shapes": lambda x: x.reshape(x.size(0), -1) * float(2),
}


@pytest.mark.parametrize("name", LAMBDAS)
def test_functions_are_sound(name):
    model = Lambda(LAMBDAS[name]).eval()
    x = torch.randn(8, 6, dtype=torch.float64)
    truth = max(float(torch.linalg.matrix_norm(jacobian_reference(model, s), 2)) for s in x)
    bound = certify(model, x, lower=False).constant.value
    # parts of one tensor count as independent: at most twice the truth here, observed 1.8
    assert truth * (1 - 1e-12) <= bound <= 2.0 * truth


SMOOTH = {
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "elu": nn.ELU(1.7),
    "celu": nn.CELU(0.4),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(2.0, 40.0),  # at 20 it jumps, and float64 sees it
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(1.5),
    "prelu": nn.PReLU(3, 0.3),
    "rrelu": nn.RReLU(0.5, 1.5),
    "hardtanh": nn.Hardtanh(-2, 3),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "softshrink": nn.Softshrink(),
    "logsigmoid": nn.LogSigmoid(),
    "sin": Lambda(torch.sin),
    "erf": Lambda(torch.erf),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes(name):
    module = SMOOTH[name].double().eval()
    grid = torch.linspace(-12, 12, 240001, dtype=torch.float64).repeat(3, 1).T.requires_grad_()
    (slopes,) = torch.autograd.grad(module(grid).sum(), grid)
    bound = certify(module, torch.zeros(1, 3, dtype=torch.float64), lower=False).constant.value
    largest = float(slopes.abs().max())
    # a grid of 1e-4 misses the supremum by at most 1e-8; RReLU stays below its bound, LogSigmoid
    # reaches its own only at infinity
    assert largest <= bound * (1 + 1e-15)
    loose = {"rrelu": 1.6, "logsigmoid": 1 + 1e-5}.get(name, 1 + 1e-7)
    assert bound <= largest * loose


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.MaxPool2d(2), 1.0),
        (nn.MaxPool2d(3, 2, 1), 2.0),
        (nn.MaxPool1d(3, 1), math.sqrt(3)),
        (nn.MaxPool2d((3, 2), (2, 2), dilation=2), 2.0),
        (nn.AdaptiveMaxPool2d(2), 1.0),
        (nn.AdaptiveMaxPool2d(5), 2.0),
    ],
)
def test_max_pools(module, expected):
    shape = (2, 8, 8) if "2d" in type(module).__name__ else (2, 8)
    bound = certify(
        module.eval(), torch.zeros(1, *shape, dtype=torch.float64), lower=False
    ).constant.value
    assert bound == pytest.approx(expected, rel=1e-14)
    single = torch.zeros(64, *shape, dtype=torch.float64)  # one peak seen by several windows
    for i, sample in enumerate(single):
        sample.view(-1)[i % sample.numel()] = 1.0
    assert float(module(single).flatten(1).norm(dim=1).max()) <= bound


def test_softmax_and_log_softmax():
    x = torch.randn(20, 5, dtype=torch.float64) * 3
    x[0] = torch.tensor([0.0, 0.0, -99, -99, -99])
    x[1] = torch.tensor([99.0, 0, 0, 0, 0])
    for module, expected in ((nn.Softmax(1), 0.5), (nn.LogSoftmax(1), math.sqrt(5))):
        bound = certify(module.eval(), x, lower=False).constant.value
        truth = max(float(torch.linalg.matrix_norm(jacobian_reference(module, s), 2)) for s in x)
        assert truth <= bound * (1 + 1e-12)
        assert truth == pytest.approx(expected, rel=1e-6)  # both are attained
        assert bound == pytest.approx(expected, rel=1e-12)


def test_batch_norm_uses_running_statistics():
    module = nn.BatchNorm2d(3).double().eval()
    module.running_var.copy_(torch.tensor([0.25, 4.0, 1.0]))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-1.0, 5.0, 0.1]))
    bound = certify(
        module, torch.zeros(1, 3, 2, 2, dtype=torch.float64), lower=False
    ).constant.value
    truth = 5.0 / math.sqrt(4.0 + module.eps)
    assert truth <= bound <= truth * (1 + 1e-14)


def test_layer_norm_is_bounded_by_its_eps():
    module = nn.LayerNorm(5, eps=1e-2).double().eval()
    x = 1e-3 * torch.randn(10, 5, dtype=torch.float64)
    truth = max(float(torch.linalg.matrix_norm(jacobian_reference(module, s), 2)) for s in x)
    bound = certify(module, x, lower=False).constant.value
    assert truth <= bound <= 1.01 * truth  # near zero it is attained; observed 1.0001
