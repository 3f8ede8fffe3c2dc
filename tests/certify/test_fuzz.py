"""Soundness: random graphs over all records, and random networks under autocast."""

import dataclasses
import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import functional, layers
from orthonet.certify import Bound, Step, certify
from orthonet.certify.graph.replay import Replay
from orthonet.certify.rules import RECORDS
from orthonet.errors import UncertifiableError
from orthonet.testing import fuzz_certificates
from orthonet.testing.fuzz import main
from tests.references import jacobian_reference

ACTIVATIONS = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Mish,
    nn.Softplus,
    nn.ELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.SELU,
    nn.PReLU,
    nn.Softsign,
    nn.Tanhshrink,
    layers.Abs,
    lambda: nn.LeakyReLU(-1.5),
    lambda: nn.GELU("tanh"),
    lambda: layers.GroupSort(2),
    layers.MaxMin,
    lambda: nn.Softmax(1),
    lambda: nn.GroupNorm(2, 4, eps=0.1),
    nn.LogSigmoid,
)


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
            lambda: torch.einsum("nchw,dc->ndhw", f(x), self.shift[:, 0] @ self.shift[:, 0].mT),
            lambda: torch.where(self.shift > 0, f(x), x),
            lambda: x.masked_fill(self.shift > 0.5, 1.0) - f(x).tril(),
            lambda: self.shift[:, 0] @ f(x)[:, :, :1] + self.shift.expand_as(x),
            lambda: F.fold(F.unfold(f(x), 3, padding=1), x.shape[2:], 3, padding=1),
        )[self.kind]()


KINDS = 16


def block() -> nn.Module:
    kind = random.randrange(7)
    if kind <= 2:
        taps = random.choice([1, 2, 3])
        mode = random.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        groups = random.choice([1, 1, 2])
        conv = nn.Conv2d(
            4,
            4,
            taps,
            padding=taps // 2,
            padding_mode=mode,
            groups=groups,
            dilation=random.choice([1, 1, 2]),
        )
        return nn.Sequential(conv, nn.BatchNorm2d(4)) if kind == 2 else conv
    if kind == 3:
        return random.choice(
            [
                nn.AvgPool2d(3, 1, 1),
                nn.MaxPool2d(3, 1, 1),
                nn.LPPool2d(2, 2, 1),
                nn.MaxPool2d(2, 1),
                nn.AvgPool2d(2),
                nn.AdaptiveAvgPool2d(3),
                nn.AdaptiveMaxPool2d(4),
                nn.Upsample(scale_factor=1.5, mode="bilinear"),
                nn.Upsample(7, mode="nearest"),
                nn.Upsample(5, mode="bicubic"),
                nn.ConvTranspose2d(4, 4, 3, 2, 1),
                layers.L2NormPool(2, 1),
                layers.ScaledAvgPool(2, 1),
                nn.Conv2d(4, 4, 3, 2),
                nn.ReflectionPad2d(1),
                nn.CircularPad2d((1, 0, 2, 1)),
                nn.BatchNorm2d(4),
            ]
        )
    if kind == 4:
        return random.choice(ACTIVATIONS)()
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    if random.random() < 0.6:
        branch.append(random.choice(ACTIVATIONS)())
    return Mix(branch, random.randrange(KINDS))


def network(seed: int, scales: tuple[float, ...]) -> tuple[nn.Module, torch.Tensor]:
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
                module.weight.mul_(random.choice(scales))
    if random.random() < 0.3:
        model.append(nn.Flatten()).append(nn.LazyLinear(3, dtype=torch.float64))
    with torch.no_grad():
        model.eval()(x)
    return model.eval(), x


def test_random_graphs_are_bounded_from_above():
    report = fuzz_certificates(100)
    assert not report.violations, str(report)
    assert report.graphs == 100
    assert report.certified > 88  # observed 91; the others are refused with a reason
    assert len(report.operations) > 60  # observed 89
    assert statistics.median(report.gaps) < 10  # of bound / largest slope; observed 1.0


@pytest.mark.parametrize(("name", "overload"), [("mul", "mul.Tensor"), ("topk", "topk.default")])
def test_the_fuzzer_finds_a_wrong_rule(name, overload, monkeypatch):
    """A factor that is halved, and an order that is not looked at."""

    def halved(call):
        step = right.gain(call)
        return step._replace(gains=tuple(Bound(g.value / 2) for g in step.gains))

    right = RECORDS[overload]
    wrong = halved if name == "mul" else lambda call: Step((Bound(1.0),), "selection")
    monkeypatch.setitem(RECORDS, overload, dataclasses.replace(right, gain=wrong, linear=None))
    report = fuzz_certificates(24, operations=[name])
    assert report.violations, str(report)
    assert all(v.found > v.claimed for v in report.violations)


@pytest.mark.slow
def test_many_random_graphs_are_bounded_from_above():
    report = fuzz_certificates(2000, seed=10_000)
    assert not report.violations, str(report)
    assert report.certified > 1700


def test_the_command_reports(capsys):
    assert main(["--graphs", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out.startswith("2 graphs")


def check_autocast(seed: int, dtype: torch.dtype) -> float | None:
    """The ratio of the bound of the rounding and the rounding of a random network."""
    try:
        model, x = network(seed, (1.0, 3.0, 0.1))
    except (RuntimeError, ValueError):
        return None
    model, x = model.float(), x.float()
    try:
        found = certify(model, x[:1], lower=False, effort="fast", autocast=dtype)
        limit = found.rounding(x)
    except UncertifiableError as refusal:
        known = (
            "rounding of",
            "must run on batches",
            "autocast must not round",
            "float32 or float64",
        )
        if not any(text in str(refusal) for text in known):
            raise
        return None
    exact = Replay(found._walker.program).eval()  # the function that the certificate is of
    flat = x.double().flatten(1)
    for sample in flat[:2]:
        jacobian = jacobian_reference(exact, sample)
        truth = float(torch.linalg.matrix_norm(jacobian, 2))
        assert found.constant.value >= truth * (1 - 1e-9), (seed, dtype, truth, model)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = model(x)
    with torch.no_grad():
        error = torch.linalg.vector_norm(y.double().flatten(1) - exact(flat), dim=1)
    assert bool((error <= limit).all()), (seed, dtype, error, limit, model)
    ratio = (limit / error.clamp_min(1e-30)).median()
    return float(ratio) if float(error.max()) > 0 else None


def test_random_networks_under_autocast_are_bounded_from_above():
    ratios = [r for r in (check_autocast(s, torch.bfloat16) for s in range(16)) if r is not None]
    assert len(ratios) >= 12
    assert statistics.median(ratios) < 1e3  # observed 70


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_many_random_networks_under_autocast_are_bounded_from_above(dtype):
    ratios = [r for r in (check_autocast(s, dtype) for s in range(2000, 2300)) if r is not None]
    assert len(ratios) > 200


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
