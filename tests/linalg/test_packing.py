"""Packed triangles: every entry once, and back."""

import pytest
import torch

from orthonet.linalg import _packing as packing


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", range(8))
def test_triangles_survive_the_round_trip(n, dtype):
    a = torch.randn(2, n, n, dtype=dtype)
    packed = packing.pack_triangle(a)
    assert packed.shape == (2, n * (n + 1) // 2)
    assert torch.equal(packing.unpack_triangle(packed, n), a.tril())
    for x, pack, unpack in (
        (a - a.mH, packing.pack_skew, packing.unpack_skew),
        (a + a.mH, packing.pack_symmetric, packing.unpack_symmetric),
    ):
        assert torch.equal(unpack(pack(x), n), x)
    size = n * (n - 1) // 2 if dtype.is_floating_point else n * (n + 1) // 2
    assert packing.pack_skew(a - a.mH).shape == (2, size)
