"""The tables of tolerances: neither too tight nor too loose, and true of the presets."""

import math

import pytest
import torch

from orthonet import reparametrizers
from orthonet.layers import OrthoLinear
from orthonet.linalg import haar
from orthonet.testing import MATRIX_CASES, Tolerance, hard_matrix, orthogonality_error, tolerances

PRESETS = [name for name in reparametrizers.__all__ if name.endswith("_ORTHO_PARAMS")]


@pytest.mark.parametrize("table", [tolerances.ROUNDING, tolerances.PRESETS, tolerances.OUTPUT])
def test_allowed_is_above_observed_but_not_far(table):
    for key, tolerance in table.items():
        assert 1 < tolerance.headroom <= 30, key
    assert Tolerance(1.0, 0.0).headroom == float("inf")


def test_every_preset_is_in_the_table():
    names = {name.removesuffix("_ORTHO_PARAMS") for name in PRESETS}
    assert {name for _, name in tolerances.PRESETS} == names


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(32, 32), (8, 40), (40, 8), (1, 16)], ids=str)
def test_presets_hold_their_tolerance_on_every_hard_matrix(preset, shape, dtype):
    allowed = tolerances.PRESETS[dtype, preset.removesuffix("_ORTHO_PARAMS")].allowed
    layer = OrthoLinear(
        shape[1], shape[0], dtype=dtype, ortho_params=getattr(reparametrizers, preset)
    )
    for mode in (True, False):
        layer.train(mode)
        for name in MATRIX_CASES:
            with torch.no_grad():
                layer.parametrization.original.copy_(hard_matrix(name, shape, dtype))
                assert orthogonality_error(layer.weight) <= allowed, name


@pytest.mark.parametrize("terms", [1, 3, 100, 4000])
def test_the_bound_of_rounding_is_above_the_worst_order_of_summation_but_not_far(terms, dtype):
    """One term after the other is the order that rounds most; `math.fsum` is exact."""
    closest = 0.0
    for _ in range(20):
        products = torch.randn(terms, dtype=dtype) * 2.0**-3
        total, largest = torch.zeros((), dtype=dtype), 0.0
        for product in products:
            total = total + product
            largest = max(largest, abs(total.item()))
        error = abs(total.item() - math.fsum(products.tolist()))
        allowed = tolerances.rounding(dtype, terms, largest)
        assert error <= allowed
        closest = max(closest, error / allowed)
    assert terms == 1 or closest > 0.01  # observed .05 to .3


@pytest.mark.parametrize("n", [3, 48, 200])
def test_products_of_orthogonal_matrices_keep_the_bound(n, dtype):
    x = haar((n, n), dtype=dtype)
    start = orthogonality_error(x)
    for count in range(1, 5):
        x = x @ haar((n, n), dtype=dtype)
        drawn = tolerances.orthogonality_rounding(dtype, (2 * count + 2) * n)
        assert orthogonality_error(x) <= start + drawn
    assert tolerances.orthogonality_rounding(dtype, 10**8) == tolerances.PROMISE[dtype]
