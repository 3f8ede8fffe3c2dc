"""Hard matrices by name: one table of inputs for many laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthonet._checks import factory, integer, one_of, require, weight_shape

__all__ = ["MATRIX_CASES", "MATRIX_SHAPES", "hard_matrix"]

MATRIX_SHAPES: dict[str, tuple[int, ...]] = {
    "1x1": (1, 1),
    "square": (16, 16),
    "wide": (8, 24),
    "tall": (24, 8),
    "1xn": (1, 16),
    "nx1": (16, 1),
    "batched": (3, 2, 8, 12),
}
"""Shapes (*batch, m, n) worth a test."""


def _with_spectrum(spectrum: Callable[[int], Tensor]) -> Callable[..., Tensor]:
    """Return a case with random singular vectors and the given singular values."""

    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        gaussian = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(gaussian, full_matrices=False)
        return (u * spectrum(s.shape[-1])) @ vh

    return make


def _gaussian(scale: float) -> Callable[..., Tensor]:
    def make(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    return make


def _zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.eye(*shape[-2:], dtype=torch.float64).expand(shape).clone()


def _geometric(kappa: float) -> Callable[[int], Tensor]:
    """From 1 down to 1 / kappa, evenly in the logarithm."""
    exponent = -torch.log10(torch.tensor(kappa, dtype=torch.float64)).item()
    return lambda n: torch.logspace(0, exponent, n, dtype=torch.float64)


def _half(value: float) -> Callable[[int], Tensor]:
    """Ones, and the last half (rounded down, one at least) equal to `value`."""
    return lambda n: torch.ones(n, dtype=torch.float64).index_fill(
        0, torch.arange(n - max(n // 2, 1), n), value
    )


_CASES: dict[str, Callable[..., Tensor]] = {
    "zero": _zero,
    "identity": _identity,
    "gaussian": _gaussian(1.0),
    "orthogonal": _with_spectrum(lambda n: torch.ones(n, dtype=torch.float64)),
    "rank_deficient": _with_spectrum(_half(0.0)),
    "repeated": _with_spectrum(_half(0.5)),
    "kappa_1e3": _with_spectrum(_geometric(1e3)),
    "kappa_1e6": _with_spectrum(_geometric(1e6)),
    "kappa_1e8": _with_spectrum(_geometric(1e8)),
    "tiny": _gaussian(1e-20),
    "huge": _gaussian(1e15),
}

MATRIX_CASES: tuple[str, ...] = tuple(_CASES)
"""Names of the matrices that `hard_matrix` makes."""


def hard_matrix(
    name: str,
    shape: Sequence[int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """Return a matrix, or a batch of them, that some orthogonalizer finds hard.

    `zero`, `identity`, `gaussian`, `orthogonal`, `rank_deficient` (half of the singular values
    are 0), `repeated` (1 and 0.5, each many times), `kappa_1e3`, `kappa_1e6`, `kappa_1e8`
    (singular values from 1 down to 1 / kappa), `tiny` (Gaussian times 1e-20), `huge` (times
    1e15). Computed in float64 and rounded once.

    Args:
        name: One of `MATRIX_CASES`.
        shape: (*batch, m, n).
        dtype: Of the result.
        seed: Of its own generator; the global one is not touched.

    Returns:
        The tensor, on the CPU.

    Raises:
        ValueError: The name is unknown, or a shape without two non-empty last dimensions.

    Examples:
        >>> hard_matrix("identity", (2, 3))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    one_of("hard_matrix", MATRIX_CASES, name=name)
    sizes = weight_shape("hard_matrix", shape)
    require(0 not in sizes, "hard_matrix", "shape must not be empty", "Use sizes >= 1", shape=shape)
    factory("hard_matrix", None, dtype)
    integer("hard_matrix", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return _CASES[name](sizes, generator).to(dtype)
