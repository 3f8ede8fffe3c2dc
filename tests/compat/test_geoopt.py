"""A geoopt script runs after one changed import: its maps, its tensors, its optimizers."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import orthonet.compat.geoopt as geoopt
from orthonet.errors import NotOnManifoldError
from tests.compat.tables import names_of

double = torch.float64
# The public names of geoopt 0.5.1, and those of geoopt.optim
PEER = set(
    """
    BirkhoffPolytope BoundedDomain CanonicalStiefel Euclidean EuclideanStiefel
    EuclideanStiefelExact Lorentz Manifold ManifoldParameter ManifoldTensor PoincareBall
    PoincareBallExact ProductManifold Scaled Sphere SphereExact SphereProjection
    SphereProjectionExact Stereographic StereographicExact StereographicProductManifold Stiefel
    SymmetricPositiveDefinite UpperHalf ismanifold linalg manifolds optim samplers tensor utils
    optim.RiemannianAdam optim.RiemannianSGD optim.RiemannianLineSearch
    optim.SparseRiemannianAdam optim.SparseRiemannianSGD
    """.split()  # noqa: SIM905
)
MANIFOLDS = [
    (geoopt.Euclidean(), (4, 3)),
    (geoopt.Euclidean(ndim=1), (4, 3)),
    (geoopt.Sphere(), (4, 5)),
    (geoopt.SphereExact(), (4, 5)),
    (geoopt.Stiefel(), (2, 5, 3)),
    (geoopt.Stiefel(canonical=False), (2, 5, 3)),
    (geoopt.EuclideanStiefelExact(), (2, 5, 3)),
    (geoopt.SymmetricPositiveDefinite(), (2, 3, 3)),
    (geoopt.PoincareBall(), (4, 5)),
    (geoopt.PoincareBallExact(c=0.5), (4, 5)),
    (geoopt.Lorentz(), (4, 5)),
    (geoopt.Lorentz(k=2.0), (4, 5)),
    (geoopt.BirkhoffPolytope(), (2, 3, 3)),
]
every_manifold = pytest.mark.parametrize(("manifold", "shape"), MANIFOLDS, ids=str)


def test_the_page_has_every_name_and_what_is_missing_says_so():
    table = names_of("coming-from-geoopt.md", geoopt)
    assert set(table) == PEER
    there = {name for name, fate in table.items() if not fate.startswith("no:")}
    assert set(geoopt.__all__) == {name for name in there if "." not in name}
    for name in PEER - there:
        if "." not in name:
            with pytest.raises(AttributeError, match=rf"{name} has no counterpart here: \w"):
                getattr(geoopt, name)
    with pytest.raises(AttributeError, match="has no attribute 'Sphere2'"):
        geoopt.Sphere2  # noqa: B018


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach().as_subclass(torch.Tensor)


@every_manifold
def test_maps_have_the_peers_names_orders_and_shapes(manifold, shape):
    x, y = (plain(manifold.random(*shape, dtype=double)) for _ in range(2))
    u, v = (0.1 * manifold.proju(x, torch.randn_like(x)) for _ in range(2))
    assert manifold.check_point_on_manifold(manifold.projx(x + 0.01 * torch.randn_like(x)))
    assert manifold.check_vector_on_tangent(x, u)
    assert not manifold.check_point(x[0, 0]) or manifold.ndim < 2
    batch = shape[: len(shape) - manifold.ndim]
    kept = (*batch, *[1] * manifold.ndim)
    assert manifold.inner(x, u, v).shape == batch
    assert manifold.inner(x, u, v, keepdim=True).shape == kept
    assert torch.allclose(manifold.inner(x, u), manifold.inner(x, u, u))
    for step, follow in (("retr", "transp_follow_retr"), ("expmap", "transp_follow_expmap")):
        z, carried = getattr(manifold, f"{step}_transp")(x, u, v)
        assert torch.equal(z, getattr(manifold, step)(x, u))
        assert torch.equal(carried, manifold.transp(x, z, v))
        assert torch.equal(carried, getattr(manifold, follow)(x, u, v))
        assert manifold.check_point_on_manifold(z)
        # both agree with the line to first order
        small = getattr(manifold, step)(x, 1e-4 * u) - x - 1e-4 * u
        assert float(small.abs().max()) <= 1e-5 * float(u.abs().max())
    grad = torch.randn_like(x)  # the Riemannian gradient represents the differential
    found = manifold.inner(x, manifold.egrad2rgrad(x, grad), u)
    expected = grad * u
    dims = tuple(range(-manifold.ndim, 0))
    expected = expected.sum(dims) if manifold.ndim else expected
    assert torch.allclose(found, expected, atol=1e-9)
    if hasattr(manifold.space, "log") or isinstance(manifold, geoopt.Euclidean):
        assert torch.allclose(manifold.expmap(x, manifold.logmap(x, y)), y, atol=1e-7)
        assert torch.allclose(manifold.dist2(x, y), manifold.dist(x, y).square())
        assert manifold.dist(x, y, keepdim=True).shape == kept
    else:
        with pytest.raises(ValueError, match="no distance in closed form"):
            manifold.dist(x, y)
        with pytest.raises(ValueError, match="no log in closed form"):
            manifold.logmap(x, y)
    origin = manifold.origin(*shape)
    assert isinstance(origin, geoopt.ManifoldTensor)
    assert manifold.check_point_on_manifold(origin)
    assert origin.manifold == manifold
    assert manifold.random(shape).shape == shape
    assert geoopt.ismanifold(manifold, type(manifold))


def test_hyperbolic_formulas_of_the_documentation():
    """Curvature -c on the ball, -1 / k on the hyperboloid."""
    for c in (1.0, 0.5, 2.0):
        ball = geoopt.PoincareBall(c=c)
        x, y = (plain(ball.random(6, 3, dtype=double)) for _ in range(2))
        u = torch.randn(6, 3, dtype=double)
        moved = ball.mobius_sub(y, x).norm(dim=-1)
        expected = 2 / c**0.5 * torch.atanh(c**0.5 * ball.mobius_add(-x, y).norm(dim=-1))
        assert torch.allclose(ball.dist(x, y), expected)
        assert torch.allclose(moved, ball.mobius_add(-x, y).norm(dim=-1))
        size = u.norm(dim=-1, keepdim=True)
        assert torch.allclose(ball.expmap0(u), torch.tanh(c**0.5 * size) * u / (c**0.5 * size))
        assert torch.allclose(ball.logmap0(ball.expmap0(u)), u)
        assert torch.allclose(ball.dist0(x), ball.lambda_x(0 * x) * ball.logmap0(x).norm(dim=-1))
        m = torch.randn(3, 3, dtype=double)
        assert torch.allclose(ball.logmap0(ball.mobius_matvec(m, x)), ball.logmap0(x) @ m.T)
        assert torch.allclose(ball.mobius_scalar_mul(2.0, x), ball.mobius_add(x, x))
        assert torch.allclose(ball.transp0back(x, ball.transp0(x, u)), u)
        assert torch.allclose(ball.lambda_x(x), 2 / (1 - c * x.square().sum(-1)))
        assert ball.k == -c
        step = 0.1 * u * (1 - c * x.square().sum(-1, keepdim=True))
        assert torch.allclose(ball.retr(x, step), ball.projx(x + step))
    for k in (1.0, 2.0):
        sheet = geoopt.Lorentz(k=k)
        x, y = (plain(sheet.random_normal(6, 4, dtype=double)) for _ in range(2))
        product = (x * y)[:, 1:].sum(-1) - (x * y)[:, 0]
        assert torch.allclose(sheet.dist(x, y), k**0.5 * torch.acosh(-product / k), atol=1e-6)
        u = sheet.proju(x, torch.randn(6, 4, dtype=double))
        assert torch.allclose(sheet.norm(u), sheet.inner(x, u).sqrt())
        assert torch.allclose(sheet.norm(x, u), sheet.norm(u))


class Model(nn.Module):
    def __init__(self, manifold, shape):
        super().__init__()
        self.x = geoopt.ManifoldParameter(manifold.random(*shape, dtype=double), manifold)
        self.bias = nn.Parameter(torch.randn(3, dtype=double))


OPTIMIZERS = {
    "adam": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=2e-2),
    "amsgrad": lambda ps: geoopt.optim.RiemannianAdam(ps, lr=2e-2, amsgrad=True, stabilize=3),
    "sgd": lambda ps: geoopt.optim.RiemannianSGD(ps, 1e-2),
    "nesterov": lambda ps: geoopt.optim.RiemannianSGD(
        ps, 5e-3, momentum=0.9, nesterov=True, stabilize=2
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_models_train_and_stay_on_their_manifolds(make):
    for manifold, shape in MANIFOLDS:
        torch.manual_seed(0)
        model = Model(manifold, shape)
        x = plain(model.x)
        target = manifold.retr(x, 0.1 * manifold.proju(x, torch.randn_like(x)))
        optimizer = make(model.parameters())
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model.x - target).square().sum() + model.bias.square().sum()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], manifold
        assert manifold.check_point_on_manifold(model.x, atol=1e-8, rtol=0.0)
        assert isinstance(model.x, geoopt.ManifoldParameter)


def test_the_second_moment_is_the_squared_length_as_in_geoopt():
    x = geoopt.ManifoldParameter(geoopt.Sphere().random(1, 6, dtype=double))
    before = plain(x).clone()
    optimizer = geoopt.optim.RiemannianAdam([x], lr=1e-3)
    (x * torch.randn(6, dtype=double)).sum().backward()
    optimizer.step()
    moved = geoopt.Sphere().dist(before, plain(x))  # the length of the first step is lr
    assert abs(float(moved) - 1e-3) <= 1e-8


def test_tensors_know_their_manifold():
    sphere = geoopt.Sphere()
    x = geoopt.ManifoldTensor(torch.randn(3, 5), manifold=sphere)
    assert not sphere.check_point_on_manifold(x)
    assert x.proj_() is x
    assert sphere.check_point_on_manifold(x)
    u, y = x.proju(torch.randn(3, 5)), sphere.random(3, 5)
    for name, arguments in {
        "retr": (u,),
        "expmap": (u,),
        "inner": (u, u),
        "proju": (u,),
        "egrad2rgrad": (u,),
        "transp": (y, u),
        "retr_transp": (u, u),
        "expmap_transp": (u, u),
        "logmap": (y,),
        "transp_follow_retr": (u, u),
        "transp_follow_expmap": (u, u),
    }.items():
        found, expected = getattr(x, name)(*arguments), getattr(sphere, name)(x, *arguments)
        found = found if isinstance(found, tuple) else (found,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(x.dist(y, p="g"), sphere.dist(x, y))
    assert torch.equal(x.dist(y), torch.dist(plain(x), plain(y)))
    p = geoopt.ManifoldParameter(x)
    assert p.manifold is sphere
    assert isinstance(p, nn.Parameter)
    assert type(p + 1) is torch.Tensor
    assert "Parameter on Sphere" in repr(p)
    with pytest.raises(ValueError, match="must be that of the tensor"):
        geoopt.ManifoldParameter(x, manifold=geoopt.Euclidean())
    assert geoopt.ManifoldParameter(torch.randn(3)).manifold == geoopt.Euclidean()
    model = Model(sphere, (3, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.x, model.x)
        assert other.x.manifold == sphere
        assert type(other.x) is geoopt.ManifoldParameter
        with torch.no_grad():
            other.x.zero_()
        assert sphere.check_point_on_manifold(model.x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert dict(model.float().named_parameters())["x"].manifold == sphere
    assert type(model.state_dict()["x"]) is torch.Tensor


def test_what_cannot_be_mapped_raises_one_sentence():
    for build, message in (
        (lambda: geoopt.Sphere(intersection=torch.eye(3)), "within a subspace"),
        (lambda: geoopt.SymmetricPositiveDefinite("LEM"), "must be the affine-invariant one"),
        (lambda: geoopt.PoincareBall(learnable=True), "curvature is a fixed number"),
        (lambda: geoopt.Lorentz(learnable=True), "curvature is a fixed number"),
        (lambda: geoopt.Sphere().assert_check_point_on_manifold(torch.ones(3)), "norm must be 1"),
        (
            lambda: geoopt.Sphere().assert_check_vector_on_tangent(*torch.eye(2)[[0, 0]]),
            "must be tangent",
        ),
        (lambda: geoopt.Stiefel().random(3), "must be a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    off = geoopt.ManifoldParameter(torch.ones(3), manifold=geoopt.Sphere())
    with pytest.raises(NotOnManifoldError, match="Project it"):
        geoopt.optim.RiemannianSGD([off], 0.1)
    names = list(inspect.signature(geoopt.optim.RiemannianSGD).parameters)
    assert names == [
        "params",
        "lr",
        "momentum",
        "dampening",
        "weight_decay",
        "nesterov",
        "stabilize",
    ]
