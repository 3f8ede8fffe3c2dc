import dataclasses
import math
from fractions import Fraction

import pytest

from orthonet.certify import Bound
from orthonet.errors import UncertifiableError


def test_arithmetic_rounds_outward():
    a, b = Bound(0.1), Bound(0.7, kind="exact")
    exact_a, exact_b = Fraction(a.value), Fraction(b.value)
    assert Fraction((a * b).value) >= exact_a * exact_b
    assert Fraction((a + b).value) >= exact_a + exact_b
    assert Fraction(Bound.hypot(a, b, a).value) ** 2 >= 2 * exact_a**2 + exact_b**2
    assert (a * b).value == pytest.approx(0.07, rel=1e-15)
    assert {(a * b).kind, (a + b).kind, Bound.hypot(a, b).kind} == {"upper"}
    assert (Bound(1.0) * b).value == b.value


def test_extremes():
    assert (Bound(0.0) * Bound(math.inf)).value == 0.0  # a constant map stays constant
    assert (Bound(1e308) * Bound(10.0)).value == math.inf
    assert (Bound(1e-300) * Bound(1e-300)).value > 0.0
    assert Bound.hypot(Bound(1e-200), Bound(1e200)).value >= 1e200


@pytest.mark.parametrize(
    "compose", [lambda a, b: a * b, lambda a, b: b + a, lambda a, b: Bound.hypot(a, b)]
)
def test_an_estimate_cannot_enter(compose):
    with pytest.raises(UncertifiableError, match="only proved bounds can be composed"):
        compose(Bound(1.0), Bound(2.0, kind="estimate"))


def test_norms_do_not_mix():
    with pytest.raises(UncertifiableError, match="same norm"):
        Bound(1.0) * Bound(1.0, norm="linf")


def test_construction():
    with pytest.raises(ValueError, match="non-negative"):
        Bound(-1.0)
    with pytest.raises(ValueError, match="non-negative"):
        Bound(math.nan)
    with pytest.raises(ValueError, match="kind must be one of"):
        Bound(1.0, kind="guess")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bound(1.0).value = 2.0
    assert float(Bound(2)) == 2.0
