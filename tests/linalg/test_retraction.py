"""Retractions to the center: what they promise, whatever the matrices."""

import pytest
import torch

from orthonet.linalg import haar, polar
from orthonet.linalg.retraction import POLAR, QR, center, retract
from orthonet.testing import tolerances

ways = pytest.mark.parametrize("way", [POLAR, QR], ids=["polar", "qr"])


def error(point):
    """Largest |sigma - 1| of the values U of centered matrices."""
    u, _ = center(point)
    return float((torch.linalg.svdvals(u.double()) - 1).abs().max())


@ways
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("shape", [(16, 16), (3, 24, 8), (8, 24), (256, 256)])
def test_matrices_are_centered_at_the_value_of_their_map(way, shape, size, dtype):
    x = 2.5 * haar(shape, dtype=dtype)
    x += size * torch.randn(shape, dtype=dtype) / max(shape[-2:]) ** 0.5
    before = x.clone()
    (moved,) = retract([(x, way)])
    assert all(moved.good) and torch.equal(x, before)
    assert error(moved.point) <= tolerances.PROMISE[dtype]  # observed 7.9e-7 and 1.9e-15
    u = center(moved.point)[0].double()
    # Up to four products before the last, and their conditioning; observed a fifth of it.
    condition = float(torch.linalg.cond(x.double()).max())
    allowed = tolerances.rounding(dtype, 4 * max(shape[-2:])) * condition
    torch.testing.assert_close(u, way.value(x.double()), atol=allowed, rtol=0)
    (again,) = retract([(moved.point, way)], move=False)
    assert all(again.good) and not any(again.written)


@ways
@pytest.mark.parametrize("n", [64, 256])
def test_one_direction_does_not_hide_among_many(way, n):
    """A defect that is rounding as a Frobenius norm breaks the promise if one direction has it."""
    direction = torch.zeros(n)
    direction[n // 3] = 1.0
    u = haar((n, n))
    x = u + 1.2e-5 * u @ torch.outer(direction, direction)
    assert error(x) > 5 * tolerances.PROMISE[torch.float32]
    (seen,) = retract([(x, way)], move=False)
    assert not any(seen.good)
    (moved,) = retract([(x, way)])
    assert all(moved.written) and error(moved.point) <= tolerances.PROMISE[torch.float32]


@pytest.mark.parametrize("shape", [(512, 512), (1024, 1024), (2, 700, 90)])
def test_the_scale_is_exact_to_rounding(shape):
    """A scale that is off is an error of every singular value."""
    x = 1.7 * haar(shape)
    _, scale = center(x)
    exact = torch.linalg.vector_norm(x.double(), dim=(-2, -1), keepdim=True)
    exact *= min(shape[-2:]) ** -0.5
    # observed 7e-8; one sum over all entries of 1024 x 1024 is off by 1e-5
    torch.testing.assert_close(scale.double(), exact, rtol=4e-7, atol=0)
    assert error(x) <= tolerances.PROMISE[torch.float32]


@pytest.mark.parametrize("size", [1e-7, 1e-2, 0.5, 4.0])
def test_unit_matrices_become_the_polar_factor(size, dtype):
    xs = [haar(s, dtype=dtype) for s in ((24, 24), (2, 20, 7), (6, 15))]
    xs = [0.999 * x + size * torch.randn_like(x) / x.shape[-2] ** 0.5 for x in xs]
    for x, moved in zip(xs, retract([(x, POLAR) for x in xs], unit=True), strict=True):
        assert all(moved.good)
        u, condition = polar(x.double()), float(torch.linalg.cond(x.double()).max())
        allowed = tolerances.rounding(dtype, 4 * max(x.shape[-2:])) * condition
        torch.testing.assert_close(moved.point.double(), u, atol=allowed, rtol=0)
        sigma = torch.linalg.svdvals(moved.point.double())
        assert float((sigma - 1).abs().max()) <= tolerances.PROMISE[dtype]


@ways
@pytest.mark.parametrize("unit", [False, True])
def test_what_has_no_direction_is_not_good_and_harms_no_other(way, unit):
    x = haar((4, 6, 6)) + 0.01 * torch.randn(4, 6, 6)
    x[1] = 0.0
    x[2, 3, 3] = float("nan")
    (moved,) = retract([(x, way)], unit=unit and way is POLAR)
    assert moved.good == moved.written == [True, False, False, True]
    assert torch.equal(moved.point[1], x[1])
    assert error(moved.point[[0, 3]]) <= tolerances.PROMISE[torch.float32]
