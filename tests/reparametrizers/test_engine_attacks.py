"""What an attack on the engine has found: reads and gradients that were those of something else."""

import gc
import os
import signal
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import orthonet
from orthonet import _torch
from orthonet.errors import InPlaceEditWarning
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import OrthoKernel, OrthoWeight
from orthonet.reparametrizers.providers.engine import ENGINE

D = torch.float64


def cold(function):
    with orthonet.caching(False):
        return function()


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=str)
def test_a_read_without_gradients_between_two_with(sizes):
    layers = [OrthoLinear(*sizes, dtype=D) for _ in range(3)]
    layers[0].requires_grad_(False)
    first = layers[1].weight
    with torch.no_grad():
        assert torch.equal(layers[1].weight, first)
    assert torch.equal(layers[1].weight, first)


def test_tied_factors_of_kernels():
    kernels = [OrthoConv2d(4, 4, k, dtype=D) for k in (3, 5, 3, 3)]
    first, last = kernels[0].parametrization, kernels[3].parametrization
    last.outer.original = first.outer.original
    for kernel in kernels:
        torch.testing.assert_close(kernel.weight, cold(lambda k=kernel: k.weight))


def test_a_hook_inside_of_a_weight_that_the_cold_cache_keeps():
    weight = OrthoWeight((4, 4), "exp", dtype=D)
    value = weight().detach()
    handle = weight.orthogonalizer.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(weight().detach(), 2 * value)
    handle.remove()
    torch.testing.assert_close(weight().detach(), value)


def test_a_hook_of_a_factor_of_a_kernel_runs():
    kernel = OrthoConv2d(4, 4, 1, dtype=D)
    value = kernel.weight.detach()
    handle = kernel.parametrization.outer.register_forward_hook(lambda module, args, out: -out)
    torch.testing.assert_close(kernel.weight.detach(), -value)  # it was not asked
    handle.remove()
    torch.testing.assert_close(kernel.weight.detach(), value)


def test_kernels_that_share_their_only_matrix():
    one, two = (OrthoConv2d(4, 4, 3, dtype=D) for _ in range(2))
    two.parametrization.outer.original = one.parametrization.outer.original
    x, parameters = torch.randn(2, 4, 5, 5, dtype=D), [*one.parameters(), *two.parameters()]

    def gradients():
        return torch.autograd.grad(two(one(x)).sin().sum(), parameters)

    for ours, theirs in zip(gradients(), cold(gradients), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "make", [lambda: OrthoLinear(4, 4, dtype=D), lambda: OrthoConv2d(4, 4, 3, dtype=D)]
)
def test_second_derivatives_of_one_parameter_in_two_weights_of_a_batch(make):
    one, two = make(), make()
    for mine, theirs in zip(
        one.parametrization.modules(), two.parametrization.modules(), strict=True
    ):
        if isinstance(mine, OrthoWeight):
            theirs.original = mine.original
    parameters = list(one.parametrization.parameters())

    def penalty():
        loss = (one.weight.sin() * two.weight.cos()).sum()
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        return [*slopes, *torch.autograd.grad(sum(s.square().sum() for s in slopes), parameters)]

    for ours, theirs in zip(penalty(), cold(penalty), strict=True):  # it was counted twice
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("read", [torch.no_grad, orthonet.defer_pullback])
@pytest.mark.parametrize(
    "make", [lambda: OrthoLinear(4, 4, dtype=D), lambda: OrthoConv2d(4, 4, 3, dtype=D)]
)
def test_weights_of_a_batch_that_begin_to_learn_one_after_the_other(make, read, order):
    layers = [make(), make()]
    with read():  # together
        _ = [layer.weight for layer in layers]
    for layer in layers:
        layer.requires_grad_(False)
    assert not any(layer.weight.requires_grad for layer in layers)
    for i in order:
        layers[i].requires_grad_(True)
        layers[i].weight.sin().sum().backward()
        assert all(p.grad is not None for p in layers[i].parametrization.parameters())


SAME_BATCH = {
    "square": lambda: OrthoLinear(6, 6, dtype=D),
    "tall": lambda: OrthoLinear(6, 4, dtype=D),
    "kernel": lambda: OrthoConv2d(4, 4, 3, dtype=D, ranks="free"),
}


@pytest.mark.parametrize("change", ["tie", "call", "scores", "part"])
@pytest.mark.parametrize("make", SAME_BATCH.values(), ids=SAME_BATCH)
def test_parameters_of_another_weight_of_the_same_batch(make, change):
    def gradients():
        return torch.autograd.grad(a.weight.sin().sum(), list(a.parameters())[1:])

    a, b = make(), make()
    mine, theirs = a.parametrization, b.parametrization
    own, other = (list(weight.parameters())[-1] for weight in (mine, theirs))
    for layer in (a, b):
        layer.weight.sum().backward()  # both are read together, with gradients and without
        with torch.no_grad():
            layer.weight  # noqa: B018
    if change == "call":
        given = dict(theirs.named_parameters())
        torch.testing.assert_close(functional_call(mine, given, ()), b.weight)
    elif change == "tie":
        for part in mine.modules():
            part._parameters.update({n: other for n, p in part._parameters.items() if p is own})
    elif hasattr(mine, "scores") and change == "part":
        mine.bases = theirs.bases
    elif hasattr(mine, "scores"):
        flipped = {"scores": nn.Parameter(-theirs.scores.detach())}
        torch.testing.assert_close(
            functional_call(mine, flipped, ()), cold(lambda: functional_call(mine, flipped, ()))
        )
        mine.scores = flipped["scores"]
    torch.testing.assert_close(a.weight, cold(lambda: a.weight))
    for found, truth in zip(gradients(), cold(gradients), strict=True):
        torch.testing.assert_close(found, truth)


def test_a_new_weight_at_the_place_of_a_freed_one():
    for _ in range(20):
        one, two = OrthoWeight((6, 6), dtype=D), OrthoWeight((6, 6), dtype=D)
        one(), two()
        del one
        three = OrthoWeight((6, 6), dtype=D)
        three.original = two.original
        assert torch.equal(three(), two())


def test_writes_through_data_to_a_value_that_was_read():
    layer = OrthoLinear(8, 8, dtype=D)
    expected = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.data.zero_()
        with pytest.warns(InPlaceEditWarning):
            torch.testing.assert_close(layer.weight, expected)


def test_a_value_changed_in_place_before_backward_is_refused():
    layer = OrthoLinear(8, 4, dtype=D)
    loss = (layer.weight * torch.randn(4, 8, dtype=D)).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_subclasses_compute_what_they_say():
    class Half(OrthoWeight):
        def evaluate(self):
            return 0.5 * super().evaluate()

    class HalfKernel(OrthoKernel):
        def evaluate(self):
            return 0.5 * super().evaluate()

    weight = Half((4, 4), dtype=D)
    torch.testing.assert_close(torch.linalg.svdvals(weight()), torch.full((4,), 0.5, dtype=D))
    kernel = HalfKernel(4, 4, (3, 3), (1, 1), dtype=D)
    torch.testing.assert_close(kernel(), cold(kernel))


def test_a_constructor_that_fails_leaves_the_others():
    def refuse(shape):
        raise RuntimeError("no")

    kept = []
    for make in (
        lambda: OrthoConv2d(2, 2, 3, ranks="bad"),
        lambda: OrthoWeight((3, 3), orthonet.OrthoParams(orthogonalizer=refuse)),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            make()
        kept.append(caught.value)
    layer = OrthoConv2d(4, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, cold(lambda: layer.weight), rtol=0, atol=1e-5)


def test_deferring_concerns_its_own_weights_only():
    a, b = OrthoLinear(8, 8, dtype=D), OrthoLinear(8, 8, dtype=D)
    x = torch.randn(4, 8, dtype=D)
    step = torch.optim.SGD(b.parameters(), 0.1)
    b(x).sum().backward()
    with orthonet.defer_pullback():
        a(x).sum().backward()
        step.step()
        with torch.no_grad():
            b.parametrization.original.mul_(2.0)
    assert a.parametrization.original.grad is not None


def test_vectorized_derivatives():
    layer = OrthoLinear(6, 6, dtype=D)
    x = torch.randn(3, 6, dtype=D, requires_grad=True)
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(layer, x))


def test_a_step_that_leaves_no_gradient_behind(monkeypatch):
    monkeypatch.setattr("orthonet._torch._entry", lambda tensor: None)  # as on an accelerator
    layer = OrthoLinear(8, 8, dtype=D)

    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-0.3)
                    p.grad = None

    optimizer = Clearing(layer.parameters(), 0.3)
    for _ in range(2):
        layer(torch.randn(4, 8, dtype=D)).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(layer.weight, cold(lambda: layer.weight))


@pytest.mark.parametrize("way", ["whole step", "switched off", "interrupted", "frozen"])
@pytest.mark.parametrize("make", [lambda: OrthoLinear(8, 8), lambda: OrthoConv2d(4, 4, 3)])
def test_a_small_step_without_a_trace(make, way, monkeypatch):
    """So small that the matrix stays centered to rounding: nothing is written, and no entry seen.

    Fused optimizers do not count the version up, and on an accelerator no entry is looked at.
    """
    monkeypatch.setattr(_torch, "_entry", lambda tensor: None)

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise KeyboardInterrupt

    layer = make()
    kind = Interrupted if way == "interrupted" else torch.optim.SGD
    optimizer = kind(layer.parameters(), 1e-5, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        before = layer.weight.detach().clone()
        (100.0 * layer.weight.sin()).sum().backward()
        layer.requires_grad_(way != "frozen")  # the gradient stays, and moves it
        with orthonet.caching(way != "switched off"):
            try:
                optimizer.step()
            except KeyboardInterrupt:
                assert way == "interrupted"
        found, truth = layer.weight.detach(), cold(lambda: layer.weight.detach())
        assert (truth - before).abs().max() > 1e-4
        # it was as far off as the step was long; now observed 5e-7, the rounding of float32
        torch.testing.assert_close(found, truth, rtol=0, atol=5e-6)
        layer.requires_grad_()


def test_readers_beside_a_thread_that_invalidates():
    net, other = OrthoLinear(8, 8), OrthoLinear(8, 8)
    stop, errors = threading.Event(), []

    def read():
        try:
            while not stop.is_set():
                assert bool(net.weight.isfinite().all())
        except (IndexError, KeyError, AttributeError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(300):
        orthonet.invalidate(other if i % 2 else net)
        other.weight  # noqa: B018
        OrthoLinear(8, 8)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_kernel_of_which_a_factor_moves_while_it_is_found(monkeypatch):
    kernel = OrthoConv2d(4, 4, 3, dtype=D).parametrization
    expected, find = cold(kernel).detach(), ENGINE._find

    def moved(weight, look=True):
        found = find(weight, look)
        if weight is kernel:
            with torch.no_grad():
                kernel.outer.original.add_(0.1)  # as an optimizer in another thread does
        return found

    monkeypatch.setattr(ENGINE, "_find", moved)
    torch.testing.assert_close(kernel(), expected)
    monkeypatch.undo()
    torch.testing.assert_close(kernel(), cold(kernel))


def test_kernels_whose_scores_are_made_in_inference_mode():
    kernel = OrthoKernel(4, 4, (3, 3), (1, 1), dtype=D, ranks="free")
    with torch.inference_mode():
        kernel.scores = nn.Parameter(kernel.scores.clone())
        torch.testing.assert_close(kernel(), cold(kernel))


def test_kernels_that_share_a_batch_in_inference_mode():
    kernels = [OrthoConv2d(4, 4, k, dtype=D) for k in (3, 5, 3)]  # the first and the last are one
    with torch.inference_mode():
        for kernel in kernels:
            torch.testing.assert_close(kernel.weight, cold(lambda k=kernel: k.weight))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_beside_a_thread_that_looks_at_parameters():
    layer, held = OrthoLinear(4, 4), threading.Event()

    def look():
        with ENGINE.lock:
            held.set()
            threading.Event().wait(0.2)

    thread = threading.Thread(target=look)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: threads are running
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # it waited for ever
        good = bool(layer.weight.isfinite().all())
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


def test_resuming_beside_a_frozen_twin_of_the_same_shape():
    import copy

    def start(state=None):
        torch.manual_seed(0)
        net, twin = OrthoLinear(8, 8), OrthoLinear(8, 8).requires_grad_(False)
        if state is not None:
            net.load_state_dict(state)
        return net, twin

    def run(net, twin):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for i in range(3):
            optimizer.zero_grad()
            (
                net(torch.full((2, 8), 0.1 * (i + 1))) - twin(torch.ones(2, 8))
            ).square().sum().backward()
            optimizer.step()
        return net.parametrization.original.detach().clone()

    net, twin = start()
    run(net, twin)
    state = copy.deepcopy(net.state_dict())
    end = run(net, twin)
    gc.collect()
    assert torch.equal(run(*start(state)), end)


def test_scales_whose_squares_leave_the_range():
    torch.manual_seed(0)
    for scale in (1e-30, 5e-21, 1e-19, 1e-15, 1e15, 1e19, 1e30):
        for shape in ((2, 1), (3, 3), (1, 4)):
            weight = OrthoWeight(shape)
            with torch.no_grad():
                weight.original.mul_(scale)
                s = torch.linalg.svdvals(weight().double())
                assert float((s - 1).abs().max()) <= 2e-6


# ------------------------------------------------------------------ compiled


@pytest.fixture
def compiler():
    torch.compiler.reset()
    return lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=str)
def test_hooks_of_parameters_run_once_when_compiled(compiler, sizes):
    layer = OrthoLinear(*sizes, dtype=D)
    calls = []
    layer.parametrization.original.register_hook(lambda g: calls.append(1) or 2 * g)
    x = torch.randn(4, 8, dtype=D, requires_grad=True)
    layer(x).sin().sum().backward()
    eager = layer.parametrization.original.grad.clone()
    layer.zero_grad()
    compiler(layer)(x).sin().sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(layer.parametrization.original.grad, eager)


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=str)
def test_compiled_functional_calls_use_what_they_are_given(compiler, sizes):
    layer, other = OrthoLinear(*sizes, dtype=D), OrthoLinear(*sizes, dtype=D)
    x = torch.randn(4, 8, dtype=D, requires_grad=True)
    given = dict(other.named_parameters())
    compiled = compiler(lambda given, x: functional_call(layer, given, (x,)))
    torch.testing.assert_close(compiled(given, x), other(x))
    found = torch.autograd.grad(compiled(given, x).sin().sum(), list(given.values()))
    truth = torch.autograd.grad(other(x).sin().sum(), list(other.parameters()))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_that_the_graph_changes(compiler):
    layer, step = OrthoLinear(8, 4, dtype=D), torch.randn(4, 8, dtype=D)

    def function(x):
        with torch.no_grad():
            layer.parametrization.original.add_(step)
        return layer(x)

    x = torch.randn(2, 8, dtype=D)
    found = compiler(function)(x)
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=str)
def test_an_old_compiled_graph_is_refused(compiler, sizes):
    layer = OrthoLinear(*sizes, dtype=D)
    y = compiler(layer)(torch.randn(4, 8, dtype=D, requires_grad=True))
    with torch.no_grad():
        layer.parametrization.original.normal_()
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("sizes", [(8, 4), (8, 8)], ids=str)
def test_freezing_between_compiled_forward_and_backward(compiler, sizes):
    layer = OrthoLinear(*sizes, dtype=D)
    x = torch.randn(4, 8, dtype=D, requires_grad=True)
    y = compiler(layer)(x)
    layer.parametrization.original.requires_grad_(False)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, sizes[1], dtype=D) @ layer.weight)


def test_two_layers_share_compiled_code(compiler):
    count = []

    def backend(graph, inputs):
        count.append(1)
        return graph.forward

    a, b = OrthoLinear(8, 4), OrthoLinear(8, 4)
    x = torch.randn(4, 8)
    compiled = torch.compile(lambda layer, x: layer(x), backend=backend, fullgraph=True)
    for layer in (a, b):
        torch.testing.assert_close(
            compiled(layer, x), nn.functional.linear(x, layer.weight, layer.bias)
        )
    assert len(count) <= 2
