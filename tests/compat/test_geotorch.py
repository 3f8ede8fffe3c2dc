"""A GeoTorch script runs after one changed import: its README, its two examples, its docstrings."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import orthonet.compat.geotorch as geotorch
from orthonet.compat.geotorch.so import torus_init_, uniform_init_
from tests.compat.tables import names_of

# `geotorch.__all__` of version 0.4.0
PEER = set(
    """
    ProductManifold Grassmannian LowRank Rn Skew Symmetric SO Sphere SphereEmbedded Stiefel
    AlmostOrthogonal GLp SL FixedRank PSD PSSD PSSDLowRank PSSDFixedRank Hurwitz skew
    symmetric sphere orthogonal grassmannian low_rank fixed_rank almost_orthogonal
    invertible sln positive_definite positive_semidefinite positive_semidefinite_low_rank
    positive_semidefinite_fixed_rank alpha_stable update_base
    """.split()  # noqa: SIM905
)


def test_the_page_has_every_name_and_no_other():
    table = names_of("coming-from-geotorch.md", geotorch)
    assert set(table) >= PEER
    assert all(hasattr(geotorch, name) for name in PEER)
    there = {name for name, fate in table.items() if not fate.startswith("no:")}
    assert set(geotorch.__all__) == {name for name in there if "." not in name}


def orthonormal(x: torch.Tensor) -> bool:
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    gap = (x.mT @ x - torch.eye(x.shape[-1])).detach()
    return float(gap.abs().max()) <= 1e-5  # five times the promise on each singular value


def test_readme():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 128)
            geotorch.orthogonal(self.linear, "weight")
            self.cnn = nn.Conv2d(16, 32, 3)
            geotorch.low_rank(self.cnn, "weight", rank=1)
            self.linear.weight = torch.eye(128, 64)

        def forward(self, x):
            return self.linear(self.cnn(x).mean((-2, -1)).repeat(1, 2))

    model = Model()
    assert torch.equal(model.linear.weight, torch.eye(128, 64))
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(4, 16, 5, 5)
    with geotorch.parametrize.cached():
        model(x).square().mean().backward()
    optim.step()
    assert not torch.equal(model.linear.weight, torch.eye(128, 64))
    assert orthonormal(model.linear.weight)
    sigma = torch.linalg.svdvals(model.cnn.weight.detach())
    assert float(sigma[..., 1:].max()) <= 1e-6
    assert "SO(" in str(geotorch.SO(4))


class modrelu(nn.Module):  # as in both examples
    def __init__(self, features):
        super().__init__()
        self.b = nn.Parameter(torch.empty(features).uniform_(-0.01, 0.01))

    def forward(self, inputs):
        return torch.sign(inputs) * F.relu(torch.abs(inputs) + self.b)


class ExpRNNCell(nn.Module):
    def __init__(self, input_size, hidden_size, constrain, reset):
        super().__init__()
        self.recurrent_kernel = nn.Linear(hidden_size, hidden_size, bias=False)
        self.input_kernel = nn.Linear(input_size, hidden_size)
        self.nonlinearity = modrelu(hidden_size)
        constrain(self.recurrent_kernel)
        nn.init.kaiming_normal_(self.input_kernel.weight.data, nonlinearity="relu")
        reset(self.recurrent_kernel)

    def forward(self, input_, hidden):
        return self.nonlinearity(self.input_kernel(input_) + self.recurrent_kernel(hidden))


class Recurrent(nn.Module):
    def __init__(self, cell, hidden_size, outputs, every):
        super().__init__()
        self.rnn, self.hidden_size, self.every = cell, hidden_size, every
        self.lin = nn.Linear(hidden_size, outputs)

    def forward(self, inputs):
        hidden, outputs = inputs.new_zeros(inputs.shape[0], self.hidden_size), []
        with geotorch.parametrize.cached():
            for input_ in torch.unbind(inputs, dim=1):
                hidden = self.rnn(input_, hidden)
                outputs.append(self.lin(hidden) if self.every else hidden)
        return torch.stack(outputs, dim=1) if self.every else self.lin(hidden)


def groups(model, lr, lr_orth):
    orth = set(model.rnn.recurrent_kernel.parameters())
    rest = (p for p in model.parameters() if p not in orth)
    return [{"params": rest, "lr": lr}, {"params": list(orth), "lr": lr_orth}]


@pytest.mark.parametrize("rgd", [False, True])
def test_the_copying_problem(rgd):
    """Recall 3 of 8 digits after 4 steps, far better than a guess."""
    torch.manual_seed(0)
    n_classes, delay, length, hidden_size = 9, 4, 3, 32

    def torus(kernel):
        kernel.weight = kernel.parametrizations.weight[0].sample("torus")

    cell = ExpRNNCell(n_classes + 1, hidden_size, geotorch.orthogonal, torus)
    model = Recurrent(cell, hidden_size, n_classes, True)
    kernel, start = cell.recurrent_kernel, cell.recurrent_kernel.weight.detach().clone()
    if rgd:
        optim = torch.optim.SGD(groups(model, 1e-2, 1e-3))
    else:
        optim = torch.optim.Adam(groups(model, 1e-2, 1e-3))
    for _ in range(5 if rgd else 60):
        seq = torch.randint(1, n_classes, (32, length))
        zeros, marker = torch.zeros(32, delay, dtype=torch.long), torch.full((32, 1), n_classes)
        x = torch.cat([seq, zeros, marker, zeros[:, : length - 1]], 1)
        y = torch.cat([torch.zeros(32, length + delay, dtype=torch.long), seq], 1)
        logits = model(F.one_hot(x, n_classes + 1).float())
        loss = F.cross_entropy(logits.reshape(-1, n_classes), y.reshape(-1))
        optim.zero_grad()
        loss.backward()
        optim.step()
        if rgd:
            before = kernel.weight.detach().clone()
            geotorch.update_base(kernel, "weight")
            assert float((kernel.weight - before).abs().max().detach()) <= 1e-6
    assert orthonormal(kernel.weight)
    assert not torch.equal(kernel.weight, start)
    if not rgd:
        guess = length * math.log(8) / (2 * length + delay)
        assert float(loss.detach()) < 0.2 * guess  # observed 0.03 to 0.07 of it, over 8 seeds


@pytest.mark.parametrize("constraints", ["orthogonal", "lowrank", "almostorthogonal"])
def test_sequential_mnist(constraints):
    """Pixel by pixel; two classes of 4 x 4 images are told apart after some steps."""
    torch.manual_seed(0)
    hidden_size = 16

    def constrain(kernel):
        if constraints == "orthogonal":
            geotorch.orthogonal(kernel, "weight")
        elif constraints == "lowrank":
            geotorch.low_rank(kernel, "weight", hidden_size)
        else:
            geotorch.almost_orthogonal(kernel, "weight", 0.1, "scaled_sigmoid")

    def reset(kernel):
        def init_(x):
            x.uniform_(0.0, math.pi / 2.0)
            c = torch.cos(x.data)
            x.data = -torch.sqrt((1.0 - c) / (1.0 + c))

        kernel.weight = torus_init_(kernel.weight, init_=init_)
        assert orthonormal(kernel.weight)

    model = Recurrent(ExpRNNCell(1, hidden_size, constrain, reset), hidden_size, 2, False)
    optim = torch.optim.RMSprop(groups(model, 1e-2, 1e-3))
    x = torch.rand(32, 16, 1)
    y = (torch.rand(32) < 0.5).long()
    x[y == 1, 8:] *= 0.2
    losses = []
    for _ in range(20):
        optim.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optim.step()
        losses.append(float(loss.detach()))
    assert min(losses[10:]) < losses[0]
    sigma = torch.linalg.svdvals(model.rnn.recurrent_kernel.weight)
    width = {"orthogonal": 2e-6, "lowrank": 1.0, "almostorthogonal": 0.1 + 2e-6}[constraints]
    assert float((sigma - 1.0).abs().max().detach()) <= width


def test_verbs_as_their_docstrings_show():
    """Every verb, with positional arguments, and the property that its docstring prints."""

    def lin(n=20, k=30):
        return nn.Linear(n, k)

    w = geotorch.symmetric(lin(30), "weight").weight
    assert torch.allclose(w, w.T)
    w = geotorch.skew(lin(30), "weight").weight
    assert torch.allclose(w, -w.T)
    layer = lin()
    geotorch.sphere(layer, "bias")
    assert abs(float(torch.linalg.vector_norm(layer.bias).detach()) - 1.0) <= 1e-6
    geotorch.sphere(layer, "weight", 1.0, True)
    assert torch.allclose(torch.linalg.vector_norm(layer.weight, dim=-1), torch.ones(30))
    for verb in (geotorch.orthogonal, geotorch.grassmannian):
        assert orthonormal(verb(lin(), "weight", "cayley").weight)
        assert orthonormal(verb(nn.Conv2d(20, 40, 3, 3), "weight").weight)
    s = torch.linalg.svdvals(geotorch.almost_orthogonal(lin(), "weight", 0.5).weight)
    assert float(s.min().detach()) >= 0.5 - 1e-5
    assert float(s.max().detach()) <= 1.5 + 1e-5
    s = torch.linalg.svdvals(geotorch.low_rank(lin(), "weight", 4).weight)
    assert int((s > 1e-6).sum()) <= 4
    s = torch.linalg.svdvals(geotorch.fixed_rank(lin(), "weight", 5).weight)
    assert int((s > 1e-6).sum()) == 5
    assert torch.det(geotorch.invertible(lin(20, 20), "weight").weight.double()) > 0.0
    determinant = torch.det(geotorch.sln(lin(20, 20), "weight").weight.double())
    assert (
        abs(float(determinant.detach()) - 1.0) <= 1e-2
    )  # GeoTorch's own bound is 5e-3, on the logarithm
    values = torch.linalg.eigvalsh(geotorch.positive_definite(lin(20, 20), "weight").weight)
    assert bool((values > 0.0).all())
    for verb, rank in (
        (geotorch.positive_semidefinite, ()),
        (geotorch.positive_semidefinite_low_rank, (5,)),
        (geotorch.positive_semidefinite_fixed_rank, (5,)),
    ):
        values = torch.linalg.eigvalsh(verb(lin(20, 20), "weight", *rank).weight)
        assert float(values.min().detach()) >= -1e-6
        assert not rank or int((values > 1e-6).sum()) == 5
    w = geotorch.alpha_stable(lin(30), "weight", alpha=2).weight
    assert bool((torch.linalg.eigvals(w).real <= -2).all())


SPACES = [
    (geotorch.Rn, (5,)),
    (geotorch.Sym, (4,)),
    (geotorch.Skew, (4,)),
    (geotorch.Sphere, (5,)),
    (geotorch.SphereEmbedded, (5,)),
    (geotorch.SO, (4,)),
    (geotorch.St, (6, 3)),
    (geotorch.Gr, (6, 3)),
    (geotorch.AlmostOrthogonal, (6, 3), 0.2),
    (geotorch.GLp, (4,)),
    (geotorch.SL, (4,)),
    (geotorch.LowRank, (6, 4), 2),
    (geotorch.FixedRank, (6, 4), 2),
    (geotorch.PSD, (4,)),
    (geotorch.PSSD, (4,)),
    (geotorch.PSSDLowRank, (4,), 2),
    (geotorch.PSSDFixedRank, (4,), 2),
    (geotorch.Hurwitz, (4,), 0.5),
]


@pytest.mark.parametrize("case", SPACES, ids=lambda case: case[0].__name__)
def test_spaces_take_sizes_as_readme_and_signature_write_them(case):
    cls, letters, *rest = case
    square = len(letters) == 1 and "Sphere" not in cls.__name__ and cls is not geotorch.Rn
    size = torch.Size(letters * 2 if square else letters)
    assert next(iter(inspect.signature(cls).parameters)) == "size"
    names = list(inspect.signature(cls).parameters)
    M = cls(*letters, *rest)
    keywords = dict(zip(names, (torch.Size((2, *size)), *rest), strict=False))
    for space, shape in ((M, size), (cls(size, *rest), size), (cls(**keywords), (2, *size))):
        x = space.sample()
        assert x.shape == shape
        assert space.in_manifold(x)
        assert not space.in_manifold(x[None])
        coordinates = space.right_inverse(x)
        assert float((space(coordinates) - x).abs().max().detach()) <= 1e-5
        copied = pickle.loads(pickle.dumps(space)), copy.deepcopy(space)
        assert all(torch.equal(other(coordinates), space(coordinates)) for other in copied)
        if cls is not geotorch.Rn:
            with pytest.raises(ValueError, match="finite"):
                space.right_inverse(x * float("nan"))
            bad = torch.randn(shape) + (5.0 * torch.eye(shape[-1]) if square else 5.0)
            bad = bad.roll(1, -2) if cls is geotorch.GLp else bad
            assert not space.in_manifold(bad)
    # the example of every `sample`: a space is registered by hand, and a sample assigned
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(size))
    geotorch.parametrize.register_parametrization(layer, "weight", M)
    layer.weight = value = M.sample()
    assert float((layer.weight - value).abs().max().detach()) <= 1e-5
    assert layer.parametrizations.weight[0] is M


def test_samples_take_the_peers_arguments():
    def ones(x):
        x.fill_(0.5)

    rotation = geotorch.SO(4, "cayley").sample("torus", ones)
    assert abs(math.atan2(rotation[1, 0], rotation[0, 0]) - 2 * math.atan(0.25)) <= 1e-6
    assert geotorch.St(3, 6).sample("torus").shape == (3, 6)
    u, s, v = geotorch.LowRank(6, 4, 2).sample(factorized=True)
    assert (u.shape, s.shape, v.shape) == ((6, 2), (2,), (4, 2))
    values, vectors = geotorch.PSSDLowRank(4, 2).sample(factorized=True)
    assert (values.shape, vectors.shape) == ((2,), (4, 2))
    assert not geotorch.SO(3).in_manifold(-torch.eye(3), in_so=True)
    assert geotorch.SO(3).in_manifold(-torch.eye(3))
    assert torch.equal(geotorch.SO(3).right_inverse(2 * torch.eye(3), False), torch.zeros(3))
    x = torch.empty(5, 3, 3)
    assert uniform_init_(x) is x
    assert bool((torch.linalg.det(x) > 0).all())
    with pytest.raises(ValueError, match="square matrices"):
        torus_init_(torch.empty(3, 4))
    with pytest.raises(ValueError, match="no orthogonal matrix is a coordinate"):
        geotorch.Hurwitz(4, 0.5, triv="cayley")
    for error in ("InManifoldError", "NonSquareError", "RankError", "VectorError", "InverseError"):
        assert issubclass(getattr(geotorch.exceptions, error), ValueError)


def test_products_and_unsized_symmetric_matrices():
    product = geotorch.ProductManifold([geotorch.SO(3), geotorch.Sphere(4)])
    points = product[0].sample(), product[1].sample()
    values = product(product.right_inverse(points))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values, points, strict=True))
    symmetric = geotorch.Symmetric(lower=False)
    assert geotorch.Symmetric.in_manifold(symmetric(torch.randn(2, 3, 3)))
    with pytest.raises(ValueError, match="square"):
        symmetric(torch.randn(3, 4))
    for lower in (True, False):
        layer = nn.Linear(4, 4)
        w = layer.weight.detach().clone()
        geotorch.symmetric(layer, "weight", lower)
        expected = w.tril() + w.tril(-1).T if lower else w.triu() + w.triu(1).T
        assert torch.allclose(layer.weight, expected)
