"""What `orthonet._torch` says of torch, inside and outside of everything that it asks about."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from orthonet import _torch

KNOWS_EXPORT = hasattr(torch.compiler, "is_exporting")  # PyTorch 2.7 and newer
KNOWS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")

QUESTIONS = {
    "tracing": _torch.tracing,
    "in_transform": _torch.in_transform,
    "is_traced": _torch.is_traced,
    "in_forward_mode": _torch.in_forward_mode,
    "is_exporting": _torch.is_exporting,
    "has_dispatch_mode": _torch.has_dispatch_mode,
    "has_function_mode": _torch.has_function_mode,
    "not eager": lambda: not _torch.eager(),
}


YES: set = set()  # not an attribute of the module, which an export puts back


class Asks(nn.Module):
    """Notes which questions are answered by yes while it runs."""

    def forward(self, x):
        YES.clear()
        YES.update(["asked"], (name for name, question in QUESTIONS.items() if question()))
        return x * x


def plain(asks, x):
    return asks(x)


def inference(asks, x):
    with torch.inference_mode():
        return asks(x)


def autocast(asks, x):
    with torch.autocast("cpu", torch.bfloat16):
        return asks(x)


def default_device(asks, x):
    with torch.device("cpu"):
        return asks(x)


def jit_trace(asks, x):
    return torch.jit.trace(asks, x, check_trace=False)


def vmap(asks, x):
    return torch.vmap(asks)(x)


def grad(asks, x):
    return torch.func.grad(lambda t: asks(t).sum())(x)


def functional_jvp(asks, x):
    return torch.func.jvp(asks, (x,), (x,))


def dual_level(asks, x):
    with forward_ad.dual_level():
        return asks(x)


def dispatch_mode(asks, x):
    with FlopCounterMode(display=False):
        return asks(x)


def function_mode(asks, x):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        return asks(x)


def export(asks, x):
    return torch.export.export(asks, (x,), strict=False)


EXPORT = {"is_exporting"} if KNOWS_EXPORT else set()
SITUATIONS = {
    plain: set(),
    inference: set(),
    autocast: set(),
    default_device: set(),
    vmap: {"in_transform", "is_traced", "not eager"},
    grad: {"in_transform", "is_traced", "not eager"},
    functional_jvp: {"in_transform", "is_traced", "in_forward_mode", "not eager"},
    dual_level: {"in_forward_mode", "not eager"},
    dispatch_mode: {"has_dispatch_mode", "not eager"},
    function_mode: {"has_function_mode", "not eager"},
    export: {"is_traced", "has_dispatch_mode", "has_function_mode", "not eager"} | EXPORT,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # the first jvp of a process uses it
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
def test_what_watches_is_seen_and_forgotten(situation):
    asks, x = Asks(), torch.ones(2, 3)
    situation(asks, x)
    assert {"asked"} | SITUATIONS[situation] == YES
    asks(x)
    assert {"asked"} == YES


@pytest.mark.filterwarnings("ignore")  # the tracer is deprecated
def test_jit_trace_is_seen():
    asks, x = Asks(), torch.ones(2, 3)
    jit_trace(asks, x)
    assert {"asked", "tracing", "not eager"} == YES
    asks(x)
    assert {"asked"} == YES


def test_compiled_code_is_traced_and_no_transform():
    answers = []

    def f(x):
        if _torch.is_traced(x) and not _torch.in_transform(x):
            return x + 1
        return x - 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    answers.append(compiled(torch.zeros(2))[0].item())
    answers.append(f(torch.zeros(2))[0].item())
    assert answers == [1.0, -1.0]


def test_default_device_of_the_process_is_no_mode():
    torch.set_default_device("cpu")
    try:
        assert _torch.eager()
    finally:
        torch.set_default_device(None)


class Shows(torch.autograd.Function):
    """The identity; its backward notes what the stack and the gradient say of a transform."""

    seen = None

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        Shows.seen = _torch.in_transform(), _torch.in_transform(g), _torch.is_traced(g)
        return g


def test_a_vectorized_backward_shows_in_the_tensors_only():
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Shows.apply(x), x, torch.eye(3), is_grads_batched=True)
    stack, tensors, traced = Shows.seen
    assert tensors and traced and not stack
    torch.autograd.grad(Shows.apply(x), x, torch.ones(3))
    assert Shows.seen == (False, False, False)


def test_autocast_is_off_inside_and_as_before_after():
    x = torch.ones(2, 2)
    for where in (x, x.device):
        with torch.autocast("cpu", torch.bfloat16):
            with _torch.without_autocast(where):
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16
    assert isinstance(_torch.without_autocast(x), contextlib.nullcontext)
    with torch.autocast("cpu", torch.bfloat16), _torch.without_autocast(x.to("meta")):
        assert (x @ x).dtype == torch.bfloat16  # meta has no autocast to switch off


def test_autocast_is_off_inside_of_compiled_code():
    def f(x):
        with _torch.without_autocast(x):
            return x @ x

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(torch.ones(2, 2)).dtype == torch.float32


def test_run_backward_is_autograd_grad():
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(4, generator=generator).requires_grad_() for _ in range(3))
    outputs = (x * y, x.sin())
    given = tuple(torch.randn(4, generator=generator) for _ in outputs)
    expected = torch.autograd.grad(outputs, (x, y, z), given, retain_graph=True, allow_unused=True)
    for _ in range(2):  # the graph is retained
        found = _torch.run_backward(outputs, given, [x, y, z])
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
        assert found[2] is None
        assert x.grad is None and not found[0].requires_grad


def test_hooks_on_saved_tensors_are_seen():
    seen = []

    def ask(x):
        seen.append(_torch.has_saved_tensor_hooks())
        return x * x

    x = torch.ones(2, requires_grad=True)
    ask(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        ask(x)
    checkpoint(ask, x, use_reentrant=False)
    ask(x)
    # PyTorch 2.6 cannot tell
    assert seen == ([False, True, True, False] if KNOWS_HOOKS else [True] * 4)


def test_ddp_that_runs_is_found(tmp_path):
    class Asked(nn.Linear):
        def forward(self, x):
            seen.append(_torch.running_ddp())
            return super().forward(x)

    seen = []
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        replica = nn.parallel.DistributedDataParallel(Asked(2, 2))
        replica(torch.ones(1, 2))
        replica.module(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [replica, None]


@pytest.mark.filterwarnings("ignore:DTensor random")  # PyTorch 2.6 on the CPU
def test_shards_are_told_from_whole_tensors(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        shard = distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])
        assert _torch.is_shard(shard) and not _torch.is_shard(shard.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


def test_foreach_functions_are_loops():
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(n, generator=generator) for n in (2, 3)] for _ in range(2))
    norms = _torch.foreach_norm(a)
    assert all(torch.allclose(n, x.norm()) for n, x in zip(norms, a, strict=True))
    _torch.foreach_copy_(a, b)
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("register", "forward"),
    [
        ("register_forward_hook", True),
        ("register_forward_pre_hook", True),
        ("register_full_backward_hook", False),
        ("register_full_backward_pre_hook", False),
    ],
)
def test_hooks_of_a_module_are_seen(register, forward):
    module = nn.Linear(2, 2)
    assert not _torch.is_hooked(module, backward=True)
    handle = getattr(module, register)(lambda *_: None)
    assert _torch.is_hooked(module) is forward
    assert _torch.is_hooked(module, backward=True)
    handle.remove()
    assert not _torch.is_hooked(module, backward=True)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_conv_forward_is_the_module(mode):
    conv = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode)
    x = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    found = _torch.conv_forward(conv, x, conv.weight, conv.bias)
    assert torch.equal(found, conv(x))
    without = _torch.conv_forward(conv, x, 2.0 * conv.weight)
    assert torch.allclose(without, 2.0 * (conv(x) - conv.bias.view(-1, 1, 1)), atol=1e-5)


def test_conv_paddings_last_dimension_first():
    assert list(_torch.conv_paddings(nn.Conv2d(1, 1, 3, padding=(1, 2)))) == [2, 2, 1, 1]
    same = nn.Conv2d(1, 1, (4, 3), padding="same", padding_mode="circular")
    assert list(_torch.conv_paddings(same)) == [1, 1, 1, 2]
    _torch.set_conv_paddings(same, [1, 1, 2, 1])
    assert list(_torch.conv_paddings(same)) == [1, 1, 2, 1]
    x = torch.arange(24.0).view(1, 1, 4, 6)
    padded = F.pad(x, [1, 1, 2, 1], mode="circular")
    expected = F.conv2d(padded, same.weight, same.bias)
    assert torch.equal(same(x), expected)


def test_conv_output_padding_reaches_the_size():
    conv = nn.ConvTranspose2d(1, 1, 3, stride=2, output_padding=1)
    x = torch.ones(1, 1, 4, 4)
    assert list(_torch.conv_output_padding(conv, x, None)) == [1, 1]
    assert list(_torch.conv_output_padding(conv, x, [9, 10])) == [0, 1]
    with pytest.raises(ValueError, match="output size"):
        _torch.conv_output_padding(conv, x, [90, 90])


def test_hooks_around_forward_are_listed():
    module, calls = nn.Linear(2, 2), []
    before = module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    for hook in _torch.forward_hooks(module):
        hook()
    assert calls == ["before", "after"]
    before.remove()
    assert len(_torch.forward_hooks(module)) == 1
    assert sum(map(len, _torch.forward_hook_tables(module))) == 1
    assert not _torch.has_global_forward_hooks()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _torch.has_global_forward_hooks()
    finally:
        everywhere.remove()


def test_what_modules_keep_for_themselves():
    known = _torch.MODULE_ATTRIBUTES
    assert {"training", "_parameters", "_buffers", "_modules", "_forward_hooks"} <= known
    assert {name for name in vars(nn.LSTM(2, 2)) if name.startswith("_")} <= known
    assert "in_features" not in known


def test_tensors_in_nested_values():
    a, b = torch.zeros(1), torch.ones(2)
    found = _torch.tensors_in({"x": (a, 3), "y": [b, None, "z"]})
    assert found[0] is a and found[1] is b and len(found) == 2
    assert _torch.tensors_in(5) == []


ADD = torch.ops.aten.add


def test_operations_and_their_names():
    assert _torch.is_overload(ADD.Tensor) and not _torch.is_overload(ADD)
    assert not _torch.is_overload(torch.add)
    assert _torch.operation_name(ADD.Tensor) == _torch.operation_name(ADD) == "aten::add"
    assert _torch.operation_name(torch.add) is None
    assert _torch.overload_name(ADD.Tensor) == "add.Tensor"
    assert _torch.overload_name(torch.ops.aten.relu.default) == "relu.default"
    assert _torch.overload_name(torch.ops.prims.add.default) == "prims::add.default"
    assert _torch.overload_name(ADD) is _torch.overload_name(torch.add) is None
    assert _torch.operation_arguments(ADD.Tensor) == {
        "self": _torch.REQUIRED,
        "other": _torch.REQUIRED,
        "alpha": 1,
    }
    assert _torch.operation_arguments(torch.add) is None
    assert _torch.mutates(ADD.out) and _torch.mutates(torch.ops.aten.add_.Tensor)
    assert not _torch.mutates(ADD.Tensor) and not _torch.mutates(torch.add)


def test_nearest_exact_takes_the_pixel_at_the_center():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    wanted = F.interpolate(x, size=(4, 1), mode="nearest-exact")
    assert torch.equal(_torch.NEAREST_EXACT_2D(x, [4, 1], None, None), wanted)


def test_composite_operations_have_their_parts():
    relu6, x = torch.ops.aten.relu6.default, torch.linspace(-9.0, 9.0, 7)
    assert torch.equal(_torch.composite_of(relu6)(x), F.relu6(x))
    assert _torch.composite_of(ADD.Tensor) is None


def test_core_decompositions_compute_the_same():
    table = _torch.core_decompositions()
    x = torch.linspace(-3.0, 3.0, 7)
    silu = table[torch.ops.aten.silu.default]
    assert torch.allclose(silu(x), F.silu(x)) and ADD.Tensor not in table


def test_names_are_those_of_torch():
    assert _torch.NN_FUNCTIONS.gelu is F.gelu
    assert isinstance(nn.Conv1d(1, 1, 1), _torch.ConvNd)
    assert isinstance(nn.ConvTranspose3d(1, 1, 1), _torch.ConvNd)

    class Casts(_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with Casts():
        torch.ones(2).to(torch.float64)
    assert _torch.TO_COPY in seen


class TestPatched:
    def test_is_undone_also_after_an_exception(self):
        before, seen = dict(vars(F)), []

        def fail():
            with _torch.patched([vars(F), vars(F)], {F.relu: torch.neg, F.gelu: torch.neg}):
                seen.extend(f(torch.ones(1)).item() for f in (F.relu, F.gelu))
                seen.append(F.silu is before["silu"])
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert seen == [-1.0, -1.0, True] and dict(vars(F)) == before

    def test_is_seen_by_its_own_thread_only(self):
        found = []
        with _torch.patched([vars(F)], {F.relu: torch.neg}):
            other = threading.Thread(target=lambda: found.append(F.relu(torch.ones(1)).item()))
            other.start()
            other.join()
            found.append(F.relu(torch.ones(1)).item())
        assert found == [1.0, -1.0]

    def test_a_second_thread_waits(self):
        order, inside, name = [], threading.Event(), F.relu

        def second():
            inside.wait()
            with _torch.patched([vars(F)], {name: torch.neg}):
                order.append(("second", F.relu(torch.ones(1)).item()))

        thread = threading.Thread(target=second)
        thread.start()
        with _torch.patched([vars(F)], {name: torch.sin}):
            inside.set()
            thread.join(timeout=0.2)
            assert thread.is_alive()
            order.append(("first", F.relu(torch.zeros(1)).item()))
        thread.join()
        assert order == [("first", 0.0), ("second", -1.0)]
        assert F.relu is name

    def test_what_was_kept_is_the_original_later(self):
        with _torch.patched([vars(F)], {F.relu: torch.neg}):
            kept = F.relu
            assert kept(torch.ones(1)) == -1.0
        assert kept(torch.ones(1)) == 1.0


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_with_a_list(cls):
    layer, x = cls(2, 3), torch.randn(4, 1, 2)
    assert all(a is b for a, b in zip(_torch.flat_weights(layer), layer.parameters(), strict=True))
    before = layer(x)[0]
    for weight in _torch.flat_weights(layer):
        weight.data.mul_(2.0)
    assert not torch.equal(before, layer(x)[0])


def test_writes_to_a_tensor_are_counted():
    x = torch.zeros(2)
    before = _torch.version_of(x)
    x.add_(1.0)
    assert _torch.version_of(x) > before
    with torch.inference_mode():
        assert _torch.version_of(torch.zeros(2).add_(1.0)) == 0


def test_hooks_of_every_module_are_found():
    assert _torch.forward_hooks(None) == []
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(_hook)
        assert _torch.forward_hooks(None) == [_hook] and _torch.has_global_forward_hooks()
        handle.remove()
    assert _torch.forward_hooks(None) == [] and not _torch.has_global_forward_hooks()


def _hook(*args):
    return None
