"""Single operations of PyTorch: written as what they are, accepted, and the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet.certify import certify
from orthonet.layers import BatchCentering, MaxMin, OrthoConv1d, OrthoConv3d
from orthonet_checker import check
from tests.checker import oracle


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4, 3))
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return self.function(self, x)


CALLS = {
    "same": lambda m, x: F.conv1d(x, m.weight, padding="same", dilation=2),
    "valid": lambda m, x: F.conv1d(x, m.weight, m.weight[0, :, 0], padding="valid", stride=2),
    "grouped": lambda m, x: F.conv1d(x, m.weight[:, :2], groups=2),
    "circular": lambda m, x: F.conv1d(F.pad(x, (1, 1), mode="circular"), m.weight),
    "circular, stride": lambda m, x: F.conv1d(F.pad(x, (1, 0), mode="circular"), m.weight, None, 2),
    "circular, too wide": lambda m, x: F.conv1d(F.pad(x, (3, 3), mode="circular"), m.weight),
    "matmul": lambda m, x: x @ m.matrix,
    "linear of rows": lambda m, x: F.linear(x, m.matrix.T),
    "pad": lambda m, x: F.pad(x, (2, 0, 1, 3), value=0.5),
    "pad and slice": lambda m, x: F.pad(x, (1, 1))[:, ::2, 1:-1],
    "select": lambda m, x: x[:, 2] - x[:, -1],
    "narrow": lambda m, x: x.narrow(1, 1, 2),
    "split": lambda m, x: torch.cat(x.split((1, 3), 1)[::-1], 1),
    "unbind": lambda m, x: torch.stack(x.unbind(2)[1:4], 1),
    "transpose": lambda m, x: x.transpose(1, 2).reshape(x.shape[0], 3, 8).permute(0, 2, 1),
    "squeeze": lambda m, x: x[:, :1].squeeze(1).unsqueeze(-1).flatten(1),
    "pixels": lambda m, x: F.pixel_shuffle(F.pixel_unshuffle(x[:, None], 2), 2),
    "mean": lambda m, x: x.mean((1, 2)),
    "mean, kept": lambda m, x: x.mean(2, keepdim=True) * 3,
    "sum": lambda m, x: x.sum(-1) / 7.0,
    "rsub": lambda m, x: 1.0 - 2 * x,
    "alpha": lambda m, x: torch.sub(x, x.flip(2), alpha=0.3),
    "diagonal": lambda m, x: m.weight[0, :, :1] * x / m.matrix[:, 0].exp(),
    "minimum": lambda m, x: torch.minimum(x, -x.roll(2, 2)),
    "clamps": lambda m, x: x.clamp(max=0.5) + x.clamp(min=-0.25) - x.clamp(-1, 1),
    "average pool": lambda m, x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False),
    "max pool": lambda m, x: F.max_pool1d(x, 3, 1, 1, 2),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool1d(x, 4),
    "sines": lambda m, x: x.sin() + x.cos() + x.atan() + x.asinh() + x.abs(),
    "activations": lambda m, x: F.silu(x) + F.mish(x) + F.gelu(x, approximate="tanh"),
    "more": lambda m, x: F.selu(x) + F.hardswish(x) + F.softsign(x) + F.tanhshrink(x),
    "others": lambda m, x: F.logsigmoid(x) + F.softshrink(x, 0.2) + F.relu6(x) + F.elu(x, 2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, tmp_path):
    model = Call(CALLS[name]).eval().double()
    _check(model, torch.zeros(1, 4, 6, dtype=torch.float64), tmp_path)


MODULES = {
    "volumes": (lambda: nn.Sequential(OrthoConv3d(2, 4, 2, stride=2), MaxMin()), (2, 4, 4, 4)),
    "signals": (lambda: OrthoConv1d(2, 6, 3, padding=1, padding_mode="circular"), (2, 8)),
    "centering": (lambda: BatchCentering(3), (3, 4, 4)),
    "pools": (lambda: nn.Sequential(nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(2)), (2, 7, 7)),
    "norm": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2)), (1, 3, 3, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, tmp_path):
    make, shape = MODULES[name]
    _check(make().eval().double(), torch.zeros(1, *shape, dtype=torch.float64), tmp_path)


def _check(model: nn.Module, example: torch.Tensor, tmp_path) -> None:
    certify(model, example, lower=False).save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    off = next(note for note in verdict.notes if "samples" in note).rsplit(" ", 1)[1]
    assert float(off) < 1e-13
    assert oracle.false_claims(*oracle.load(tmp_path / "c.json"), points=1) == []
