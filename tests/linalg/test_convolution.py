import pytest
import torch
from torch.nn import functional as F

from orthonet import linalg


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_convolution_is_the_composition(dims, stride):
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    inner = torch.randn(4, 3, *(2, 3, 1)[:dims], dtype=torch.float64)
    outer = torch.randn(5, 4, *(3, 1, 2)[:dims], dtype=torch.float64)
    x = torch.randn(2, 3, *(7, 8, 6)[:dims], dtype=torch.float64)
    product = linalg.block_convolution(outer, inner, spatial_dims=dims)
    expected = conv(conv(x, inner), outer, stride=stride)
    torch.testing.assert_close(conv(x, product, stride=stride), expected)


def test_block_convolution_batches_and_refuses():
    outer, inner = torch.randn(2, 5, 4, 3), torch.randn(2, 4, 3, 2)
    both = linalg.block_convolution(outer, inner, spatial_dims=1)
    assert both.shape == (2, 5, 3, 4)
    one = linalg.block_convolution(outer[1], inner[1], spatial_dims=1)
    torch.testing.assert_close(both[1], one)
    with pytest.raises(ValueError, match="the inner channels of both kernels must agree"):
        linalg.block_convolution(outer, torch.randn(2, 3, 3, 2), spatial_dims=1)


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_paraunitary_factors_multiply_as_polynomials(rank):
    v = linalg.haar((1, 3, 4, 4), dtype=torch.float64)[..., :rank]
    kernel = torch.randn(1, 4, 2, 3, 5, dtype=torch.float64)
    ours = linalg.apply_projectors(kernel, v, taps=2, dim=0)
    expected = kernel[0].movedim(-1, 1)  # (c, n, *k)
    for base in v[0]:
        p = base @ base.mT
        factor = torch.stack([p, torch.eye(4, dtype=p.dtype) - p], -1).unsqueeze(-1)
        expected = linalg.block_convolution(factor, expected, spatial_dims=2)
    assert ours.shape == (1, 4, 5, 3, 5)
    torch.testing.assert_close(ours[0].movedim(-1, 1), expected)


SHIFTS = [(0, 0, 0), (0, 1, 1), (1, 0, 1), ()]


@pytest.mark.parametrize("dims", SHIFTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_chain_of_factors_has_the_gradients_of_its_steps(dims, weighted):
    """One node for all factors, against autograd through the operations it replaces."""
    from orthonet.linalg.kernels.projector_product import chain

    kernel = torch.randn(2, 3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    bases = torch.randn(2, len(dims), 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, len(dims), 2, dtype=torch.float64, requires_grad=True)
    inputs = [kernel, bases, *([weights] if weighted else [])]

    def ours(kernel, bases, weights=None):
        return linalg.apply_projectors(kernel, bases, taps=2, dim=dims, weights=weights)

    left = bases * weights.unsqueeze(-2) if weighted else bases
    expected = chain(kernel, left, bases, tuple(2 + d for d in dims))
    result = ours(*inputs)
    torch.testing.assert_close(result, expected)
    direction = torch.randn_like(result)
    mine = torch.autograd.grad(result, inputs, direction, materialize_grads=True)
    theirs = torch.autograd.grad(expected, inputs, direction, materialize_grads=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


PRODUCTS = [  # taps before, which of them each factor lengthens, rows
    ((1,), (0, 0), 5),
    ((1,), (0,) * 7, 4),  # pairs, then one alone
    ((1, 1), (0, 0, 1, 1), 4),
    ((1, 1), (0, 0, 0, 0, 1, 1), 4),  # polynomials of different degrees
    ((1, 1), (0, 0, 1), 4),
    ((1, 1), (0, 1, 0), 4),  # the same dimension twice
    ((1, 1), (0, 0, 1, 1), 1),  # too few rows for polynomials
    ((2, 1), (0, 1, 1, 1), 6),
    ((2, 2), (0, 0, 1), 7),
    ((1, 1, 1), (0, 0, 1, 1, 1, 2, 2), 3),
    ((1, 2, 1), (0, 0, 0, 0, 1, 2, 2, 2, 2), 4),
]


@pytest.mark.parametrize(("taps", "axes", "rows"), PRODUCTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_product_of_factors_has_the_values_and_gradients_of_their_chain(
    taps, axes, rows, weighted, channels_first, batch
):
    """Whichever way is taken, against the factors one by one, in both layouts."""
    from orthonet.linalg.kernels.projector_product import chain, multiply_projectors

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    sizes, columns = ((5, rows), 2) if channels_first else ((rows, 5), 1)
    start, left, right = draw(batch, *sizes, *taps), *(draw(batch, len(axes), 5, 2) for _ in "lr")
    inputs = (start, left, right) if weighted else (start, left)
    result = multiply_projectors(
        start, left, right if weighted else None, axes, channels_first=channels_first
    )
    expected = chain(
        start.movedim(columns, -1), left, right if weighted else left, tuple(2 + a for a in axes)
    ).movedim(-1, columns)
    assert result.is_contiguous()
    # observed: 8e-11 beside values of 1e5, the factors being no projectors
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-9)
    direction = torch.randn_like(result)
    mine = torch.autograd.grad(result, inputs, direction)
    for one, other in zip(mine, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("taps", "axes", "rows"), PRODUCTS, ids=str)
def test_multiplications_of_a_product_are_counted(taps, axes, rows):
    from torch.utils.flop_counter import FlopCounterMode

    from orthonet.linalg.kernels.projector_product import multiplications, multiply_projectors

    start, bases = torch.randn(1, rows, 6, *taps), torch.randn(1, len(axes), 6, 2)
    with FlopCounterMode(display=False) as counter:
        multiply_projectors(start, bases, None, axes)
    assert counter.get_total_flops() == 2 * multiplications(taps, rows, 6, 2, axes)


def test_chain_of_factors_can_be_differentiated_twice_and_transformed():
    kernel = torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    bases = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)

    def product(kernel, bases):
        return linalg.apply_projectors(kernel, bases, taps=1, dim=0)

    assert torch.autograd.gradcheck(product, (kernel, bases))
    assert torch.autograd.gradgradcheck(product, (kernel, bases))
    many = torch.randn(3, *bases.shape, dtype=torch.float64)
    stacked = torch.vmap(product, (None, 0))(kernel, many)
    torch.testing.assert_close(stacked[1], product(kernel, many[1]))
    jacobian = torch.func.jacrev(product, 1)(kernel.detach(), many[0])
    assert jacobian.shape == (*product(kernel, many[0]).shape, *many[0].shape)
    with pytest.raises(ValueError, match="apply_projectors: dim must name one of the tap dim"):
        linalg.apply_projectors(kernel, bases, taps=1, dim=1)


@pytest.mark.parametrize("steps", [(1, 1), (2, 1)])
def test_filtering_a_signal_is_the_convolution_with_the_factors(steps):
    from orthonet.linalg.kernels.filtering import filter_signal

    bases = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    signal = torch.randn(1, 3, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def ours(signal, bases):
        return filter_signal(signal, bases, (3, 4), steps)

    eye = torch.eye(3, dtype=torch.float64)
    expected = signal[0].movedim(1, 0)  # (n, c, h, w)
    for index, shape in ((1, (1, 2)), (0, (2, 1))):
        p = bases[0, index] @ bases[0, index].mT
        weight = torch.stack([p, eye - p], -1).view(3, 3, *shape)
        expected = F.conv2d(expected, weight, dilation=(steps[0], steps[1]))
    torch.testing.assert_close(ours(signal, bases)[0].movedim(1, 0), expected)
    assert torch.autograd.gradcheck(ours, (signal, bases))
    assert torch.autograd.gradgradcheck(ours, (signal, bases))
    assert torch.autograd.gradgradcheck(ours, (signal.detach(), bases))
