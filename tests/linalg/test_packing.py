"""Packed triangles: every entry once, and back."""

import pytest
import torch

from orthonet.linalg import packing


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_tables_of_places_are_the_copies_of_blocks(monkeypatch, n, block, dtype):
    packed = torch.randn(3, n * (n - 1) // 2, dtype=dtype)
    gradient = torch.randn(3, n, n, dtype=dtype)
    by_table = packing.unpack_real_skew(packed, n), packing.pack_difference(gradient)
    shifted = packing.identity_minus_half_skew(packed, n)
    assert torch.equal(shifted, torch.eye(n, dtype=dtype) - by_table[0] / 2)
    monkeypatch.setattr(packing, "_TABLES_TO", 0)
    monkeypatch.setattr(packing, "_BLOCK", block)
    assert torch.equal(shifted, packing.identity_minus_half_skew(packed, n))
    assert torch.equal(by_table[0], packing.unpack_real_skew(packed, n))
    assert torch.equal(by_table[1], packing.pack_difference(gradient))
    assert torch.equal(by_table[1], packing.pack_skew(gradient - gradient.mT))
    # one is the adjoint of the other
    inner = (by_table[0] * gradient).sum((-2, -1)), (packed * by_table[1]).sum(-1)
    torch.testing.assert_close(*inner)
