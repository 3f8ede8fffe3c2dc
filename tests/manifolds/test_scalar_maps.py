"""Assignment through the scalar maps is exact to rounding, at every size of the weight."""

import math
import re

import pytest
import torch
from torch import Tensor

from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds import (
    PSD,
    SL,
    AlmostOrthogonal,
    Bounded,
    FixedRank,
    GLp,
    Nonnegative,
    PSSDFixedRank,
    SpectralBall,
)
from orthonet.manifolds.scalar import ScalarMap, bounded_map, positive_map
from tests.manifolds.common import EXACT

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
POSITIVE = ("softplus", "exp", "absolute", torch.exp, (torch.exp, torch.log))
BOUNDED = ("fold", "sin", "tanh", "scaled_sigmoid")


def named(value):
    """The id of a case, the same in every process."""
    return re.sub(r"<built-in method (\w+) of type object at \w+>", r"\1", str(value))


def sizes(dtype: torch.dtype, count: int) -> Tensor:
    """Positive numbers from twice the smallest normal one to half of the largest."""
    info = torch.finfo(dtype)
    ends = math.log(2.0 * info.tiny), math.log(0.5 * info.max)
    return torch.linspace(*ends, count, dtype=torch.float64).exp().to(dtype)


def units(f: ScalarMap, y: Tensor, scale: Tensor, work: torch.dtype) -> float:
    """Largest error of f(inverse(y)), relative to `scale`, in units of what rounding may do.

    The inverse is computed in `work`, and the coordinate s kept in the dtype of y. To round s by
    one unit moves f(s) by |s f'(s)| units.
    """
    s = f.inverse(y.to(work)).to(y.dtype).to(compute_dtype(y.dtype)).requires_grad_()
    value = f(s)
    (slope,) = torch.autograd.grad(value.sum(), s)
    error = (value.detach().double() - y.double()).abs()
    return float((error / (scale + (s.detach() * slope).abs().double())).max()) / eps(y.dtype)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("f", POSITIVE, ids=named)
def test_positive_maps_and_their_inverses_agree_at_every_size(f, dtype):
    y = sizes(dtype, 200)
    for work in {torch.float64, compute_dtype(dtype)}:  # factorizations invert in float64
        # a unit each for the rounding of s and for its formula; observed 1.0
        assert units(positive_map("Test", f), y, y.double(), work) <= 2.0


@every_dtype
@pytest.mark.parametrize("f", BOUNDED)
def test_bounded_maps_and_their_inverses_agree_up_to_the_ends(f, dtype):
    near = 1.0 - torch.logspace(-17, 0, 500, dtype=torch.float64)
    y = torch.cat([near, -near, torch.linspace(-1, 1, 501, dtype=torch.float64)]).to(dtype)
    one = torch.ones((), dtype=torch.float64)
    for work in {torch.float64, compute_dtype(dtype)}:
        assert units(bounded_map("Test", f), y, one, work) <= 2.0  # observed 1.0, next to the ends


NAMED = POSITIVE[:3]
SCALED = [
    (space, {"f": f}) for space in (GLp(), PSD(), FixedRank(3), PSSDFixedRank(3)) for f in NAMED
] + [(Nonnegative(), {"f": f}) for f in (None, *POSITIVE)]


def allowed(dtype: torch.dtype, moved: float) -> float:
    """As any assignment, and what rounding the coordinate s moves, by |s f'(s) / f(s)| units."""
    return EXACT[compute_dtype(dtype)] + 2.0 * eps(dtype) * (1.0 + moved)


@every_dtype
@pytest.mark.parametrize(("space", "options"), SCALED, ids=named)
def test_spaces_without_a_scale_assign_at_every_size(space, options, dtype):
    """In float32, 1e-5 I became 1.0119e-5 I: forward added an eps, the inverse another one."""
    p = space.parametrization((3, 3), **options).to(dtype)
    for size in sizes(dtype, 11)[1:-1]:
        x = size * torch.eye(3, dtype=dtype)
        x = size.expand(3, 3) if isinstance(space, Nonnegative) else x
        error = (p(p.right_inverse(x)).double() - x.double()).abs().max() / size.double()
        # observed 0.05, 0.21, 0.20, 0.18 of it in float64, float32, bfloat16, float16
        assert float(error) <= allowed(dtype, abs(math.log(float(size))))


@every_dtype
@pytest.mark.parametrize("f", NAMED)
def test_matrices_of_determinant_one_keep_every_ratio(f, dtype):
    """In float32, diag(1e3, 1, 1e-3) became diag(971, ...)."""
    p = SL().parametrization((3, 3), f=f).to(dtype)
    for exponent in range(0, int(-0.5 * math.log2(eps(dtype))), 3):
        largest = 2.0**exponent
        x = torch.diag(torch.tensor([largest, 1.0, 1.0 / largest], dtype=dtype))
        error = (p(p.right_inverse(x)).double() - x.double()).abs().max() / largest
        assert float(error) <= allowed(dtype, 2.0 * math.log(largest))  # observed 0.17 of it


@every_dtype
@pytest.mark.parametrize("f", BOUNDED)
def test_spaces_with_a_scale_assign_up_to_their_ends(f, dtype):
    values = torch.tensor([1.0, 1.0 - eps(dtype), 0.3], dtype=torch.float64)
    for space, diagonal in (
        (SpectralBall(), values),
        (AlmostOrthogonal(0.2), 0.8 + 0.4 * values),
        (Bounded(-0.5, 2.0), -0.5 + 2.5 * values),
    ):
        p = space.parametrization((3, 3), f=f).to(dtype)
        x = torch.diag(diagonal).to(dtype)
        error = (p(p.right_inverse(x)).double() - x.double()).abs().max()
        assert float(error) <= allowed(dtype, 1.0)  # observed 0.20 of it
