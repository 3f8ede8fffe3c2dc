"""Every verb, on parameters and buffers of all kinds of modules, from registration to removal."""

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthonet
from orthonet import constraints
from orthonet.errors import InPlaceEditWarning, NotOnManifoldError
from orthonet.manifolds import (
    PSD,
    PSSD,
    SL,
    SO,
    AlmostOrthogonal,
    Bounded,
    Correlation,
    DoublyStochastic,
    FixedRank,
    GLp,
    Grassmannian,
    Hurwitz,
    Hyperbolic,
    LowRank,
    Manifold,
    Nonnegative,
    NormBall,
    Oblique,
    PoincareBall,
    ProductManifold,
    PSSDFixedRank,
    PSSDLowRank,
    Simplex,
    Skew,
    SpectralBall,
    Sphere,
    Stiefel,
    Symmetric,
    Symplectic,
    Unitary,
)


@dataclass(frozen=True)
class Verb:
    """A verb with its arguments and the space that it promises."""

    function: Callable
    space: Manifold
    arguments: tuple = ()
    square: bool = False  # whether its matrices must be

    def __call__(self, module, name="weight", **options):
        return self.function(module, name, *self.arguments, **options)

    def __repr__(self):
        return self.function.__name__


V = constraints
TWO = ProductManifold((Stiefel(), Stiefel()))
VERBS = [
    Verb(V.symmetric, Symmetric(), square=True),
    Verb(V.skew, Skew(), square=True),
    Verb(V.sphere, Sphere()),
    Verb(V.oblique, Oblique()),
    Verb(V.unit_norm, Sphere()),
    Verb(V.orthogonal, Stiefel()),
    Verb(V.grassmannian, Grassmannian()),
    Verb(V.almost_orthogonal, AlmostOrthogonal(0.1)),
    Verb(V.spectral_ball, SpectralBall()),
    Verb(V.invertible, GLp(), square=True),
    Verb(V.sln, SL(), square=True),
    Verb(V.alpha_stable, Hurwitz(1e-3), square=True),
    Verb(V.poincare_ball, PoincareBall()),
    Verb(V.low_rank, LowRank(2), (2,)),
    Verb(V.fixed_rank, FixedRank(2), (2,)),
    Verb(V.positive_definite, PSD(), square=True),
    Verb(V.positive_semidefinite, PSSD(), square=True),
    Verb(V.positive_semidefinite_low_rank, PSSDLowRank(2), (2,), square=True),
    Verb(V.positive_semidefinite_fixed_rank, PSSDFixedRank(2), (2,), square=True),
    Verb(V.correlation, Correlation(), square=True),
    Verb(V.nonnegative, Nonnegative()),
    Verb(V.bounded, Bounded()),
    Verb(V.norm_ball, NormBall()),
    Verb(V.simplex, Simplex()),
    Verb(V.stochastic, Simplex()),
    Verb(V.doubly_stochastic, DoublyStochastic(), square=True),
    Verb(V.symplectic, Symplectic(), square=True),
    Verb(V.hyperbolic, Hyperbolic()),
    Verb(V.product, TWO, ((Stiefel(), Stiefel()),)),
]
# A module, the name of a tensor of it, and whether its matrices are square.
HOLDERS = {
    "Linear": (lambda: nn.Linear(6, 4), "weight", False),
    "square Linear": (lambda: nn.Linear(4, 4), "weight", True),
    "Conv2d": (lambda: nn.Conv2d(3, 2, (2, 4)), "weight", False),
    "square Conv2d": (lambda: nn.Conv2d(2, 3, 4), "weight", True),
    "Embedding": (lambda: nn.Embedding(8, 4), "weight", False),
    "RNN": (lambda: nn.RNN(3, 4), "weight_hh_l0", True),
    "LSTM": (lambda: nn.LSTM(3, 4), "weight_hh_l0", False),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", False),
    "square MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "out_proj.weight", True),
}
CASES = [
    pytest.param(verb, holder, id=f"{verb!r}-{holder}")
    for verb in VERBS
    for holder, (_, _, square) in HOLDERS.items()
    if square >= verb.square and (square == verb.square or holder == "RNN")
]
every_verb = pytest.mark.parametrize("verb", VERBS, ids=repr)


def held(holder: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor itself, and its name there."""
    module, path, _ = HOLDERS[holder]
    *parts, name = path.split(".")
    return module().get_submodule(".".join(parts)), name


def linear(verb: Verb) -> nn.Module:
    return nn.Linear(4, 4 if verb.square else 8)


def matrix(verb: Verb, x: Tensor) -> Tensor:
    """The tensor as the space sees it."""
    return x.detach().flatten(1) if verb.function is V.unit_norm else x.detach()


def wrong(shape: tuple[int, ...]) -> Tensor:
    """A matrix that is on none of the spaces: full rank, negative determinant, of norm > 1."""
    x = torch.zeros(shape)
    x.diagonal().copy_(torch.tensor([-3.0, 2.0, 2.5, 3.5]))
    x[0, 1] = 1.0
    return x


def train(module: nn.Module, name: str, opt: torch.optim.Optimizer, count: int = 5) -> None:
    direction = torch.randn_like(getattr(module, name))
    if not any(p.numel() for p in module.parametrizations[name].parameters()):
        return  # a single point, such as the Grassmannian of square matrices
    for _ in range(count):
        opt.zero_grad()
        (getattr(module, name) * direction).sum().backward()
        opt.step()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.05)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 4e-6 * b.abs().max().clamp(min=1.0))


@pytest.mark.parametrize(("verb", "holder"), CASES)
def test_the_constraint_holds_from_registration_to_removal(verb, holder):
    module, name = held(holder)
    kind, shape = type(module), getattr(module, name).shape
    assert verb(module, name) is module
    opt = adam(module)
    for stage in (
        lambda: None,
        lambda: train(module, name, opt),
        lambda: orthonet.update_base(module, name, optimizer=opt),
        lambda: train(module, name, opt, 2),
    ):
        stage()
        value = getattr(module, name)
        assert value.shape == shape
        found = verb.space.contains(matrix(verb, value))
        assert found, found
    before = value.detach().clone()
    constraints.remove(module, name)
    assert not parametrize.is_parametrized(module)
    assert type(module) is kind
    assert isinstance(getattr(module, name), nn.Parameter)
    assert torch.equal(getattr(module, name), before)


@every_verb
def test_assignments_are_accepted_refused_or_projected(verb):
    module = verb(linear(verb))
    module.weight = x = module.parametrizations.weight[0].sample()
    assert close(module.weight, x)
    before = copy.deepcopy(module.state_dict())
    off = wrong(x.shape)
    with pytest.raises(NotOnManifoldError) as caught:
        module.weight = off
    for part in (type(verb.space).__name__, "distance=", "shape=(", "project=True"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"must have shape \(.*shape=\(2, 4\).*Transpose"):
        module.weight = x[:2]
    with pytest.raises(NotOnManifoldError, match="finite"):
        module.weight = torch.full_like(x, float("inf"))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    if verb.function is V.symplectic:
        off = x + 1e-2 * torch.randn_like(x)  # only near the group is there a projection
    constraints.assign(module, "weight", off, project=True)
    assert verb.space.contains(module.weight)
    assert close(module.weight, verb.space.project(off))


@every_verb
def test_the_present_weight_is_kept_projected_or_replaced(verb):
    module = linear(verb)
    point = verb.space.sample(module.weight.shape)
    off = nn.Linear(4, module.out_features)
    with torch.no_grad():
        module.weight.copy_(point)
        off.weight.copy_(wrong(off.weight.shape))
    for init in (None, "keep", "project"):
        assert close(verb(copy.deepcopy(module), init=init).weight, point)
    assert close(verb(copy.deepcopy(off), init=point).weight, point)
    assert not close(verb(copy.deepcopy(module), init="sample").weight, point)
    with pytest.raises(NotOnManifoldError, match="distance="):
        verb(off, init="keep")
    assert not parametrize.is_parametrized(off)  # and nothing has changed
    assert torch.equal(off.weight, wrong(off.weight.shape))
    if verb.function is not V.symplectic:
        assert close(verb(off, init="project").weight, verb.space.project(wrong(point.shape)))


@every_verb
def test_copies_pickles_and_state_dicts(verb):
    module = verb(linear(verb))
    train(module, "weight", adam(module), 2)
    value = module.weight.detach().clone()
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, value)
    assert torch.equal(pickle.loads(pickle.dumps(module)).weight, value)
    fresh = verb(linear(verb))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.weight, value)
    train(twin, "weight", adam(twin), 2)
    assert not torch.equal(twin.weight, value)
    assert torch.equal(module.weight, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_verb
def test_samples_have_the_dtype_of_the_weight(verb, dtype):
    module = verb(linear(verb).to(dtype))
    for part in (module, copy.deepcopy(module)):
        sample = part.parametrizations.weight[0].sample()
        assert sample.dtype is dtype
        part.weight = sample
        assert part.weight.dtype is dtype
    assert module.double().parametrizations.weight[0].sample().dtype is torch.float64


FLATTENED = [
    (V.orthogonal, (), Stiefel()),
    (V.grassmannian, (), Grassmannian()),
    (V.almost_orthogonal, (), AlmostOrthogonal(0.1)),
    (V.spectral_ball, (), SpectralBall()),
    (V.low_rank, (2,), LowRank(2)),
    (V.fixed_rank, (2,), FixedRank(2)),
    (V.norm_ball, (), NormBall()),
]


@pytest.mark.parametrize(("verb", "arguments", "space"), FLATTENED)
def test_a_kernel_is_one_matrix_or_many(verb, arguments, space):
    whole, slices = (nn.Conv2d(3, 5, (3, 4)) for _ in range(2))
    verb(whole, "weight", *arguments, flatten=True)
    verb(slices, "weight", *arguments)
    for conv, view in ((whole, lambda w: w.flatten(1)), (slices, lambda w: w)):
        train(conv, "weight", adam(conv))
        assert conv.weight.shape == (5, 3, 3, 4)
        assert space.contains(view(conv.weight.detach()))
        conv(torch.randn(2, 3, 6, 6)).sum().backward()
    assert not space.contains(slices.weight.detach().flatten(1))


@every_verb
def test_buffers_are_constrained_too(verb):
    module = nn.Module()
    module.register_buffer("state", torch.randn(4, 4))
    verb(module, "state")
    assert verb.space.contains(matrix(verb, module.state))
    assert not list(module.parameters())
    module.state = x = module.parametrizations.state[0].sample()
    assert close(module.state, x)
    constraints.remove(module, "state")
    assert "state" in dict(module.named_buffers())


def test_complex_parameters_take_unitary():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    V.unitary(module)
    opt = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(5):
        opt.zero_grad()
        module.weight.real.sum().backward()
        opt.step()
    assert Unitary().contains(module.weight.detach())
    assert module.parametrizations.weight[0].sample().dtype is torch.complex64
    orthonet.update_base(module)
    assert Unitary().contains(module.weight.detach())
    with pytest.raises(NotOnManifoldError, match="singular values"):
        module.weight = 2.0 * module.weight.detach()


@pytest.mark.parametrize("verb", [V.grassmannian, V.skew, V.sphere, V.invertible])
def test_complex_parameters_are_refused_by_real_spaces(verb):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"complex tensor.*dtype=torch\.complex64.*unitary"):
        verb(module, "weight")
    assert torch.equal(module.weight, before)


def test_whole_modules_run_with_constrained_parts():
    lstm = V.product(nn.LSTM(3, 4), "weight_hh_l0", (Stiefel(), Stiefel(), SO(), SO(det=-1)))
    attention = V.orthogonal(nn.MultiheadAttention(4, 2), "in_proj_weight")
    V.orthogonal(attention.out_proj)
    for module, inputs in (
        (lstm, (torch.randn(5, 2, 3),)),
        (attention, (torch.randn(5, 2, 4),) * 3),
    ):
        opt = adam(module)
        for _ in range(3):
            opt.zero_grad()
            module(*inputs)[0].square().sum().backward()
            assert all(p.grad is not None for p in module.parameters())
            opt.step()
    blocks = lstm.weight_hh_l0.detach().split(4)
    assert all(Stiefel().contains(block) for block in blocks)
    assert torch.linalg.det(blocks[2]) > 0 > torch.linalg.det(blocks[3])
    assert Stiefel().contains(attention.in_proj_weight.detach())
    assert Stiefel().contains(attention.out_proj.weight.detach())


def test_chained_constraints_hold_together():
    layer = V.skew(nn.Linear(4, 4))
    V.spectral_ball(layer)
    train(layer, "weight", adam(layer), 20)
    assert Skew().contains(layer.weight.detach())
    assert SpectralBall().contains(layer.weight.detach())
    layer.weight = x = SpectralBall().project(Skew().sample((4, 4)))
    assert close(layer.weight, x)
    with pytest.raises(NotOnManifoldError, match="Skew"):
        layer.weight = 0.1 * torch.eye(4)
    assert close(layer.weight, x)
    assert close(pickle.loads(pickle.dumps(layer)).weight, x)
    assert close(copy.deepcopy(layer).weight, x)


SECOND = (V.orthogonal, V.nonnegative, V.norm_ball)


def snapshot(module: nn.Module) -> tuple:
    stages = [type(stage) for stage in module.parametrizations.weight]
    return stages, {**copy.deepcopy(module.state_dict()), "weight": module.weight.detach().clone()}


def same(before: tuple, after: tuple) -> bool:
    (stages, old), (others, new) = before, after
    return (
        stages == others
        and old.keys() == new.keys()
        and all(map(torch.equal, *([t[key] for key in old] for t in (old, new))))
    )


@every_verb
def test_a_second_constraint_works_by_projection(verb):
    """It was left half registered where its projection left the first space."""
    for second in (verb for verb in VERBS if verb.function in SECOND):
        layer = verb(nn.Linear(4, 4).double())
        first = layer.weight.detach().clone()
        assert second(layer) is layer
        assert second.space.contains(layer.weight.detach(), 1e-3)
        assert close(layer.weight, second.space.project(first))
        train(layer, "weight", adam(layer), 1)
        assert second.space.contains(layer.weight.detach(), 1e-3)
        constraints.remove(layer, "weight")


@every_verb
def test_a_second_constraint_is_applied_or_refused_as_a_whole(verb):
    layer, refusals = verb(nn.Linear(4, 4)), []
    before = snapshot(layer)
    point = 0.1 * torch.randn(4, 4)  # in the ball, hardly on the first space
    for space, attempt in (
        (NormBall(), lambda module: V.norm_ball(module, init=point)),
        (Symplectic(), lambda module: V.symplectic(module, init="sample")),
        (Symplectic(), lambda module: V.symplectic(module, init="project")),
        (Sphere(), lambda module: V.sphere(module, init="keep")),
        (Bounded(), lambda module: V.bounded(module, init=torch.eye(3))),
        (LowRank(1), lambda module: V.low_rank(module, "weight", 5)),
    ):
        module = copy.deepcopy(layer)
        try:
            attempt(module)
        except ValueError as error:
            refusals.append(str(error))
            assert same(before, snapshot(module))
            train(module, "weight", adam(module), 2)
            assert verb.space.contains(matrix(verb, module.weight))
        else:
            assert space.contains(module.weight.detach(), 1e-3)
    assert len(refusals) >= 3
    assert all(re.match(r"\w+: .+, got .+\. .+\.$", message) for message in refusals)


def test_every_verb_is_transferred_with_its_value_and_nothing_is_shared():
    for verb in VERBS:
        a, b = linear(verb), linear(verb)
        verb(a)
        train(a, "weight", adam(a))
        before = a.weight.detach().clone()
        assert constraints.transfer_parametrizations_and_params(a, b, "weight") is b
        assert torch.equal(b.weight, before), verb
        assert not torch.equal(b.bias, a.bias)
        train(b, "weight", adam(b))
        assert verb.space.contains(matrix(verb, b.weight), 1e-5), verb
        assert torch.equal(a.weight, before), verb
        with pytest.raises(ValueError, match="must not be constrained yet"):
            constraints.transfer_parametrizations_and_params(a, b)
    empty = nn.Module()
    constraints.transfer_parametrizations_and_params(a, empty)
    assert torch.equal(empty.weight, a.weight)
    with pytest.raises(ValueError, match="constrained tensor of that name"):
        constraints.transfer_parametrizations_and_params(a, nn.Linear(4, 8), "bias")


def test_a_parametrization_is_registered_as_it_is():
    p = SO().parametrization((4, 4), triv="cayley")
    layer = constraints.constrain(nn.Linear(4, 4), "weight", p)
    assert layer.parametrizations.weight[0] is p
    assert SO().contains(layer.weight)
    for bad, options in ((p, {"triv": "exponential"}), (SO().parametrization((3, 3)), {})):
        with pytest.raises(ValueError, match="must have the shape of the tensor"):
            constraints.constrain(nn.Linear(4, 4), "weight", bad, **options)
    constraints.constrain(layer, "weight", Stiefel().parametrization((4, 4)))  # by projection
    assert Stiefel().contains(layer.weight)


def test_errors_name_who_what_and_the_way_out():
    layer = nn.Linear(4, 3)
    for call, words in (
        (lambda: V.orthogonal(layer, "wieght"), ("constrain", "tensor_name='wieght'", "'weight'")),
        (lambda: V.symmetric(layer), ("Symmetric", "shape=(3, 4)", "Reshape")),
        (lambda: V.low_rank(layer, "weight", 0), ("LowRank", "rank=0")),
        (lambda: V.almost_orthogonal(layer, lam=2.0), ("AlmostOrthogonal", "lam=2.0")),
        (lambda: V.orthogonal(layer, triv="qr"), ("triv='qr'", "cayley")),
        (lambda: V.orthogonal(layer, det=3), ("orthogonal", "det=3", "free")),
        (lambda: V.symplectic(layer), ("Symplectic", "shape=(3, 4)")),
        (lambda: V.bounded(layer, low=1.0, high=0.0), ("Bounded", "low=1.0")),
        (lambda: constraints.assign(layer, "weight", torch.eye(3)), ("tensor_name='weight'",)),
        (lambda: constraints.update_base(layer, "bias"), ("update_base", "tensor_name='bias'")),
        (lambda: constraints.rebase_every(layer, None, 0), ("rebase_every", "steps=0")),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
            call()
        for word in words:
            assert word in str(caught.value)
        assert not parametrize.is_parametrized(layer)


def test_an_edit_in_place_is_reported_where_the_tensor_is_read():
    layer = V.orthogonal(nn.Linear(4, 4))
    nn.init.zeros_(layer.weight)
    with pytest.warns(InPlaceEditWarning) as record:
        _ = layer.weight
    assert record[0].filename == __file__
    nn.init.zeros_(layer.weight)
    with pytest.warns(InPlaceEditWarning) as record:
        layer(torch.randn(1, 4))
    assert record[0].filename == __file__  # not within torch


def test_a_constrained_tensor_is_assigned_values_of_another_dtype():
    for verb in ("orthogonal", "symmetric", "sphere", "positive_definite", "nonnegative", "sln"):
        layer = getattr(orthonet.constraints, verb)(nn.Linear(4, 4), "weight")
        value = layer.weight.detach().double()
        layer.weight = value
        assert layer.weight.dtype == torch.float32
        # a point and its coordinates: 5e-7 was seen at entries below 4
        torch.testing.assert_close(layer.weight.double(), value, rtol=8e-6, atol=8e-6)
    for value, way in (
        (torch.eye(4).long(), r"value.to\(torch.float32\)"),
        (torch.eye(4) + 0j, "real"),
    ):
        with pytest.raises(ValueError, match=rf"the tensor takes real .*\. .*{way}"):
            layer.weight = value
    layer = orthonet.unitary(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="the tensor takes complex values"):
        layer.weight = torch.eye(4)
