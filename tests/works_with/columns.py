"""The columns: what people do to a model, each as a function of a row that raises if it fails."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from orthonet.certify import certify
from orthonet.constraints import update_base
from orthonet.convert import to_plain
from orthonet.errors import ProjectionWarning
from orthonet.testing import jacobian, laws
from tests.references import RoundedWeights
from tests.works_with.rows import Row, excess

__all__ = ["COLUMNS", "Column"]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # observed 1.2e-6 in float32
HOLDS = 2e-5  # of the norm above its bound in float32; observed 2.3e-6


class Column(NamedTuple):
    """A title for the page, what exactly is tested, and the function."""

    title: str
    tested: str
    check: Callable[[Row], None]
    slow: bool


COLUMNS: dict[str, Column] = {}


def column(title: str, *, slow: bool = False) -> Callable[[Any], Any]:
    def register(check: Callable[[Row], None]) -> Callable[[Row], None]:
        tested = " ".join((check.__doc__ or "").split())
        COLUMNS[check.__name__] = Column(title, tested, check, slow)
        return check

    return register


def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.eval()(x)


def train(layer: nn.Module, row: Row, steps: int = 3, **options: Any) -> None:
    step = torch.optim.AdamW(layer.parameters(), 0.02, **options)
    layer.train()
    for _ in range(steps):
        step.zero_grad()
        (layer(row.input()) - 1.0).square().mean().backward()
        step.step()


def gradients(layer: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in layer.parameters()]


def same_gradients(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)  # float64


@column("`.double()`, `.bfloat16()`, `.half()`")
def dtypes(row: Row) -> None:
    """The output has the dtype, is right to its precision, and stays finite after a step."""
    laws.assert_dtype_is_followed(row.make, row.shape)
    layer = row.make().double()
    if row.group == "constraint":
        update_base(layer)  # which was rounded to float32 before
    assert excess(row, layer) <= 1e-10  # observed 2.2e-15


@column("autocast, bfloat16 and float16")
def autocast(row: Row) -> None:
    """The constrained weight has the bits that it has without autocast; training keeps it."""
    laws.assert_autocast_is_safe(row.make, row.shape)
    for dtype in (torch.bfloat16, torch.float16):
        layer = row.make()
        step = torch.optim.SGD(layer.parameters(), 0.05)
        for _ in range(2):
            step.zero_grad()
            with torch.autocast("cpu", dtype):
                y = layer(row.input())
            (y.float() - 1.0).square().mean().backward()
            step.step()
        assert excess(row, layer) <= HOLDS
        assert all(p.dtype == torch.float32 for p in layer.parameters())


@column("AdamW with weight decay")
def weight_decay(row: Row) -> None:
    """Three steps with a weight decay of 10 %: the constraint holds and all is finite."""
    for fused in (False, True):
        layer = row.make()
        train(layer, row, weight_decay=5.0, fused=fused)
        assert all(bool(p.isfinite().all()) for p in layer.parameters())
        assert excess(row, layer) <= HOLDS


@column("`copy.deepcopy`")
def deepcopy(row: Row) -> None:
    """The copy gives the same bits, and training it leaves the original alone."""
    laws.assert_deepcopy_is_independent(row.make, row.shape)


@column("`AveragedModel` (EMA, SWA)")
def averaged(row: Row) -> None:
    """The average of the raw parameters keeps the constraint and follows the model."""
    layer = row.make()
    for options in ({"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {}):
        average = AveragedModel(layer, **options)
        before = evaluated(average, row.input())
        train(layer, row)
        average.update_parameters(layer)
        train(layer, row)
        average.update_parameters(layer)
        after = evaluated(average, row.input())
        assert excess(row, average.module) <= HOLDS
        assert not torch.equal(before, after)


@column("`pickle`, `torch.save(model)`")
def pickle(row: Row) -> None:
    """The restored model gives the same bits."""
    laws.assert_pickle_round_trip(row.make, row.shape)
    layer, file = row.make(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    assert torch.equal(evaluated(restored, row.input()), evaluated(layer, row.input()))


@column("`state_dict`, strict")
def state_dict(row: Row) -> None:
    """Saved with `torch.save`, loaded with `weights_only=True` and strictly: the same bits."""
    laws.assert_state_dict_round_trip(row.make, row.shape)
    layer, other, file = row.make(), row.make(), io.BytesIO()
    train(layer, row)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(evaluated(other, row.input()), evaluated(layer, row.input()))


@column("safetensors")
def safetensors(row: Row) -> None:
    """`safetensors.torch.save` and `load`, then a strict `load_state_dict`: the same bits."""
    from safetensors.torch import load, save

    layer, other = row.make(), row.make()
    train(layer, row)
    other.load_state_dict(load(save(layer.state_dict())))
    assert torch.equal(evaluated(other, row.input()), evaluated(layer, row.input()))


@column("loading a plain checkpoint")
def plain_checkpoint(row: Row) -> None:
    """The weight of the stock layer is projected, with a warning, and the bias is kept."""
    assert row.twin is not None
    layer, plain = row.make(), row.twin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.load_state_dict(plain.state_dict(), strict=True)
    assert [w.category for w in caught] == [ProjectionWarning] * len(caught)
    assert excess(row, layer) <= HOLDS
    if row.group != "recurrent" and layer.bias is not None and layer.bias.numel():
        torch.testing.assert_close(layer.bias, plain.bias)


@column("meta device, `to_empty`, `reset_parameters`")
def meta(row: Row) -> None:
    """Made on meta, then filled by `reset_parameters`: every entry is set and the layer works."""
    laws.assert_materializes_from_meta(row.make, row.shape)


@column("`functional_call`")
def functional(row: Row) -> None:
    """With other raw parameters, and with gradients in them; the module itself is unchanged."""
    layer, other = row.make(), row.make()
    x = row.input()
    before = evaluated(layer, x)
    tensors = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    buffers = dict(other.named_buffers())
    y = functional_call(layer, (tensors, buffers), (x,))
    torch.testing.assert_close(y, evaluated(other, x), **CLOSE)
    y.sum().backward()
    assert any(t.grad is not None for t in tensors.values())
    assert torch.equal(evaluated(layer, x), before)


@column("`vmap` over an ensemble")
def ensemble(row: Row) -> None:
    """`stack_module_state` of three layers, and one call: the outputs of each."""
    members = [row.make().eval() for _ in range(3)]
    state = stack_module_state(members)
    base, x = copy.deepcopy(members[0]).to("meta"), row.input()
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*state)
    for mine, member in zip(y, members, strict=True):
        torch.testing.assert_close(mine, evaluated(member, x), **CLOSE)


@column("per-sample gradients")
def per_sample(row: Row) -> None:
    """`vmap(grad(...))` gives the gradient of each sample that backward gives."""
    layer, x = row.make().double().eval(), row.input(dtype=torch.float64)
    tensors = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(tensors: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(layer, tensors, (one[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(tensors, x)
    for index in range(2):
        layer.zero_grad()
        layer(x[index : index + 1]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(each[name][index], parameter.grad)


@column("gradient accumulation")
def accumulation(row: Row) -> None:
    """Two micro-batches give the gradient of the whole batch."""
    whole, parts = row.make().double(), row.make().double()
    x = row.input(dtype=torch.float64)
    parts.load_state_dict(whole.state_dict())
    whole.eval(), parts.eval()
    whole(x).square().sum().backward()
    for piece in x.chunk(2):
        parts(piece).square().sum().backward()
    same_gradients(gradients(whole), gradients(parts))


@column("activation checkpointing")
def checkpointing(row: Row) -> None:
    """The same gradients as without, reentrant or not."""
    for reentrant in (False, True):
        plain, saved = row.make().double(), row.make().double()
        saved.load_state_dict(plain.state_dict())
        plain.train(), saved.train()
        x = row.input(dtype=torch.float64)
        plain(x).square().sum().backward()
        point = x.clone().requires_grad_()
        checkpoint(saved, point, use_reentrant=reentrant).square().sum().backward()
        same_gradients(gradients(plain), gradients(saved))


@column("`to_plain`")
def plain(row: Row) -> None:
    """Stock modules only, outputs equal to 2e-6, and no tensor that is shared with the layer."""
    layer = row.make()
    train(layer, row)
    exported = to_plain(layer.eval())
    x = row.input()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-6, atol=2e-6)
    for module in exported.modules():
        name = type(module).__module__
        assert name.startswith(("torch.nn.", "torch.fx.")) or type(module).__name__ == "First"
    assert not {p.data_ptr() for p in layer.parameters()} & {
        p.data_ptr() for p in exported.parameters()
    }


@column("certificate of `to_plain`", slow=True)
def certificate(row: Row) -> None:
    """Computed anew on the exported model it is the same bound, to 1e-5, and above the Jacobian."""
    layer = row.make()
    train(layer, row)
    x = row.input()
    ours = certify(layer.eval(), x, effort="fast").constant.value
    exported = certify(to_plain(layer), x, effort="fast").constant.value
    found = float(torch.linalg.matrix_norm(jacobian(layer, x[0]).double(), 2))
    assert found <= min(ours, exported) * (1 + 1e-6)
    if exported > ours * (1 + 1e-5):
        raise AssertionError("the bound of the stock layers is looser than that of the layer")
    assert math.isclose(ours, exported, rel_tol=1e-5)


@column("certificate under autocast", slow=True)
def autocast_certificate(row: Row) -> None:
    """For bfloat16 and float16: above the Jacobian with the weights as used; rounding enclosed."""
    layer, x = row.make(), row.input()
    train(layer, row)
    layer.eval()
    for dtype in (torch.bfloat16, torch.float16):
        found = certify(layer, x, effort="fast", autocast=dtype)
        twin = RoundedWeights(dtype)
        matrix = jacobian(lambda v, twin=twin: twin.run(layer, v), x[0]).double()
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= found.constant.value * (1 + 1e-6)
        with torch.no_grad():
            with torch.autocast("cpu", dtype):
                used = layer(x).double()
            off = (used - twin.run(layer, x).double()).flatten(1).norm(dim=1)
        assert bool((off <= found.rounding(x)).all())  # observed 40 % of it at most


@column("`torch.compile(fullgraph=True)`", slow=True)
def compiled(row: Row) -> None:
    """One graph in train and one in eval mode, no recompilation from step to step."""
    layer, twin, x = row.make(), row.make(), row.input()
    twin.load_state_dict(layer.state_dict())
    torch.compiler.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    steps = [torch.optim.SGD(m.parameters(), 0.05) for m in (layer, twin)]
    with torch.no_grad():
        expected = layer.eval()(x)
        torch.testing.assert_close(fast(x), expected, **CLOSE)
    layer.train(), twin.train()
    fast(x).sum().backward()  # the graph of training
    layer.zero_grad()
    twin(x).sum().backward()
    twin.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for module, step in zip((fast, twin), steps, strict=True):
                step.zero_grad()
                module(x).square().mean().backward()
                step.step()
    torch.testing.assert_close(evaluated(layer, x), evaluated(twin, x), rtol=1e-4, atol=1e-4)
    assert excess(row, layer) <= HOLDS


@column("`torch.export`", slow=True)
def exported(row: Row) -> None:
    """The exported program gives the same outputs, at another batch size as well."""
    layer = row.make().eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layer, (row.input(4),), dynamic_shapes=shapes)
    with torch.no_grad():
        for batch in (4, 3):
            x = row.input(batch)
            torch.testing.assert_close(program.module()(x), layer(x), **CLOSE)


@column("ONNX (of `to_plain`)", slow=True)
def onnx(row: Row) -> None:
    """`torch.onnx.export(dynamo=True)` of `to_plain`: onnxruntime gives the same outputs."""
    import onnxruntime

    layer, x = to_plain(row.make().eval()), row.input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), evaluated(layer, x), rtol=1e-4, atol=1e-5)
