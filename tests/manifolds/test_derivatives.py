"""Derivatives of every map: forward mode equals reverse mode, and equal points are no exception."""

import pytest
import torch
from torch.autograd import forward_ad

from orthonet.manifolds import PSD, SL, AlmostOrthogonal, DoublyStochastic, SpectralBall, Symplectic
from orthonet.testing import tolerances
from tests.each import each
from tests.manifolds.common import ALSO, CASES, EXACT, SPACES, fits, relative
from tests.manifolds.test_geometry import GEODESIC

# of forward mode itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
double = torch.float64
FITTING = [
    (space, next(s for s in ((6, 3), (4, 4)) if fits(space, s))) for space, _ in [*SPACES, *ALSO]
]
GENERIC = [case for case in CASES if case[:2] in FITTING]
MAPS = ("project", "tangent", "retract", "exp", "log", "distance", "transport", "norm")


def sides(function, arguments) -> tuple[float, float]:
    """The two sides of <J t, g> = <t, J* g>, relative to |t| |J* g|, in forward and reverse."""
    tangents = tuple(torch.randn_like(x) for x in arguments)
    with forward_ad.dual_level():  # `torch.func.jvp` would count as traced
        y = function(*map(forward_ad.make_dual, arguments, tangents))
        moved = forward_ad.unpack_dual(y).tangent
    assert moved is not None
    g = torch.randn_like(moved)
    leaves = [x.clone().requires_grad_() for x in arguments]
    grads = torch.autograd.grad(
        function(*leaves), leaves, g, allow_unused=True, materialize_grads=True
    )
    pairs = list(zip(tangents, grads, strict=True))
    size = sum(float(t.double().norm() * h.double().norm()) for t, h in pairs)
    size = max(size, float(moved.double().norm() * g.double().norm()), 1e-30)
    forward = float((moved.double() * g.double()).sum())
    return forward / size, sum(float((t.double() * h.double()).sum()) for t, h in pairs) / size


def sample(space, shape, dtype) -> torch.Tensor:
    """A random point, well conditioned where exponentials divide by it."""
    x = space.sample(shape, dtype=dtype)
    if not isinstance(space, (PSD, SL)):
        return x
    size = torch.linalg.matrix_norm(x, keepdim=True)
    return space.project(torch.eye(shape[-1], dtype=dtype) + 0.5 * x / size)


def arguments_of(space, method, shape, dtype):
    """Arguments at which the method is smooth."""
    x = sample(space, shape, dtype)
    v = 0.1 * space.tangent(x, torch.randn_like(x))
    y = space.retract(x, v)
    near = (1e-3 if isinstance(space, Symplectic) else 0.3) * torch.randn_like(x)
    return {
        "project": (x + near,),
        "log": (x, y),
        "distance": (x, y),
        "transport": (x, y, v),
    }.get(method, (x, v))


@each("case", GENERIC, of=lambda case: repr(case[0]))
def test_parametrizations_have_the_same_derivative_in_both_modes(case, dtype):
    space, shape, options = case
    p = space.parametrization(shape, **options).to(dtype)
    c = p.right_inverse(space.sample(shape, dtype=dtype))
    if not c.numel():
        return
    forward, reverse = sides(p, (c + 0.2 * torch.randn_like(c),))
    # observed 0.001 of it in float64, 0.09 in float32, where the two modes sum in other orders
    assert abs(forward - reverse) <= EXACT[dtype] + tolerances.rounding(dtype, 200)


@each("method", MAPS)
@pytest.mark.parametrize(("space", "shape"), FITTING, ids=str)
def test_maps_of_spaces_have_the_same_derivative_in_both_modes(space, shape, method, dtype):
    if not hasattr(space, method):
        return
    arguments = arguments_of(space, method, shape, dtype)
    forward, reverse = sides(getattr(space, method), arguments)
    assert abs(forward - reverse) <= tolerances.rounding(dtype, 200)  # observed 0.15 of it


@pytest.mark.parametrize(
    "space", [SpectralBall(), AlmostOrthogonal(0.2), PSD(), DoublyStochastic()], ids=repr
)
def test_projections_can_be_differentiated_twice_and_mapped(space):
    x = torch.randn(2, 4, 4, dtype=double)
    assert torch.autograd.gradgradcheck(space.project, x[0].clone().requires_grad_())
    hessian = torch.func.hessian(lambda t: space.project(t).square().sum())(x[0])
    assert relative(hessian.reshape(16, 16), hessian.reshape(16, 16).mT) <= 1e-12
    if not isinstance(space, DoublyStochastic):  # a hundred rounds only, where code is traced
        together = torch.func.vmap(space.project)(x)
        assert relative(together, torch.stack([space.project(one) for one in x])) <= 1e-13


def special(space, shape, dtype) -> list[torch.Tensor]:
    """A random point, and one where spectra repeat: the nearest to the identity."""
    identity = torch.eye(*shape[-2:], dtype=dtype).expand(shape).clone()
    return [sample(space, shape, dtype), space.project(identity)]


@pytest.mark.parametrize(("space", "shape"), GEODESIC, ids=str)
def test_gradients_at_equal_points_are_finite_and_those_of_the_difference(space, shape, dtype):
    """Of `distance` the subgradient 0, of its square 0, of `log` those of y - x."""
    for x in special(space, shape, dtype):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        for power in (1, 2):
            d = space.distance(a, b)
            for grad in torch.autograd.grad(d.pow(power).sum(), (a, b)):
                assert torch.isfinite(grad).all()
        g, v = torch.randn_like(x), space.tangent(x, torch.randn_like(x))
        grads = torch.autograd.grad(space.log(a, b), (a, b), g)
        size = float(g.norm() * v.norm())
        for grad, sign in zip(grads, (-1.0, 1.0), strict=True):
            gap = float((grad * v).sum() - sign * (g * v).sum()) / size
            assert abs(gap) <= tolerances.rounding(dtype, 200)  # observed 0.47 of it


@pytest.mark.parametrize(("space", "shape"), FITTING, ids=str)
def test_the_length_of_nothing_has_the_gradient_zero(space, shape, dtype):
    for x in special(space, shape, dtype):
        x.requires_grad_()
        v = torch.zeros_like(x).requires_grad_()
        length = space.norm(x, v)
        grads = torch.autograd.grad(length.sum(), (x, v), allow_unused=True, materialize_grads=True)
        assert not any(t.any() for t in (length, *grads))


@pytest.mark.parametrize(("space", "shape"), GEODESIC, ids=str)
def test_repeated_spectra_give_finite_gradients(space, shape, dtype):
    """At the identity, the most common base point, every decomposition is degenerate."""
    x = special(space, shape, dtype)[1].requires_grad_()
    v = space.tangent(x.detach(), 0.3 * torch.randn_like(x)).requires_grad_()
    y = space.exp(x.detach(), v.detach())
    for value in (space.exp(x, v), space.log(x, y), space.distance(x, y), space.transport(x, y, v)):
        for grad in torch.autograd.grad(value.sum(), (x, v), allow_unused=True):
            assert grad is None or torch.isfinite(grad).all()
