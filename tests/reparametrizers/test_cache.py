"""The cold cache: a weight that is kept is the weight that would be computed, bit for bit.

It serves what the engine does not: maps of the user's own and the exponential map. The engine has
its own tests, in test_engine.py.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import orthonet
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import (
    POLAR_ORTHO_PARAMS,
    BatchedExponentialOrthogonalization,
    BatchedIdentity,
    OrthoParams,
    register,
)

# A map without a center.
COLD = OrthoParams(BatchedIdentity, BatchedExponentialOrthogonalization)


class Counting(nn.Module):
    """A smooth map onto symmetric matrices that counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.sign = 1.0
        self.calls = 0

    def forward(self, x):
        vars(self)["calls"] += 1
        value = self.sign * torch.sin(x + x.mT) + self.shift
        return 0.9 * value if self.training else value

    def right_inverse(self, x):
        return torch.asin((x / (0.9 if self.training else 1)).clamp(-1, 1)) / 2


def symmetric(cached: bool = True, n: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    layer = register(nn.Linear(n, n), "weight", Counting())
    layer.parametrizations.weight.caching = cached
    return layer


def orthogonal(cached: bool = True, n: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    layer = OrthoLinear(n, n, ortho_params=COLD)
    layer.parametrization.caching = cached
    return layer


def convolution(cached: bool = True, n: int = 8) -> nn.Module:
    torch.manual_seed(0)
    convolution = OrthoConv2d(2, 4, 2, padding=1, ortho_params=COLD)
    layer = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), convolution, nn.Flatten())
    layer[1].parametrization.caching = cached
    return layer


KINDS = {"registered": symmetric, "linear": orthogonal, "kernel": convolution}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def make(request):
    """A factory of one kind of module, with and without cache."""
    return request.param


@pytest.fixture
def x():
    return torch.randn(5, 8)


def raw(layer: nn.Module) -> torch.Tensor:
    return next(p for name, p in layer.named_parameters() if "original" in name)


def weight(layer: nn.Module) -> torch.Tensor:
    return (layer[1] if isinstance(layer, nn.Sequential) else layer).weight


def calls(layer: nn.Linear) -> int:
    return layer.parametrizations.weight[0].calls


def loss(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (layer(x) + 1).sin().pow(2).mean()


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def gradients(layer: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in layer.parameters()]


OPTIMIZERS = {
    "SGD for-loop": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam for-loop": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_without_cache_bit_for_bit(make, optimizer, x):
    results = []
    for cached in (True, False):
        layer = make(cached)
        step = optimizer(layer.parameters())

        def closure(layer=layer, step=step):
            step.zero_grad()
            value = loss(layer, x)
            value.backward()
            return value

        for _ in range(5 if make is convolution else 20):
            step.step(closure)
            with torch.no_grad():
                layer.eval()(x)
            layer.train()
        results.append([*layer.parameters(), weight(layer)])
    assert same(*results)


def test_computed_once_per_step_and_once_in_eval(x):
    layer = symmetric()
    step = torch.optim.SGD(layer.parameters(), 0.1)
    before = calls(layer)
    for _ in range(3):
        for _ in range(4):
            loss(layer, x).backward()
        with torch.no_grad():
            layer(x)
        step.step()
    assert calls(layer) - before == 3
    layer.eval()
    before = calls(layer)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(4)]
    assert calls(layer) - before == 1
    assert same(outputs[:1] * 3, outputs[1:])


def test_accumulated_gradients_are_those_without_cache(make):
    xs = torch.randn(8, 5, 8)
    results = []
    for cached in (True, False):
        layer = make(cached)
        for x in xs:
            loss(layer, x).backward()
        results.append(gradients(layer))
    assert same(*results)


def test_one_pull_back_for_many_reads(x):
    """The weight of a loop over time gets its gradient summed first, then pulled back once."""
    layer, plain = symmetric(), symmetric(False)
    passes = []
    original = raw(layer)
    original.register_hook(lambda grad: passes.append(1))
    for module in (layer, plain):
        h = x
        for _ in range(6):
            h = torch.tanh(module(h))
        h.sum().backward()
    assert passes == [1]
    assert layer.weight is layer.weight
    # the order of a sum of six terms; 1e-7 was seen
    torch.testing.assert_close(original.grad, raw(plain).grad, rtol=1e-5, atol=1e-6)


def test_hooks_of_a_parameter_run_once(make, x):
    results = []
    for cached in (True, False):
        layer = make(cached)
        raw(layer).register_hook(lambda grad: 2 * grad)
        seen = []
        raw(layer).register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(1))
        loss(layer, x).backward()
        assert seen == [1]
        results.append(gradients(layer))
    assert same(*results)


def test_no_grad_first_does_not_lose_the_gradient(make, x):
    layer, plain = make(), make(False)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    for module in (layer, plain):
        loss(module, x).backward()
    assert same(gradients(layer), gradients(plain))
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        weight(layer)
    loss(layer, x).backward()  # what inference mode left behind can be differentiated


def test_freezing_is_seen(make, x):
    layer = make()
    for p in layer.parameters():
        p.requires_grad_(False)
    assert not layer(x).requires_grad
    raw(layer).requires_grad_(True)
    loss(layer, x).backward()
    assert raw(layer).grad is not None


def test_two_losses_of_one_forward(make, x):
    results = []
    for cached in (True, False):
        layer = make(cached)
        y = layer(x)
        y.sum().backward(retain_graph=True)
        y.pow(2).sum().backward()
        results.append(gradients(layer))
    assert same(*results)


@pytest.mark.parametrize(
    "params", [None, COLD, POLAR_ORTHO_PARAMS], ids=["sine", "exponential", "polar"]
)
def test_an_old_graph_after_a_step(params, x):
    """It raises where the map depends on the parameter; else it gives the old gradient."""
    results = []
    for cached in (True, False):
        torch.manual_seed(0)
        layer = symmetric(cached) if params is None else OrthoLinear(8, 8, ortho_params=params)
        if params is not None:
            layer.parametrization.caching = cached
        y = layer(x)
        y.sum().backward(retain_graph=True)
        torch.optim.SGD(layer.parameters(), 0.1).step()
        if params is not None:
            with pytest.raises(RuntimeError, match="modified"):
                y.pow(2).sum().backward()
        else:
            y.pow(2).sum().backward()
        results.append(gradients(layer))
    # The engine's closed form at the center and the cold gradient of the polar factor: n = 8, some
    # ten operations an entry, so 1e2 units of 6e-8; 3e-7 was seen.
    for ours, plain in zip(*results, strict=True):
        exact = params is not POLAR_ORTHO_PARAMS
        torch.testing.assert_close(ours, plain, rtol=0, atol=0.0 if exact else 6e-6)


def test_gradient_of_a_gradient(make, x):
    """A gradient penalty and a Hessian-vector product."""
    results = []
    for cached in (True, False):
        layer = make(cached).double()
        point = x.double().requires_grad_()
        loss(layer, point)  # nothing of an earlier forward may be in the way
        (slope,) = torch.autograd.grad(loss(layer, point), point, create_graph=True)
        slope.pow(2).sum().backward()
        parameters = list(layer.parameters())
        grads = torch.autograd.grad(loss(layer, point), parameters, create_graph=True)
        second = torch.autograd.grad(
            sum(g.pow(2).sum() for g in grads), parameters, create_graph=True
        )
        third = torch.autograd.grad(sum(g.sum() for g in second), parameters)
        results.append([*gradients(layer), *second, *third])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)  # 1e-14 was seen


def test_gradgradcheck():
    layer = symmetric(n=3).double()

    def function(original, x):
        with torch.no_grad():
            raw(layer).copy_(original)
        w = layer.weight
        (g,) = torch.autograd.grad(F.linear(x, w).pow(2).sum(), raw(layer), create_graph=True)
        return g

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(raw(layer).detach().clone(), x), (x,))


CHANGES = {
    "in place": lambda layer, other: raw(layer).add_(1.0),
    "copy_": lambda layer, other: raw(layer).copy_(raw(other)),
    "data =": lambda layer, other: setattr(raw(layer), "data", raw(other).data.clone()),
    "data = strided": lambda layer, other: setattr(
        raw(layer), "data", raw(layer).data.as_strided(raw(layer).shape, raw(layer).mT.stride())
    ),
    "load_state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "load_state_dict, assign": lambda layer, other: layer.load_state_dict(
        other.state_dict(), assign=True
    ),
    "double": lambda layer, other: layer.double(),
    "vector_to_parameters": lambda layer, other: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(other.parameters()), layer.parameters()
    ),
    "raw write": lambda layer, other: raw(layer).data.mul_(1.5),
    "raw write of all": lambda layer, other: raw(layer).data.copy_(raw(other)),
    "numpy": lambda layer, other: raw(layer).numpy().__imul__(1.5),
    "reset": lambda layer, other: [
        m.reset_parameters() for m in layer.modules() if hasattr(m, "reset_parameters")
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(make, change, x):
    layer, other = make().eval(), make().eval()
    with torch.no_grad():
        raw(other).mul_(torch.randn(()).abs() + 2).add_(torch.randn_like(raw(other)))
        layer(x)
        change(layer, other)
        kept = weight(layer).clone()
        orthonet.invalidate(layer)
        assert torch.equal(kept, weight(layer))


ELSEWHERE = {
    "buffer written": lambda layer, stage: stage.shift.fill_(2.0),
    "buffer replaced": lambda layer, stage: setattr(stage, "shift", torch.ones(())),
    "attribute": lambda layer, stage: setattr(stage, "sign", -1.0),
    "mode": lambda layer, stage: layer.train(),
    "another stage": lambda layer, stage: register(layer, "weight", nn.Softplus()),
    "another stage, by torch": lambda layer, stage: parametrize.register_parametrization(
        layer, "weight", nn.Softplus()
    ),
    "assignment": lambda layer, stage: setattr(layer, "weight", torch.full((8, 8), 0.1)),
}


@pytest.mark.parametrize("change", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_change_elsewhere_is_seen(change):
    layer = symmetric().eval()
    with torch.no_grad():
        before = layer.weight.clone()
        change(layer, layer.parametrizations.weight[0])
        kept = layer.weight.clone()
        orthonet.invalidate(layer)
        assert torch.equal(kept, layer.weight)
        assert not torch.equal(kept, before)
