"""Sorts in balls: every form of them gains as a ReLU does, and no point of a ball refutes it."""

import pytest
import torch
from torch import nn

import orthonet
from orthonet import functional, layers
from orthonet.certify import certify
from orthonet.certify.local import ball as balls
from orthonet.certify.local import moves, order
from tests.certify.test_local_graphs import check_ball, check_random_nets


class Form(nn.Module):
    """A sort that is written out."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FORMS[self.name](x)


def halves(x):
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def smaller(x):
    a, b = x.chunk(2, 1)
    return torch.cat([torch.min(b, a), a + torch.fmax(a, b)], 1)


FORMS = {
    "max_min": lambda x: functional.max_min(x, 1 - x.ndim),
    "maximum": halves,
    "sort": lambda x: x.unflatten(1, (-1, 2)).sort(2).values.flatten(1, 2),
    "descending": lambda x: x.unflatten(1, (2, -1)).sort(1, descending=True)[0].flatten(1, 2),
    "sort of all": lambda x: torch.sort(x, 1)[0],
    "other operands": smaller,
    "neighbors": lambda x: torch.maximum(x, x.roll(1, 1)),
    "one": lambda x: torch.minimum(x, x),
}
MODULES = {
    "MaxMin": orthonet.MaxMin,
    "MaxMin of images": lambda: orthonet.MaxMin(dim=-3),
    "plain MaxMin": lambda: orthonet.to_plain(orthonet.MaxMin()),
    "plain GroupSort": lambda: orthonet.to_plain(layers.GroupSort(2)),
    "groups of four": lambda: layers.GroupSort(4),
    "FullSort": layers.FullSort,
    "Householder": lambda: layers.HouseholderActivation(8),
    **{name: lambda name=name: Form(name) for name in FORMS},
}


def conv_net(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), act(), nn.Conv2d(8, 8, 3, 2, 1), act())
    return net.extend([nn.Flatten(), nn.Linear(32, 3)]).double().eval()


def dense_net(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 8))
    return net.double().eval()


@pytest.mark.parametrize("name", MODULES)
def test_no_point_refutes_a_sort_and_a_ball_without_extent_has_its_jacobian(name):
    net, x = conv_net(MODULES[name]), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    certificate = certify(net, x, lower=False)
    jacobian = torch.func.jacrev(lambda z: net(z[None])[0])(x[0]).flatten(1)
    truth = float(torch.linalg.matrix_norm(jacobian.detach(), 2))
    (local,) = certificate.local_bound(x, 0.0)
    # Observed 1e-10 relative, the error of the rows in the Frobenius norm.
    assert truth * (1 - 1e-12) <= local.value <= truth * (1 + 1e-8)
    assert local.value < 0.95 * certificate.constant.value
    check_ball(net, x, 0.5, certificate)


def ratio(net, x):
    certificate = certify(net, x[:1], lower=False)
    return float((certificate.local_radius(net, x) / certificate.radius(net, x)).median())


@pytest.mark.parametrize(
    ("build", "shape"), [(dense_net, (2, 32)), (conv_net, (2, 1, 8, 8))], ids=["dense", "conv"]
)
def test_radii_of_sorts_gain_as_those_of_relu_do(build, shape):
    x = torch.randn(shape, dtype=torch.float64)
    assert ratio(build(nn.ReLU), x) > 1.5
    for name in ("MaxMin", "plain MaxMin"):
        assert ratio(build(MODULES[name]), x) > 1.3


def test_known_orders_are_copies():
    """No rounding is added, so that an orthogonal network loses nothing however deep it is."""
    net = nn.Sequential(*(MODULES["FullSort"]() for _ in range(3))).eval()
    x = torch.randn(1, 8, dtype=torch.float64)
    certificate = certify(net, x)
    found = balls.Ball(balls.Point(certificate._walker, (x,)), 0.0)
    rows = found.moves[certificate._walker.program.outputs[0]]
    assert torch.equal(rows.known, torch.eye(8, dtype=torch.float64)[:, x[0].argsort()])
    assert float(rows.error.max()) < 1e-150  # no more than what underflow takes


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
def test_the_network_sorts_all_words_of_two_letters(size):
    """And by the principle of zeros and ones all others."""
    words = ((torch.arange(2**size)[:, None] >> torch.arange(size)) & 1).float()
    found = words.clone()
    for pairs in order._network(size):
        low, high = ([p[i] for p in pairs] for i in (0, 1))
        assert len({*low, *high}) == 2 * len(pairs)
        a, b = found[:, low], found[:, high]
        found[:, low], found[:, high] = torch.minimum(a, b), torch.maximum(a, b)
    assert torch.equal(found, words.sort(1).values)


def test_a_sort_that_does_not_fit_counts_with_its_gain(monkeypatch):
    net, x = dense_net(MODULES["FullSort"]), torch.randn(1, 32, dtype=torch.float64)
    point = balls.Point(certify(net, x)._walker, (x,))
    assert balls.Ball(point, 0.3).unknown.count == 128  # 64 entries are too many to be followed
    monkeypatch.setattr(order, "_MOST", 64)
    whole = balls.Ball(point, 0.3)
    assert whole.unknown.count > 128  # more units than entries of both sorts
    monkeypatch.setattr(moves, "_ENTRIES", 64 * (32 + 128))
    found = balls.Ball(point, 0.3)
    assert found.unknown.count == 128
    joint = balls.Ball(point, 0.3, joint=True)
    node = point.walker.program.outputs[0]
    assert torch.equal(found.rows(found.moves[node]), joint.rows(joint.moves[node]))


MORE = [
    lambda: orthonet.MaxMin(dim=-3),
    lambda: orthonet.to_plain(orthonet.MaxMin()),
    lambda: orthonet.to_plain(layers.GroupSort(2)),
    lambda: Form("sort"),
    lambda: Form("descending"),
    lambda: Form("other operands"),
    lambda: Form("neighbors"),
    layers.FullSort,
]


def test_no_point_of_a_ball_refutes_random_networks_with_sorts():
    assert check_random_nets(range(2), MORE) >= 1


@pytest.mark.slow
def test_no_point_of_a_ball_refutes_many_networks_with_sorts():
    assert check_random_nets(range(100, 150), MORE) >= 15
