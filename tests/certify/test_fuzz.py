"""Soundness: random small networks of all operations against their dense Jacobians."""

import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import functional, layers
from orthonet.certify import certify
from tests.references import jacobian_reference

SCALES = (1.0, 1.0, 1.0, 1e-18, 1e18, 1e-9, 1e9, 1e-40)
ACTIVATIONS = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Mish, nn.Softplus, nn.ELU, nn.Hardswish, nn.Sigmoid,
    nn.SELU, nn.PReLU, nn.Softsign, nn.Tanhshrink, layers.Abs, lambda: nn.LeakyReLU(-1.5),
    lambda: nn.GELU("tanh"), lambda: layers.GroupSort(2), layers.MaxMin, lambda: nn.Softmax(1),
    lambda: nn.GroupNorm(2, 4, eps=0.1), nn.LogSigmoid,
)  # fmt: skip


class Mix(nn.Module):
    """A branch and one of the ways to put it together with its input."""

    def __init__(self, branch: nn.Module, kind: int) -> None:
        super().__init__()
        self.branch, self.kind = branch, kind
        self.register_buffer("shift", torch.randn(4, 1, 1, dtype=torch.float64))

    def forward(self, x):
        f = self.branch
        a, b = x.chunk(2, 1)
        return (
            lambda: x + f(x),
            lambda: x - 0.5 * f(x) + self.shift,
            lambda: f(f(x)),
            lambda: torch.maximum(f(x), x),
            lambda: torch.cat([a, f(x)[:, 2:] + b], 1),
            lambda: torch.stack([f(x)[:, 0], x[:, 1], x[:, 2], a[:, 0]], 1),
            lambda: functional.max_min(f(x) * self.shift),
            lambda: f(x) + f(-x),
            lambda: torch.lerp(x, f(x), 0.3).flip(1).roll(1, 2),
            lambda: x[:, [0, 0, 3, 2]] - x.clamp(-0.5, 0.5),
            lambda: F.pad(f(x), (1, 1, 0, 2), mode="replicate")[..., 1:-1, :-2].permute(0, 1, 3, 2),
            lambda: torch.einsum("nchw,dc->ndhw", x, self.shift[:, 0] @ self.shift[:, 0].T),
        )[self.kind]()


def block() -> nn.Module:
    kind = random.randrange(7)
    if kind <= 2:
        taps = random.choice([1, 2, 3])
        mode = random.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        groups = random.choice([1, 1, 2])
        conv = nn.Conv2d(4, 4, taps, padding=taps // 2, padding_mode=mode, groups=groups,
                         dilation=random.choice([1, 1, 2]))  # fmt: skip
        return nn.Sequential(conv, nn.BatchNorm2d(4)) if kind == 2 else conv
    if kind == 3:
        return random.choice([
            nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.LPPool2d(2, 2, 1), nn.MaxPool2d(2, 1),
            nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(4),
            nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Upsample(7, mode="nearest"),
            nn.Upsample(5, mode="bicubic"), nn.ConvTranspose2d(4, 4, 3, 2, 1),
            layers.L2NormPool2d(2, 1), layers.ScaledAvgPool2d(2, 1), nn.Conv2d(4, 4, 3, 2),
            nn.ReflectionPad2d(1), nn.CircularPad2d((1, 0, 2, 1)), nn.BatchNorm2d(4),
        ])  # fmt: skip
    if kind == 4:
        return random.choice(ACTIVATIONS)()
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    if random.random() < 0.6:
        branch.append(random.choice(ACTIVATIONS)())
    return Mix(branch, random.randrange(11))


def network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    random.seed(seed)
    torch.manual_seed(seed)
    x = torch.randn(4, 4, random.choice([5, 6]), random.choice([5, 7]), dtype=torch.float64)
    model = nn.Sequential(*(block() for _ in range(random.randint(1, 4)))).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            nn.init.uniform_(module.weight, -2, 2)
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(random.choice(SCALES))
    if random.random() < 0.3:
        model.append(nn.Flatten()).append(nn.LazyLinear(3, dtype=torch.float64))
    with torch.no_grad():
        model.eval()(x)
    return model.eval(), x


def check(seed: int) -> float | None:
    """The ratio of the bound and the largest Jacobian norm; None for a net that cannot run."""
    try:
        model, x = network(seed)
    except (RuntimeError, ValueError):  # a window larger than the image
        return None
    truth = 0.0
    for sample in torch.cat([x, 1e-3 * x[:1]]):
        jacobian = jacobian_reference(model, sample)
        if bool(jacobian.isfinite().all()) and jacobian.numel():
            size = float(jacobian.abs().max())
            scaled = jacobian / size if size else jacobian
            truth = max(truth, float(torch.linalg.matrix_norm(scaled, 2)) * size)
    effort = random.choice(["fast", "default", "tight"])
    bound = certify(model, x[:1], lower=False, effort=effort).constant.value
    assert bound >= truth * (1 - 1e-12), (seed, effort, bound, truth, model)
    return bound / truth if 1e-300 < truth < 1e300 else None


def test_random_networks_are_bounded_from_above():
    gaps = [gap for gap in map(check, range(36)) if gap is not None]
    assert len(gaps) > 25  # observed 33
    assert statistics.median(gaps) < 10  # of bound / largest of 5 Jacobians; observed 1.4


@pytest.mark.slow
def test_many_random_networks_are_bounded_from_above():
    gaps = [gap for gap in map(check, range(1000, 1450)) if gap is not None]
    assert len(gaps) >= 300


def test_single_convolutions_with_zero_padding_are_tight():
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        random.seed(seed)
        taps, stride = random.choice([2, 3, 5]), random.choice([1, 1, 2])
        conv = nn.Conv2d(8, 8, taps, stride, padding=taps // 2).double().eval()
        x = torch.zeros(1, 8, 14, 12, dtype=torch.float64)  # more than 1024 columns: a torus
        truth = float(torch.linalg.matrix_norm(jacobian_reference(conv, x[0]), 2))
        bound = certify(conv, x, lower=False).constant.value
        assert bound >= truth * (1 - 1e-12)
        ratios.append(bound / truth)
    assert statistics.median(ratios) <= 1.05  # observed 1.01
