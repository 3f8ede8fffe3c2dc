"""The stateless maps: values, Jacobians, constants, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from orthonet import functional
from orthonet.testing import jacobian, orthogonality_error, singular_values, tolerances

# (name, map on (N, 8, ...) at dim=1 or on the last dim)
PRESERVING = {
    "max_min": functional.max_min,
    "group_sort_2": functional.group_sort,
    "group_sort_4": lambda x, dim=1: functional.group_sort(x, 4, dim),
    "full_sort": lambda x, dim=1: functional.group_sort(x, 8, dim),
    "absolute": lambda x, dim=1: functional.absolute(x),
}
SIZES = [(1, 1, 0), (2, 2, 0), (3, 3, 1), (3, 2, 0), (3, 1, 1), (2, 3, 1), (5, 2, 2), (4, 1, 0)]


@pytest.mark.parametrize("name", PRESERVING)
@pytest.mark.parametrize("point", ["random", "zero", "ties", "huge", "tiny"])
def test_jacobian_is_a_signed_permutation_at_every_point(name, point, dtype):
    x = {
        "random": torch.randn(8),
        "zero": torch.zeros(8),
        "ties": torch.tensor([1.0, 1, 2, 2, 1, 1, -2, 2]),
        "huge": 1e15 * torch.randn(8),
        "tiny": 1e-20 * torch.randn(8),
    }[point].to(dtype)
    matrix = jacobian(PRESERVING[name], x).abs()
    assert torch.equal(matrix.sum(0), torch.ones(8, dtype=dtype))
    assert torch.equal(matrix.sum(1), torch.ones(8, dtype=dtype))
    assert torch.equal(matrix.square(), matrix)


@pytest.mark.parametrize("name", PRESERVING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_exact(name, dtype):
    x = torch.randn(5, 8).to(dtype)
    y = PRESERVING[name](x)
    assert y.dtype == dtype
    if name == "absolute":
        assert torch.equal(y, x.abs())
    else:
        assert torch.equal(y.sort(dim=1).values, x.sort(dim=1).values)


def test_max_min_is_the_maxima_then_the_minima():
    x = torch.randn(3, 6, 5, 4)
    a, b = x[:, :3], x[:, 3:]
    expected = torch.cat((torch.maximum(a, b), torch.minimum(a, b)), 1)
    assert torch.equal(functional.max_min(x), expected)


def test_group_sort_is_ascending_in_consecutive_groups():
    x = torch.randn(3, 12, 5)
    for size in (1, 2, 3, 4, 6, 12):
        expected = x.reshape(3, 12 // size, size, 5).sort(dim=2).values.reshape(3, 12, 5)
        assert torch.equal(functional.group_sort(x, size), expected)


def test_max_min_is_group_sort_of_two_up_to_a_permutation():
    x = torch.randn(7, 8)
    interleaved = torch.stack((x[:, :4], x[:, 4:]), 2).flatten(1)
    y = functional.group_sort(interleaved)
    assert torch.equal(functional.max_min(x), torch.cat((y[:, 1::2], y[:, ::2]), 1))


@pytest.mark.parametrize("name", ["max_min", "group_sort_2", "group_sort_4"])
def test_channels_may_be_any_dimension(name):
    x = torch.randn(2, 8, 3, 4)
    expected = PRESERVING[name](x)
    assert torch.equal(PRESERVING[name](x, dim=-3), expected)
    assert torch.equal(PRESERVING[name](x[0], dim=-3), expected[0])
    assert torch.equal(PRESERVING[name](x[0, :, 0, 0], dim=0), expected[0, :, 0, 0])
    assert torch.equal(PRESERVING[name](x.movedim(1, -1), dim=-1).movedim(-1, 1), expected)


@pytest.mark.parametrize("name", PRESERVING)
def test_second_derivatives_and_vmap(name):
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PRESERVING[name], x)
    assert torch.autograd.gradgradcheck(PRESERVING[name], x)
    mapped = torch.vmap(lambda row: PRESERVING[name](row, dim=0))(x)
    assert torch.equal(mapped, PRESERVING[name](x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.max_min(torch.ones(2, 3)), "max_min: .* multiple of 2, got channels=3"),
        (lambda: functional.max_min(torch.ones(4)), "dim must be a dimension .* got dim=1"),
        (lambda: functional.group_sort(torch.ones(2, 6), 4), "multiple of 4, got channels=6"),
        (lambda: functional.group_sort(torch.ones(2, 6), 0), "group_size must be an integer >= 1"),
        (lambda: functional.householder(torch.ones(2, 4), torch.ones(4)), "each of the 2 pairs"),
        (lambda: functional.l2_norm_pool(torch.ones(1, 2, 4, 4), (2,)), "1 spatial dimensions"),
        (lambda: functional.l2_norm_pool(torch.ones(1, 2, 4), (2,), (1, 1)), "same length"),
        (lambda: functional.scaled_avg_pool(torch.ones(1, 4), ()), "must have 1, 2 or 3 entries"),
        (lambda: functional.scaled_avg_pool(torch.ones(1, 4), (0,)), "kernel_size must be"),
        (lambda: functional.space_to_depth(torch.ones(1, 2, 5), 2, 1), "multiple of downscale"),
        (lambda: functional.depth_to_space(torch.ones(1, 3, 5), 2, 1), "must be a multiple of 2"),
        (lambda: functional.space_to_depth(torch.ones(5), 2, 1), "channel dimension before"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("angle", [0.0, 0.3, torch.pi / 2, 2.0, torch.pi, -1.0])
def test_householder_has_singular_values_one(angle, dtype):
    theta = torch.full((4,), angle, dtype=dtype)
    # v to two units and 2 v v^T z: 16 roundings; observed 1.2e-7 and 2.2e-16
    allowed = tolerances.orthogonality_rounding(dtype, 16)
    for x in (torch.randn(8), torch.zeros(8), -torch.ones(8)):
        matrix = jacobian(lambda z: functional.householder(z, theta), x.to(dtype))
        assert orthogonality_error(matrix) <= allowed


def test_householder_at_a_right_angle_is_max_min(dtype):
    x = torch.randn(6, 8, 3, dtype=dtype)
    theta = torch.full((4,), torch.pi / 2, dtype=dtype)
    # the same 16 roundings of entries up to the largest; observed 1.2e-7 and 6.2e-16
    difference = functional.householder(x, theta) - functional.max_min(x)
    assert difference.abs().max() <= tolerances.rounding(dtype, 16, float(x.abs().max()))


def test_householder_is_differentiable_in_input_and_angles():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.householder, (x, theta))


def test_safe_sqrt_has_a_finite_gradient():
    x = torch.tensor([0.0, 4.0, 1e-38], requires_grad=True)
    y = functional.safe_sqrt(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.sqrt())
    assert gradient[0] == 0
    assert gradient[1] == 0.25
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("k", "s", "p"), SIZES)
def test_l2_norm_pool_is_the_scaled_norm_of_each_window(k, s, p):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    windows = F.pad(x, (p, p, p, p)).unfold(2, k, s).unfold(3, k, s)
    expected = windows.square().sum((-2, -1)).sqrt() / -(-k // s)
    y = functional.l2_norm_pool(x, (k, k), (s, s), (p, p))
    assert ((y - expected) / expected.clamp(min=1e-9)).abs().max() <= 1e-14  # observed 3.4e-16


@pytest.mark.parametrize(("k", "s", "p"), SIZES)
def test_l2_norm_pool_reaches_its_constant_and_no_more(k, s, p):
    """The pixel that most windows share: f(t e) - f(0) has norm exactly t."""
    unit = torch.eye(12, dtype=torch.float64).view(12, 1, 12)
    norms = functional.l2_norm_pool(unit, (k,), (s,), (p,)).flatten(1).norm(dim=1)
    assert norms.max().item() == pytest.approx(1, abs=1e-14)  # observed 2e-16
    for _ in range(20):
        x = torch.randn(1, 1, 12, dtype=torch.float64)
        matrix = jacobian(lambda z: functional.l2_norm_pool(z, (k,), (s,), (p,)), x[0])
        assert torch.linalg.matrix_norm(matrix, 2) - 1 <= 1e-14  # observed 2e-16


@pytest.mark.parametrize(("k", "s"), list(itertools.product((1, 2, 3, 5), (1, 2, 3))))
def test_scaled_avg_pool_constant_is_the_supremum(k, s):
    def excess(size):
        pool = functional.scaled_avg_pool
        sigma = singular_values(lambda x: pool(x, (k,), (s,)), (1, size), dtype=torch.float64)
        return sigma[0].item() - 1

    assert excess(13) <= 1e-14  # observed 2.3e-16
    assert excess(200) <= 1e-14
    assert excess(200) >= -1e-3  # to 0 from below like 1 / size^2: observed -2.7e-4
    if s >= k:
        assert abs(excess(13)) <= 1e-14


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_pools_of_every_dimension_agree_with_their_global_form(spatial):
    x = torch.randn(2, 3, *(4,) * spatial, dtype=torch.float64)
    window = (4,) * spatial
    for pool, whole in (
        (functional.l2_norm_pool, functional.global_l2_norm_pool),
        (functional.scaled_avg_pool, functional.global_scaled_avg_pool),
    ):
        torch.testing.assert_close(pool(x, window), whole(x, spatial, keepdim=True))
        torch.testing.assert_close(pool(x, window).flatten(1), whole(x, spatial))
        torch.testing.assert_close(pool(x[0], window), pool(x, window)[0])


def test_l2_norm_pool_accumulates_half_precision_in_float32():
    x = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    y = functional.l2_norm_pool(x, (2, 2))
    assert y.dtype == torch.float16
    assert y.item() == 600


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_space_to_depth_is_a_permutation_with_an_inverse(spatial, factor):
    shape = (2, *(6,) * spatial)
    x = torch.randn(2, *shape)
    y = functional.space_to_depth(x, factor, spatial)
    assert y.shape == (2, 2 * factor**spatial, *(6 // factor,) * spatial)
    assert torch.equal(functional.depth_to_space(y, factor, spatial), x)
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    if spatial == 2:
        assert torch.equal(y, F.pixel_unshuffle(x, factor))


@pytest.mark.parametrize(
    ("shape", "pads"),
    [
        ((2, 3, 5), (1, 2)),
        ((2, 3, 4, 5), (1, 2, 0, 3)),
        ((3, 4, 5), (2, 0, 0, 1)),
        ((2, 2, 3, 4, 5), (1, 0, 2, 1, 0, 3)),
        ((2, 3, 4, 4), (4, 4, 4, 4)),
        ((2, 3, 4), (0, 0)),
    ],
)
def test_circular_pad_is_that_of_torch(shape, pads):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = functional.circular_pad(x, pads)
    theirs = torch.nn.functional.pad(x, pads, mode="circular")
    assert torch.equal(ours, theirs)
    direction = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, x, direction)
    torch.testing.assert_close(torch.autograd.grad(ours, x, direction), expected)
    assert torch.autograd.gradgradcheck(lambda z: functional.circular_pad(z, pads) ** 2, x)


def test_circular_pad_keeps_the_memory_format_and_refuses():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    y = functional.circular_pad(x, (1, 1, 1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"))
    many = torch.vmap(lambda z: functional.circular_pad(z, (1, 0)))(x)
    assert torch.equal(many, torch.nn.functional.pad(x, (1, 0, 0, 0), mode="circular"))
    for pads in ((6, 0), (-1, 0), (1,)):
        with pytest.raises(ValueError, match="circular_pad: pad must hold two integers from 0"):
            functional.circular_pad(x, pads)
