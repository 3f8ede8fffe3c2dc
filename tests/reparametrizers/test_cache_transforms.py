"""The cache within checkpointing, transforms, compilers, export and autocast."""

import copy
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import orthonet
from orthonet.layers import OrthoLinear
from tests.reparametrizers.test_cache import (
    COLD,
    calls,
    gradients,
    make,
    raw,
    symmetric,
    weight,
    x,
)

__all__ = ["make", "x"]  # fixtures


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_activation_checkpointing(make, reentrant, warm, x):
    results = []
    for cached in (True, False):
        layer = make(cached)
        if warm:
            layer(x)
        point = x.clone().requires_grad_()
        y = checkpoint(layer, point, use_reentrant=reentrant) + layer(point)
        y.sin().sum().backward()
        results.append([*gradients(layer), point.grad])
    for ours, plain in zip(*results, strict=True):  # another order of summation; 1e-7 was seen
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_checkpointing_with_a_step_in_place_is_refused(x):
    """Hooks on saved tensors hide from autograd that a parameter has changed."""
    layer = OrthoLinear(8, 8, ortho_params=COLD)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = layer(x).sum()
    with torch.no_grad():
        raw(layer).add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place since the forward pass"):
        y.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, of jvp
def test_func_transforms(make, x):
    layer, plain = make(), make(False)
    layer(x)
    key = next(name for name, p in layer.named_parameters() if p is raw(layer))

    def per_sample(module):
        tensors = {name: p.detach() for name, p in module.named_parameters()}

        def one(tensors, xi):
            return functional_call(module, tensors, (xi[None],)).sin().mean()

        return vmap(grad(one), in_dims=(None, 0))(tensors, x)[key]

    if make is symmetric:
        assert torch.equal(per_sample(layer), per_sample(plain))
        assert torch.equal(jvp(layer, (x,), (x,))[1], jvp(plain, (x,), (x,))[1])
    assert torch.equal(jacrev(layer)(x[:1]), jacrev(plain)(x[:1]))
    other = {name: p.detach() + 0.1 for name, p in layer.named_parameters()}
    assert torch.equal(functional_call(layer, other, (x,)), functional_call(plain, other, (x,)))
    learned = {name: p.requires_grad_() for name, p in other.items()}
    functional_call(layer, learned, (x,)).sum().backward()
    assert learned[key].grad is not None
    assert torch.equal(layer(x), plain(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_forward_mode(x):
    tangents = []
    for module in (symmetric(), symmetric(False)):
        module(x)
        with forward_ad.dual_level():
            duals = {
                n: forward_ad.make_dual(p.detach(), torch.ones_like(p))
                for n, p in module.named_parameters()
            }
            y = functional_call(module, duals, (x,))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*tangents)


def test_ensembles_are_stacked(x):
    models = [symmetric() for _ in range(3)]
    for model in models:
        model(x)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for row, model in zip(y, models, strict=True):
        torch.testing.assert_close(row, model(x))


def test_compiled_without_a_graph_break(make, x):
    layer = make()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert raw(layer).grad is not None
    step = torch.optim.SGD(layer.parameters(), 0.1)
    torch.compile(step.step, backend="aot_eager")()
    kept = layer(x)
    orthonet.invalidate(layer)
    assert torch.equal(kept, layer(x))


def test_exported_and_traced(make, x):
    layer = make().eval()
    with torch.no_grad():
        expected = layer(x)
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)


def test_fake_and_meta_tensors(x):
    layer = symmetric()
    layer(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.weight is not layer.weight
    meta = copy.deepcopy(layer).to("meta")
    assert weight(meta).is_meta
    assert not weight(layer).is_meta


def test_a_default_device_does_not_switch_it_off(x):
    layer = symmetric().eval()
    with torch.device("cpu"), torch.no_grad():
        before = calls(layer)
        layer(x), layer(x)
        assert calls(layer) == before + 1


def test_autocast_does_not_round_the_weight(make, x):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        inside = weight(layer)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert torch.equal(inside, weight(make(False)))
    plain = make(False)
    weight(plain).backward(torch.ones_like(weight(plain)))
    inside = make()
    with torch.autocast("cpu", torch.bfloat16):
        weight(inside).backward(torch.ones_like(weight(inside)))
    assert torch.equal(raw(inside).grad, raw(plain).grad)
