"""What forward reads from outside of the model must not change, and is part of the model."""

import array
import collections
import copy
import datetime
import gc
import io
import os
import random
import time
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.certify.graph.identity import fingerprint
from orthonet.errors import UncertifiableError


class Lambda(nn.Module):
    def __init__(self, function, state=None):
        super().__init__()
        self.function, self.state = function, state

    def forward(self, x):
        return self.function(self.state, x)


class Counter:
    n = 0


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Held:
    def __init__(self):
        self.n = 0

    def step(self):
        self.n += 1


def _count(owner):
    owner.n += 1


def _add(a):
    a += 1


def _generator():
    n = 0
    while True:
        n += 1
        yield n


GENERATOR = np.random.default_rng(0)
OWN = random.Random(0)
STATE = {
    "class attribute": (None, lambda s: _count(Counter)),
    "class attribute of the state": (Counter(), lambda s: _count(type(s))),
    "numpy": (np.zeros(1), _add),
    "deque": (collections.deque(), lambda s: s.append(1)),
    "array": (array.array("i"), lambda s: s.append(1)),
    "bytearray": (bytearray(), lambda s: s.append(1)),
    "slots": (Slotted(), _count),
    "object": (Held(), lambda s: s.step()),
    "ordered": (collections.OrderedDict(), lambda s: s.update({len(s): 1})),
    "counts": (collections.Counter(), lambda s: s.update("a")),
    "set": (set(), lambda s: s.add(len(s))),
    "iterator": (iter(range(10**6)), next),
    "generator": (_generator(), next),
    "file": (io.StringIO(), lambda s: s.write("a")),
    "random": (None, lambda s: random.random()),
    "random of its own": (OWN, lambda s: s.random()),
    "random of numpy": (None, lambda s: np.random.rand()),  # noqa: NPY002
    "generator of numpy": (None, lambda s: GENERATOR.random()),
    "environment": (None, lambda s: os.environ.get("LOUD")),
    "getenv": (None, lambda s: os.getenv("LOUD")),
    "clock": (None, lambda s: time.time()),
    "clock by name": (None, lambda s: perf_counter()),
    "date": (None, lambda s: datetime.datetime.now()),
    "file system": (None, lambda s: os.path.exists("/loud")),
    "threads": (None, lambda s: "loud" if torch.get_num_threads() > 999 else ""),
    "seed": (None, lambda s: "loud" if torch.initial_seed() == 77 else ""),
    "garbage": (None, lambda s: "loud" if gc.get_count()[0] > 10**6 else ""),
}


@pytest.mark.parametrize("name", STATE)
def test_hidden_state_is_refused(name):
    state, change = STATE[name]

    def forward(s, x):
        return x * 50.0 if change(s) == "loud" else x * 1.0

    with pytest.raises(UncertifiableError, match=r"forward must change no attribute|able to copy"):
        certify(Lambda(forward, state).eval(), torch.zeros(1, 2), lower=False)


def test_constants_of_all_kinds_are_allowed():
    state = {
        "numpy": np.ones(2),
        "deque": collections.deque([1]),
        "set": {1, 2},
        "module": nn.ReLU(),
        "lazy": nn.LazyLinear(2),
        "object": Held(),
        "class": Held,
        "function": torch.relu,
        "path": io.StringIO("a"),
        "numbers": random.Random(3),
    }
    model = Lambda(lambda s, x: s["module"](x) * float(s["numpy"][0]), state).eval()
    certificate = certify(model, torch.zeros(1, 2))
    assert certificate.constant.value == 1.0
    assert certificate.matches(model) and certificate.matches(copy.deepcopy(model))


def test_only_forward_must_not_read_the_clock():
    class Timed(nn.Linear):
        def fit(self):
            return time.time()

    assert certify(Timed(2, 2).eval(), torch.zeros(1, 2)).constant.value > 0


def test_modules_that_hold_each_other_are_read_once():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    a.others, b.others = [b], [a]
    model = Lambda(lambda s, x: s[0](x), [a, b]).eval()
    a.itself = {"a": a, "model": model}
    a.itself["itself"] = a.itself
    before = fingerprint(model)
    assert before == fingerprint(model)
    b.weight.data.add_(1.0)
    assert before != fingerprint(model)


class Listed(nn.Module):
    k = 1.0

    def __init__(self):
        super().__init__()
        self.blocks, self.linear = [nn.Linear(2, 2).eval()], nn.Linear(2, 2)
        self.linear.register_forward_hook(_hook_of([1.0], self))

    def forward(self, x):
        return self.linear(self.blocks[0](x)) * self.k

    def double(self):
        return 2.0


def _hook_of(factors, model):
    model.factors = lambda: factors  # the cell of the hook
    return lambda module, args, out: out * factors[0]


def _weight(model):
    model.blocks[0].weight.data.mul_(1000.0)


def _mode(model):
    model.blocks[0].train()


def _global_hook(model):
    return nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 10).remove


def _class(model):
    Listed.k = 1000.0
    return lambda: setattr(Listed, "k", 1.0)


def _method(model):
    before, Listed.forward = Listed.forward, lambda self, x: 50.0 * x
    return lambda: setattr(Listed, "forward", before)


def _closure(model):
    model.factors()[0] = 1000.0


CHANGES = {
    "module in a list": _weight,
    "mode of a module in a list": _mode,
    "closure of a hook": _closure,
    "class attribute": _class,
    "method": _method,
    "global hook": _global_hook,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_changed_outside_of_its_parameters_does_not_match(name):
    model = Listed().eval()
    certificate = certify(model, torch.zeros(1, 2), lower=False)
    assert certificate.matches(model)
    undo = CHANGES[name](model)
    try:
        assert not certificate.matches(model)
        with pytest.raises(ValueError, match="must be the one that was certified"):
            certificate.radius(model, torch.zeros(1, 2))
    finally:
        if callable(undo):
            undo()
