"""Intervals for regression: they hold outputs and targets, under attack too."""

import functools
import math

import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.downstream import ConformalBand, calibrate_band, certified_interval


@functools.cache
def example(outputs=2, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype).eval()
    model.requires_grad_(False)
    x = torch.randn(200, 2, dtype=dtype)
    return model, certify(model, x[:1], lower=False), x


def moved(x, eps):
    """Points on the sphere around each, rounded to lie inside, (directions, N, 2)."""
    turn = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)[:, None, None]
    return (x + eps * (1 - 1e-6) * torch.cat((turn.cos(), turn.sin()), 2)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_nearby_lie_in_their_interval(dtype):
    model, certificate, x = example(2, dtype)
    for eps in (0.0, 0.01, 1.0):
        found = certified_interval(model(x), certificate, eps, x)
        assert found.shape == (200, 2, 2) and found.dtype == torch.float64
        for points in moved(x, eps) if eps else [x]:
            outputs = model(points).double()
            assert ((found[..., 0] <= outputs) & (outputs <= found[..., 1])).all()
        width = (found[..., 1] - found[..., 0]).max() / 2
        assert certificate.band(eps) <= width <= certificate.band(eps) + 1e-4  # observed 6.4e-5


@pytest.mark.parametrize("outputs", [1, 2])
def test_bands_cover_under_attack(outputs):
    model, certificate, x = example(outputs)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    targets, eps, alpha = model(x)[:, 0] + 0.15 * noise, 0.5, 0.25
    ends = model(x) + torch.tensor([-0.1, 0.1]).double()[:outputs]
    # The worst of some points around each input, for its own target.
    near = torch.stack([model(p) for p in moved(x, eps)])
    away = (near.mean(2) - targets).abs().argmax(0)
    worst = near[away, torch.arange(200)] + (ends - model(x))
    clean, broken, robust = [], [], []
    for _ in range(30):
        order = torch.randperm(200, generator=generator)
        first, rest = order[:99], order[99:]
        band = calibrate_band(ends[first], targets[first], alpha)
        y = targets[rest]
        plain, grown = band.predict(worst[rest]), band.robust(worst[rest], certificate, eps, None)
        assert ((grown[:, 0] <= plain[:, 0]) & (plain[:, 1] <= grown[:, 1])).all()
        for found, interval in (
            (clean, band.predict(ends[rest])),
            (broken, plain),
            (robust, grown),
        ):
            found.append(((interval[:, 0] <= y) & (y <= interval[:, 1])).double().mean())
        held = band.worst_case(ends[rest], y, certificate, eps, None)
        assert held.proved <= held.lower <= broken[-1] <= held.upper
        assert held.clean == clean[-1]
    assert torch.stack(clean).mean() >= 1 - alpha - 0.02  # observed .755 and .759
    assert torch.stack(robust).mean() >= 1 - alpha  # observed .871 and .982
    assert torch.stack(broken).mean() < torch.stack(clean).mean() - 0.05  # observed .53 and .65


def test_a_band_is_the_interval_of_the_ranks():
    outputs, targets = torch.zeros(9), torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9])
    band = calibrate_band(outputs, targets, 0.3)  # 10 * .7 = 7: the seventh of |y|
    assert band.threshold == pytest.approx(7.0, abs=1e-12)
    assert band.predict(torch.ones(1)).tolist()[0] == pytest.approx([-6.0, 8.0], abs=1e-12)
    pair = torch.tensor([[-1.0, 1.0]]).expand(9, 2)
    band = calibrate_band(pair, targets, 0.3)
    assert band.threshold == pytest.approx(6.0, abs=1e-12)
    with pytest.warns(UserWarning, match="at least 19 samples"):
        band = calibrate_band(outputs, targets, 0.05)
    assert band.predict(outputs).tolist()[0] == [-math.inf, math.inf]
    narrow = ConformalBand(-3.0, 0.1, 9).predict(torch.tensor([[-1.0, 1.0]]))
    assert narrow[0, 0] > narrow[0, 1]  # empty


Y = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: calibrate_band(torch.zeros(3, 3), Y), r"outputs must be \(N,\)"),
        (lambda c: calibrate_band(torch.zeros(()), Y), "outputs must be"),
        (lambda c: calibrate_band(Y[:0], Y[:0]), "outputs must be"),
        (lambda c: calibrate_band(Y, Y[:2]), "targets must be one number"),
        (lambda c: calibrate_band(Y, Y * math.nan), "targets must be finite"),
        (lambda c: calibrate_band(Y * math.nan, Y), "outputs must be finite"),
        (lambda c: calibrate_band(Y, Y.long()), "floating-point"),
        (lambda c: calibrate_band(Y, Y, 0.0), "alpha must be"),
        (lambda c: ConformalBand(math.nan, 0.1, 9), "threshold must be"),
        (lambda c: certified_interval(Y, c, -1.0, None), "eps must be"),
        (lambda c: certified_interval(Y, 2.0, 1.0, None), "certificate must be"),
        (
            lambda c: certified_interval(torch.zeros(3, 2), c, 1.0, torch.zeros(3, 2)),
            "dtype that was certified",
        ),
        (lambda c: certified_interval(Y, c, 1.0, None), "which has 2 a sample"),
        (lambda c: ConformalBand(1.0, 0.1, 9).robust(Y, c, math.nan, None), "eps must be"),
        (
            lambda c: ConformalBand(1.0, 0.1, 9).worst_case(Y, Y, c, 0.1, None, confidence=0),
            "confidence must be",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(example()[1])
