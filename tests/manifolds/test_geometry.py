"""Textbook identities of the geometry: exp, log, distance, transport, tangent, volumes."""

import math

import pytest
import torch

from orthonet.manifolds import (
    PSD,
    PSSD,
    SL,
    SO,
    AlmostOrthogonal,
    EuclideanStiefel,
    FisherRaoSimplex,
    FixedRank,
    GLp,
    Grassmannian,
    Hyperbolic,
    LowRank,
    Oblique,
    PoincareBall,
    PSSDFixedRank,
    PSSDLowRank,
    Rn,
    Skew,
    Sphere,
    Stiefel,
    Symmetric,
    Symplectic,
)
from tests.manifolds.common import ALSO, SPACES, fits, relative

# Spaces with a logarithm, and shapes.
GEODESIC = [
    (Rn(), (2, 4, 3)),
    (Symmetric(), (2, 4, 4)),
    (Skew(), (2, 4, 4)),
    (Sphere(), (3, 5)),
    (Sphere(2.5), (3, 5)),
    (Oblique(), (2, 4, 3)),
    (SO(), (2, 4, 4)),
    (SO(), (2, 5, 5)),
    (SO(det=-1), (2, 4, 4)),
    (Grassmannian(), (2, 6, 2)),
    (Grassmannian(), (2, 2, 6)),
    (PSD(), (2, 4, 4)),
    (Hyperbolic(), (3, 5)),
    (Hyperbolic(2.0), (3, 5)),
    (PoincareBall(2.0), (3, 5)),
    (FisherRaoSimplex(), (3, 5)),
]
geodesic = pytest.mark.parametrize(("space", "shape"), GEODESIC, ids=str)
EXP_ONLY = [
    (Stiefel(), (2, 5, 2)),
    (Stiefel(), (2, 5)),
    (Stiefel(), (4, 4)),
    (EuclideanStiefel(), (2, 5, 2)),
    (EuclideanStiefel(), (2, 5)),
    (SL(), (2, 3, 3)),
]
double = torch.float64


def point(space, shape):
    return space.sample(shape, dtype=double)


def vector(space, x, size):
    """A tangent vector of that length."""
    v = space.tangent(x, torch.randn_like(x))
    lengths = space.norm(x, v)
    return size * v / lengths.reshape(*lengths.shape, *[1] * space.event_ndim)


def reach(space, x):
    """A length within the injectivity radius, at which no geodesic is reflected at a boundary."""
    if isinstance(space, FisherRaoSimplex):
        return min(0.7, 0.9 * 2.0 * math.asin(float(x.min()) ** 0.5))
    return 0.7


@geodesic
def test_exponential_and_logarithm_are_inverse_and_give_the_distance(space, shape):
    x = point(space, shape)
    for size in (1e-6, reach(space, x)):
        v = vector(space, x, size)
        y = space.exp(x, v)
        assert space.contains(y)
        assert relative(space.log(x, y) / size, v / size) <= 1e-7  # observed 2e-8, at 1e-6
        assert torch.allclose(space.distance(x, y), space.norm(x, v), rtol=1e-8)
        assert torch.allclose(space.distance(y, x), space.distance(x, y), rtol=1e-8)
    y = point(space, shape)
    back = space.exp(x, space.log(x, y))
    if isinstance(space, Grassmannian):
        assert float(space.distance(back, y).max()) <= 1e-7  # bases differ, subspaces do not
    else:
        assert relative(back, y) <= 1e-10
    assert torch.allclose(space.distance(x, y), space.norm(x, space.log(x, y)), rtol=1e-9)
    assert float(space.distance(x, x).abs().max()) <= 1e-7
    middle = space.exp(x, 0.5 * space.log(x, y))
    assert torch.allclose(space.distance(x, middle), 0.5 * space.distance(x, y), rtol=1e-7)


@pytest.mark.parametrize("size", [0.0, math.pi])
def test_logarithms_at_the_ends(size):
    """The same point, and (for rotations) the cut locus, where one of several is returned."""
    x = SO().sample((4, 4), dtype=double)
    turn = torch.eye(4, dtype=double)
    if size:
        turn[:2, :2] *= -1.0
    v = SO().log(x, x @ turn)
    assert torch.allclose(SO().norm(x, v), torch.tensor(size, dtype=double), atol=1e-10)
    assert relative(SO().exp(x, v), x @ turn) <= 1e-10


# On the Grassmannian it is by projection, as documented.
CARRIERS = [case for case in GEODESIC if not isinstance(case[0], Grassmannian)]


@pytest.mark.parametrize(("space", "shape"), CARRIERS, ids=str)
def test_transport_is_isometric_and_carries_the_geodesic_to_itself(space, shape):
    x = point(space, shape)
    y = space.exp(x, vector(space, x, 0.7))
    u, v = vector(space, x, 1.0), vector(space, x, 2.0)
    moved = [space.transport(x, y, t) for t in (u, v)]
    for t in moved:
        assert relative(space.tangent(y, t), t) <= 1e-10
    assert torch.allclose(space.inner(y, *moved), space.inner(x, u, v), atol=1e-10)
    arrived = space.transport(x, y, space.log(x, y))
    assert relative(arrived, -space.log(y, x)) <= 1e-9


@pytest.mark.parametrize(
    ("space", "shape"),
    [(Grassmannian(), (5, 2)), (Stiefel(), (5, 2)), (SL(), (3, 3)), (GLp(), (3, 3))],
)
def test_transport_by_projection_is_tangent_and_never_longer(space, shape):
    x, y = point(space, shape), point(space, shape)
    v = vector(space, x, 1.0)
    moved = space.transport(x, y, v)
    assert torch.equal(moved, space.tangent(y, v))
    assert float(moved.norm()) <= float(v.norm()) * (1 + 1e-12)


FITTING = [
    pytest.param(space, next(s for s in ((2, 4, 4), (2, 6, 3)) if fits(space, s)), id=repr(space))
    for space, _ in [*SPACES, *ALSO]
]


@pytest.mark.parametrize(("space", "shape"), FITTING)
def test_the_tangent_projection_is_idempotent_and_orthogonal(space, shape):
    x = point(space, shape)
    u, v = torch.randn(2, *shape, dtype=double)
    tu, tv = space.tangent(x, u), space.tangent(x, v)
    assert relative(space.tangent(x, tu), tu) <= 1e-10
    if isinstance(space, Symplectic):
        return  # a projection along the symplectic complement
    if isinstance(space, (Hyperbolic, FisherRaoSimplex)):
        # orthogonal for the form of which `inner` is the restriction
        normal = u - tu
        assert float(space.inner(x, normal, tv).abs().max()) <= 1e-9
        return
    product = ((u - tu) * tv).sum((-2, -1)) if space.event_ndim == 2 else ((u - tu) * tv).sum(-1)
    assert float(product.abs().max()) <= 1e-9  # the Frobenius metric of the embedding


@pytest.mark.parametrize(("space", "shape"), FITTING)
def test_retractions_agree_with_the_line_to_first_order(space, shape):
    x = point(space, shape)
    v = 0.05 * space.tangent(x, torch.randn_like(x))
    assert relative(space.retract(x, torch.zeros_like(v)), x) <= 1e-9
    if type(space).__name__ in {"Nonnegative", "Bounded", "NormBall", "SpectralBall", "Simplex"}:
        return  # v may leave these sets, whatever its length
    errors = []
    for t in (1e-3, 1e-4):
        y = space.retract(x, t * v)
        errors.append(float((y - x - t * v).abs().max()))
        if hasattr(space, "exp"):
            assert float((y - space.exp(x, t * v)).abs().max()) <= 10 * t**2
    assert errors[1] <= 0.02 * errors[0] + 1e-9  # quadratic: a hundredth; flat spaces: rounding


@pytest.mark.parametrize("method", ["cayley", "polar", "exponential"])
@pytest.mark.parametrize("shape", [(5, 2), (2, 5), (4, 4)])
def test_retractions_of_frames(method, shape):
    x = point(Stiefel(), shape)
    v = vector(Stiefel(), x, 1.0)
    for t in (1e-2, 1e-3):
        gap = Stiefel().retract(x, t * v, method=method) - Stiefel().exp(x, t * v)
        # the Cayley map is of second order, its error of third; that of the polar factor of a
        # geodesic of the canonical metric is of second
        assert float(gap.abs().max()) <= (5 * t**3 if method != "polar" else 5 * t**2)


@pytest.mark.parametrize(("space", "shape"), EXP_ONLY, ids=str)
def test_exponentials_without_a_logarithm(space, shape):
    x = point(space, shape)
    v = vector(space, x, 0.5)
    assert space.contains(space.exp(x, v))
    h = 1e-5
    slope = (space.exp(x, h * v) - space.exp(x, -h * v)) / (2 * h)
    assert relative(slope, v) <= 1e-8
    if isinstance(space, Stiefel):  # a geodesic has constant speed
        y = space.exp(x, v)
        slope = (space.exp(x, (1 + h) * v) - space.exp(x, (1 - h) * v)) / (2 * h)
        assert torch.allclose(space.norm(y, slope), space.norm(x, v), rtol=1e-7)


VOLUMES = [
    (Symmetric(), (3, 3), {}),
    (Skew(), (3, 3), {}),
    (Sphere(), (4,), {}),
    (SO(), (3, 3), {}),
    (SO(), (3, 3), {"triv": "cayley"}),
    (Stiefel(), (4, 2), {}),
    (GLp(), (2, 2), {}),
    (GLp(), (3, 3), {"f": "exp", "triv": "cayley"}),
    (SL(), (2, 2), {}),
    (LowRank(1), (3, 3), {}),
    (LowRank(2), (4, 3), {"triv": "cayley"}),
    (FixedRank(2), (3, 4), {"f": "exp"}),
    (PSD(), (3, 3), {}),
    (PSSD(), (3, 3), {"triv": "cayley"}),
    (PSSDFixedRank(2), (3, 3), {}),
]


def jacobian(p, c):
    return torch.autograd.functional.jacobian(p, c).reshape(-1, c.numel())


@pytest.mark.parametrize(("space", "shape", "options"), VOLUMES, ids=str)
def test_log_volumes_are_those_of_the_jacobian(space, shape, options):
    p = space.parametrization(shape, **options).double()
    c = p.right_inverse(point(space, shape))
    c = c + 0.3 * torch.randn_like(c)
    j = jacobian(p, c)
    expected = 0.5 * torch.linalg.slogdet(j.mT @ j).logabsdet
    assert torch.allclose(p.log_abs_det(c), expected, atol=1e-9)


BIJECTIVE = (
    [(s, sh, {}) for s, sh in GEODESIC[1:] if not isinstance(s, FisherRaoSimplex)]
    + VOLUMES
    + [(AlmostOrthogonal(0.3), (4, 2), {}), (Stiefel(), (3, 3), {}), (PSSDLowRank(2), (4, 4), {})]
)


@pytest.mark.parametrize(("space", "shape", "options"), BIJECTIVE, ids=str)
def test_the_dimension_is_the_rank_of_the_differential(space, shape, options):
    shape = shape[-space.event_ndim :]
    p = space.parametrization(shape, **options).double()
    c = p.right_inverse(point(space, shape))
    c = c + 0.1 * torch.randn_like(c)
    j = jacobian(p, c)
    assert int(torch.linalg.matrix_rank(j, rtol=1e-8)) == space.dimension(shape) == c.numel()
    if space.event_ndim == 2 and not isinstance(space, Grassmannian):
        x = p(c)  # and the differential maps onto the tangent space
        for column in j.mT[:3]:
            v = column.reshape(shape)
            assert relative(space.tangent(x, v), v) <= 1e-8


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_the_ball_and_the_hyperboloid_are_one_space(radius):
    """Points, distances, tangent vectors, geodesics and transport, to a float64 rounding."""
    ball = PoincareBall(radius)
    x, y = ball.sample((2, 50, 4), dtype=double)
    up, down = ball.to_hyperboloid, ball.from_hyperboloid
    assert ball.hyperboloid.contains(up(x))
    assert relative(down(up(x)), x) <= 1e-14
    assert torch.allclose(ball.distance(x, y), ball.hyperboloid.distance(up(x), up(y)), atol=1e-12)
    v = ball.log(x, y)
    lifted = torch.func.jvp(up, (x,), (v,))[1]
    assert relative(lifted, ball.hyperboloid.log(up(x), up(y))) <= 1e-12
    carried = torch.func.jvp(up, (y,), (ball.transport(x, y, torch.ones_like(x)),))[1]
    ones = torch.func.jvp(up, (x,), (torch.ones_like(x),))[1]
    assert relative(carried, ball.hyperboloid.transport(up(x), up(y), ones)) <= 1e-12


def test_the_probabilities_are_a_part_of_a_sphere():
    space = FisherRaoSimplex()
    x, y = space.sample((2, 50, 4), dtype=double)
    expected = 2.0 * torch.acos((x * y).sqrt().sum(-1))
    assert torch.allclose(space.distance(x, y), expected, atol=1e-12)
    corner = torch.eye(4, dtype=double)
    assert torch.allclose(space.distance(corner[0], corner[1]), torch.tensor(math.pi).double())
    grad = torch.randn_like(x)  # the natural gradient represents the differential
    v = space.tangent(x, torch.randn_like(x))
    natural = space.inner(x, space.gradient(x, grad), v)
    assert torch.allclose(natural, (grad * v).sum(-1), atol=1e-12)


def test_checkpoints_with_an_empty_reflector_load():
    """Beside a square base there is none; earlier versions saved an empty one."""
    from orthonet import constraints

    square, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    constraints.orthogonal(square, "weight"), constraints.orthogonal(other, "weight")
    saved = square.state_dict()
    assert not any(name.endswith("reflector") for name in saved)
    place = next(name for name in saved if name.endswith("base")).removesuffix("base")
    saved[f"{place}reflector"] = torch.empty(4, 0)
    other.load_state_dict(saved)
    assert torch.equal(other.weight, square.weight)
    assert f"{place}reflector" in saved  # what the caller holds is left alone
