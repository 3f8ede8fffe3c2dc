"""Random sequences of what hands do to two models: every read and gradient is the cold map's."""

import contextlib
import copy
import pickle
import random
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import orthonet
from orthonet import _torch, constraints
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


def mixed():
    """All maps; the cold cache beside the engine."""
    names = ["default", "qr", "cholesky_stable", "exp", "default_test", "polar"]
    net = nn.Sequential(*(OrthoLinear(4, 4, dtype=D, ortho_params=name) for name in names))
    net.insert(3, nn.Tanh())
    return net.append(constraints.orthogonal(nn.Linear(4, 4, dtype=D), "weight"))


NETS = {
    "linear": (linear, 6),
    "mixed": (mixed, 4),
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

    def anew(self, k, model):
        """Go on with this model, and an optimizer of its own."""
        self.models[k], learning = model, list(model.parameters())
        self.optimizers[k] = self.one(
            [
                lambda: torch.optim.SGD(learning, 0.1, momentum=0.9),
                lambda: torch.optim.AdamW(learning, 1e-2, foreach=True),
                lambda: torch.optim.Adam(learning, 1e-2, fused=True),
                lambda: torch.optim.Rprop(learning, 1e-2, maximize=True),
            ]
        )()

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

    def write_an_entry(self, k):
        p = self.parameter(k).detach()
        p.view(-1)[self.random.randrange(p.numel())] += 0.3

    def write_in_inference_mode(self, k):
        with torch.inference_mode():
            for p in self.models[k].parameters():
                p.add_(torch.randn_like(p), alpha=0.1)

    def write_a_vector(self, k):
        parameters = list(self.models[k].parameters())
        vector = nn.utils.parameters_to_vector(parameters).detach()
        nn.utils.vector_to_parameters(vector + 0.1 * torch.randn_like(vector), parameters)

    def exchange(self, k):
        mine, theirs = (list(m.parameters()) for m in (self.models[k], self.models[1 - k]))
        i = self.random.randrange(min(len(mine), len(theirs)))
        if mine[i].shape == theirs[i].shape:
            mine[i].data, theirs[i].data = theirs[i].data, mine[i].data

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
        self.anew(k, copy.deepcopy(self.models[k]))

    def pickle(self, k):
        self.anew(k, pickle.loads(pickle.dumps(self.models[k])))

    def average(self, k):
        average = AveragedModel(self.models[k])
        self.step(k)
        average.update_parameters(self.models[k])
        self.anew(k, average.module)

    def convert(self, k):
        dtype = self.one([torch.float32, torch.bfloat16])
        self.models[k].to(dtype)(self.x().to(dtype))
        self.models[k].to(D)

    def train(self, k):
        self.models[k].train(self.one([True, False]))

    def load_other_tensors(self, k):
        state = self.models[1 - k].state_dict()
        self.models[k].load_state_dict(
            state if self.one([True, False]) else copy.deepcopy(state), assign=True
        )
        self.anew(k, self.models[k])

    def load_in_the_step(self, k):
        state = copy.deepcopy(self.models[1 - k].state_dict())
        register = self.one(
            [self.optimizers[k].register_step_pre_hook, self.optimizers[k].register_step_post_hook]
        )
        handle = register(lambda *_: self.models[k].load_state_dict(state) and None)
        self.step(k)
        handle.remove()

    def skip(self, k):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        loss = self.models[k](self.x()).sin().sum() * self.one([1.0, torch.inf])
        self.optimizers[k].zero_grad()
        if loss.requires_grad:
            scaler.scale(loss).backward()
            if any(p.grad is not None for p in self.models[k].parameters()):
                scaler.step(self.optimizers[k])
        self.models[k].zero_grad(set_to_none=self.one([True, False]))

    def search(self, k):
        learning = [p for p in self.models[k].parameters() if p.requires_grad]
        if not learning:
            return
        optimizer, x = torch.optim.LBFGS(learning, 0.05, max_iter=2), self.x()

        def closure():
            optimizer.zero_grad()
            loss = self.models[k](x).sin().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def perturb_and_restore(self, k):
        before = [p.detach().clone() for p in self.models[k].parameters()]
        self.write(k)
        self.accumulate(k)
        for p, value in zip(self.models[k].parameters(), before, strict=True):
            p.data.copy_(value)
        self.optimizers[k].step()

    def interrupt(self, k):
        """A hook fails in the middle of the backward pass."""
        p = self.parameter(k)
        if not p.requires_grad:
            return
        handle = p.register_hook(lambda _: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            self.accumulate(k)
        handle.remove()

    def two_optimizers(self, k):
        learning = list(self.models[k].parameters())
        half = len(learning) // 2
        first, second = (torch.optim.SGD(ps, 0.05) for ps in (learning[:half], learning[half:]))
        self.accumulate(k)
        first.step()
        self.infer(k)
        second.step()

    def call(self, k):
        model, x = self.models[k], self.x()
        given = {n: p + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()}

        def loss(given):
            return torch.func.functional_call(model, given, (x,)).sin().sum()

        found = torch.func.grad(loss)({n: p.detach() for n, p in given.items()})
        with orthonet.caching(False):
            truth = torch.func.grad(loss)({n: p.detach() for n, p in given.items()})
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        loss(given)

    def map(self, k):
        xs = torch.randn(2, 3, self.size, dtype=D)
        torch.testing.assert_close(
            torch.func.vmap(self.models[k])(xs), torch.stack([*map(self.models[k], xs)])
        )

    def threads(self, k):
        failures = []

        def work(act, k):
            try:
                act(k)
            except Exception as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=pair)
            for pair in ((self.step_on, k), (self.infer, k), (self.infer, 1 - k))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures

    def twice(self, k):
        loss = self.models[k](self.x()).sin().sum()
        if loss.requires_grad:
            loss.backward(retain_graph=True)
            loss.backward()

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
ACTIONS = [a for a in ACTIONS if a not in ("anew", "check", "matrix", "one", "parameter", "x")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("net", NETS)
def test_reads_are_those_of_the_cold_map(net, seed):
    hands, done = Hands(seed, *NETS[net]), []
    for _ in range(60):
        done.append((hands.one(ACTIONS), hands.random.randrange(2)))
        getattr(hands, done[-1][0])(done[-1][1])
        hands.check(done[-8:])


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_fused_steps_of_any_length_are_seen_on_an_accelerator(net, monkeypatch):
    """They count no version up, and no entry is looked at there; tried on the CPU."""
    monkeypatch.setattr(_torch, "_entry", lambda tensor: None)
    make, size = NETS[net]
    for seed in range(6):
        torch.manual_seed(seed)
        model, chance = make(), random.Random(seed)
        parameters = list(model.parameters())
        for _ in range(12):
            kind = chance.choice([torch.optim.SGD, torch.optim.Adam])
            optimizer = kind(parameters, 10.0 ** chance.uniform(-9, -1), fused=True)
            if chance.random() < 0.2:  # with what gradient it has
                p = chance.choice(parameters)
                p.requires_grad_(not p.requires_grad)
            loss = model(torch.randn(3, size, dtype=D)).sin().sum()
            if loss.requires_grad:
                loss.backward()
            with orthonet.caching(chance.random() < 0.8):
                optimizer.step()
            x = torch.randn(3, size, dtype=D)
            found = results(model, x)
            with orthonet.caching(False):
                truth = results(model, x)
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)  # observed 2e-13


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
