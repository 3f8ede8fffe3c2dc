"""Norm bounds are compared with exact rational arithmetic: float64 cannot judge the last bit."""

import math
import random
from fractions import Fraction

import pytest
import torch

from orthonet.linalg.bounds import rounding
from orthonet.linalg.bounds.enclosure import gram_norm_bound, spectral_norm_bound


def is_positive_semidefinite(a: list[list[Fraction]]) -> bool:
    """Exact, by symmetric elimination."""
    n = len(a)
    for k in range(n):
        pivot = a[k][k]
        if pivot < 0 or (pivot == 0 and any(a[i][k] != 0 for i in range(k + 1, n))):
            return False
        for i in range(k + 1, n) if pivot else ():
            factor = a[i][k] / pivot
            a[i] = [a[i][j] - factor * a[k][j] for j in range(n)]
    return True


def exceeds_norm(bound: float, matrix: torch.Tensor) -> bool:
    """Whether bound^2 I - A^T A is positive semidefinite, in exact arithmetic."""
    a = [[Fraction(x) for x in row] for row in matrix.tolist()]
    n = len(a[0])
    gram = [[sum(row[i] * row[j] for row in a) for j in range(n)] for i in range(n)]
    square = Fraction(bound) ** 2
    return is_positive_semidefinite(
        [[square * (i == j) - gram[i][j] for j in range(n)] for i in range(n)]
    )


def orthogonal(m: int, n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(max(m, n), n, dtype=dtype))[0][:m].double()


HARD = {
    "gaussian": lambda m, n: torch.randn(m, n, dtype=torch.float64),
    "float32": lambda m, n: torch.randn(m, n).double(),
    "graded": lambda m, n: (
        torch.randn(m, n, dtype=torch.float64) * torch.logspace(-12, 12, n, dtype=torch.float64)
    ),
    "orthogonal": lambda m, n: orthogonal(max(m, n), n),
    "orthogonal in float32": lambda m, n: orthogonal(max(m, n), n, torch.float32),
    "huge": lambda m, n: torch.randn(m, n, dtype=torch.float64) * 1e150,
    "tiny": lambda m, n: torch.randn(m, n, dtype=torch.float64) * 1e-150,
    "nearly of rank one": lambda m, n: 1 + 1e-15 * torch.randn(m, n, dtype=torch.float64),
    "repeated values": lambda m, n: 3.0 * torch.eye(m, n, dtype=torch.float64),
    "denormal": lambda m, n: torch.randint(-9, 9, (m, n)).double() * 5e-324,
    "mixed scales": lambda m, n: (
        torch.randn(m, n, dtype=torch.float64) * 10.0 ** torch.randint(-300, 150, (m, n)).double()
    ),
}


@pytest.mark.parametrize("kind", HARD)
def test_bound_holds_in_exact_arithmetic(kind):
    for _ in range(4):
        matrix = HARD[kind](random.randint(1, 8), random.randint(1, 6))
        bound = spectral_norm_bound(matrix)
        assert exceeds_norm(bound, matrix)
        if kind != "denormal" and matrix.any():  # there one unit in the last place is large
            assert not exceeds_norm(bound * (1 - 1e-9), matrix)


@pytest.mark.parametrize("kind", HARD)
def test_gram_iteration_holds_in_exact_arithmetic(kind):
    for niters in (0, 1, 3, 8, 40):
        matrix = HARD[kind](random.randint(1, 8), random.randint(1, 6))
        bound = gram_norm_bound(matrix, niters=niters)
        assert exceeds_norm(bound, matrix)
        rank = min(matrix.shape)
        if kind != "denormal" and matrix.any():
            allowed = rank ** (0.5 ** (niters + 1)) * (1 + 1e-9)
            assert not exceeds_norm(bound / allowed * (1 - 1e-9), matrix)


def test_gram_iteration_of_batches_and_complex_blocks():
    blocks = torch.randn(5, 6, 4, dtype=torch.complex128) * torch.tensor(
        [1e-200, 1.0, 0.0, 3.0, 1e-5], dtype=torch.float64
    ).reshape(5, 1, 1)
    truth = float(torch.linalg.matrix_norm(blocks, 2).max())
    for tensor in (blocks, blocks.mH, blocks[:0], blocks * 0):
        bound = gram_norm_bound(tensor)
        expected = truth if tensor.numel() and bool(tensor.any()) else 0.0
        assert expected * (1 - 1e-12) <= bound <= expected * 4 ** (1 / 512) * (1 + 1e-12)
    with pytest.raises(ValueError, match="gram_norm_bound: every entry must be finite"):
        gram_norm_bound(torch.full((2, 2), math.inf))
    with pytest.raises(ValueError, match="niters must be"):
        gram_norm_bound(torch.eye(2), niters=-1)


def test_svd_alone_is_not_a_bound():
    below = sum(
        not exceeds_norm(float(torch.linalg.svdvals(a)[0]), a)
        for a in (torch.randn(5, 4, dtype=torch.float64) for _ in range(20))
    )
    assert below > 0  # observed: 10 of 20


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 40), (40, 1), (64, 64), (10, 512), (300, 200), (256, 512)]
)
def test_bound_is_tight(shape):
    for matrix in (torch.randn(shape), orthogonal(max(shape), min(shape), torch.float32)):
        truth = float(torch.linalg.svdvals(matrix.double())[0])
        bound = spectral_norm_bound(matrix)
        # allowed 1e-9 above, observed 3e-11; below only by the rounding of the SVD
        assert truth * (1 - 1e-13) <= bound <= truth * (1 + 1e-9)


def test_batch_is_a_block_diagonal_and_complex_matrices_count():
    blocks = torch.randn(3, 20, 6, 5, dtype=torch.complex128)
    truth = float(torch.linalg.matrix_norm(blocks, 2).max())
    # observed excess 1e-12
    assert truth * (1 - 1e-13) <= spectral_norm_bound(blocks) <= truth * (1 + 1e-9)
    large = torch.randn(30, 40, 24, dtype=torch.complex128)  # screens before it estimates
    truth = float(torch.linalg.matrix_norm(large, 2).max())
    assert truth * (1 - 1e-13) <= spectral_norm_bound(large) <= truth * (1 + 1e-6)


@pytest.mark.parametrize("lie", [0.0, 0.3, 0.999, 1.0 - 1e-12, 1.001, 7.0, math.inf, math.nan])
def test_bound_does_not_trust_the_eigenvalues(monkeypatch, lie):
    honest = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: honest(a) * lie)
    for matrix in (torch.randn(6, 4, dtype=torch.float64), orthogonal(5, 5)):
        bound = spectral_norm_bound(matrix)
        assert exceeds_norm(bound, matrix)
        assert bound <= float(torch.linalg.matrix_norm(matrix)) * (1 + 1e-12)  # Frobenius at worst


@pytest.mark.parametrize("noise", [1e-12, 1e-6, 1e-2])
def test_bound_does_not_trust_the_factorization(monkeypatch, noise):
    honest = torch.linalg.cholesky_ex

    def wrong(a):
        factor, info = honest(a)
        return factor * (1 + noise), torch.zeros_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    for _ in range(5):
        matrix = torch.randn(6, 4, dtype=torch.float64)
        assert exceeds_norm(spectral_norm_bound(matrix), matrix)


def test_zero_empty_and_overflow():
    assert spectral_norm_bound(torch.zeros(3, 2)) == 0.0
    assert spectral_norm_bound(torch.zeros(0, 2)) == 0.0
    assert spectral_norm_bound(torch.full((9, 9), 1.7e308, dtype=torch.float64)) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(value):
    matrix = torch.eye(3)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="every entry must be finite"):
        spectral_norm_bound(matrix)
    with pytest.raises(ValueError, match="must have shape"):
        spectral_norm_bound(torch.ones(3))


def test_scalars_round_outward():
    numbers = [math.ldexp(random.random(), random.randint(-60, 60)) for _ in range(200)] + [1.0]
    for _ in range(300):
        a, b, c = (random.choice(numbers) for _ in range(3))
        x, y, z = Fraction(a), Fraction(b), Fraction(c)
        assert Fraction(rounding.add_up(a, b, c)) >= x + y + z
        assert Fraction(rounding.mul_up(a, b, c)) >= x * y * z
        assert Fraction(rounding.div_up(a, b)) >= x / y
        assert Fraction(rounding.sqrt_up(a)) ** 2 >= x
        assert Fraction(rounding.hypot_up(a, b, c)) ** 2 >= x * x + y * y + z * z
    terms = torch.randn(1000, dtype=torch.float64)
    exact = sum(Fraction(t) ** 2 for t in terms.tolist())
    assert exact <= Fraction(rounding.squared_norm_up(terms)) <= exact * (1 + Fraction(1, 10**12))
    assert rounding.mul_up(1.0, 3.0) == 3.0
    assert rounding.sqrt_up(9.0) == 3.0
    assert rounding.gamma(10) >= 10 * 2.0**-53


def test_a_block_that_the_screening_passes_over_does_not_cost_tightness():
    """Power iteration ranks thirty identities above the block of the largest norm."""
    blocks = torch.eye(20, dtype=torch.float64).repeat(31, 1, 1)
    blocks[17] *= 0.99
    blocks[17, 3, 3] = 1.02
    assert 1.02 <= spectral_norm_bound(blocks) < 1.02 * (1 + 1e-9)  # observed 5e-13 above
