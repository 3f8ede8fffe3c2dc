"""Assertions on the promise of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthonet._checks import in_range, integer, positive_int
from orthonet.testing._operator import (
    Map,
    check_map,
    evaluated,
    factory_kwargs,
    jacobian,
    preserved,
    singular_values,
)
from orthonet.testing.tolerances import ROUNDING

__all__ = ["assert_lipschitz", "assert_orthogonal"]

_JACOBIAN_ENTRIES = 2**20  # larger Jacobians are not formed


def assert_orthogonal(
    fn: Map,
    input_shape: Sequence[int],
    atol: float | None = None,
    *,
    dtype: torch.dtype | None = None,
    train: bool = False,
) -> None:
    """Check that an affine map is semi-orthogonal: all singular values of its matrix are 1.

    Args:
        fn: A function or module that maps `(N, *input_shape)` to `(N, ...)`.
        input_shape: Shape of one sample, without the batch dimension.
        atol: Largest accepted |sigma - 1|; default by dtype, `tolerances.ROUNDING`.
        dtype: Of the inputs; default that of the module.
        train: Evaluate a module in train mode instead of eval mode.

    Raises:
        AssertionError: A singular value is another; the message has the extreme ones.
        ValueError: The map is not affine.

    Examples:
        >>> assert_orthogonal(torch.nn.PixelUnshuffle(2), (1, 4, 4))
    """
    check_map("assert_orthogonal", fn, input_shape, dtype, atol)
    atol = ROUNDING[factory_kwargs(fn, dtype)["dtype"]].allowed if atol is None else atol
    sigma = singular_values(fn, input_shape, dtype=dtype, train=train)
    low, high = sigma.min().item(), sigma.max().item()
    if not max(1 - low, high - 1) <= atol:
        raise AssertionError(
            f"not orthogonal on {tuple(input_shape)}: singular values in "
            f"[1 - {1 - low:.3e}, 1 + {high - 1:.3e}], allowed 1 +- {atol:.1e}"
        )


def assert_lipschitz(
    fn: Map,
    input_shape: Sequence[int],
    constant: float = 1.0,
    atol: float | None = None,
    *,
    attained: bool = False,
    dtype: torch.dtype | None = None,
    samples: int = 8,
    seed: int = 0,
    train: bool = False,
) -> None:
    r"""Check that no Lipschitz constant above `constant` is found.

    The ratios \(\|f(x) - f(y)\| / \|x - y\|\) of random pairs near and far are compared with it,
    and the spectral norm of the Jacobian at random points where it is small enough to be formed.
    A failure is a proof that the promise is broken; a success is evidence, not a proof: use
    `orthonet.certify.certify` for a bound, `orthonet.certify.lipschitz_estimate` for a search.

    Args:
        fn: A function or module, sample by sample, as of
            [`assert_orthogonal`][orthonet.testing.assert_orthogonal].
        input_shape: As there.
        constant: The promised constant.
        atol: Accepted excess, relative to `constant`; default by dtype, `tolerances.ROUNDING`.
        attained: Also check that the largest ratio comes as near to `constant` from below.
        dtype: As there.
        samples: Random points at each of four scales.
        seed: Of the points.
        train: As there.

    Raises:
        AssertionError: A larger ratio was found; the message has it.

    Examples:
        >>> assert_lipschitz(torch.nn.ReLU(), (5,))
    """
    check_map("assert_lipschitz", fn, input_shape, dtype, atol)
    in_range("assert_lipschitz", 0.0, float("inf"), constant=constant)
    positive_int("assert_lipschitz", samples=samples)
    integer("assert_lipschitz", seed=seed)
    atol = ROUNDING[factory_kwargs(fn, dtype)["dtype"]].allowed if atol is None else atol
    found = _observed_constant(fn, input_shape, dtype, samples, seed, train)
    if not found <= constant * (1 + atol):
        raise AssertionError(
            f"not {constant}-Lipschitz on {tuple(input_shape)}: found {found:.9g}, "
            f"allowed {constant} * (1 + {atol:.1e})"
        )
    if attained and not found >= constant * (1 - atol):
        raise AssertionError(
            f"the constant {constant} is not attained on {tuple(input_shape)}: found "
            f"{found:.9g}, allowed {constant} * (1 - {atol:.1e})"
        )


def _observed_constant(
    fn: Map,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
    samples: int,
    seed: int,
    train: bool,
) -> float:
    """Return the largest secant of random pairs, or norm of a Jacobian at random points."""
    kwargs = factory_kwargs(fn, dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return (scale * torch.randn(samples, *input_shape, generator=generator)).to(**kwargs)

    best = 0.0
    with preserved(fn, train), torch.no_grad():
        for scale in (0.0, 0.1, 1.0, 10.0):
            x = draw(scale)
            for step in (1.0, 0.1):
                y = x + draw(step * max(scale, 1.0))
                moved = evaluated("assert_lipschitz", fn, x) - fn(y)
                best = max(best, _norms(moved).div(_norms(x - y)).max().item())
        numel = x[0].numel() * fn(x[:1]).numel()
    if numel <= _JACOBIAN_ENTRIES:
        for x in draw(1.0):
            matrix = jacobian(fn, x, train=train).double()
            best = max(best, torch.linalg.matrix_norm(matrix, 2).item())
    return best


def _norms(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)
