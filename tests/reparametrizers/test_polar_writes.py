"""Warm training writes to its parameter: when, in which surroundings, and what reads it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import orthonet
from orthonet import linalg
from orthonet.layers import OrthoLinear
from orthonet.reparametrizers import OrthoWeight, _polar, _rounds
from orthonet.testing import hard_matrix, orthogonality_error
from tests.references import polar_gradient_reference, polar_reference

WARM = orthonet.POLAR_WARM_ORTHO_PARAMS


def unchanged(weight: OrthoWeight, action) -> bool:
    before = weight.original.detach().clone()
    action()
    return torch.equal(before, weight.original.detach())


def test_only_a_training_forward_of_the_parameter_itself_writes():
    weight = OrthoWeight((6, 4), WARM)
    with torch.no_grad():
        weight.original.add_(torch.randn(6, 4))
    given = {"original": weight.original.detach() + 0.1}
    kept = given["original"].clone()
    call = torch.func.functional_call
    assert unchanged(weight, weight.eval())
    weight.train()
    with torch.no_grad():
        assert unchanged(weight, weight)
    assert unchanged(weight, lambda: call(weight, given, ()))
    assert torch.equal(given["original"], kept)
    loss = torch.func.grad(lambda p: call(weight, p, ()).sum())
    assert unchanged(weight, lambda: loss(dict(weight.named_parameters())))
    weight.requires_grad_(False)
    assert unchanged(weight, weight)
    weight.requires_grad_()
    assert not unchanged(weight, weight)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)], ids=str)
def test_compiled_training_re_centres_without_a_graph_break(shape):
    torch.compiler.reset()
    weight = OrthoWeight(shape, WARM, dtype=torch.float64)
    with torch.no_grad():
        weight.original.add_(0.1 * torch.randn(shape))
    truth = polar_reference(weight.original.detach())
    w = torch.compile(weight, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(w.detach(), truth, atol=1e-12, rtol=0)  # observed 2e-15
    centred = weight.original.detach()
    scale = centred.norm(dim=(-2, -1), keepdim=True) / min(shape[-2:]) ** 0.5
    torch.testing.assert_close(centred, scale * truth, atol=1e-12, rtol=0)
    direction = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(w, weight.original, direction)
    expected = polar_gradient_reference(centred, direction)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)  # observed 9e-15


class _Reads(TorchDispatchMode):
    """Operations by which the host learns a value."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("_local_scalar_dense", "is_nonzero", "equal")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_form_of_accelerators_reads_once_a_step(monkeypatch):
    monkeypatch.setattr(_polar, "_ROUNDS_ON_CPU", True)
    rounds, read = [], _rounds.read
    monkeypatch.setattr(_rounds, "read", lambda bounds: rounds.append(len(bounds)) or read(bounds))
    shapes = [(10, 10), (10, 10), (6, 10), (10, 6)]
    net = nn.Sequential(*(OrthoLinear(i, o, ortho_params=WARM) for o, i in shapes))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    kinds = {6: "gaussian", 9: "zero", 12: "kappa_1e8", 15: "rank_deficient"}
    for step in range(18):
        if step in kinds:
            with torch.no_grad():
                net[1].parametrization.original.copy_(hard_matrix(kinds[step], (10, 10)))
        if step == 17:
            optimizer.param_groups[0]["lr"] = 1e3
        optimizer.zero_grad()
        rounds.clear()
        weights, x = [], torch.randn(16, 10)
        with _Reads() as reads:
            for layer in net:
                weights.append(layer.weight)
                x = nn.functional.linear(x, weights[-1], layer.bias)
            x.sin().sum().backward()
        optimizer.step()
        worst = max(orthogonality_error(w.detach()) for w in weights)
        assert worst <= 2e-6  # observed 7e-7
        if step:  # in the first step each layer makes itself known
            assert rounds == [4]
        if step < 9 and step not in kinds:  # after zero, every step is as large as the parameter
            assert not reads.seen
    net(torch.randn(16, 10)).sum().backward()
    assert max(orthogonality_error(layer.weight.detach()) for layer in net) <= 2e-6


def test_two_forwards_before_one_backward_on_accelerators(monkeypatch):
    monkeypatch.setattr(_polar, "_ROUNDS_ON_CPU", True)
    weight = OrthoWeight((12, 12), WARM)
    with torch.no_grad():
        weight.original.add_(0.02 * torch.randn(12, 12))
    first, second = weight(), weight()
    (first + second).sum().backward()  # nothing that the first one saved has been written


def _trained(optimizer_of, closure_of, steps):
    torch.manual_seed(0)
    layer = OrthoLinear(8, 8, ortho_params=WARM)
    x, target = torch.randn(32, 8), torch.randn(32, 8) @ linalg.haar((8, 8))
    y = x @ linalg.haar((8, 8)) + 0.0 * target
    optimizer = optimizer_of(layer.parameters())
    losses = []
    for _ in range(steps):
        losses.append(float(closure_of(layer, optimizer, x, y)))
        assert orthogonality_error(layer.weight.detach()) <= 2e-6
    return losses


def test_lbfgs_and_restoring_sam_train():
    def lbfgs(layer, optimizer, x, y):
        def closure():
            optimizer.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    def sam(layer, optimizer, x, y):
        parameters = list(layer.parameters())
        (layer(x) - y).square().mean().backward()
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.05 / float(p.grad.norm() + 1e-12))
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for method, make, steps in (
        (lbfgs, lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"), 8),
        (sam, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), 200),
    ):
        losses = _trained(make, method, steps)
        assert losses[-1] < 0.5 * losses[0]


def test_half_precision_storage_is_left_alone():
    weight = OrthoWeight((8, 8), WARM, dtype=torch.bfloat16)
    assert unchanged(weight, weight)
    assert orthogonality_error(weight.compute()) <= 2e-6  # observed 2e-7
