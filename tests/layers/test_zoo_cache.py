"""Parametrizations of several tensors are computed once per step, like those of one."""

import copy

import pytest
import torch

from orthonet import caching
from orthonet.layers import make_conv, make_linear
from orthonet.reparametrizers import Weight

SAME = {"padding": "same", "padding_mode": "circular"}
LAYERS = {
    "soc": (lambda: make_conv("soc", 4, 4, 3, **SAME), (2, 4, 5, 6)),
    "cpl": (lambda: make_conv("cpl", 4, 4, 3, **SAME), (2, 4, 5, 6)),
    "sll": (lambda: make_conv("sll", 4, 4, 3, **SAME), (2, 4, 5, 6)),
    "cpl, linear": (lambda: make_linear("cpl", 4, 4), (2, 4)),
    "sll, linear": (lambda: make_linear("sll", 4, 4), (2, 4)),
    "cayley": (lambda: make_conv("cayley", 4, 4, 3, **SAME), (2, 4, 5, 6)),
    "bro": (lambda: make_conv("bro", 4, 4, 3, **SAME), (2, 4, 5, 6)),
    "lot, strided": (lambda: make_conv("lot", 4, 8, 3, 2, **SAME), (2, 4, 6, 4)),
    "sandwich, linear": (lambda: make_linear("sandwich", 4, 6), (2, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_several_tensors_are_computed_once_per_step(make, shape, monkeypatch):
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    parametrization = layer.parametrization
    assert isinstance(parametrization, Weight)
    counted, evaluate = [], type(parametrization).evaluate

    def count(self):
        counted.append(1)
        return evaluate(self)

    monkeypatch.setattr(type(parametrization), "evaluate", count)
    step = torch.optim.SGD(layer.parameters(), 0.1)
    for number in (1, 2, 3):
        step.zero_grad()
        for _ in range(2):  # two micro-batches
            layer(x).square().sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        assert len(counted) == number
        with caching(False):
            layer.zero_grad()
            (2 * layer(x).square().sum()).backward()
        for p, kept in zip(layer.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, kept, rtol=1e-10, atol=1e-12)  # observed 1e-15
        del counted[number:]
        step.step()
    layer.eval()
    with torch.no_grad():
        first = [layer(x) for _ in range(3)]
        assert len(counted) == 4
        with caching(False):
            assert torch.equal(layer(x), first[0]) and torch.equal(first[1], first[2])


def test_blocks_of_another_size_are_computed_anew():
    layer = make_conv("cayley", 4, 4, 3, **SAME).double().eval()
    images = [torch.randn(2, 4, *size, dtype=torch.float64) for size in ((5, 6), (6, 5), (5, 6))]
    with torch.no_grad():
        kept = [layer(x) for x in images]
        with caching(False):
            for x, y in zip(images, kept, strict=True):
                assert torch.equal(layer(x), y)
        layer.parametrization.original.mul_(2.0)
        twice = layer(images[-1])
    assert not torch.allclose(twice, kept[-1])
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(images[-1]), twice)
