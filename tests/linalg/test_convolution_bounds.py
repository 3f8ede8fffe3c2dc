"""Bounds of convolutions against the norm of the dense operator."""

import itertools
import math
import random
import statistics

import pytest
import torch
import torch.nn.functional as F

from orthonet.layers import OrthoConv1d, OrthoConv2d
from orthonet.linalg.bounds.autocorrelation import autocorrelation_bound
from orthonet.linalg.bounds.convolutions import _axes, convolution_norm_bound
from tests.references import convolution_by_unit_vectors


def random_convolution(circular: bool):
    """Kernel and arguments of a small convolution with at least one output."""
    while True:
        dims = random.choice([1, 1, 2, 2, 3])
        size = tuple(
            random.randint(5, 9) if dims < 3 else random.randint(3, 5) for _ in range(dims)
        )
        taps = [random.randint(1, 4) for _ in range(dims)]
        dilation = tuple(random.randint(1, 2) for _ in range(dims))
        padding = tuple(random.randint(0, d * (k - 1)) for d, k in zip(dilation, taps, strict=True))
        reach = [
            n + 2 * p - d * (k - 1)
            for n, p, d, k in zip(size, padding, dilation, taps, strict=True)
        ]
        if min(reach) >= 1 and all(p <= n for p, n in zip(padding, size, strict=True)):
            break
    groups = random.choice([1, 1, 2])
    channels_in, channels_out = 2 * random.randint(1, 2), 2 * random.randint(1, 2)
    kernel = torch.randn(channels_out, channels_in // groups, *taps, dtype=torch.float64)
    keywords = {
        "stride": tuple(random.randint(1, 3) for _ in range(dims)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": "circular" if circular else "zeros",
    }
    return kernel, size, keywords


@pytest.mark.parametrize("circular", [False, True], ids=["zeros", "circular"])
def test_bound_exceeds_the_dense_norm(circular):
    ratios = {"auto": [], "dense": [], "fourier": [], "gram": [], "unfoldings": []}
    for _ in range(60):
        kernel, size, keywords = random_convolution(circular)
        dense = convolution_by_unit_vectors(kernel, size, **keywords)
        truth = float(torch.linalg.matrix_norm(dense, 2))
        for method, found in ratios.items():
            bound = convolution_norm_bound(kernel, size, method=method, **keywords)
            found.append(bound.value / truth)
            # 1e-12 is what the SVD of the truth may be off; observed 1 + 3e-15 at the least
            assert found[-1] >= 1 - 1e-12, (method, tuple(kernel.shape), size, keywords)
            if bound.tight:
                assert found[-1] <= 1 + 1e-9  # observed 4e-12
    assert statistics.median(ratios["auto"]) <= 1.05
    assert max(ratios["dense"]) <= 1 + 1e-9
    assert statistics.median(ratios["unfoldings"]) <= 2.0  # observed 1.1 and 1.3
    for gram, fourier in zip(ratios["gram"], ratios["fourier"], strict=True):
        assert fourier * (1 - 1e-9) <= gram <= 1.02 * fourier  # rank 8 at most: 1.005
    if not circular:  # observed 1.053 on maps of 3 to 9 pixels, where the torus is much larger
        assert statistics.median(ratios["fourier"]) <= 1.1


def test_autocorrelation_bounds_what_is_near_an_isometry():
    """Kernels from orthogonal ones to noisy ones: a sound bound, tight near isometries, or none."""
    ratios, refused = [], 0
    for dims in (1, 2):
        for stride, dilation, groups, circular in itertools.product(
            (1, 2), (1, 2), (1, 2), (False, True)
        ):
            layer = (OrthoConv1d, OrthoConv2d)[dims - 1](
                4, 2 + 4 * random.randint(0, 1), 3, stride, groups=groups, dtype=torch.float64
            )
            for noise, scale in ((0.0, 1.0), (1e-6, 3.0), (0.1, 1e-3)):
                weight = layer.weight.detach()
                kernel = scale * (weight + noise * torch.randn_like(weight))
                geometry = {"stride": stride, "padding": 1, "dilation": dilation, "groups": groups}
                geometry["padding_mode"] = "circular" if circular else "zeros"
                size = (8,) * dims
                axes = _axes(kernel, size, stride, 1, dilation, circular)
                grouped = kernel.unflatten(0, (groups, -1))
                found = autocorrelation_bound(grouped, axes, 10.0)
                if math.isinf(found):
                    refused += 1
                    assert dilation > 1  # behind strides, or a circle that is read repeatedly
                    continue
                dense = convolution_by_unit_vectors(kernel, size, **geometry)
                truth = float(torch.linalg.matrix_norm(dense, 2))
                # 1e-12 is what the SVD of the truth may be off; observed 1 - 1e-15
                assert found >= truth * (1 - 1e-12), (kernel.shape, geometry)
                if noise < 0.1:  # 30 spectral norms of noise at the most; observed 1 + 2e-5
                    ratios.append(found / truth)
                    assert found <= truth * (1 + 100 * noise + 1e-9)
                    near = autocorrelation_bound(grouped, axes, 1e-3)
                    assert truth * (1 - 1e-12) <= near <= found * (1 + 1e-9)
                else:
                    assert autocorrelation_bound(grouped, axes, 1e-3) == math.inf
    assert len(ratios) >= 40
    assert refused


def test_efforts_take_the_autocorrelation_where_a_torus_is_large():
    kernel = OrthoConv2d(32, 32, 3).weight.detach()
    fast = convolution_norm_bound(kernel, (64, 64), padding=1, effort="fast")
    assert fast.method == "autocorrelation of the kernel"
    assert fast.value <= 1 + 1e-4  # sums of 13 lags of float32; observed 2e-6, a grid gives 1.04
    large = convolution_norm_bound(kernel, (160, 160), padding=1)
    assert large.method == fast.method
    assert large.value <= fast.value  # spectral norms of the lags; fast may take Frobenius norms
    small = convolution_norm_bound(kernel, (12, 12), padding=1)
    assert small.method == "torus embedding"
    noisy = convolution_norm_bound(torch.randn(4, 4, 3, 3), (64, 64), padding=1, effort="fast")
    assert noisy.method == "coarse grid of frequencies"


@pytest.mark.parametrize(
    ("out_channels", "stride"), [(32, 1), (48, 2)], ids=["stride 1", "stride 2"]
)
def test_torus_embedding_is_within_one_percent(out_channels, stride):
    kernel = torch.randn(out_channels, 32, 3, 3, dtype=torch.float64)
    bound = convolution_norm_bound(kernel, (24, 24), stride=stride, padding=1)
    assert bound.method == "torus embedding"
    x = torch.randn(1, 32, 24, 24, dtype=torch.float64)
    below = 0.0
    for _ in range(150):
        x = x / x.norm()
        y = F.conv2d(x, kernel, stride=stride, padding=1)
        below = float(y.norm())
        x = F.conv_transpose2d(y, kernel, stride=stride, padding=1, output_padding=stride - 1)
    assert below <= bound.value <= 1.01 * below  # observed 1.004 and 1.004


def test_transform_at_the_input_size_is_no_bound():
    """What many libraries compute: it can lie below the norm under zero padding."""
    lower = 0
    for _ in range(60):
        kernel = torch.randn(1, 1, 3, dtype=torch.float64)
        dense = convolution_by_unit_vectors(kernel, (5,), padding=1)
        truth = float(torch.linalg.matrix_norm(dense, 2))
        naive = float(torch.fft.fft(kernel, 5).abs().max())
        lower += naive < truth * (1 - 1e-9)
        assert convolution_norm_bound(kernel, (5,), padding=1, method="fourier").value >= truth
    assert lower > 0  # observed 12 of 60


def test_circular_convolution_is_exact_in_the_blocks():
    kernel = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    keywords = {"stride": 2, "padding": 1, "padding_mode": "circular"}
    bound = convolution_norm_bound(kernel, (8, 6), **keywords)
    assert bound.tight
    assert bound.method == "Fourier blocks"
    truth = float(
        torch.linalg.matrix_norm(convolution_by_unit_vectors(kernel, (8, 6), **keywords), 2)
    )
    assert bound.value == pytest.approx(truth, rel=1e-9)  # observed 1e-12


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e150, 1e300])
def test_scales(scale):
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64).clamp(-2, 2)
    for method in ("dense", "fourier", "gram", "unfoldings"):
        unit = convolution_norm_bound(kernel, (6, 6), padding=1, method=method).value
        scaled = convolution_norm_bound(kernel * scale, (6, 6), padding=1, method=method).value
        # at 1e-310 the weights themselves keep only 13 digits
        assert scaled / scale == pytest.approx(unit, rel=1e-11)


def test_unfoldings_where_they_are_exact_and_beside_a_coarse_grid():
    """A positive kernel of rank one has the norm of its sum, in the limit of large images."""
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    fast = convolution_norm_bound(kernel, (64, 64), padding=1, effort="fast")
    assert fast.method == "unfoldings of the kernel"
    assert 8.9 < fast.value <= 9 * (1 + 1e-12)  # a coarse grid gives 9.4
    strided = convolution_norm_bound(kernel, (64, 64), stride=3, method="unfoldings")
    assert strided.value == pytest.approx(3.0, rel=1e-12)  # every pixel is read once
    large = torch.randn(300, 300, 3, dtype=torch.float64)
    assert "unfold" not in convolution_norm_bound(large, (64,), padding=1, effort="fast").method


def test_same_padding_of_an_even_kernel():
    kernel = torch.randn(3, 3, 4, 2, dtype=torch.float64)
    unit = torch.eye(3 * 35, dtype=torch.float64).reshape(-1, 3, 7, 5)
    padded = F.pad(unit, (0, 1, 1, 2))  # what "same" adds: the larger part at the end
    truth = float(torch.linalg.matrix_norm(F.conv2d(padded, kernel).flatten(1), 2))
    for method in ("dense", "fourier"):
        bound = convolution_norm_bound(kernel, (7, 5), padding="same", method=method)
        assert truth * (1 - 1e-12) <= bound.value <= truth * 1.2  # observed 1.07
    valid = convolution_norm_bound(kernel, (7, 5), padding="valid")
    assert valid == convolution_norm_bound(kernel, (7, 5), padding=0)


def test_zero_kernel_and_errors():
    assert convolution_norm_bound(torch.zeros(2, 2, 3), (8,)).value == 0.0
    with pytest.raises(ValueError, match="finite"):
        convolution_norm_bound(torch.full((1, 1, 3), math.nan), (8,))
    with pytest.raises(ValueError, match="must fit into the padded input"):
        convolution_norm_bound(torch.ones(1, 1, 9), (4,))
    with pytest.raises(ValueError, match="one spatial dim per input size"):
        convolution_norm_bound(torch.ones(1, 1, 3, 3), (4,))
    with pytest.raises(ValueError, match="groups must divide"):
        convolution_norm_bound(torch.ones(3, 1, 3), (4,), groups=2)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        convolution_norm_bound(torch.ones(1, 1, 3), (4,), padding_mode="reflect")


@pytest.mark.parametrize(
    ("shape", "size", "geometry"),
    [
        ((4, 3, 3), (40,), {"padding": 1}),
        ((3, 4, 4), (50,), {"padding": 2, "stride": 2}),
        ((4, 2, 3, 2), (20, 40), {"padding": (1, 0), "stride": (2, 2)}),
        ((4, 2, 5), (90,), {"padding": 2, "dilation": 3, "groups": 2}),
        ((2, 3, 3), (40,), {"padding": 2, "dilation": 2, "stride": 2}),
        ((2, 3, 3), (40,), {"padding": 1, "padding_mode": "circular"}),
        ((2, 3, 4), (45,), {"padding": 1, "stride": 2, "padding_mode": "circular"}),
        ((2, 3, 3), (40,), {"padding": ((0, 3),), "stride": 2}),
    ],
)
@pytest.mark.parametrize("effort", ["fast", "default", "tight"])
def test_efforts_are_sound(shape, size, geometry, effort):
    kernel = torch.randn(shape, dtype=torch.float64)
    found = convolution_norm_bound(kernel, size, effort=effort, method="fourier", **geometry).value
    sides = geometry.get("padding")
    if isinstance(sides[0] if isinstance(sides, tuple) else sides, tuple):
        (left, right), *_ = sides
        geometry = {**geometry, "padding": right}  # pads more on the left: the rows shift
        plain = torch.nn.functional.pad(
            torch.eye(size[0] * shape[1], dtype=torch.float64).reshape(-1, shape[1], *size),
            (left, right),
        )
        matrix = torch.nn.functional.conv1d(plain, kernel, stride=geometry["stride"]).flatten(1).T
    else:
        matrix = convolution_by_unit_vectors(kernel, size, **geometry)
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    # a grid of 8 points for each degree costs 2 % a dim; observed 1.06 in all
    assert truth * (1 - 1e-12) <= found <= 1.5 * truth
