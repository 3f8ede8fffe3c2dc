"""Slopes of activations on intervals: nothing is outside, and little is given away."""

import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.certify.mlp.slopes import Turns
from orthonet.certify.ops.activations import activation_of
from orthonet.certify.ops.suprema import DERIVATIVES, turning
from tests.certify.functions import Lambda

MODULES = [
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softsign(),
    nn.Tanhshrink(),
    nn.LogSigmoid(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.SELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.ELU(1.0),
    nn.ELU(-1.5),
    nn.ELU(0.3),
    nn.CELU(2.0),
    nn.CELU(0.25),  # autograd of CELU rounds alpha to float32
    nn.Softplus(1.0, 40.0),
    nn.Softplus(3.0, 60.0),
]
PLAIN = {"sin": torch.sin, "cos": torch.cos, "atan": torch.atan, "asinh": torch.asinh}
CURVES = [(str(m), m, activation_of(m, 1).narrow) for m in MODULES]
CURVES += [(name, f, turning(name)) for name, f in {**PLAIN, "erf": torch.erf}.items()]
FEW = 41
NEAR = {"Hardsigmoid()": 1e-7, "Hardswish()": 1e-6}
"""Of those that hold 1 / 6 in two ways."""


def intervals():
    """Of all sizes: around zero, kinks and turns, far out, and of one point."""
    generator = torch.Generator().manual_seed(0)
    count = 300
    center = torch.randn(count, generator=generator).double() * 3
    center[::7] = torch.tensor([-3.0, 3.0, 0.0, 2.3993572, -1.4142135, 20.0, -50.0]).repeat(7)[
        : len(center[::7])
    ]
    center[1::31] *= 50
    width = 10.0 ** (torch.rand(count, generator=generator).double() * 6 - 4)
    width[::50] = 0.0
    share = torch.rand(count, generator=generator).double()
    share[::9] = 0.0
    return center - share * width, center + (1 - share) * width, center


def along(low, high):
    return low + (high - low) * torch.linspace(0, 1, FEW).double()[:, None]


def derivative(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("place", range(len(CURVES)))
def test_no_slope_lies_outside(place):
    name, function, turns = CURVES[place]
    assert isinstance(turns, Turns)
    low, high, start = intervals()
    least, most = turns(low, high)
    found = derivative(function, along(low, high))
    slack = torch.where(along(low, high).abs() == 3.0, 2.0, 1e-12)  # autograd takes one side
    assert bool((found >= least - slack).all() and (found <= most + slack).all())
    # The ends of an interval are reached, but for jumps and for what a grid misses.
    wide = (high - low) < 1e-2
    lost = torch.maximum(found.amin(0) - least, most - found.amax(0))[wide]
    assert float(lost.quantile(0.9)) < 1e-4  # observed 3e-6
    # Chords from the start, and from near it.
    off = (high - low) * 1e-3
    begin, end = torch.maximum(start - off, low), torch.minimum(start + off, high)
    lower, upper = turns.chords(begin, end, low, high)
    assert bool((lower >= least).all() and (upper <= most).all())
    ends = along(low, high)
    for first in (begin, start, end):
        length = ends - first
        chord = (function(ends) - function(first)) / length
        rounding = 1e-15 * (1 + function(ends).abs() + function(first).abs()) / length.abs()
        rounding = rounding + 1e-12 + NEAR.get(name, 0.0)
        good = (chord >= lower - rounding) & (chord <= upper + rounding)
        assert bool((good | (length == 0)).all())


def test_chords_are_flatter_than_tangents():
    """Where the derivative is a line, chords have half of its range, plus a part."""
    act = Turns(lambda x: x)
    low, high, start = (torch.tensor([v]).double() for v in (-1.0, 3.0, 1.0))
    least, most = act.chords(start, start, low, high)
    assert float(least) == pytest.approx(-0.125) and float(most) == pytest.approx(2.125)


def test_slopes_without_a_value_are_unknown():
    turns = turning("silu")
    least, most = turns(torch.tensor([-torch.inf, 0.0, torch.nan]), torch.full((3,), torch.inf))
    assert bool((least <= turns.ends[0]).all() and (most >= turns.ends[1]).all())


def test_every_derivative_has_an_activation():
    named = {"selu", "celu", "softplus", "gelu", "gelu_tanh"} | set(DERIVATIVES)
    assert len(named) == len(DERIVATIVES) == len({n for n, _, _ in CURVES}) - 5  # parameters


SLOW = [pytest.param(a, marks=pytest.mark.slow) for a in (nn.Tanh, nn.Sigmoid, nn.ELU, nn.Mish)]


@pytest.mark.parametrize("activation", [nn.GELU, nn.Softplus, *SLOW])
def test_local_bounds_follow_smooth_activations(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 4)
    ).eval()
    for p in model.requires_grad_(False).parameters():
        p.mul_(3.0)
    x, radius = torch.randn(2, 6), 0.05
    whole = certify(model, x, lower=False).constant.value
    near = certify(model, x, radius=radius)
    model = model.double()
    directions = torch.randn(2, 200, 6).double()
    points = x.double()[:, None] + radius * directions / directions.norm(dim=2, keepdim=True)
    moved = (model(points) - model(x.double())[:, None]).norm(dim=2) / radius
    for constant, secant, found in zip(near.constants, near.secants(), moved, strict=True):
        assert float(found.max()) <= secant.value <= constant.value < 0.8 * whole


def test_a_sine_far_out():
    model = Lambda(lambda x: (x * 1e7).sin()).eval()
    x = torch.tensor([[0.3]], dtype=torch.float64)
    assert certify(model, x, radius=1e-3).constants[0].value == pytest.approx(1e7)
