"""The cache beside copies, threads, switches, and maps that write or draw."""

import copy
import gc
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import orthonet
from orthonet.errors import InPlaceEditWarning
from orthonet.layers import OrthoLinear
from orthonet.reparametrizers import Weight, register
from tests.reparametrizers.test_cache import (
    calls,
    loss,
    make,
    raw,
    same,
    symmetric,
    weight,
    x,
)

__all__ = ["make", "x"]  # fixtures


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_empty_and_is_independent(make, copied, x):
    layer = make()
    loss(layer, x).backward()
    twin = copied(layer)
    assert all(m._slot.current is None for m in twin.modules() if isinstance(m, Weight))
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        raw(twin).add_(torch.randn_like(raw(twin)))
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


def test_torch_save_of_the_module(make, x):
    layer, file = make(), io.BytesIO()
    before = layer(x)
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), before)


def test_a_shallow_copy_with_other_parameters(x):
    """As DataParallel makes its replicas."""
    layer = symmetric()
    before = layer.weight
    entry = layer.parametrizations.weight
    other = copy.copy(entry)
    vars(other)["_parameters"] = {"original": nn.Parameter(raw(layer).detach() + 1)}
    assert not torch.equal(other(), before)
    assert torch.equal(entry(), before)


def test_moving_average_of_a_model(x):
    results = []
    for cached in (True, False):
        layer = symmetric(cached)
        average = torch.optim.swa_utils.AveragedModel(
            layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        ).eval()
        step = torch.optim.SGD(layer.parameters(), 0.1)
        outputs = []
        for _ in range(5):
            loss(layer, x).backward()
            step.step()
            average.update_parameters(layer)
            with torch.no_grad():
                outputs.append(average(x))
        results.append(outputs)
    assert same(*results)


def test_it_is_freed_with_the_module_without_the_collector(make, x):
    layer = make()
    loss(layer, x).backward()
    kept = [m._slot.current for m in layer.modules() if isinstance(m, Weight)]
    alive = [weakref.ref(layer), *(weakref.ref(c.value) for c in kept if c)]
    assert len(alive) >= 2
    del kept
    gc.collect()
    gc.disable()
    try:
        del layer
        assert [ref() for ref in alive[1:]] == [None] * (len(alive) - 1)
    finally:
        gc.enable()


def test_memory_does_not_grow(x):
    gc.freeze()  # what other tests left is not looked at again and again
    try:
        layer = symmetric()
        step = torch.optim.SGD(layer.parameters(), 0.1)
        counts = []
        for _ in range(6):
            for _ in range(3):
                loss(layer, x).backward()
            step.step()
            step.zero_grad()
            gc.collect()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[2] == counts[-1] > 0


def test_servers_beside_a_training(make, x):
    layer, plain = make(), make(False)
    stop, errors = threading.Event(), []

    def serve():
        while not stop.is_set():
            time.sleep(1e-3)  # threads that never rest keep the training from its turn
            try:
                with torch.no_grad():
                    assert not layer(x).requires_grad
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (layer, plain)]
    try:
        for _ in range(15):
            for module, step in zip((layer, plain), steps, strict=True):
                step.zero_grad()
                loss(module, x).backward()
                step.step()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert same([*layer.parameters()], [*plain.parameters()])


def test_within_torchs_cached_block(make, x):
    """`cached()` adds nothing and breaks nothing."""
    layer = make()
    results = []
    for module in (layer, make(False)):
        step = torch.optim.SGD(module.parameters(), 0.1)
        with orthonet.cached():
            with torch.no_grad():
                module(x)
            for _ in range(3):
                step.zero_grad()
                loss(module, x).backward()
                if module is layer:
                    step.step()
                    twin = copy.deepcopy(module)
                    with torch.no_grad():
                        raw(twin).add_(torch.randn_like(raw(twin)))
                    assert not torch.equal(weight(twin), weight(module))
        results.append(module)
    assert orthonet.cached is parametrize.cached


def test_switches(x):
    layer = symmetric().eval()

    def computed() -> int:
        before = calls(layer)
        with torch.no_grad():
            layer(x), layer(x), layer(x)
        return calls(layer) - before

    assert computed() == 1
    with orthonet.caching(False):
        assert computed() == 3
        with orthonet.caching(True):
            assert computed() == 1
        assert computed() == 3
    orthonet.caching(False)
    try:
        assert computed() == 3
    finally:
        orthonet.caching(True)
    layer.parametrizations.weight.caching = False
    assert computed() == 3
    layer.parametrizations.weight.caching = True
    assert computed() == 1
    orthonet.invalidate(nn.Sequential(layer))
    assert computed() == 1
    orthonet.invalidate()
    assert computed() == 1


class Drawing(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


def test_a_random_map_is_not_kept(x):
    layer = register(nn.Linear(8, 8), "weight", Drawing())
    assert not torch.equal(layer.weight, layer.weight)
    layer.weight.sum().backward()
    assert raw(layer).grad is not None


def test_a_map_that_depends_on_other_tensors_is_not_kept(x):
    other = nn.Parameter(torch.ones(8, 8))

    class Closure(nn.Module):
        def forward(self, x):
            return x * other

    layer = register(nn.Linear(8, 8), "weight", Closure())
    layer.weight.sum().backward()
    assert other.grad is not None
    with torch.no_grad():
        other.mul_(2)
    assert torch.equal(layer.weight, raw(layer) * 2)


def test_parameters_of_the_map_itself_learn(x):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x

    results = []
    for cached in (True, False):
        torch.manual_seed(0)
        layer = register(nn.Linear(8, 8), "weight", Scale())
        layer.parametrizations.weight.caching = cached
        step = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(3):
            step.zero_grad()
            loss(layer, x).backward()
            step.step()
        results.append([*layer.parameters()])
        if cached:
            assert layer.weight is layer.weight
    assert same(*results)


def test_a_map_that_fails_leaves_the_parameters(x):
    layer = OrthoLinear(8, 8)
    original = raw(layer)
    with torch.no_grad():
        original[0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="finite"):
            layer(x)
        assert raw(layer) is original
    with torch.no_grad():
        original[0, 0] = 0.0
    layer(x).sum().backward()
    assert original.grad is not None


def test_memory_shared_with_other_processes_is_not_kept():
    layer = symmetric().eval().share_memory()
    with torch.no_grad():
        before = calls(layer)
        assert torch.equal(layer.weight, layer.weight)
        assert calls(layer) == before + 2


def test_writes_to_what_a_reader_got():
    layer = symmetric().eval()
    with torch.no_grad():
        expected = layer.weight.clone()
        layer.weight.zero_()
        with pytest.warns(InPlaceEditWarning, match="assign to it"):
            assert torch.equal(layer.weight, expected)
        layer.weight.data.normal_()  # seen where a write hits the entry that is looked at
        with pytest.warns(InPlaceEditWarning, match="assign to it"):
            assert torch.equal(layer.weight, expected)
        layer.weight.requires_grad_()
        assert not layer.weight.requires_grad


def test_a_parameter_shared_by_two_layers(x):
    one, two = symmetric(), symmetric()
    two.parametrizations.weight.original = one.parametrizations.weight.original
    plain = symmetric(False)
    two(one(x)).sum().backward()
    plain(plain(x)).sum().backward()
    torch.testing.assert_close(raw(one).grad, raw(plain).grad)


def test_sgd_on_several_threads_with_gradients(x):
    """Two threads that train one module at once (Hogwild) get each its gradient."""
    layer, plain = symmetric(), symmetric(False)
    threads = [
        threading.Thread(target=lambda: [loss(layer, x).backward() for _ in range(20)])
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(40):
        loss(plain, x).backward()
    torch.testing.assert_close(raw(layer).grad, raw(plain).grad, rtol=1e-4, atol=1e-5)
