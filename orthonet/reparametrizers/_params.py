"""`OrthoParams`: which normalizer and which orthogonalizer a layer uses, and the presets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from orthonet import _checks
from orthonet.reparametrizers._normalizers import BatchedIdentity, BatchedPowerIteration
from orthonet.reparametrizers._polar import BatchedPolarOrthogonalization
from orthonet.reparametrizers.orthogonalizers import (
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedQROrthogonalization,
)

__all__ = [
    "AUTO_ORTHO_PARAMS",
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "POLAR_ORTHO_PARAMS",
    "POLAR_WARM_ORTHO_PARAMS",
    "QR_ORTHO_PARAMS",
    "ClassParam",
    "OrthoParams",
]


class ClassParam(functools.partial):
    """A class with keyword arguments, to be called with the shape of a weight later.

    A `functools.partial` that compares by value and prints as the call it stands for; a plain
    `functools.partial` or a class serves in its place.

    Examples:
        >>> ClassParam(BatchedBjorckOrthogonalization, niters=25)
        ClassParam(BatchedBjorckOrthogonalization, niters=25)
    """

    def _key(self) -> tuple[Any, ...]:
        return (self.func, self.args, tuple(sorted(self.keywords.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassParam) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        name = getattr(self.func, "__name__", repr(self.func))
        arguments = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.keywords.items())]
        return f"ClassParam({', '.join([name, *arguments])})"


@dataclass(frozen=True)
class OrthoParams:
    """How a layer makes its weights orthogonal.

    Attributes:
        spectral_normalizer: Called with the shape (*batch, m, n) of a weight; returns a module
            that brings the weight to unit scale. A class, `ClassParam` or `functools.partial`.
        orthogonalizer: Called likewise; returns a module that makes it semi-orthogonal.

    Raises:
        ValueError: a field is not callable.

    Examples:
        >>> params = OrthoParams(orthogonalizer=BatchedQROrthogonalization)
        >>> params.build((4, 4))[1]
        BatchedQROrthogonalization(weight_shape=(4, 4))
    """

    spectral_normalizer: Callable[..., nn.Module] = field(
        default=ClassParam(BatchedPowerIteration, power_it_niter=3, eps=1e-6)
    )
    orthogonalizer: Callable[..., nn.Module] = field(
        default=ClassParam(BatchedBjorckOrthogonalization, beta=0.5, niters=12)
    )

    def __post_init__(self) -> None:
        for name in ("spectral_normalizer", "orthogonalizer"):
            factory = getattr(self, name)
            _checks.require(
                callable(factory),
                self,
                f"{name} must be callable with a weight shape",
                "Pass a class, ClassParam(cls, ...) or functools.partial(cls, ...)",
                **{name: factory},
            )

    def build(self, weight_shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        """Return the normalizer and the orthogonalizer for one weight shape (*batch, m, n)."""
        return self.spectral_normalizer(weight_shape), self.orthogonalizer(weight_shape)


DEFAULT_ORTHO_PARAMS = OrthoParams()

DEFAULT_TEST_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=ClassParam(BatchedPowerIteration, power_it_niter=4, eps=1e-4),
    orthogonalizer=ClassParam(BatchedBjorckOrthogonalization, beta=0.5, niters=25),
)

BJORCK_PASS_THROUGH_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=ClassParam(BatchedPowerIteration, power_it_niter=3, eps=1e-4),
    orthogonalizer=ClassParam(
        BatchedBjorckOrthogonalization, beta=0.5, niters=12, pass_through=True
    ),
)

EXP_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=ClassParam(BatchedPowerIteration, power_it_niter=3, eps=1e-6),
    orthogonalizer=ClassParam(BatchedExponentialOrthogonalization, niters=12),
)

QR_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=ClassParam(BatchedPowerIteration, power_it_niter=3, eps=1e-3),
    orthogonalizer=BatchedQROrthogonalization,
)

CHOLESKY_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=BatchedIdentity,
    orthogonalizer=ClassParam(BatchedCholeskyOrthogonalization),
)

CHOLESKY_STABLE_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=BatchedIdentity,
    orthogonalizer=ClassParam(BatchedCholeskyOrthogonalization, stable=True),
)

POLAR_ORTHO_PARAMS = OrthoParams(
    spectral_normalizer=BatchedIdentity,
    orthogonalizer=BatchedPolarOrthogonalization,
)

POLAR_WARM_ORTHO_PARAMS = POLAR_ORTHO_PARAMS
"""The polar factor, as `POLAR_ORTHO_PARAMS`: every preset starts warm now.

It used to re-centre the parameter in the forward pass. That happens after the optimizer step.
"""

AUTO_ORTHO_PARAMS = CHOLESKY_ORTHO_PARAMS
"""The orthogonal factor by Cholesky-QR2, as `CHOLESKY_ORTHO_PARAMS`, which it used to choose."""
