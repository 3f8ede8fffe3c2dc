"""Bounds in balls around samples, of any graph: no point of the ball refutes them."""

import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import orthonet
from orthonet.certify import certify
from orthonet.certify.local import ball as balls
from orthonet.certify.local import moves
from orthonet.certify.mlp.slopes import Kinks
from orthonet.certify.ops.pooling import pooling_windows
from orthonet.certify.rules import Call, Operand
from orthonet.errors import UncertifiableError


class Residual(nn.Module):
    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


def random_net(draw, more=()):
    """A classifier of images 1x8x8 with random operations, among them `more`."""
    channels = draw.choice([2, 4])
    layers = [nn.Conv2d(1, channels, 3, draw.choice([1, 2]), 1)]
    for _ in range(draw.randrange(1, 4)):
        layers.append(
            draw.choice(
                [
                    lambda: nn.ReLU(),
                    lambda: nn.LeakyReLU(draw.choice([0.1, -0.5, 1.5])),
                    lambda: nn.Tanh(),
                    lambda: nn.GELU(),
                    lambda: nn.Softplus(threshold=40.0),
                    lambda: orthonet.MaxMin(),
                    lambda: orthonet.layers.Abs(),
                    lambda: nn.Hardtanh(-0.3, 0.4),
                    lambda: nn.PReLU(channels),
                    lambda: nn.MaxPool2d(3, 1, 1),
                    lambda: orthonet.layers.GroupSort(2),
                    *more,
                ]
            )()
        )
        layers.append(
            draw.choice(
                [
                    lambda: nn.Conv2d(channels, channels, 3, 1, 1),
                    lambda: nn.AvgPool2d(2, 1),
                    lambda: nn.BatchNorm2d(channels),
                    lambda: nn.MaxPool2d(2, 1),
                    nn.Identity,
                    lambda: Residual(nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU()),
                ]
            )()
        )
    net = nn.Sequential(*layers, nn.Flatten())
    width = net.eval()(torch.zeros(1, 1, 8, 8)).shape[1]
    net.append(nn.Linear(width, 3))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.normal_()
    return net.eval()


def unit_vectors(count, shape):
    d = torch.randn(count, *shape, dtype=torch.float64)
    return d / d.flatten(1).norm(dim=1).reshape(-1, *[1] * len(shape))


def check_ball(net, x, radius, certificate):
    """Secants from the center against rows of differences, all secants against the constant."""
    twin = net.double()
    x = x.double()
    with torch.no_grad():
        d = torch.cat([unit_vectors(40, x.shape[1:]), -unit_vectors(1, x.shape[1:])])
        # among them the steepest descent of each output
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z: twin(z[None])[0]))(x)[0]
        d = torch.cat(
            [
                d,
                *(
                    s * F.normalize(jacobian.flatten(1), dim=1).reshape(-1, *x.shape[1:])
                    for s in (1.0, -1.0)
                ),
            ]
        )
        length = torch.cat([torch.rand(20), torch.ones(len(d) - 20)]).double()
        points = x + radius * length.reshape(-1, *[1] * (x.ndim - 1)) * d
        at, center = twin(points), twin(x)
        far = (points - x).flatten(1).norm(dim=1)
        point = balls.Point(certificate._walker, (x,))
        for joint, dtype in ((False, torch.float64), (True, torch.float64), (False, torch.float32)):
            found = balls.Ball(point, radius, joint=joint, dtype=dtype)
            node = certificate._walker.program.outputs[0]
            most = found.differences(node, 0, torch.full((at.shape[1],), math.inf).double())
            change = ((at[:, :1] - at) - (center[:, :1] - center)).abs()
            # 1e-12: the float64 forward of both points, values of size 1 on these nets
            assert bool((change <= most * far[:, None] + 1e-12 * (1 + at.abs().max())).all())
        (local,) = certificate.local_bound(x, radius)
        assert local.value <= certificate.constant.value
        steep = (at[1:] - at[:-1]).norm(dim=1)
        apart = (points[1:] - points[:-1]).flatten(1).norm(dim=1)
        assert bool((steep <= local.value * apart + 1e-12 * (1 + at.abs().max())).all())


def check_random_nets(seeds, more=()):
    tighter = 0
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        net, x = random_net(draw, more), torch.randn(1, 1, 8, 8)
        certificate = certify(net, x, effort="fast")
        radius = draw.choice([1e-3, 0.03, 0.3, 3.0, 100.0])
        (local,) = certificate.local_bound(x, radius)
        tighter += local.value < 0.9 * certificate.constant.value
        check_ball(net, x, radius, certificate)
    return tighter


def test_no_point_of_a_ball_refutes_random_networks():
    assert check_random_nets([*range(12), 255]) >= 3  # 255: windows that share entries


@pytest.mark.slow
def test_no_point_of_a_ball_refutes_a_thousand_networks():
    assert check_random_nets(range(100, 1100)) >= 300


@pytest.mark.parametrize("module", [nn.Softmax(1), nn.Softsign(), orthonet.layers.GroupSort(4)])
def test_operations_that_are_known_by_a_gain_count_with_it(module):
    net = nn.Sequential(nn.Linear(64, 8), module, nn.Linear(8, 3)).eval()
    x = torch.randn(1, 64)
    for radius in (0.01, 1.0):
        check_ball(net, x, radius, certify(net.double(), x.double()))


def test_a_ball_without_extent_has_the_norm_of_the_jacobian():
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    net = (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            orthonet.MaxMin(),
            Residual(nn.Conv2d(4, 4, 3, 1, 1), nn.LeakyReLU()),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        .double()
        .eval()
    )
    (local,) = certify(net, x).local_bound(x, 0.0)
    jacobian = torch.func.jacrev(lambda z: net(z[None])[0])(x[0]).flatten(1)
    truth = float(torch.linalg.matrix_norm(jacobian.detach(), 2))
    # Observed 1e-10 relative, the error of the rows in the Frobenius norm.
    assert truth * (1 - 1e-12) <= local.value <= truth * (1 + 1e-8)


def test_radii_are_larger_and_nothing_within_them_changes_the_class():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()
    x = torch.randn(4, 1, 8, 8)
    certificate = certify(net, x)
    radii, local = certificate.radius(net, x), certificate.local_radius(net, x)
    assert bool((local >= radii).all()) and float((local / radii).median()) > 1.2
    classes = net(x).argmax(1)
    for _ in range(20):  # ascent on the sphere of each radius
        z = (x + local.reshape(-1, 1, 1, 1) * 0.999 * unit_vectors(4, (1, 8, 8))).float()
        for _ in range(10):
            z.requires_grad_()
            out = net(z)
            top = out.gather(1, classes[:, None])[:, 0]
            rest = out.scatter(1, classes[:, None], -math.inf).amax(1)
            (slope,) = torch.autograd.grad((rest - top).sum(), z)
            d = z.detach() - x + slope * 1e3
            length = d.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            z = x + (d / length * local.reshape(-1, 1, 1, 1) * 0.999).float()
        assert torch.equal(net(z).argmax(1), classes)


def test_an_orthogonal_network_loses_nothing():
    net = nn.Sequential(
        orthonet.OrthoLinear(16, 16), orthonet.MaxMin(), orthonet.OrthoLinear(16, 4)
    ).eval()
    x = torch.randn(3, 16)
    certificate = certify(net, x)
    assert bool((certificate.local_radius(net, x) >= certificate.radius(net, x)).all())
    for local in certificate.local_bound(x, 0.1):
        assert local.value <= certificate.constant.value


def test_labels_norms_and_binary_outputs_are_those_of_the_radius():
    net = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(4, 9)
    certificate = certify(net, x)
    right = net(x).argmax(1)
    found = certificate.local_radius(net, x)
    wrong = certificate.local_radius(net, x, labels=(right + 1) % 3)
    assert torch.equal(wrong, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(certificate.local_radius(net, x, labels=right), found)
    linf = certificate.local_radius(net, x, norm="linf")
    assert bool((linf <= found / 3).all()) and bool((linf >= found / 3 * (1 - 1e-12)).all())
    binary = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    whole = certify(binary, x)
    assert torch.equal(whole.local_radius(binary, x), whole.radius(binary, x))


def test_what_does_not_fit_into_memory_keeps_the_global_bound(monkeypatch):
    net = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 9)
    certificate = certify(net, x)
    assert bool((certificate.local_radius(net, x) > certificate.radius(net, x)).any())
    monkeypatch.setattr(moves, "_ENTRIES", 100)
    assert torch.equal(certificate.local_radius(net, x), certificate.radius(net, x))
    assert all(b.value == certificate.lipschitz for b in certificate.local_bound(x, 0.1))


def test_bad_arguments_are_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    certificate = certify(net, x)
    with pytest.raises(ValueError, match="steps"):
        certificate.local_radius(net, x, steps=0)
    with pytest.raises(ValueError, match="radius"):
        certificate.local_bound(x, -1.0)
    with pytest.raises(ValueError, match="one that was certified"):
        certificate.local_radius(nn.Sequential(nn.Linear(4, 3)).eval(), x)
    with pytest.raises(UncertifiableError, match="graph"):
        pickle.loads(pickle.dumps(certificate)).local_bound(x, 0.1)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-1.0, 1.0), (2.5, -0.5)])
def test_slopes_of_chords_contain_those_of_all_chords(slopes):
    knot, kinks = 0.25, Kinks((0.25,), slopes)

    def f(x):
        return torch.where(x < knot, slopes[0] * (x - knot), slopes[1] * (x - knot))

    start = torch.linspace(-1, 1, 41).double()
    off, far = torch.rand(41).double() * 0.02, torch.rand(41).double() + 0.03
    lower, upper = kinks.chords(start - off, start + off, start - far, start + far)
    narrow = kinks(start - far, start + far)
    assert bool((lower >= narrow[0]).all() and (upper <= narrow[1]).all())
    tight = torch.zeros(41, dtype=torch.bool)
    for s in (-1.0, 0.0, 1.0):
        for t in torch.linspace(-1, 1, 101):
            a, b = start + s * off, start + t * far
            slope = (f(b) - f(a)) / (b - a)
            good = (b - a).abs() > 1e-3
            # 1e-12: the rounding of the quotient, 4 units over a difference of 1e-3
            assert bool(((slope >= lower - 1e-12) & (slope <= upper + 1e-12) | ~good).all())
            tight |= good & (slope >= upper - 1e-9)
    assert bool(tight.all())  # the largest is attained at an end


@pytest.mark.parametrize("seed", range(6))
def test_windows_are_those_of_the_pooling(seed):
    draw = random.Random(seed)
    kernel, pad, spread = draw.choice([2, 3]), draw.choice([0, 1]), draw.choice([1, 2])
    step, ceil = draw.choice([1, 2, 3]), seed % 2 == 0
    x = torch.randn(1, 2, 9, 7)
    target = torch.ops.aten.max_pool2d.default
    args = ([kernel], [step], [pad], [spread], ceil)
    y = target(x, *args)
    call = Call(
        "max_pool2d", "", (Operand((2, 9, 7), None), *args), {}, tuple(y.shape[1:]), target=target
    )
    places = pooling_windows(call)
    assert torch.equal(x.flatten(2)[..., places].amax(-1).reshape(y.shape), y)
