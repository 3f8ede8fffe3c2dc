"""Matrices of the axes, made from definitions, against PyTorch's kernels."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from orthonet.certify.ops import axes


def columns(function, size):
    """The matrix of a linear map of one axis, from unit vectors."""
    return function(torch.eye(size, dtype=torch.float64)[:, None])[:, 0].mT


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding(mode):
    for size, left, right in itertools.product((1, 3, 6), (-2, 0, 1, 2), (-1, 0, 2)):
        kept = axes.kept(size, (left, right))
        if kept < 1 or (mode != "constant" and max(left, right) >= kept):
            continue
        found = axes.padding(size, (left, right), mode)
        assert torch.equal(found, columns(lambda x: F.pad(x, (left, right), mode), size))  # noqa: B023


def test_averages_and_windows():
    for size, k, s, p, ceil, inside in itertools.product(
        (3, 7), (1, 2, 3), (1, 2, 3), (0, 1), (False, True), (False, True)
    ):
        if 2 * p > k:
            continue
        kernel = columns(lambda x: F.avg_pool1d(x, k, s, p, ceil, inside), size)  # noqa: B023
        found = axes.average(size, len(kernel), k, s, p, not inside, False)
        assert torch.allclose(found, kernel, rtol=1e-15, atol=0)
        whole = axes.average(size, len(kernel), k, s, p, not inside, True)
        assert torch.equal(whole, (kernel != 0).double())
        if not ceil:
            counts = (kernel != 0).sum(0)
            assert axes.windows(size, len(kernel), k, s, p) == int(counts.max())


def test_adaptive_averages():
    for size, outputs in itertools.product(range(1, 8), range(1, 10)):
        kernel = columns(lambda x: F.adaptive_avg_pool1d(x, outputs), size)  # noqa: B023
        assert torch.allclose(axes.adaptive(size, outputs), kernel, rtol=1e-15, atol=0)


def test_taps_are_patches():
    for n, k, s, p, d in itertools.product((4, 7), (1, 3), (1, 2), (0, 2), (1, 2)):
        if n + 2 * p < d * (k - 1) + 1:
            continue
        unit = torch.eye(n, dtype=torch.float64)[:, None, :, None]
        patches = F.unfold(unit, (k, 1), (d, 1), (p, 0), (s, 1))  # (n, k, outputs)
        found = axes.taps(n, patches.shape[2], k, s, p, d)
        assert torch.equal(found, patches.permute(1, 2, 0))


MODES = {
    "nearest": {"mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
    "linear": {"mode": "bilinear", "align_corners": False},
    "linear corners": {"mode": "bilinear", "align_corners": True},
    "cubic": {"mode": "bicubic", "align_corners": False},
    "cubic corners": {"mode": "bicubic", "align_corners": True},
    "linear-aa": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "cubic-aa": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "linear-aa corners": {"mode": "bilinear", "align_corners": True, "antialias": True},
}


@pytest.mark.parametrize("name", MODES)
def test_interpolation(name):
    """Along rows of images of two columns: antialiased kernels are wrong for one column."""
    options = MODES[name]
    mode, corners = name.removesuffix(" corners"), bool(options.get("align_corners"))
    off = 0.0
    for size, aim in itertools.product((1, 2, 5, 9), (1, 2, 3, 4, 7, 12, 2.0, 0.6, 1.7)):
        if isinstance(aim, float) and int(size * aim) < 1:
            continue
        to = {"scale_factor": (aim, 1.0)} if isinstance(aim, float) else {"size": (aim, 2)}

        def kernel(x, to=to):
            return F.interpolate(x[..., None].expand(-1, -1, -1, 2), **options, **to)[..., 0]

        expected = columns(kernel, size)
        scale = aim if isinstance(aim, float) else None
        found = axes.interpolation(size, len(expected), mode, corners, scale)
        if mode.startswith("nearest"):
            assert bool((found.matrix >= expected).all())
            assert not found.certain or torch.equal(found.matrix, expected)
        else:
            off = max(off, float((found.matrix - expected).abs().max()))
    # some 10 roundings of weights up to 1.3 at places up to 12; observed 6e-15
    assert off <= 2.0**-44


@pytest.mark.parametrize("name", [m for m in MODES if "nearest" not in m])
def test_places_that_move_move_a_matrix_by_no_more_than_is_said(name):
    mode, corners = name.removesuffix(" corners"), "corners" in name
    for size, outputs in itertools.product((5, 9, 30), (3, 7, 12)):
        grid = axes.interpolation(size, outputs, mode, corners, None)
        step = 1e-4
        # another ratio moves every place, by step at most
        ratio = outputs / size * (1 + step / size)
        moved = axes.interpolation(size, outputs, mode, False, ratio)
        if corners:
            continue
        change = float(torch.linalg.matrix_norm(moved.matrix - grid.matrix, 2))
        assert change <= grid.moved * step
