"""Pooling and down-sampling: the constant on the dense operator, the laws of a layer."""

from functools import partial

import pytest
import torch
from torch import nn

from orthonet import functional, layers
from orthonet.certify import certify
from orthonet.testing import (
    LAYER_LAWS,
    assert_lipschitz,
    assert_orthogonal,
    jacobian,
    singular_values,
)

LINEAR = {
    "ScaledAvgPool": partial(layers.ScaledAvgPool, 2),
    "ScaledAvgPool2d_rectangle": partial(layers.ScaledAvgPool, (2, 3)),
    "AdaptiveScaledAvgPool": partial(layers.AdaptiveScaledAvgPool, (2, 3)),
    "GlobalScaledAvgPool": layers.GlobalScaledAvgPool,
    "SpaceToDepth2d": partial(layers.SpaceToDepth2d, 2),
}
NORMS = {
    "L2NormPool": partial(layers.L2NormPool, 2),
    "L2NormPool2d_gaps": partial(layers.L2NormPool, 2, 3),
    "AdaptiveL2NormPool": partial(layers.AdaptiveL2NormPool, (2, 3)),
    "GlobalL2NormPool": layers.GlobalL2NormPool,
}
OVERLAPPING = {
    "L2NormPool": partial(layers.L2NormPool, 3, 2, 1),
    "L2NormPool2d_dense": partial(layers.L2NormPool, (3, 2), 1),
    "ScaledAvgPool": partial(layers.ScaledAvgPool, 3, 2, 1),
}
SHAPE = (2, 4, 6)


@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "factory",
    [LINEAR["ScaledAvgPool"], LINEAR["SpaceToDepth2d"], *NORMS.values()],
    ids=["ScaledAvgPool", "SpaceToDepth2d", *NORMS],
)
def test_laws(factory, law):
    law(factory, SHAPE)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_pools_without_overlap_are_orthogonal(name):
    assert_orthogonal(LINEAR[name](), SHAPE, atol=1e-14, dtype=torch.float64)  # observed 5.6e-16
    assert_orthogonal(LINEAR[name](), SHAPE)


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_twice_differentiable_at_zero(name):
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    x[:, 0] = 0.0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(NORMS[name]()(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * torch.randn_like(x)).sum(), x)
    assert bool(second.isfinite().all())
    assert float(second[:, 0].abs().max()) == 0.0
    assert float(second[:, 1].abs().max()) > 0.0


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_constant_one(name):
    layer = NORMS[name]()
    assert_lipschitz(layer, SHAPE, attained=True)
    for x in torch.randn(5, *SHAPE, dtype=torch.float64):
        sigma = torch.linalg.svdvals(jacobian(layer, x))
        # one gradient of norm 1 for each window: observed |sigma - 1| <= 4.5e-16
        assert (sigma - 1).abs().max() <= 1e-14


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_windows_stay_below_one(name):
    assert_lipschitz(OVERLAPPING[name](), (2, 7, 8))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    ["L2NormPool", "ScaledAvgPool", "AdaptiveL2NormPool", "AdaptiveScaledAvgPool"],
)
def test_every_dimension_batched_and_unbatched(name, spatial):
    layer = getattr(layers, name)(2, dims=spatial)
    assert repr(getattr(layers, name)((2,) * spatial)) == repr(layer)  # the length of a size tells
    x = torch.randn(3, 2, *(4,) * spatial)
    y = layer(x)
    assert y.shape == (3, 2, *(2,) * spatial)
    torch.testing.assert_close(layer(x[0]), y[0])
    function = functional.l2_norm_pool if "L2" in name else functional.scaled_avg_pool
    torch.testing.assert_close(y, function(x, (2,) * spatial))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_global_pools(spatial):
    x = torch.randn(3, 2, *(4,) * spatial)
    norm = partial(layers.GlobalL2NormPool, dims=spatial)
    mean = partial(layers.GlobalScaledAvgPool, dims=spatial)
    torch.testing.assert_close(norm()(x), x.flatten(2).norm(dim=2))
    torch.testing.assert_close(mean()(x), x.flatten(2).sum(2) / 2**spatial)
    assert norm(keepdim=True)(x).shape == mean(keepdim=True)(x).shape == (3, 2, *(1,) * spatial)
    torch.testing.assert_close(norm()(x[0]), norm()(x)[0])
    for keepdim in (False, True):
        for pool in (norm(keepdim), mean(keepdim)):
            assert certify(pool.eval(), x[:1], lower=False).constant.value <= 1 + 1e-12


@pytest.mark.parametrize("name", NORMS)
def test_gradient_at_zero_is_zero(name):
    x = torch.zeros(1, *SHAPE, requires_grad=True)
    NORMS[name]()(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_space_to_depth_is_inverted_exactly(spatial):
    layer = getattr(layers, f"SpaceToDepth{spatial}d")(2)
    x = torch.randn(3, 2, *(4,) * spatial)
    y = layer(x)
    assert y.shape == (3, 2 * 2**spatial, *(2,) * spatial)
    assert torch.equal(layer.inverse(y), x)
    assert torch.equal(layer.inverse(y[0]), x[0])
    assert torch.equal(singular_values(layer, x.shape[1:]), torch.ones(x[0].numel()).double())


def test_space_to_depth_2d_is_pixel_unshuffle():
    x = torch.randn(2, 3, 6, 9)
    layer = layers.SpaceToDepth2d(3)
    assert isinstance(layer, nn.PixelUnshuffle)
    assert torch.equal(layer(x), nn.PixelUnshuffle(3)(x))
    assert torch.equal(layer.inverse(layer(x)), nn.PixelShuffle(3)(nn.PixelUnshuffle(3)(x)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.L2NormPool(0), "L2NormPool: kernel_size must be an integer >= 1"),
        (lambda: layers.L2NormPool((2, 2, 2), dims=2), "an integer or 2 of them, got kernel_size"),
        (lambda: layers.ScaledAvgPool(2, padding=2, dims=1), "padding must be at most half"),
        (lambda: layers.ScaledAvgPool((2,), padding=-1), "padding must be an integer >= 0"),
        (lambda: layers.L2NormPool(2)(torch.ones(4, 4)), "2 spatial dimensions"),
        (lambda: layers.AdaptiveL2NormPool(2)(torch.ones(1, 1, 5, 4)), "multiple of output_size"),
        (lambda: layers.L2NormPool(2, dims=4), "dims must be one of"),
        (lambda: layers.L2NormPool(2.5), "kernel_size must be an integer >= 1"),
        (lambda: layers.ScaledAvgPool("2"), "kernel_size must be an integer >= 1"),
        (lambda: layers.AdaptiveL2NormPool(0), "output_size must be an integer >= 1"),
        (lambda: layers.GlobalL2NormPool(dims=3)(torch.ones(1, 1, 5)), "3 spatial dimensions"),
        (lambda: layers.SpaceToDepth2d(2)(torch.ones(1, 1, 5, 4)), "multiple of downscale_factor"),
        (lambda: layers.SpaceToDepth1d(0), "downscale_factor must be an integer >= 1"),
        (lambda: layers.SpaceToDepth1d(2).inverse(torch.ones(1, 3, 4)), "number of channels must"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_representations_are_one_line():
    window = "kernel_size=(2, 2), stride=(2, 2), padding=(0, 0)"
    assert repr(layers.L2NormPool(2)) == f"L2NormPool({window})"
    assert repr(layers.AdaptiveL2NormPool(2, dims=1)) == "AdaptiveL2NormPool(output_size=(2,))"
    assert repr(layers.GlobalL2NormPool(dims=1)) == "GlobalL2NormPool(keepdim=False, dims=1)"
    assert repr(layers.SpaceToDepth3d(2)) == "SpaceToDepth3d(downscale_factor=2)"
