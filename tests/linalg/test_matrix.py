"""Products of which only one half is computed."""

import torch

from orthonet.linalg.matrix import symmetric_product


def test_the_blocks_of_a_symmetric_product_are_those_of_the_whole_one():
    torch.manual_seed(0)
    for n in (60, 384, 392, 512):  # below the blocks; rows apart or not
        for rows in (n, 3 * n // 2):
            for dtype in (torch.float32, torch.float64):
                a = torch.randn(rows, n, dtype=dtype)
                for out in (None, torch.full((n, n), torch.nan, dtype=dtype)):
                    found = symmetric_product(a, a, out)
                    assert found.shape == (n, n)
                    assert out is None or found is out
                    # A sum of `rows` products, of any order. Observed: 0.03 of it.
                    bound = rows * torch.finfo(dtype).eps * (a.abs().mT @ a.abs()).double()
                    exact = a.double().mT @ a.double()
                    assert bool(((found.double() - exact).abs() <= bound).all())
