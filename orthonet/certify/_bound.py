"""A number with its meaning: what it bounds, in which norm, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orthonet import _checks
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import add_up, hypot_up, mul_up

__all__ = ["Bound", "Kind", "Row", "norm_text"]

Kind = Literal["exact", "upper", "estimate"]


@dataclass(frozen=True)
class Bound:
    r"""A Lipschitz constant, a proved bound of it, or an estimate.

    `a * b` bounds a composition, `a + b` a sum of maps, and `Bound.hypot(a, b, ...)` a
    concatenation. All round outward, so the result holds in exact arithmetic. It is of kind
    `"upper"`, because the worst cases of two maps need not meet.

    Args:
        value: The number, non-negative; infinity is a (useless) upper bound.
        norm: The norms of input and output: `"l2"`, or `"l1->linf"` where they differ.
        kind: `"exact"`: the constant, attained up to rounding (and rounded upward).
            `"upper"`: proved from above. `"estimate"`: found from below. It proves nothing and
                cannot enter any arithmetic.

    Raises:
        ValueError: `value` is negative or NaN, or `kind` is unknown.
        UncertifiableError: An estimate, a bound in another norm, or one between different norms
            enters a composition.

    Examples:
        >>> Bound(2.0) * Bound(3.0, kind="exact")
        Bound(value=6.000000000000001, norm='l2', kind='upper')
        >>> Bound.hypot(Bound(3.0), Bound(4.0)).value >= 5.0
        True
    """

    value: float
    norm: str = "l2"
    kind: Kind = "upper"

    def __post_init__(self) -> None:
        _checks.one_of("Bound", ("exact", "upper", "estimate"), kind=self.kind)
        good = isinstance(self.value, (int, float)) and self.value >= 0.0
        _checks.require(
            good,
            "Bound",
            "value must be a non-negative number",
            "Take the absolute value",
            value=self.value,
        )
        object.__setattr__(self, "value", float(self.value))

    @classmethod
    def hypot(cls, *bounds: Bound) -> Bound:
        """Return the bound of maps whose outputs are concatenated.

        In l2 it is the root of the sum of squares, in l-infinity the largest, in l1 the sum.
        """
        values = _values(bounds)
        combine = {"linf": max, "l1": lambda *v: add_up(*v)}.get(bounds[0].norm, hypot_up)
        return cls(combine(*values), bounds[0].norm)

    @property
    def ends(self) -> tuple[str, str]:
        """The norm of the input and the norm of the output."""
        norm, _, to = self.norm.partition("->")
        return norm, to or norm

    def __mul__(self, other: Bound) -> Bound:
        return Bound(mul_up(*_values((self, other))), self.norm)

    def __add__(self, other: Bound) -> Bound:
        return Bound(add_up(*_values((self, other))), self.norm)

    def __float__(self) -> float:
        return self.value


def _values(bounds: tuple[Bound, ...]) -> list[float]:
    """The values, if these bounds may be composed."""
    for bound in bounds:
        _checks.require(
            bound.kind != "estimate",
            "Bound",
            "only proved bounds can be composed into a certificate",
            "An estimate holds from below: use spectral_norm_bound or another proof instead",
            UncertifiableError,
            bound=bound,
        )
        _checks.require(
            bound.norm == bounds[0].norm,
            "Bound",
            "composed bounds must be in the same norm",
            "Convert one of them",
            UncertifiableError,
            bound=bound,
            other=bounds[0],
        )
        _checks.require(
            "->" not in bound.norm,
            "Bound",
            "composed bounds must be from one norm to the same one",
            "Certify the whole model between these norms",
            UncertifiableError,
            bound=bound,
        )
    return [bound.value for bound in bounds]


def norm_text(norm: str, to: str) -> str:
    """The norms of input and output as `Bound.norm` holds them."""
    return norm if norm == to else f"{norm}->{to}"


@dataclass(frozen=True)
class Row:
    """One step of the certificate: an operation, or several affine ones that were joined.

    Attributes:
        path: The module it belongs to.
        op: The class of the module or the name of the operation, joined by `+`.
        input_shape: The shape of one sample that it reads.
        constant: The Lipschitz constant of the operation; with several operands, that of the first.
        cumulative: The constant from the input of the model to its output.
        method: How the constant was obtained.
        kind: The kind of the constant, see `Bound`.
        seconds: The time that the proof took.
    """

    path: str
    op: str
    input_shape: tuple[int, ...]
    constant: float
    cumulative: float
    method: str
    kind: str
    seconds: float
