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
from orthonet.reparametrizers.orthogonalizers import (
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
    Orthogonalizer,
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
    "Presets",
    "described",
    "name_of",
    "presets",
    "read_params",
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


_OF_A_USER = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
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
        alike = isinstance(value, torch.Tensor) and value.shape == w.shape
        if not alike or not bool(value.isfinite().all()):
            return float("inf")
        return float((torch.linalg.svdvals(value.double()) - 1.0).abs().max())


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

    def __new__(cls, *args: Any, **fields: Any) -> OrthoParams:
        """Say what the fields are called."""
        for name in fields:
            _checks.one_of(cls, ("spectral_normalizer", "orthogonalizer"), field=name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("spectral_normalizer", "orthogonalizer"):
            factory = getattr(self, name)
            _checks.require(
                callable(factory) and not isinstance(factory, nn.Module),
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
        # Those of the library are tested; trying them would cost a process a fifth of a second.
        own = type(built).__module__ == Orthogonalizer.__module__
        if own or small in tried or not _torch.eager():
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

It used to re-center the parameter in the forward pass. That happens after the optimizer step.
"""

AUTO_ORTHO_PARAMS = CHOLESKY_ORTHO_PARAMS
"""The orthogonal factor by Cholesky-QR2, as `CHOLESKY_ORTHO_PARAMS`, which it used to choose."""


class Presets(dict[str, OrthoParams]):
    """The presets by name; prints as a table with one line each."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {_ABOUT[name][1]}" for name in self)


_ABOUT = {
    "default": (DEFAULT_ORTHO_PARAMS, "the nearest orthogonal matrix (polar factor), by Björck"),
    "default_test": (DEFAULT_TEST_ORTHO_PARAMS, "the same, with more steps"),
    "bjorck_pass_through": (
        BJORCK_PASS_THROUGH_ORTHO_PARAMS,
        "the same; away from the center, with a cheaper, approximate gradient",
    ),
    "polar": (POLAR_ORTHO_PARAMS, "the same, by polynomials or eigenvectors of the Gram matrix"),
    "exp": (EXP_ORTHO_PARAMS, "a base point, rotated by the exponential of a skew matrix"),
    "qr": (QR_ORTHO_PARAMS, "the Q factor, its signs fixed, by Householder reflections"),
    "cholesky": (CHOLESKY_ORTHO_PARAMS, "the Q factor, by Cholesky-QR2: matrix products only"),
    "cholesky_stable": (
        CHOLESKY_STABLE_ORTHO_PARAMS,
        "the same, shifted, for ill-conditioned parameters",
    ),
    "polar_warm": (POLAR_WARM_ORTHO_PARAMS, "an older name of polar"),
    "auto": (AUTO_ORTHO_PARAMS, "an older name of cholesky"),
}


def presets() -> Presets:
    """Return the published presets by name; printed, one line says what each makes.

    Every layer takes the name in place of the object: `ortho_params="cholesky"`.

    Examples:
        >>> presets()["cholesky"] is CHOLESKY_ORTHO_PARAMS
        True
        >>> print(str(presets()).splitlines()[5])
        qr                   the Q factor, its signs fixed, by Householder reflections
    """
    return Presets({name: preset for name, (preset, _) in _ABOUT.items()})


def read_params(owner: object, ortho_params: object) -> OrthoParams:
    """Return a preset that is given itself or by its name; refuse everything else."""
    if isinstance(ortho_params, OrthoParams):
        return ortho_params
    name = ortho_params if isinstance(ortho_params, str) else ""
    short = name.lower().removesuffix("_ortho_params")
    if short not in _ABOUT:
        _checks.fail(
            owner,
            f"ortho_params must be an OrthoParams or the name of a preset, {', '.join(_ABOUT)}",
            "Pass such a name, or a preset, e.g. orthonet.CHOLESKY_ORTHO_PARAMS",
            ortho_params=ortho_params,
        )
    return _ABOUT[short][0]


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def described(module: nn.Module) -> str:
    """The class of a module and what its `extra_repr` shows, in one line, without the shape."""
    shown = re.sub(r"weight_shape=\([^)]*\)(, )?", "", module.extra_repr())
    return _ADDRESS.sub("", f"{type(module).__name__}({' '.join(shown.split())})")


@functools.cache
def _names() -> dict[str, str]:
    """The name of each preset by its description; of two names the first."""
    named = reversed(presets().items())
    return {preset.described(): f"{name.upper()}_ORTHO_PARAMS" for name, preset in named}


def name_of(description: str) -> str:
    """The name of the published preset that is described so, or the description."""
    return _names().get(description, description)
