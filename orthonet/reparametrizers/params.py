"""`OrthoParams`: which normalizer and which orthogonalizer a layer uses, and the presets."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from orthonet import _checks, _torch
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
    "described",
    "name_of",
    "require_params",
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


_TESTED = (  # by the library; to try them would cost each process a fifth of a second
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
)
_OF_A_USER = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_ALLOWED = 3.5e-4  # of singular values from 1, in float32, as for an assigned weight


@torch.no_grad()
def _distance(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> float:
    """How far the singular values are from 1 that a module gives a random matrix of norm 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
        left, sigma, right = torch.linalg.svd(
            torch.randn(shape, generator=generator, dtype=torch.float32), full_matrices=False
        )
        w = (left * torch.linspace(1.0, 0.5, sigma.shape[-1])) @ right
        with _torch.without_autocast(w):
            value = make().to(w)(w)
        if not isinstance(value, torch.Tensor) or value.shape != w.shape:
            return float("inf")
        if not bool(value.isfinite().all()):
            return float("inf")
        return float((torch.linalg.svdvals(value.double()) - 1.0).abs().max())


def require_params(owner: object, ortho_params: object) -> None:
    """Refuse what is no `OrthoParams`."""
    _checks.require(
        isinstance(ortho_params, OrthoParams),
        owner,
        "ortho_params must be an OrthoParams",
        "Pass a preset, e.g. orthonet.CHOLESKY_ORTHO_PARAMS, or OrthoParams(...)",
        ortho_params=ortho_params,
    )


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
        """Return the normalizer and the orthogonalizer for one weight shape (*batch, m, n).

        The first time, an orthogonalizer of your own is tried on a random matrix of norm 1.

        Raises:
            ValueError: a field does not return modules, or the orthogonalizer does not return
                semi-orthogonal matrices.
        """
        built = self.spectral_normalizer(weight_shape), self.orthogonalizer(weight_shape)
        for name, module in zip(("spectral_normalizer", "orthogonalizer"), built, strict=True):
            _checks.require(
                isinstance(module, nn.Module),
                self,
                f"{name} must return a torch.nn.Module",
                "Pass a class of modules, ClassParam(cls, ...) or functools.partial(cls, ...)",
                **{name: getattr(self, name), "returned": type(module)},
            )
        self._try(tuple(weight_shape), built[1])
        return built

    def _try(self, shape: tuple[int, ...], built: nn.Module) -> None:
        """Refuse an orthogonalizer that is none; once for square, for tall and for wide weights.

        A small one is tried, or a copy of `built` where the factory makes no small one.
        """
        *batch, rows, columns = shape
        small = (*(2 for _ in batch), 4 if rows <= columns else 8, 4 if rows >= columns else 8)
        tried: set[tuple[int, ...]] = vars(self).setdefault("_tried", set())
        if type(built) in _TESTED or small in tried or not _torch.eager():
            return
        try:
            distance = _distance(lambda: self.orthogonalizer(small), small)
        except _OF_A_USER:  # whose code takes other shapes
            if any(t.is_meta for t in (*built.parameters(), *built.buffers())):
                return
            distance = _distance(lambda: copy.deepcopy(built), shape)
        _checks.require(
            distance <= _ALLOWED,
            self,
            "orthogonalizer must turn matrices of norm 1 into semi-orthogonal ones, all singular "
            f"values 1 (to {_ALLOWED:.1e})",
            "Pass one that does, such as BatchedPolarOrthogonalization, and what only scales as "
            "spectral_normalizer",
            orthogonalizer=self.orthogonalizer,
            distance=distance,
        )
        tried.add(small)

    def described(self) -> str:
        """The classes of the two and their arguments, as a `state_dict` holds them."""
        return ", ".join(map(described, self.build((2, 2))))


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


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def described(module: nn.Module) -> str:
    """The class of a module and what its `extra_repr` shows, in one line, without the shape."""
    shown = re.sub(r"weight_shape=\([^)]*\)(, )?", "", module.extra_repr())
    return _ADDRESS.sub("", f"{type(module).__name__}({' '.join(shown.split())})")


def name_of(description: str) -> str:
    """The name of the published preset that is described so, or the description."""
    for name, preset in globals().items():
        if isinstance(preset, OrthoParams) and description == preset.described():
            return name
    return description
