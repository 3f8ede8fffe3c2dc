"""Riemannian optimizers: every space, torch's formulas on Rn, and problems with known answers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from orthonet.errors import NotOnManifoldError
from orthonet.manifolds import (
    PSD,
    SO,
    Grassmannian,
    Hyperbolic,
    Nonnegative,
    PoincareBall,
    Sphere,
    Stiefel,
    Symplectic,
    Unitary,
    frechet_mean,
)
from orthonet.optim import RiemannianAdam, RiemannianLBFGS, RiemannianSGD
from tests.manifolds.common import ALSO, SPACES, fits

double = torch.float64
MAKERS = {
    "Nesterov": lambda ps, space: RiemannianSGD(
        ps, lr=0.01, momentum=0.5, nesterov=True, space=space
    ),
    "AMSGrad": lambda ps, space: RiemannianAdam(ps, lr=0.02, amsgrad=True, space=space),
    "LBFGS": lambda ps, space: RiemannianLBFGS(ps, max_iter=2, space=space),
}
optimizers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def descend(optimizer, loss_of, steps) -> list[float]:
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return losses


@optimizers
def test_steps_stay_on_every_space_and_descend(make):
    """Toward a near point of the space, whose squared distance is the loss."""
    torch.manual_seed(0)
    dtype = torch.float32
    for space in [*(space for space, _ in [*SPACES, *ALSO]), Unitary()]:
        shapes = ((4, 4), (6, 3))
        shape = next(s for s in shapes if fits(space, s) and space.dimension(s) > 0)
        kind = dtype.to_complex() if isinstance(space, Unitary) else dtype
        x = nn.Parameter(space.sample(shape, dtype=kind))
        v = space.tangent(x.detach(), torch.randn_like(x))
        target = space.retract(x.detach(), 0.3 * v / v.norm())
        optimizer = make([x], space)
        losses = descend(optimizer, lambda x=x, t=target: (x - t).abs().square().sum(), 5)
        assert space.contains(x, max(space.tolerance(x), 1e3 * torch.finfo(dtype).eps)), space
        assert losses[-1] < losses[0] or isinstance(space, Symplectic), space


def test_on_rn_they_are_those_of_torch():
    for ours, theirs, options in (
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1}),
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
        (RiemannianAdam, torch.optim.Adam, {"lr": 0.1}),
        (RiemannianAdam, torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
        (RiemannianAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-3}),
    ):
        start, a = torch.randn(5, 3, dtype=double), torch.randn(4, 5, dtype=double)
        ends = []
        for make in (ours, theirs):
            x = nn.Parameter(start.clone())
            losses = descend(
                make([x], **options), lambda x=x, a=a: (a @ x).tanh().square().sum(), 12
            )
            ends.append(x.detach())
        assert losses[-1] < losses[0]
        # observed 2e-15: torch multiplies in another order
        assert float((ends[0] - ends[1]).abs().max()) <= 1e-12, (ours, options)


def test_groups_have_their_own_spaces_and_states_are_saved():
    def build():
        torch.manual_seed(1)
        a = nn.Parameter(Sphere().sample((3, 5), dtype=double))
        b = nn.Parameter(PSD().sample((4, 4), dtype=double))
        c = nn.Parameter(torch.randn(7, dtype=double))
        groups = [
            {"params": [a], "space": Sphere()},
            {"params": b, "space": PSD()},
            {"params": [c]},
        ]
        return groups, lambda: a.sum() + b.square().sum() + c.square().sum()

    for cls, options in (
        (RiemannianSGD, {"lr": 0.01, "momentum": 0.9}),
        (RiemannianAdam, {"lr": 0.01, "amsgrad": True}),
    ):
        groups, loss = build()
        optimizer = cls(groups, **options)
        descend(optimizer, loss, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        values = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        descend(optimizer, loss, 3)
        expected = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        groups, loss = build()
        again = cls(groups, **options)
        with torch.no_grad():
            for p, value in zip(
                (p for g in again.param_groups for p in g["params"]), values, strict=True
            ):
                p.copy_(value)
        again.load_state_dict(pickle.loads(pickle.dumps(saved)))
        descend(again, loss, 3)
        found = [p.detach() for g in again.param_groups for p in g["params"]]
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("space", [Grassmannian(), Stiefel()], ids=repr)
def test_lbfgs_finds_eigenvectors(space):
    torch.manual_seed(0)
    a = torch.diag(torch.arange(1.0, 21.0, dtype=double))
    x = nn.Parameter(space.sample((20, 3), dtype=double))
    optimizer = RiemannianLBFGS([x], max_iter=100, tolerance_change=1e-14, space=space)
    losses = descend(optimizer, lambda: (x.mT @ a @ x).trace(), 1)
    assert abs(losses[-1] - 6.0) <= 1e-10  # 1 + 2 + 3; observed 2e-14 over 12 seeds
    assert len(losses) <= 100  # observed 36 to 54
    assert Stiefel().contains(x)


def test_lbfgs_moves_points_of_several_spaces_together():
    torch.manual_seed(0)
    points = PSD().sample((4, 3, 3), dtype=double)
    truth = SO().sample((3, 3), dtype=double)
    x, r = nn.Parameter(points[0].clone()), nn.Parameter(SO().sample((3, 3), dtype=double))

    def loss():
        spread = PSD().distance(x.expand_as(points), points).square().mean()
        return spread + (r - truth).square().sum()

    groups = [{"params": [x], "space": PSD()}, {"params": [r], "space": SO()}]
    losses = descend(
        RiemannianLBFGS(groups, max_iter=60, max_eval=120, tolerance_change=1e-14), loss, 1
    )
    mean = frechet_mean(PSD(), points)
    assert float((x.detach() - mean).abs().max()) <= 1e-5  # observed 5e-8 over 16 seeds
    assert float((r.detach() - truth).abs().max()) <= 1e-5
    assert len(losses) <= 150  # observed 13 to 79
    assert min(losses) == losses[-1]


def test_lbfgs_on_rn_minimizes_rosenbrocks_function():
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=double))
    optimizer = RiemannianLBFGS([x], max_iter=100, tolerance_change=1e-14)
    losses = descend(optimizer, lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, 1)
    assert float((x.detach() - 1.0).abs().max()) <= 1e-4
    assert len(losses) <= 100  # observed 46


def test_lbfgs_goes_on_from_where_its_search_ends():
    """A longer step meets both conditions, although a shorter one had the smaller loss."""
    x = nn.Parameter(torch.zeros(1, dtype=double))
    optimizer = RiemannianLBFGS([x], max_iter=2)
    losses = descend(optimizer, lambda: (x - 1.2).abs().sum(), 1)
    assert losses == pytest.approx([1.2, 0.2, 0.8, 0.2])  # at 0, 1, 2, and back at 1
    assert float(x.detach()) == 1.0


def test_a_failed_search_leaves_the_point_and_the_loss_never_rises():
    x = nn.Parameter(torch.tensor([1.0, 0.0], dtype=double))
    optimizer = RiemannianLBFGS([x], max_iter=3, space=Sphere())
    values = iter([0.0, *[1.0] * 100])

    def closure():  # a loss that only rises, whatever its gradient says
        optimizer.zero_grad()
        x.sum().backward()
        return torch.tensor(next(values))

    optimizer.step(closure)
    assert torch.equal(x.detach(), torch.tensor([1.0, 0.0], dtype=double))
    with pytest.raises(ValueError, match="finite where a step begins"):
        optimizer.step(lambda: torch.tensor(float("nan")))


@optimizers
def test_errors_say_what_to_do(make):
    off = nn.Parameter(torch.ones(3))
    with pytest.raises(NotOnManifoldError, match=r"must lie on Sphere.*Project it with"):
        make([off], Sphere())
    half = nn.Parameter(torch.tensor([1.0, 0.0]).bfloat16())
    with pytest.raises(ValueError, match="stored in float32 or float64"):
        make([half], Sphere())
    with pytest.raises(ValueError, match=r"space must be a space of orthonet\.manifolds"):
        make([off], "sphere")
    x = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = make([x], Sphere())
    if not isinstance(optimizer, RiemannianLBFGS):
        x.grad = torch.tensor([float("inf"), 0.0])
        with pytest.raises(ValueError, match="gradients must be finite"):
            optimizer.step()
        assert torch.equal(x.detach(), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="lr"):
        type(optimizer)([x], lr=-1.0)


def test_second_moments_are_of_points_or_of_entries():
    for space, shape in ((Sphere(), (3, 1)), (Hyperbolic(), (3, 1)), (Nonnegative(), (3, 5))):
        x = nn.Parameter(space.sample((3, 5)))
        optimizer = RiemannianAdam([x], space=space)
        descend(optimizer, lambda x=x: x.square().sum(), 1)
        assert optimizer.state[x]["exp_avg_sq"].shape == shape


def test_a_step_moves_entries_by_the_learning_rate():
    x = nn.Parameter(Stiefel().sample((8, 8), dtype=double))
    before, w = x.detach().clone(), torch.randn(8, 8, dtype=double)
    descend(RiemannianAdam([x], lr=1e-3, space=Stiefel()), lambda: (x * w).sum(), 1)
    moved = Stiefel().norm(before, x.detach() - before) / 8
    assert abs(float(moved) - 1e-3) <= 1e-6  # to second order in the step


class TestFrechetMean:
    def test_of_two_points_is_the_middle_and_of_commuting_ones_geometric(self):
        for space in (PSD(), PoincareBall(), Hyperbolic()):
            x, y = points = space.sample((2, 4, 4), dtype=double)
            middle = space.exp(x, 0.5 * space.log(x, y))
            assert float((frechet_mean(space, points) - middle).abs().max()) <= 1e-9
        d = torch.rand(5, 4, dtype=double) + 0.1
        mean = frechet_mean(PSD(), torch.diag_embed(d))
        assert torch.allclose(mean, torch.diag(d.log().mean(0).exp()), atol=1e-12)

    def test_is_carried_along_by_congruence_and_weights_count_points(self):
        points, m = PSD().sample((4, 3, 3), dtype=double), torch.randn(3, 3, dtype=double)
        mean = frechet_mean(PSD(), points)
        moved = frechet_mean(PSD(), m @ points @ m.T)
        assert torch.allclose(moved, m @ mean @ m.T, rtol=1e-8, atol=1e-10)
        twice = frechet_mean(PSD(), torch.cat([points, points[:1]]))
        weighted = frechet_mean(PSD(), points, torch.tensor([2.0, 1, 1, 1]))
        assert torch.allclose(twice, weighted, atol=1e-10)

    def test_of_points_far_apart_has_no_pull_left(self):
        scale = torch.logspace(-4, 4, 6, dtype=double)[:, None, None]
        points = scale * PSD().sample((6, 3, 3), dtype=double)
        mean = frechet_mean(PSD(), points)
        pull = PSD().log(mean.expand_as(points), points).mean(0)
        assert float(PSD().norm(mean, pull)) <= 1e-9

    def test_gradient_is_that_of_finite_differences(self):
        points = PSD().sample((3, 2, 2), dtype=double) + 0.5 * torch.eye(2, dtype=double)

        def mean(raw):
            return frechet_mean(PSD(), raw + raw.mT, tol=1e-13)

        assert torch.autograd.gradcheck(mean, (0.5 * points).requires_grad_())

    def test_refuses_what_has_no_mean(self):
        with pytest.raises(ValueError, match="logarithm"):
            frechet_mean(Stiefel(), Stiefel().sample((2, 4, 2)))
        for weights in (torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(3)):
            with pytest.raises(ValueError, match="2 nonnegative numbers"):
                frechet_mean(Sphere(), Sphere().sample((2, 4)), weights)
        with pytest.raises(ValueError, match="stacked"):
            frechet_mean(PSD(), torch.eye(3))
