"""Sums, products with constants, and products and powers of bounded values."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.ops.advice import ADVICE, IN_A_BALL
from orthonet.certify.ops.entries import ENTRYWISE, LARGEST, PAIRS
from orthonet.certify.ops.registry import (
    EVERYTHING,
    SMOOTH,
    Interval,
    Linear,
    Values,
    added,
    amplification,
    constant,
    each_repeated,
    f64,
    first_moves,
    interval_of,
    number,
    op,
    zeros,
)
from orthonet.certify.rules import BatchDependent, Call, Operand, Step, exact, upper
from orthonet.certify.walk.forms import Form, aligned, channels_of, scaled
from orthonet.linalg.bounds.rounding import div_up, down, mul_up, up

__all__: list[str] = []

_INF = math.inf


def _hull(low: float, high: float, *, steps: int = 2) -> Interval:
    """The interval, a few floats wider."""
    for _ in range(steps):
        low, high = down(low), up(high)
    return low, high


def _range_of(call: Call, value: Any) -> Interval:
    """The entries of an operand or of a constant."""
    if isinstance(value, Operand):
        return interval_of(value)
    if isinstance(value, BatchDependent) and not value.rows:
        return EVERYTHING
    tensor = call.as_constant(value, "other")
    return (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 0.0)


def _sum_range(call: Call) -> Interval:
    a, b = (_range_of(call, call[name]) for name in ("self", "other"))
    alpha = call.given("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return EVERYTHING
    if call.op != "add":
        alpha = -alpha
    first, second = (a, b) if call.op != "rsub" else (b, a)
    # rsub is other - alpha self
    ends = [_times(alpha, end) for end in second]
    return _hull(first[0] + min(ends), first[1] + max(ends))


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0.0 or b == 0.0 else a * b


# --- sums ----------------------------------------------------------------------------------------


def _add_linear(a: Values, absolute: bool) -> Any:
    alpha = a.get("alpha", 1)
    first, second = zeros(a["self"]), zeros(a["other"])
    if "rsub" in str(a.target):
        first, second = second, first
    if absolute:
        return first + abs(alpha) * second
    return first + alpha * second if "add" in str(a.target) else first - alpha * second


def _add_form(state: Any, forms: list[Form]) -> Form | None:
    call = state.call
    alpha = call.given("alpha", 1)
    terms = [call["self"], call["other"]]
    operands = [isinstance(a, Operand) for a in terms]
    if not all(operands):  # a constant shifts, and changes nothing unless it widens the shape
        if tuple(state.shape[1:]) != forms[0].outputs or state.shape[0] != channels_of(forms[0]):
            return None
        moving = operands.index(True)
        factor = {("sub", 1): -alpha, ("add", 1): alpha, ("rsub", 0): -alpha}.get(
            (call.op, moving), 1
        )
        form = forms[0]
        return form if factor == 1 else scaled(form, torch.tensor(float(factor)).double(), 1)
    pair = forms if len(forms) == 2 else [forms[0], forms[0]]
    if terms[0]._state is not state.parents[0]:
        pair = pair[::-1]
    both = aligned(pair)
    if both is None or tuple(state.shape[1:]) != pair[0].outputs:
        return None
    return both[0].plus(
        both[1], *{"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.op]
    )


def _add_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    alpha, kind = number(draw), draw.randrange(6)
    other = constant(draw, *draw.choice([shape, shape[-1:], (1, *shape), ()]))
    scalar = number(draw)
    return [
        lambda x, y: x + y,
        lambda x, y: torch.sub(x, y, alpha=alpha),
        lambda x, y: torch.rsub(x, y, alpha=alpha),
        lambda x, y: torch.add(x, other, alpha=alpha),
        lambda x, y: scalar - x,
        lambda x, y: other - x,
    ][kind]


@op(
    "add.Tensor",
    "add.Scalar",
    "sub.Tensor",
    "sub.Scalar",
    "rsub.Tensor",
    "rsub.Scalar",
    reads=("other", "alpha"),
    interval=_sum_range,
    kernel=_add_form,
    offset=added,
    linear=Linear(_add_linear, lambda state: 2, when=lambda call: True),
    samples=_add_samples,
)
def _add(call: Call) -> Step:
    alpha = abs(call.number("alpha"))
    gains = []
    for position, name in enumerate(("self", "other")):
        if isinstance(call[name], Operand):
            size = alpha if position == (0 if call.op == "rsub" else 1) else 1.0
            gains.append(Bound(mul_up(size, amplification(call, call[name])), kind="exact"))
    method = "shift" if len(gains) == 1 else "sum of norms"
    return Step(tuple(gains), method, roundings=2.0)


def _lerp_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    weight = draw.choice([0.3, -1.5, 2.0, constant(draw, *shape)])
    return lambda x, y: torch.lerp(x, y, weight)


@op(
    "lerp.Scalar",
    "lerp.Tensor",
    reads=("end", "weight"),
    offset=added,
    entries=ENTRYWISE,
    samples=_lerp_samples,
)
def _lerp(call: Call) -> Step:
    weight = call.fixed("weight")
    gains = []
    for name, factor in (("self", (1.0 - weight).abs()), ("end", weight.abs())):
        if isinstance(call[name], Operand):
            # 1 - weight was rounded once
            size = mul_up(float(factor.max()), up(1.0 + 2.0**-52), amplification(call, call[name]))
            gains.append(Bound(size))
    return Step(tuple(gains), "weighted mean", roundings=4.0)


@op(
    "hypot.default",
    reads=("other",),
    entries=PAIRS,
    samples=lambda draw, shape: lambda x, y: torch.hypot(x, y),
)
def _hypot(call: Call) -> Step:
    if len(call.operands) == 1:
        return exact(amplification(call), "the length of a pair", SMOOTH)
    return Step(each_repeated(call), "the length of a pair", "hypot", roundings=SMOOTH)


@op(
    "logaddexp.default",
    reads=("other",),
    entries=LARGEST,
    samples=lambda draw, shape: lambda x, y: torch.logaddexp(x, y),
)
def _logaddexp(call: Call) -> Step:
    """Both slopes are non-negative and add up to 1, so their squares add up to 1 at most."""
    if len(call.operands) == 1:
        return upper(amplification(call), "gradient is a distribution")
    return Step(each_repeated(call), "gradient is a distribution", "hypot")


# --- products ------------------------------------------------------------------------------------


def _product_range(call: Call) -> Interval:
    a, b = (_range_of(call, call[name]) for name in ("self", "other"))
    if call.op == "div":
        if b[0] <= 0.0 <= b[1]:
            return EVERYTHING
        b = _hull(1.0 / b[1], 1.0 / b[0], steps=1)
    ends = [_times(u, v) for u in a for v in b]
    return _hull(min(ends), max(ends), steps=1)


def _factors(call: Call) -> tuple[Any, Any]:
    """The operand and what it is multiplied by, or the numerator and the divisor."""
    a, b = call["self"], call["other"]
    return (a, b) if isinstance(a, Operand) or call.op == "div" else (b, a)


def _scale_linear(a: Values, absolute: bool) -> Any:
    first, second = f64(a["self"], absolute), f64(a["other"], absolute)
    return first * second if "mul" in str(a.target) else first / second


def _scale_form(state: Any, forms: list[Form]) -> Form | None:
    call, form = state.call, forms[0]
    value = [a for a in (call["self"], call["other"]) if not isinstance(a, Operand)]
    if len(value) != 1 or (call.op == "div" and not isinstance(call["self"], Operand)):
        return None
    factor = torch.as_tensor(value[0]).detach().cpu().double()
    shape = (1,) * (form.dims + 2 - factor.ndim) + tuple(factor.shape)
    if len(shape) != form.dims + 2 or any(n != 1 for i, n in enumerate(shape) if i != 1):
        return None
    return scaled(form, 1.0 / factor if call.op == "div" else factor, 3)


def _modulus(call: Call, operand: Operand) -> float:
    return max(map(abs, interval_of(operand)))


_BOUNDED = (
    "A product or quotient of two tensors that depend on the input has a Lipschitz "
    f"constant only where both are bounded, as behind tanh or clamp; {IN_A_BALL}; a rule of your "
    "own may be registered for the module around it with @register_rule"
)


def _mul_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    other = constant(draw, *draw.choice([shape, shape[-1:], (), (1, *shape)]))
    scalar = number(draw)
    return draw.choice(
        [
            lambda x, y: x * other,
            lambda x, y: other * x,
            lambda x, y: x * scalar,
            lambda x, y: x.tanh() * y.sigmoid(),
            lambda x, y: x.clamp(-1, 2) * y.clamp(max=3, min=-1),
        ]
    )


@op(
    "mul.Tensor",
    "mul.Scalar",
    reads=("other",),
    interval=_product_range,
    kernel=_scale_form,
    linear=Linear(_scale_linear, lambda state: 3),
    entries=ENTRYWISE,
    samples=_mul_samples,
)
def _mul(call: Call) -> Step:
    first, second = _factors(call)
    if len(call.operands) == 2:
        sizes = [_modulus(call, x) for x in (second, first)]
        if not all(map(math.isfinite, sizes)):
            call.refuse("the factors of a product must be constants, or bounded", _BOUNDED)
        gains = tuple(
            Bound(mul_up(size, amplification(call, x)))
            for size, x in zip(sizes, (first, second), strict=True)
        )
        return Step(gains, "product of bounded values")
    return _scaled_by(call, call.as_constant(second, "other").abs())


def _scaled_by(call: Call, factor: Tensor) -> Step:
    size = amplification(call)
    value = mul_up(float(factor.max()) if factor.numel() else 0.0, size)
    same = size == 1.0 or bool((factor == factor.amax()).all())
    return (exact if same else upper)(value, "largest factor", 1.0)


def _inverse(call: Call) -> list[Any]:
    return [1.0 / call.fixed("other")]


def _exact_quotient(call: Call) -> None:
    if call.given("rounding_mode") is not None:
        call.refuse("a division must not round", "Leave out rounding_mode")


def _div_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    other = constant(draw, *draw.choice([shape, shape[-1:], ()])).sign() + 1.5
    return draw.choice(
        [
            lambda x, y: x / other,
            lambda x, y: x / 3.0,
            lambda x, y: x.tanh() / (y.relu() + 0.5),
            lambda x, y: 2.0 / (x.abs() + 1.0),
            lambda x, y: other / (x.sigmoid() + 0.1),
        ]
    )


@op(
    "div.Tensor",
    "div.Scalar",
    "div.Tensor_mode",
    "div.Scalar_mode",
    reads=("other", "rounding_mode"),
    only=_exact_quotient,
    interval=_product_range,
    kernel=_scale_form,
    linear=Linear(_scale_linear, lambda state: 3, when=first_moves, scales=_inverse),
    entries=ENTRYWISE,
    samples=_div_samples,
)
def _div(call: Call) -> Step:
    first, second = _factors(call)
    if not isinstance(second, Operand):
        other = call.as_constant(second, "other").abs()
        smallest = float(other.min()) if other.numel() else 1.0
        if smallest == 0.0:
            call.refuse("the divisor must not be zero", "Add an eps to the constant")
        size = amplification(call)
        same = size == 1.0 or bool((other == other.amax()).all())
        value = mul_up(div_up(1.0, smallest), size)
        return (exact if same else upper)(value, "largest factor", 1.0)
    low, high = interval_of(second)
    least = _distance_from_zero(low, high)
    largest = max(map(abs, _range_of(call, first)))
    if least <= 0.0 or not math.isfinite(largest):
        call.refuse(
            "the divisor must be bounded away from zero, and the numerator bounded", _BOUNDED
        )
    slope = Bound(mul_up(div_up(div_up(largest, least), least), amplification(call, second)))
    if not isinstance(first, Operand):
        return Step((slope,), "quotient of bounded values")
    gain = Bound(mul_up(div_up(1.0, least), amplification(call, first)))
    return Step((gain, slope), "quotient of bounded values")


def _distance_from_zero(low: float, high: float) -> float:
    return 0.0 if low <= 0.0 <= high else min(abs(low), abs(high))


# --- functions with a slope on an interval -------------------------------------------------------


def _bounded_slope(call: Call, value: float, what: str) -> Step:
    if not math.isfinite(value):
        call.refuse(
            f"{call.op} must have an input that is {what}",
            ADVICE.get(
                call.op,
                "It has no global Lipschitz constant: bound its input "
                f"by relu, sigmoid, tanh or clamp; {IN_A_BALL}",
            ),
        )
    return upper(mul_up(value, amplification(call, call.operand)), "largest slope on an interval")


_LIBRARY = 1.0 + 2.0**-40  # for the rounding of the math library


def _exp_up(x: float) -> float:
    return math.exp(x) * _LIBRARY if x < 700.0 else _INF


def _exp_range(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    shift = 1.0 if call.op == "expm1" else 0.0
    lowest = math.exp(low) / _LIBRARY if low > -700.0 else 0.0
    return _hull(lowest - shift, _exp_up(high) - shift, steps=1 if shift or lowest else 0)


@op(
    "exp.default",
    "expm1.default",
    interval=_exp_range,
    entries=ENTRYWISE,
    samples=lambda draw, shape: lambda x, y: (-x.relu()).exp(),
)
def _exp(call: Call) -> Step:
    return _bounded_slope(call, _exp_up(interval_of(call.operand)[1]), "bounded from above")


@op(
    "reciprocal.default",
    interval=lambda call: _reciprocal_range(call),
    entries=ENTRYWISE,
    samples=lambda draw, shape: lambda x, y: 1.0 / (1.0 + x.relu()),
)
def _reciprocal(call: Call) -> Step:
    least = _distance_from_zero(*interval_of(call.operand))
    slope = div_up(div_up(1.0, least), least) if least > 0.0 else _INF
    return _bounded_slope(call, slope, "bounded away from zero")


def _reciprocal_range(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    if low <= 0.0 <= high:
        return EVERYTHING
    return _hull(1.0 / high, 1.0 / low, steps=1)


def _root_range(call: Call) -> Interval:
    return 0.0, _INF


@op(
    "sqrt.default",
    interval=_root_range,
    entries=ENTRYWISE,
    samples=lambda draw, shape: lambda x, y: (x.abs() + 0.25).sqrt(),
)
def _sqrt(call: Call) -> Step:
    low = interval_of(call.operand)[0]
    slope = div_up(0.5, math.sqrt(low) / _LIBRARY) if low > 0.0 else _INF
    return _bounded_slope(call, slope, "bounded away from zero")


@op(
    "rsqrt.default",
    interval=_root_range,
    entries=ENTRYWISE,
    samples=lambda draw, shape: lambda x, y: (x.abs() + 0.25).rsqrt(),
)
def _rsqrt(call: Call) -> Step:
    low = interval_of(call.operand)[0]
    slope = mul_up(0.5, _pow_up(low, -1.5)) if low > 0.0 else _INF
    return _bounded_slope(call, slope, "bounded away from zero")


@op(
    "log.default",
    "log1p.default",
    entries=ENTRYWISE,
    samples=lambda draw, shape: lambda x, y: (x.abs() + 0.25).log(),
)
def _log(call: Call) -> Step:
    low = interval_of(call.operand)[0]
    low = down(low + 1.0) if call.op == "log1p" else low
    return _bounded_slope(call, div_up(1.0, low) if low > 0.0 else _INF, "bounded away from zero")


def _pow_up(base: float, power: float) -> float:
    """Not less than base ** power, for base > 0."""
    exponent = power * math.log(base) if base < _INF else _INF
    return math.exp(exponent) * _LIBRARY if exponent < 700.0 else _INF


def _power_range(call: Call) -> Interval:
    power = call.given("exponent", 2)
    return (0.0, _INF) if isinstance(power, int) and power % 2 == 0 else EVERYTHING


@op(
    "pow.Tensor_Scalar",
    "square.default",
    reads=("exponent",),
    interval=_power_range,
    entries=ENTRYWISE,
    samples=lambda draw, shape: (
        lambda x, y, p=draw.choice([1, 2, 3, 1.0, 2.0]): x.clamp(-2, 1.5) ** p
    ),
)
def _power(call: Call) -> Step:
    power = call.given("exponent", 2)
    low, high = interval_of(call.operand)
    size = max(abs(low), abs(high))
    if not isinstance(power, (int, float)) or not math.isfinite(power):
        call.refuse("a power must be a finite constant number", ADVICE["pow"])
    if power != int(power) and low < 0.0:
        call.refuse("a power must be an integer, or of values >= 0", ADVICE["pow"])
    if power == 1:
        slope = 1.0
    elif power > 1:
        slope = mul_up(abs(power), _pow_up(size, power - 1)) if size > 0.0 else 0.0
    elif power == 0:
        slope = 0.0
    else:
        least = _distance_from_zero(low, high)
        slope = mul_up(abs(power), _pow_up(least, power - 1)) if least > 0.0 else _INF
    if not math.isfinite(slope):
        call.refuse("a power must have bounded values", ADVICE["pow"])
    return upper(mul_up(slope, amplification(call, call.operand)), "largest slope on an interval")
