"""One pull-back for many micro-batches, and no gradient lost on the way."""

import threading

import pytest
import torch
from torch import nn

import orthonet
from tests.reparametrizers.test_cache import gradients, loss, make, orthogonal, raw, symmetric, x

__all__ = ["make", "x"]  # fixtures


def close(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        # the sum is pulled back instead of a sum of pull-backs; 1e-7 was seen
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_sum_is_pulled_back_once(make):
    xs = torch.randn(8, 5, 8)
    layer, plain = make(), make(False)
    passes = []
    raw(layer).register_hook(lambda grad: passes.append(1))
    for _ in range(2):  # accumulates across contexts as `backward` does
        with orthonet.defer_pullback():
            for x in xs:
                loss(layer, x).backward()
            assert raw(layer).grad is None or len(passes) == 1
        for x in xs:
            loss(plain, x).backward()
    assert passes == [1, 1]
    close(gradients(layer), gradients(plain))


def test_several_weights_of_one_parameter_in_one_context(x):
    """Between train and eval another weight is computed; both sums are pulled back."""
    layer, plain = symmetric(), symmetric(False)
    with orthonet.defer_pullback():
        loss(layer, x).backward()
        loss(layer.eval(), x).backward()
    loss(plain, x).backward()
    loss(plain.eval(), x).backward()
    close(gradients(layer), gradients(plain))


def test_nested_contexts_are_one(x):
    layer, plain = symmetric(), symmetric(False)
    with orthonet.defer_pullback():
        with orthonet.defer_pullback():
            loss(layer, x).backward()
        assert raw(layer).grad is None
    loss(plain, x).backward()
    close(gradients(layer), gradients(plain))


def test_a_forward_from_before_the_context(x):
    layer, plain = symmetric(), symmetric(False)
    early = loss(layer, x)
    with orthonet.defer_pullback():
        early.backward()
    late = loss(layer, x)
    with orthonet.defer_pullback():
        inside = loss(layer, x)
    late.backward()
    loss(layer, x).backward()
    for _ in range(3):
        loss(plain, x).backward()
    close(gradients(layer), gradients(plain))
    with pytest.raises(RuntimeError, match="the backward of a forward pass inside must be inside"):
        inside.backward()


def test_a_step_inside_is_refused(make, x):
    layer, other = make(), nn.Linear(2, 2)
    step = torch.optim.SGD(layer.parameters(), 0.1)
    before = raw(layer).detach().clone()
    with orthonet.defer_pullback():
        torch.optim.SGD(other.parameters(), 0.1).step()  # not concerned
        loss(layer, x).backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
        with pytest.raises(RuntimeError, match="SGD: step\\(\\) must come after the end of defer"):
            step.step()
    assert torch.equal(raw(layer), before)
    assert raw(layer).grad is not None
    step.step()


def test_a_change_in_place_inside_is_refused(x):
    layer = symmetric()

    def body():
        with orthonet.defer_pullback():
            loss(layer, x).backward()
            with torch.no_grad():
                raw(layer).add_(1.0)

    with pytest.raises(RuntimeError, match="has been modified in place since the forward pass"):
        body()
    torch.optim.SGD(layer.parameters(), 0.1).step()  # nothing waits any more
    loss(layer, x).backward()
    assert raw(layer).grad is not None


def test_what_waits_is_dropped_with_an_exception(x):
    layer, plain = symmetric(), symmetric(False)

    def body():
        with orthonet.defer_pullback():
            loss(layer, x).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert raw(layer).grad is None
    layer.zero_grad()
    loss(layer, x).backward()
    loss(plain, x).backward()
    assert torch.equal(raw(layer).grad, raw(plain).grad)


def test_uncached_weights_do_not_wait(x):
    plain = orthogonal(False)
    with orthonet.defer_pullback():
        loss(plain, x).backward()
        assert raw(plain).grad is not None


def test_derivatives_inside(x):
    """A penalty on the input gradient works; derivatives in the parameters are refused."""
    layer, plain = symmetric(), symmetric(False)
    point = x.clone().requires_grad_()
    for module in (layer, plain):
        with orthonet.defer_pullback():
            (slope,) = torch.autograd.grad(loss(module, point), point, create_graph=True)
            slope.pow(2).sum().backward()
    close(gradients(layer)[1:], gradients(plain)[1:])
    with orthonet.defer_pullback():
        with pytest.raises(RuntimeError, match="create_graph=True\\) must be outside"):
            torch.autograd.grad(loss(layer, point), layer.bias, create_graph=True)[
                0
            ].sum().backward(create_graph=True)
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(loss(layer, point), raw(layer))


def test_another_thread_does_not_wait(x):
    one, two = symmetric(), symmetric()
    found = []

    def other():
        loss(two, x).backward()
        found.append(raw(two).grad is not None)

    with orthonet.defer_pullback():
        loss(one, x).backward()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert raw(one).grad is None
    assert found == [True]
    assert raw(one).grad is not None
