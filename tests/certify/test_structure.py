"""A model must be one function, however it is called: what a sample does not show, a graph does."""

import itertools
import math

import pytest
import torch
from torch import nn

from orthonet.certify import certify, local_bound, local_radius, mlp_bound
from orthonet.errors import UncertifiableError
from orthonet.layers import MaxMin, OrthoLinear


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.b, self.n, self.items = 0.0, 0, [0]
        self.register_buffer("state", torch.zeros(()))

    def forward(self, x):
        return self.function(self, x)


def steep(x):
    """Equal to x near the example and of slope 51 far from it."""
    return torch.relu(x - 30.0) * 50.0 + x


HOW_IT_IS_CALLED = {
    "one sample": lambda s, x: steep(x) if x.shape[0] == 1 else x,
    "gradients": lambda s, x: steep(x) if torch.is_grad_enabled() else x,
    "no gradients": lambda s, x: x if torch.is_grad_enabled() else steep(x),
    "gradients of the input": lambda s, x: steep(x) if x.requires_grad else x,
    "exported": lambda s, x: x if torch.compiler.is_exporting() else steep(x),
    "not exported": lambda s, x: steep(x) if torch.compiler.is_exporting() else x,
    "compiled": lambda s, x: steep(x) if torch.compiler.is_compiling() else x,
    "inference mode": lambda s, x: steep(x) if torch.is_inference_mode_enabled() else x,
    "an inference tensor": lambda s, x: steep(x) if x.is_inference() else x,
    "default dtype": lambda s, x: steep(x) if torch.get_default_dtype() == torch.float64 else x,
    "dtype of a new tensor": lambda s, x: steep(x) if torch.zeros(()).dtype == torch.float64 else x,
    "dtype of a number": lambda s, x: steep(x) if torch.tensor(1.0).dtype == torch.float64 else x,
    "threads": lambda s, x: x if torch.get_num_threads() == s.threads else steep(x),
    "one sample or gradients": lambda s, x: (
        steep(x) if (x.shape[0] == 1) != torch.is_grad_enabled() else x
    ),
    "one sample and gradients": lambda s, x: (
        steep(x) if x.shape[0] == 1 and torch.is_grad_enabled() else x
    ),
    "one sample and inference": lambda s, x: (
        steep(x) if x.shape[0] == 1 and torch.is_inference_mode_enabled() else x
    ),
    "a constant": lambda s, x: torch.relu(x - 30) * torch.tensor(5.0 + torch.is_grad_enabled()) + x,
    "one sample beside a large output": lambda s, x: torch.cat(
        [x * (5.0 if x.shape[0] == 1 else 1.0), torch.full_like(x, 1e9)], 1
    ),
    "without gradients inside": lambda s, x: (
        x + torch.no_grad()(lambda: torch.relu(x - 30.0) * torch.is_grad_enabled())() * 50.0
        if torch.is_grad_enabled()
        else x
    ),
}


@pytest.mark.parametrize("name", HOW_IT_IS_CALLED)
def test_branches_on_how_the_model_is_called_are_refused(name):
    model = Lambda(HOW_IT_IS_CALLED[name]).eval()
    model.threads = torch.get_num_threads()
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(model, torch.zeros(1, 4), lower=False)
    assert torch.get_num_threads() == model.threads
    assert torch.get_default_dtype() == torch.float32


BATCH_AS_A_VALUE = {
    "quotient": lambda s, x: x * (1 + x.shape[0] // 200),
    "maximum": lambda s, x: x * (torch.sym_max(x.shape[0], 500) / 500),
    "index": lambda s, x: x * (1 + torch.arange(x.shape[0]) // 200)[:, None].to(x.dtype),
    "sum of ones": lambda s, x: x * (1 + x.new_ones(x.shape[0], 1).sum(0) // 200),
    "cumulative sum": lambda s, x: x * (1 + torch.ones_like(x[:, :1]).cumsum(0) // 200),
    "number of entries": lambda s, x: x * (1 + x.numel() // 800),
    "remainder": lambda s, x: x * (1 + x.shape[0] % 1009 // 1000),
    "filled": lambda s, x: x * (1 + torch.full((1,), x.shape[0]) // 200),
    "square": lambda s, x: x * (1 + x.new_ones(x.shape[0], x.shape[0]).sum(1, True) // 200),
    "far part of the input": lambda s, x: x + torch.zeros_like(x)[200:].sum(0),
    "large branch": lambda s, x: steep(x) if x.shape[0] > 2**21 else x,
}


@pytest.mark.parametrize("name", BATCH_AS_A_VALUE)
def test_the_batch_size_enters_shapes_only(name):
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(Lambda(BATCH_AS_A_VALUE[name]).eval(), torch.zeros(1, 4), lower=False)


def test_shapes_may_hold_the_batch_size():
    def forward(s, x):
        h = x.new_zeros(x.shape[0], 4)
        h = torch.tanh(h @ torch.ones(4, 4)) + torch.zeros_like(x)
        rows = torch.ones(1, 4).expand(x.shape[0], 4)
        return (x.reshape(x.shape[0], 2, 2).view(x.shape[0], -1) + h) * rows

    found = certify(Lambda(forward).eval(), torch.zeros(1, 4))
    assert found.constant.value == pytest.approx(1.0, rel=1e-12)


def test_constants_may_be_made_on_the_device_of_the_input():
    """A trace answers `x.device` by itself, and all such models were refused."""
    model = Lambda(
        lambda s, x: (
            (x - torch.tensor([0.1, 0.2, 0.3], device=x.device))
            * torch.arange(1, 1 + x.shape[1], device=x.device, dtype=x.dtype)
        )
    ).eval()
    assert 3.0 <= certify(model, torch.zeros(1, 3), lower=False).lipschitz < 3.0 + 1e-9


def _set(module, name, value):
    setattr(module, name, value)


COUNTER, NUMBERS = [0], itertools.count()


def _global_counter(s, x):
    COUNTER[0] += 1
    return steep(x) if COUNTER[0] > 1000 else x


def _global_iterator(s, x):
    return steep(x) if next(NUMBERS) > 1000 else x


STATE = {
    "attribute": lambda s, x: (_set(s, "b", s.b + 1e-6), x * (1.0 + s.b))[1],
    "counter": lambda s, x: (_set(s, "n", s.n + 1), steep(x) if s.n > 1000 else x)[1],
    "list": lambda s, x: (s.items.append(0), steep(x) if len(s.items) > 1000 else x)[1],
    "buffer": lambda s, x: (s.state.data.add_(1e-6), x * (1.0 + s.state))[1],
    "global": _global_counter,
    "iterator": _global_iterator,
    "class": lambda s, x: (_set(type(s), "calls", getattr(type(s), "calls", 0) + 1), x)[1],
}


@pytest.mark.parametrize("name", STATE)
def test_a_forward_that_changes_anything_is_refused(name):
    try:
        with pytest.raises(UncertifiableError, match="certify: "):
            certify(Lambda(STATE[name]).eval(), torch.zeros(1, 4), lower=False)
    finally:
        if hasattr(Lambda, "calls"):
            del Lambda.calls


def test_a_cache_that_is_filled_once_is_not_state():
    def forward(s, x):
        if s.b == 0.0:
            s.b = 2.0
        return x * s.b

    assert certify(Lambda(forward).eval(), torch.zeros(1, 4)).constant.value == 2.0


RETURNED_TWICE = {
    "tuple": lambda s, x: (x.relu(),) * 2,
    "dict": lambda s, x: dict.fromkeys("ab", x.relu()),
    "nested": lambda s, x: (lambda y: {"a": [y], "b": ({"c": y}, None)})(x.relu()),
    "input": lambda s, x: (x, x),
    "aliases": lambda s, x: (lambda y: (y, y.view(y.shape[0], 2, 2)))(x.relu()),
}


@pytest.mark.parametrize("name", RETURNED_TWICE)
def test_an_output_counts_as_often_as_it_is_returned(name):
    found = certify(Lambda(RETURNED_TWICE[name]).eval(), torch.randn(4, 4))
    assert 2**0.5 <= found.constant.value <= 2**0.5 * (1 + 1e-12)
    assert found.lower.value >= 2**0.5 * (1 - 1e-9)
    assert len(found.outputs) == len(found.output_shapes) == 2
    assert [b.value for b in found.outputs] == [1.0, 1.0]


class Residual(nn.Sequential):
    def forward(self, x):
        return x + 10 * super().forward(x)


def _layers():
    return nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)


@pytest.mark.parametrize("kind", ["forward", "hook", "pre-hook", "instance", "inner", "leaf hook"])
def test_chains_are_read_only_where_they_are_chains(kind):
    torch.manual_seed(0)
    model = nn.Sequential(*_layers())
    if kind == "forward":
        model = Residual(*_layers())
    elif kind == "hook":
        model.register_forward_hook(lambda m, args, out: args[0] + 10 * out)
    elif kind == "pre-hook":
        model.register_forward_pre_hook(lambda m, args: (10 * args[0],))
    elif kind == "instance":
        model.forward = lambda x: 10 * x
    elif kind == "leaf hook":
        model[0].register_forward_hook(lambda m, args, out: 10 * out)
    else:
        model = nn.Sequential(nn.Linear(4, 4), Residual(*_layers()))
    model = model.eval()
    for bound in (mlp_bound, lambda m: local_bound(m, torch.zeros(4), 0.1)):
        with pytest.raises(UncertifiableError, match=r"without a forward or hooks|must be linear"):
            bound(model)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))  # read as a graph instead
    radius, label = local_radius(model, x), model(x).argmax()
    directions = torch.randn(2000, 4, generator=torch.Generator().manual_seed(4))
    inside = x + 0.999 * radius.float() * nn.functional.normalize(directions)
    assert 0 < radius < math.inf
    assert (model(inside).argmax(1) == label).all()
    assert not (model(x + 4 * (inside - x)).argmax(1) == label).all()  # observed: 1.1 to 3.2
    assert mlp_bound(nn.Sequential(nn.Sequential(*_layers())).eval()).constant.value > 0
    assert mlp_bound(nn.Sequential(OrthoLinear(4, 4), MaxMin()).eval()).constant.value > 0
