"""Weights that are computed together are those that are computed alone."""

import copy
import functools
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import orthonet
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import (
    CHOLESKY_ORTHO_PARAMS,
    QR_ORTHO_PARAMS,
    BatchedIdentity,
    BatchedQROrthogonalization,
    OrthoParams,
)
from tests.presets import PRESETS


def build(params=QR_ORTHO_PARAMS, dtype=None, n=6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrthoLinear(n, n, ortho_params=params, dtype=dtype),
        nn.Tanh(),
        OrthoLinear(n, n, ortho_params=params, dtype=dtype),
        OrthoLinear(n, n, bias=False, ortho_params=params, dtype=dtype),
        nn.Unflatten(1, (n, 1, 1)),
        OrthoConv2d(n, n, 1, ortho_params=params, dtype=dtype),
        OrthoConv2d(n, n, 3, padding=1, ortho_params=params, dtype=dtype),
        OrthoConv2d(n, n, 3, padding=1, ortho_params=params, dtype=dtype),
        nn.Flatten(),
        OrthoLinear(n, 2, ortho_params=params, dtype=dtype),
    )


def loss(model, x):
    return (model(x) + 1).sin().pow(2).mean()


def weights(model):
    return [m.weight.detach().clone() for m in model if hasattr(m, "parametrization")]


def apart(a, b) -> float:
    pairs = [*zip(a, b, strict=True)]
    return max((float((p - q).detach().abs().max()) for p, q in pairs), default=0.0)


class Batches(nn.Module):
    """An orthogonalizer that tells how many matrices it is given."""

    seen: ClassVar[list[int]] = []

    def __init__(self, weight_shape):
        super().__init__()
        self.inner = BatchedQROrthogonalization(weight_shape)

    def forward(self, w):
        self.seen.append(w.shape[:-2].numel())
        return self.inner(w)

    def right_inverse(self, w):
        return w


COUNTING = OrthoParams(BatchedIdentity, Batches)


@pytest.mark.parametrize("params", PRESETS.values(), ids=PRESETS)
def test_training_is_that_of_single_layers(params):
    plain, fused = build(params, torch.float64), build(params, torch.float64)
    keys = list(plain.state_dict())
    groups = orthonet.fuse(fused)
    assert [len(group) for group in groups] == [6, 2]  # 3 + 3 outer factors, 2 times 4 bases
    assert list(fused.state_dict()) == keys
    steps = [torch.optim.SGD(m.parameters(), 0.05) for m in (plain, fused)]
    xs = torch.randn(6, 5, 6, dtype=torch.float64)
    for x in xs:
        for model, step in zip((plain, fused), steps, strict=True):
            step.zero_grad()
            loss(model, x).backward()
            step.step()
    # 1e-15 was seen; with the re-centring preset 1e-10, for a batch takes the steps of its worst
    assert apart(plain.parameters(), fused.parameters()) < 1e-8
    assert apart(plain.eval().buffers(), fused.eval().buffers()) < 1e-8
    with torch.no_grad():
        assert apart(weights(plain), weights(fused)) < 1e-8


def test_one_call_for_each_shape():
    model = build(COUNTING)
    orthonet.fuse(model)
    Batches.seen.clear()
    x = torch.randn(5, 6)
    for _ in range(2):
        loss(model, x).backward()
    assert sorted(Batches.seen) == [1, 6, 8]  # the last layer is alone
    torch.optim.SGD(model.parameters(), 0.1).step()
    loss(model, x).backward()
    assert sorted(Batches.seen) == [1, 1, 6, 6, 8, 8]
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert sorted(Batches.seen) == [1, 1, 1, 6, 6, 6, 8, 8, 8]


def test_one_pull_back_for_each_batch():
    model, plain = build(), build()
    orthonet.fuse(model)
    x = torch.randn(5, 6)
    for _ in range(3):
        loss(plain, x).backward()
    with orthonet.defer_pullback():
        for _ in range(3):
            loss(model, x).backward()
    assert apart([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]) < 1e-6


def test_what_is_not_used_gets_no_gradient():
    model = build()
    orthonet.fuse(model)
    used = model[0].parametrization.original
    model[0].weight.sum().backward()
    assert used.grad is not None
    assert all(p.grad is None for p in model.parameters() if p is not used)


def test_frozen_members_and_modes():
    model, plain = build(), build()
    orthonet.fuse(model)
    x = torch.randn(5, 6)
    for m in (model, plain):
        m[0].requires_grad_(False)
        m[2].eval()
        loss(m, x).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or apart([p.grad], [q.grad]) < 1e-6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_among_themselves(copied):
    model = build(COUNTING)
    orthonet.fuse(model)
    x = torch.randn(5, 6)
    before = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), before)
    step = torch.optim.SGD(twin.parameters(), 0.1)
    loss(twin, x).backward()
    step.step()
    Batches.seen.clear()
    after = twin(x)
    assert sorted(Batches.seen) == [1, 6, 8]
    assert not torch.equal(after, before)
    assert torch.equal(model(x), before)
    alone = copied(twin[0])
    torch.testing.assert_close(alone.weight, twin[0].weight)
    del model
    assert torch.equal(twin(x), after)


def test_changes_of_one_member_are_seen():
    model, plain = build().eval(), build().eval()
    orthonet.fuse(model)
    x = torch.randn(5, 6)
    with torch.no_grad():
        model(x)
        noise = torch.randn(6, 6)
        for m in (model, plain):
            m[2].parametrization.original.mul_(noise)
        assert apart([model(x)], [plain(x)]) < 1e-5
        for m in (model, plain):
            m[0].weight = torch.eye(6)
        assert apart([model(x)], [plain(x)]) < 1e-5
        model[3].double(), plain[3].double()
        assert apart([model[3].weight], [plain[3].weight]) < 1e-12
        assert apart([model[0].weight], [plain[0].weight]) < 1e-6
        model.load_state_dict(plain.state_dict())
        assert apart(weights(model), weights(plain)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    plain, fused = build(CHOLESKY_ORTHO_PARAMS, dtype), build(CHOLESKY_ORTHO_PARAMS, dtype)
    orthonet.fuse(fused)
    x = torch.randn(5, 6, dtype=dtype)
    for m in (plain, fused):
        assert m[0].weight.dtype == dtype
        loss(m, x).backward()
    eps = torch.finfo(dtype).eps
    assert apart(weights(plain), weights(fused)) <= 4 * eps  # 0 and 2 eps were seen
    grads = [[p.grad for p in m.parameters()] for m in (plain, fused)]
    assert apart(*grads) < 100 * eps


def test_gradient_of_a_gradient():
    results = []
    x = torch.randn(5, 6, dtype=torch.float64)
    for fused in (True, False):
        model = build(dtype=torch.float64)
        if fused:
            orthonet.fuse(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss(model, x), parameters, create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        results.append([p.grad for p in parameters])
    assert apart(*results) < 1e-10  # 1e-14 was seen


def test_unfuse_and_surroundings():
    model, plain = build(), build()
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = plain.eval()(x)
        orthonet.fuse(model.eval())
        with orthonet.caching(False):
            assert apart([model(x)], [expected]) < 1e-6
        exported = torch.export.export(model, (x,)).module()
        assert apart([exported(x)], [expected]) < 1e-6
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert apart([compiled(x)], [expected]) < 1e-6
        grads = torch.func.jacrev(model)(x)
        assert grads.shape == (5, 2, 5, 6)
        assert orthonet.fuse(model) == orthonet.fuse(model)
        orthonet.unfuse(model)
        assert apart([model(x)], [expected]) < 1e-6
        assert all("_group" not in vars(m) for m in model.modules())
        meta = build().to("meta")
        assert len(orthonet.fuse(meta)) == 2
        assert orthonet.fuse(build(n=6), largest=2) == []


class Shared(nn.Module):
    """Acts on the batch as a whole, which nothing can batch."""

    def __init__(self, weight_shape):
        super().__init__()

    def forward(self, w):
        return w / w.norm()


class Learned(nn.Module):
    def __init__(self, weight_shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, w):
        return self.scale * w


class Counter(nn.Module):
    def __init__(self, weight_shape):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, w):
        return w


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (functools.partial(Learned), "no parameters of their own"),
        (Counter, "one entry per matrix"),
    ],
)
def test_what_cannot_be_batched_is_refused(normalizer, message):
    model = build(OrthoParams(normalizer, BatchedQROrthogonalization))
    with pytest.raises(ValueError, match=message):
        orthonet.fuse(model)
    assert all("_group" not in vars(m) for m in model.modules())


def test_a_map_of_the_whole_batch_is_refused():
    model = build(OrthoParams(BatchedIdentity, Shared))
    with pytest.raises(ValueError, match="treat each matrix of a batch alone"):
        orthonet.fuse(model)


def test_registered_parametrizations_of_a_fused_layer():
    model = build()
    orthonet.fuse(model)
    orthonet.reparametrizers.register(model[0], "bias", nn.Softplus())
    loss(model, torch.randn(5, 6)).backward()
    assert parametrize.is_parametrized(model[0], "bias")
    assert model[0].parametrization.original.grad is not None
