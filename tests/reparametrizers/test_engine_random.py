"""Random sequences of what hands do to two models: every read and gradient is the cold map's."""

import copy
import random

import pytest
import torch
from torch import nn

import orthonet
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import OrthoWeight, Weight

D = torch.float64


def linear():
    return nn.Sequential(
        OrthoLinear(6, 6, dtype=D),
        nn.Tanh(),
        OrthoLinear(6, 6, dtype=D),
        OrthoLinear(6, 4, dtype=D),
    )


def convolutional(ranks):
    first, last = (OrthoConv2d(4, 4, 3, padding=1, ranks=ranks, dtype=D) for _ in range(2))
    return nn.Sequential(nn.Unflatten(1, (4, 4, 4)), first, nn.Tanh(), last, nn.Flatten())


NETS = {
    "linear": (linear, 6),
    "half": (lambda: convolutional("half"), 64),
    "free": (lambda: convolutional("free"), 64),
}


class Hands:
    """Two models with their optimizers, and what may be done to one of them."""

    def __init__(self, seed, make, size):
        self.random, self.size = random.Random(seed), size
        torch.manual_seed(seed)
        self.models = [make(), make()]
        self.optimizers = [torch.optim.Adam(m.parameters(), 1e-2, fused=True) for m in self.models]

    def x(self):
        return torch.randn(3, self.size, dtype=D)

    def one(self, found):
        return self.random.choice(list(found))

    def parameter(self, k):
        return self.one(self.models[k].parameters())

    def matrix(self, k):
        return self.one(m for m in self.models[k].modules() if isinstance(m, OrthoWeight))

    def accumulate(self, k):
        loss = self.models[k](self.x()).sin().sum()
        if loss.requires_grad:
            loss.backward()

    def step(self, k):
        self.optimizers[k].zero_grad()
        self.accumulate(k)
        self.optimizers[k].step()

    def step_on(self, k):
        self.accumulate(k)
        self.optimizers[k].step()

    def infer(self, k):
        with torch.inference_mode():
            self.models[k](self.x())

    def move(self, k):
        size = self.one([1e-9, 1e-3, 1.0])
        with torch.no_grad():
            for p in self.models[k].parameters():
                p.add_(torch.randn_like(p), alpha=size)

    def write(self, k):
        self.parameter(k).data.mul_(1.5).add_(0.01)

    def place(self, k):
        p = self.parameter(k)
        p.data = torch.randn_like(p)

    def replace(self, k):
        weight = self.matrix(k)
        weight.original = nn.Parameter(torch.randn_like(weight.original))

    def tie(self, k):
        mine, theirs = (
            [w for w in m.modules() if isinstance(w, OrthoWeight)]
            for m in (self.models[k], self.models[1 - k])
        )
        i = self.random.randrange(len(mine))
        mine[i].original = theirs[i].original

    def load(self, k):
        self.models[k].load_state_dict(self.models[1 - k].state_dict())

    def copy(self, k):
        self.models[k] = copy.deepcopy(self.models[k])
        self.optimizers[k] = torch.optim.SGD(self.models[k].parameters(), 0.1, momentum=0.9)

    def freeze(self, k):
        p = self.parameter(k)
        p.requires_grad_(not p.requires_grad)

    def project(self, k):
        layer = self.one(m for m in self.models[k] if hasattr(m, "project_"))
        layer.project_(layer.weight.detach() + 0.1 * torch.randn_like(layer.weight))

    def switch(self, k):
        weight = self.one(m for m in self.models[k].modules() if isinstance(m, Weight))
        weight.caching = not weight.caching

    def forget(self, k):
        orthonet.invalidate(self.one([None, self.models[k]]))

    def defer(self, k):
        with orthonet.defer_pullback():
            self.accumulate(k)
            self.accumulate(k)

    def check(self, done):
        for model in self.models:
            x = self.x()
            found, truth = results(model, x), None
            with orthonet.caching(False):
                truth = results(model, x)
            for ours, theirs in zip(found, truth, strict=True):
                torch.testing.assert_close(  # observed 1e-11
                    ours, theirs, rtol=1e-7, atol=1e-8, msg=lambda text: f"{done}: {text}"
                )


def results(model, x):
    """The output without and with gradients, and the gradients."""
    with torch.no_grad():
        plain = model(x)
    y = model(x)
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        return [plain, y]
    grads = torch.autograd.grad(y.sin().sum(), learning, allow_unused=True)
    return [plain, y, *(g for g in grads if g is not None)]


ACTIONS = sorted(name for name in vars(Hands) if not name.startswith("_"))
ACTIONS = [a for a in ACTIONS if a not in ("check", "matrix", "one", "parameter", "x")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("net", NETS)
def test_reads_are_those_of_the_cold_map(net, seed):
    hands, done = Hands(seed, *NETS[net]), []
    for _ in range(60):
        done.append((hands.one(ACTIONS), hands.random.randrange(2)))
        getattr(hands, done[-1][0])(done[-1][1])
        hands.check(done[-8:])


@pytest.mark.parametrize("net", NETS)
def test_second_derivatives_are_those_of_the_cold_map_where_a_parameter_is_frozen(net):
    torch.manual_seed(0)
    make, size = NETS[net]
    model, x = make(), torch.randn(3, size, dtype=D)

    def penalty(learning):
        slopes = torch.autograd.grad(model(x).sin().sum(), learning, create_graph=True)
        return torch.autograd.grad(sum(s.square().sum() for s in slopes), learning)

    for frozen in model.parameters():
        frozen.requires_grad_(False)
        learning = [p for p in model.parameters() if p.requires_grad]
        found = penalty(learning)  # it was refused: the frozen one was differentiated, too
        with orthonet.caching(False):
            truth = penalty(learning)
        # observed 6e-12 beside values of 1, the center being the point of the parameter to rounding
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        frozen.requires_grad_(True)
