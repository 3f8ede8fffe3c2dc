"""Every constrained weight of the library is a `Weight`, and keeps its laws."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import orthonet
from orthonet import layers
from orthonet.errors import NotOnManifoldError
from orthonet.manifolds import Stiefel
from orthonet.reparametrizers import OrthoKernel, OrthoWeight, ReshapedKernel, Weight, register


class Symmetric(nn.Module):
    """A parametrization as users write them."""

    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


def of(layer):
    return layer.parametrization


SAME = {"padding": "same", "padding_mode": "circular"}
MAKERS = {
    "OrthoWeight": lambda: OrthoWeight((2, 5, 3)),
    "OrthoKernel": lambda: OrthoKernel(4, 3, (3, 2), (1, 1)),
    "ReshapedKernel": lambda: ReshapedKernel(4, 3, (3, 2), (1, 1)),
    "MappedWeight": lambda: of(layers.make_linear("aol", 4, 3)),
    "FourierWeight": lambda: of(layers.make_conv("cayley", 4, 4, 3, **SAME)),
    "TrivializedWeight": lambda: layers.OrthoRNN(3, 4, triv="cayley").recurrent["weight_hh_l0"],
    "SkewKernel": lambda: of(layers.make_conv("soc", 4, 4, 3, **SAME)),
    "SlopedWeight": lambda: of(layers.make_linear("sll", 4, 3)),
    "_Pair": lambda: of(layers.make_linear("sandwich", 4, 3)),
    "CachedParametrizationList": lambda: register(
        nn.Linear(4, 4), "weight", Symmetric()
    ).parametrizations["weight"],
    "ConstrainedList": lambda: orthonet.constraints.constrain(
        nn.Linear(4, 4), "weight", Stiefel()
    ).parametrizations["weight"],
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
# Maps without an inverse say so.
UNASSIGNABLE = {"FourierWeight", "SkewKernel", "SlopedWeight", "_Pair"}


def in_double(make):
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def kinds(base=Weight):
    """The concrete sub-classes that the library defines."""
    for cls in base.__subclasses__():
        if cls.__module__.startswith("orthonet.") and not cls.__abstractmethods__:
            yield cls
        yield from kinds(cls)


def test_every_kind_of_weight_is_here():
    assert all(type(make()).__name__ == name for name, make in MAKERS.items())
    assert {cls.__name__ for cls in kinds()} == set(MAKERS)


@every_kind
def test_a_read_is_the_evaluation_and_writes_nothing(make):
    weight = in_double(make)
    before = copy.deepcopy(weight.state_dict())
    value = weight.evaluate()
    assert isinstance(value, torch.Tensor) and value.shape == weight.shape
    assert value.requires_grad
    if type(weight).__name__ != "FourierWeight":  # which is called with a size
        for _ in range(2):
            read = weight()
            parts = read if isinstance(read, tuple) else (read,)
            assert sum(part.numel() for part in parts) == value.numel()
            if len(parts) == 1:
                torch.testing.assert_close(read, value, rtol=0, atol=1e-13)  # observed 5e-16
    after = weight.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert weight.lipschitz > 0 and weight.orthogonal in (True, False)
    assert weight.map is None or isinstance(weight, OrthoWeight)


@every_kind
def test_values_are_assigned_and_projected_or_refused(make):
    weight, other = in_double(make), in_double(make)
    name, value = type(weight).__name__, other.evaluate().detach()
    before = copy.deepcopy(weight.state_dict())
    if name in UNASSIGNABLE:
        for change in (weight.assign_, weight.project_):
            with pytest.raises(NotOnManifoldError, match="no assignment"):
                change(value)
        assert all(torch.equal(t, before[n]) for n, t in weight.state_dict().items())
        return
    weight.assign_(value)
    torch.testing.assert_close(weight.evaluate(), value, rtol=0, atol=1e-9)  # observed 2e-12
    weight.update_base()
    torch.testing.assert_close(weight.evaluate(), value, rtol=0, atol=1e-9)  # observed 2e-12
    moved = weight.project_(value + 1e-3 * torch.randn_like(value))
    assert 0.0 <= moved < 0.1
    assert weight.evaluate().shape == value.shape
    torch.testing.assert_close(weight.evaluate(), value, rtol=0, atol=0.1)
    with pytest.raises((ValueError, RuntimeError)):
        weight.assign_(value[..., :-1])


@pytest.mark.parametrize("preset", ["default", "exp", "cholesky"])
def test_the_base_moves_in_half_precision(preset):
    weight = OrthoWeight((2, 5, 3), preset, dtype=torch.bfloat16)
    before = weight.evaluate()
    weight.update_base()  # what was rounded to bfloat16 is no semi-orthogonal matrix in float32
    distance = (weight.evaluate() - before).abs().max()
    assert distance <= 2 * torch.finfo(torch.bfloat16).eps  # two roundings; observed one


@every_kind
def test_parameters_are_drawn_anew(make):
    weight = make()
    with torch.no_grad():
        for p in weight.parameters():
            p.fill_(float("nan"))
    weight.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in weight.parameters())
    meta = copy.deepcopy(weight).to("meta")
    if not isinstance(meta, nn.ModuleList):
        meta.reset_parameters()
    assert meta.shape == weight.shape
    filled = meta.filled_copy(torch.zeros(()))
    assert all(bool(p.isfinite().all()) for p in filled.parameters())


@every_kind
def test_a_plain_tensor_in_a_checkpoint_is_taken_or_refused(make):
    weight, other = in_double(make), in_double(make)
    plain, errors = other.evaluate().detach(), []
    state = {"layer.weight": plain}
    done = weight.load_plain(state, "layer.weight", "layer.own.", errors, weight)
    assert set(state) == {f"layer.own.{name}" for name in weight.state_dict()}
    if type(weight).__name__ in UNASSIGNABLE:
        assert done is None and "no assignment" in errors[0]
        return
    assert errors == [] and done is not None and done[0] <= 1e-6
    weight.load_state_dict({name.removeprefix("layer.own."): t for name, t in state.items()})
    torch.testing.assert_close(weight.evaluate(), plain, rtol=0, atol=1e-6)


@every_kind
def test_copies_are_weights_of_their_own(make):
    weight = make()
    twin = copy.deepcopy(weight)
    assert int(twin.number) != int(weight.number)
    with torch.no_grad():
        next(twin.parameters()).mul_(1.5)[0].add_(0.1)
    assert not torch.equal(twin.evaluate(), weight.evaluate())


def test_pytorch_may_swap_the_parameters_for_those_of_another_dtype():
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    kinds = [layers.OrthoConv2d(2, 2, 3, padding=1) for _ in range(2)]  # that share a graph
    net = nn.Sequential(*kinds, nn.Flatten(), *(layers.OrthoLinear(32, 32) for _ in range(2)))
    x, step = torch.randn(2, 2, 4, 4), torch.optim.SGD(net.parameters(), 0.1)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        for _ in range(2):  # the graph of the last pass is kept
            net(x).sum().backward()
            step.step()
        expected, before = net(x), list(net.parameters())
        net.double()
        assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
        torch.testing.assert_close(net(x.double()).float(), expected)
        other = copy.deepcopy(net)
        with torch.no_grad():
            next(other.parameters()).mul_(-1.0)
        net.load_state_dict(other.state_dict())
        assert torch.equal(net(x.double()), other(x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def test_pytorch_may_swap_what_is_loaded_while_a_graph_of_the_value_is_alive():
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    makers = [lambda: OrthoWeight((4, 4), "exp"), *MAKERS.values()]
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        for make in makers:
            weight, other = make(), make()
            size = ((4, 4),) if type(weight).__name__ == "FourierWeight" else ()
            read = weight(*size)
            parts = read if isinstance(read, tuple) else (read,)
            sum(part.abs().square().sum() for part in parts).backward()
            weight.load_state_dict(other.state_dict())  # the graph held the buffer `base` of exp
            torch.testing.assert_close(weight(*size), other(*size), rtol=0, atol=0)
            assert all(part.requires_grad for part in parts)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@pytest.mark.parametrize("make", [OrthoKernel, ReshapedKernel])
def test_a_factor_that_is_pruned_makes_the_kernel(make):
    kernel = make(4, 4, (3, 3), (1, 1), dtype=torch.float64)
    before, part = kernel().detach(), kernel.outer
    prune.random_unstructured(part, "original", 0.2)
    with torch.no_grad():
        part.original_orig.mul_(torch.linspace(0.5, 1.5, 4)[:, None])
    assert not torch.allclose(kernel(), before)
    kernel().square().mul(torch.arange(9.0).view(3, 3)).sum().backward()
    assert bool((part.original_orig.grad[part.original_mask == 0.0] == 0.0).all())
    assert bool(part.original_orig.grad.abs().amax() > 0.0)
    expected = kernel().detach()
    prune.remove(part, "original")
    torch.testing.assert_close(kernel(), expected)
