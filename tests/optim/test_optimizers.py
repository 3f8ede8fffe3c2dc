"""Optimizers on the Stiefel manifold: formulas, manifold, equivariance, PyTorch's habits."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

import orthonet
from orthonet.errors import NotOnManifoldError
from orthonet.linalg import haar, polar_svd
from orthonet.linalg.distributed import assign
from orthonet.optim import StiefelAdam, StiefelMuon, StiefelSGD, retract_after_step
from orthonet.testing import tolerances
from tests import references

MAKERS = {
    "SGD": lambda ps: StiefelSGD(ps, lr=0.05),
    "SGD momentum": lambda ps: StiefelSGD(ps, lr=0.05, momentum=0.9, dampening=0.5),
    "SGD Nesterov": lambda ps: StiefelSGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda ps: StiefelAdam(ps, lr=0.01),
    "Muon": lambda ps: StiefelMuon(ps, lr=0.02),
}
SHAPES = ((12, 12), (12, 12), (12, 5), (5, 12), (3, 6, 4), (2, 4, 6), (1, 5), (5, 1), (1, 1))
optimizers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def points(dtype=torch.float64, shapes=SHAPES):
    return [nn.Parameter(haar(shape, dtype=dtype)) for shape in shapes]


def distance(params, targets):
    return sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))


def sigma_error(params) -> float:
    with torch.no_grad():
        return max(float((torch.linalg.svdvals(p.double()) - 1).abs().max()) for p in params)


def train(optimizer, params, targets, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        distance(params, targets).backward()
        optimizer.step()


@optimizers
def test_steps_stay_on_the_manifold_and_descend(make, dtype):
    params, targets = points(dtype), [p.detach() for p in points(dtype)]
    # the components of O(n): from one, no path leads to a target in the other
    targets = [polar_svd(p.detach() + 0.3 * t) for p, t in zip(params, targets, strict=True)]
    before = float(distance(params, targets).detach())
    train(make(params), params, targets, 60)
    # observed 4.2e-7 at most
    assert sigma_error(params) <= tolerances.PROMISE[dtype]
    assert float(distance(params, targets).detach()) < 0.1 * before


@optimizers
def test_batched_steps_are_those_of_the_formulas(make):
    """Beside a loop over matrices with an SVD for each retraction."""
    params = points()
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    twins = [p.detach().clone() for p in params]
    optimizer = make(params)
    reference = references.StiefelReference(optimizer)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, g in enumerate(step):
            twins[i] = reference.step(i, twins[i], g)
        for p, twin in zip(params, twins, strict=True):
            assert torch.allclose(p, twin, rtol=0, atol=1e-12)  # observed 4.2e-15


@optimizers
def test_orthogonal_maps_of_rows_and_columns_commute_with_a_step(make):
    x, left, right = (haar((n, k), dtype=torch.float64) for n, k in ((8, 5), (8, 8), (5, 5)))
    one, other = nn.Parameter(x.clone()), nn.Parameter(left @ x @ right)
    steps = make([one]), make([other])
    for _ in range(5):
        one.grad = torch.randn(8, 5, dtype=torch.float64)
        other.grad = left @ one.grad @ right
        for step in steps:
            step.step()
    assert torch.allclose(left @ one @ right, other, rtol=0, atol=1e-12)  # observed 3.9e-16


def test_adam_of_constant_gradients_moves_by_the_learning_rate():
    """The root mean square change of an entry, at first."""
    x = nn.Parameter(haar((32, 16), dtype=torch.float64))
    before = x.detach().clone()
    x.grad = torch.randn_like(x)
    StiefelAdam([x], lr=1e-4).step()
    moved = (x.detach() - before).square().mean().sqrt().item()
    assert moved == pytest.approx(1e-4, rel=1e-4)  # observed 1.5e-11


@optimizers
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e10])
def test_gradients_of_any_scale_leave_orthogonal_matrices(make, scale):
    params = points(torch.float32)
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p) * scale
        optimizer.step()
    assert sigma_error(params) <= 2e-6  # observed 6.9e-7


@optimizers
def test_a_thousand_steps_do_not_drift(make):
    """What a step leaves is seen by the next one."""
    p = nn.Parameter(haar((24, 24)))
    optimizer, worst = make([p]), 0.0
    for step in range(1000):
        p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 100 == 99:
            worst = max(worst, sigma_error([p]))
    assert worst <= tolerances.PROMISE[torch.float32]  # observed 7.3e-7


@optimizers
def test_plain_groups_move_as_by_torch(make):
    twins = {
        StiefelSGD: lambda p, g: torch.optim.SGD(
            p,
            lr=0.03,
            weight_decay=0.1,
            momentum=g["momentum"],
            dampening=g["dampening"],
            nesterov=g["nesterov"],
        ),
        StiefelAdam: lambda p, g: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
        StiefelMuon: lambda p, g: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    }
    optimizer = make(points())
    plain = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 2, 2))]
    other = copy.deepcopy(plain)
    group = {"params": plain, "stiefel": False, "lr": 0.03, "weight_decay": 0.1}
    optimizer.add_param_group(group)
    twin = twins[type(optimizer)](other, optimizer.defaults)
    for _ in range(5):
        for p, q in zip(plain, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
    for p, q in zip(plain, other, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)  # observed 1.2e-7


@optimizers
def test_state_dict_goes_on_where_it_stopped(make):
    params = points()
    targets = [p.detach() for p in points()]
    optimizer = make(params)
    train(optimizer, params, targets, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = copy.deepcopy(params)
    resumed = make(others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step, tensors in ((optimizer, params), (resumed, others), (copy.deepcopy(resumed), None)):
        if tensors is not None:
            train(step, tensors, targets, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_parameters_that_join_late_have_their_own_count():
    """One batch holds matrices of different numbers of steps."""
    x, y = points(shapes=((6, 6), (6, 6)))
    alone = copy.deepcopy(y)
    together, single = StiefelAdam([x, y], lr=0.01), StiefelAdam([alone], lr=0.01)
    x.grad = torch.randn_like(x)
    together.step()
    y.grad = torch.randn_like(y)
    alone.grad = y.grad.clone()
    together.step()
    single.step()
    assert torch.allclose(y, alone, rtol=0, atol=1e-14)  # observed 3.3e-16


def test_closures_schedulers_and_clipping():
    params, targets = points(), [p.detach() for p in points()]
    optimizer = StiefelAdam(params, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure():
        optimizer.zero_grad()
        loss = distance(params, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        return loss

    losses = []
    for _ in range(10):
        losses.append(float(optimizer.step(closure).detach()))
        schedule.step()
    assert losses[-1] < losses[0]
    assert sigma_error(params) <= 1e-12


def test_gradient_scaler_and_autocast():
    layer = nn.init.orthogonal_(nn.Linear(8, 8).weight)
    layer = nn.Parameter(layer.detach())
    optimizer = StiefelSGD([layer], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = layer.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (nn.functional.linear(torch.ones(2, 8), layer).float() * factor).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # the first one is skipped
        scaler.update()
        if factor > 1.0:
            assert torch.equal(layer, before)
    assert not torch.equal(layer, before)
    assert sigma_error([layer]) <= 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_step_is_the_eager_one():
    params = points(torch.float32, ((6, 6), (6, 6), (3, 5)))
    others = copy.deepcopy(params)
    steps = StiefelAdam(params, lr=0.01), StiefelAdam(others, lr=0.01)
    compiled = torch.compile(steps[0].step, backend="eager")
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        compiled()
        steps[1].step()
    # two ways, three steps, about six products of 6 x 6; observed 5.4e-7 of 3.5e-6
    allowed = tolerances.rounding(torch.float32, 2 * 3 * 6 * 6)
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=allowed)


HOOKED = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
}
if hasattr(torch.optim, "Muon"):
    HOOKED["Muon"] = lambda ps: torch.optim.Muon(ps, lr=0.02)


@pytest.mark.parametrize("riemannian", [False, True])
@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
def test_any_optimizer_retracts_after_its_step(make, riemannian):
    shapes = ((12, 12), (12, 12), (12, 5), (5, 12))
    params = points(torch.float32, shapes)
    start = [p.detach().clone() for p in params]
    targets = [polar_svd(p.detach() + 0.3 * haar(p.shape)) for p in params]
    optimizer = make(params)
    hook = retract_after_step(optimizer, riemannian=riemannian)
    before = float(distance(params, targets).detach())
    for _ in range(100):
        optimizer.zero_grad()
        distance(params, targets).backward()
        optimizer.step()
        assert sigma_error(params) <= 2e-6  # observed 8.1e-7
    assert float(distance(params, targets).detach()) < 0.1 * before
    hook.remove()
    train(optimizer, params, [2 * t for t in start], 3)
    assert sigma_error(params) > 1e-4


def test_the_hook_leaves_other_parameters_alone():
    layer = nn.Linear(6, 6)
    nn.init.orthogonal_(layer.weight)
    twin = copy.deepcopy(layer)
    one, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (layer, twin))
    retract_after_step(one, [layer.weight])
    x = torch.randn(4, 6)
    for step, module in ((one, layer), (other, twin)):
        module(x).sin().sum().backward()
        step.step()
    assert torch.equal(layer.bias, twin.bias)
    assert torch.allclose(
        layer.weight, polar_svd(twin.weight.detach()), atol=2e-6
    )  # observed 4.2e-7


def test_what_cannot_be_done_is_refused():
    good = nn.Parameter(torch.eye(3))
    for make in (StiefelSGD, StiefelAdam, StiefelMuon):
        with pytest.raises(NotOnManifoldError, match="semi-orthogonal"):
            make([nn.Parameter(2 * torch.eye(3))])
        with pytest.raises(ValueError, match="stiefel=False"):
            make([nn.Parameter(torch.ones(3))])
        with pytest.raises(ValueError, match="half precision"):
            make([nn.Parameter(torch.eye(3, dtype=torch.bfloat16))])
        with pytest.raises(ValueError, match="normal to it"):
            make([good], weight_decay=0.1)
        with pytest.raises(ValueError, match="lr"):
            make([good], lr=-1.0)
    with pytest.raises(ValueError, match="nesterov"):
        StiefelSGD([good], nesterov=True)
    with pytest.raises(ValueError, match="betas"):
        StiefelAdam([good], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="ns_steps"):
        StiefelMuon([good], ns_steps=0)
    with pytest.raises(TypeError, match="LBFGS"):
        retract_after_step(torch.optim.LBFGS([good]))
    with pytest.raises(ValueError, match="belong to the optimizer"):
        retract_after_step(torch.optim.SGD([good], 0.1), [nn.Parameter(torch.eye(2))])
    optimizer = StiefelSGD([good])
    with pytest.raises(NotOnManifoldError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert len(optimizer.param_groups) == 1


def test_a_kept_weight_is_computed_anew_after_a_step():
    layer = orthonet.layers.OrthoLinear(4, 4)
    before = layer.weight.detach().clone()
    plain = nn.Parameter(torch.eye(4))
    plain.grad = torch.ones(4, 4)
    with torch.no_grad(), warnings.catch_warnings():
        layer.parametrization.original.data.mul_(-1.0)
    StiefelSGD([plain]).step()
    assert torch.allclose(layer.weight, -before, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_of_the_ranks_are_within_the_bound_of_graham(size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        costs = torch.randint(1, 9, (7,), generator=generator).tolist()
        owners = assign(costs, size)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
        best = min(
            max(sum(c for c, o in zip(costs, tried, strict=True) if o == r) for r in range(size))
            for tried in itertools.product(range(min(size, 3)), repeat=7)
        )
        assert sum(loads) == sum(costs)
        if size <= 3:
            assert max(loads) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


@pytest.mark.parametrize("kind", [StiefelSGD, StiefelMuon, StiefelAdam])
def test_gradients_that_are_not_finite_change_nothing(kind):
    p = nn.Parameter(torch.eye(5, 3))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.randn(5, 3)
    optimizer.step()
    before = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    p.grad = torch.full((5, 3), float("nan"))
    with pytest.raises(ValueError, match=rf"{kind.__name__}: gradients must be finite, got shape"):
        optimizer.step()
    assert torch.equal(p, before[0])
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, before[1][0][name])


def test_the_direction_of_muon_in_half_precision():
    start, grad = haar((24, 24)), torch.randn(24, 24)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        StiefelMuon([p], lr=0.02, ns_dtype=dtype).step()
        moved[dtype] = p.detach() - start
        # the direction is rounded, the matrix is not: observed 3e-7
        assert sigma_error([p]) < 2e-6
    size = float(moved[torch.float32].norm())
    # observed 0.034 and 0.0044
    assert float((moved[torch.bfloat16] - moved[torch.float32]).norm()) < 0.08 * size
    assert float((moved[torch.float16] - moved[torch.float32]).norm()) < 0.01 * size
    with pytest.raises(ValueError, match="StiefelMuon: ns_dtype must be one of"):
        StiefelMuon([nn.Parameter(start)], ns_dtype=torch.int8)
