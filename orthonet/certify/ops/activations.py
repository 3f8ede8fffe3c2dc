"""Functions of single entries: their slopes, and what bounds of perceptrons know of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import layers
from orthonet.certify.mlp.slopes import (
    Activation,
    Kinks,
    Narrow,
    Pieces,
    Turns,
    reflections,
    sorting,
)
from orthonet.certify.ops.entries import ENTRYWISE, LARGEST
from orthonet.certify.ops.registry import (
    SMOOTH,
    Interval,
    Linear,
    Values,
    amplification,
    constant,
    each_repeated,
    interval_of,
    op,
)
from orthonet.certify.ops.suprema import DERIVATIVES, SUPREMA, turning
from orthonet.certify.rules import (
    COPY,
    Call,
    Rounding,
    Roundings,
    Step,
    exact,
    scalar_rounding,
    upper,
)
from orthonet.certify.walk.forms import Form, scaled
from orthonet.linalg.bounds.rounding import down, mul_up, up

__all__ = ["Curve", "activation_of", "jumps_in_float64"]


class Curve(NamedTuple):
    """A function of one entry: its least and largest slope, one for all or one for each channel."""

    function: Callable[[Tensor], Tensor]
    lower: float | Tensor
    upper: float | Tensor
    narrow: Narrow | None = None

    @property
    def largest(self) -> float:
        """The largest modulus of a slope."""
        ends = (torch.as_tensor(v, dtype=torch.float64).abs() for v in (self.lower, self.upper))
        return max(float(end.max()) if end.numel() else 0.0 for end in ends)


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., Curve | None]
    reads: tuple[str, ...]


_MODULES: dict[type[nn.Module], _Entry] = {nn.Identity: _Entry(lambda: Curve(_itself, 1, 1), ())}


def _itself(x: Tensor) -> Tensor:
    return x


def curve(
    *overloads: Any,
    reads: tuple[str, ...] = (),
    module: type[nn.Module] | None = None,
    rounding: Roundings | Callable[[Call], Roundings] = SMOOTH,
    interval: Any = None,
    arguments: Callable[[random.Random], dict[str, Any] | None] | None = None,
    refuse: str = "its parameters must give it a Lipschitz constant",
    **fields: Any,
) -> Callable[[Any], Any]:
    """Make a function of the parameters that returns a `Curve`, or None, a record."""

    def decorate(build: Any) -> Any:
        def read(call: Call) -> Curve:
            values = {name: _read(call, name) for name in reads}
            found = build(**values)
            if found is None:
                call.refuse(refuse, "Use its default parameters")
            return found

        def gain(call: Call) -> Step:
            found = read(call)
            rule: Any = rounding
            rounds: Any = rule(call) if callable(rule) else rule
            size = mul_up(found.largest, amplification(call, call.operand))
            return exact(size, "largest slope", rounds)

        def slopes(call: Call, width: int) -> Activation | None:
            found = read(call)
            lower, upper = (_spread(call, v, width) for v in (found.lower, found.upper))
            narrow = found.narrow
            if isinstance(narrow, Kinks):
                narrow = Kinks(narrow.knots, tuple(_spread(call, v, width) for v in narrow.slopes))
            value = _first(found.function, narrow)
            return _activation(
                found.function,
                lower,
                upper,
                narrow,
                None if value is None else _spread(call, value, width),
            )

        def run(x: Tensor, y: Tensor, values: dict[str, Any]) -> Tensor:
            target = overloads[0]
            if isinstance(target, str):
                name, _, overload = target.partition(".")
                target = getattr(getattr(torch.ops.aten, name), overload)
            return target(x, **values)

        def samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
            values = arguments(draw) if arguments else {}
            return None if values is None else lambda x, y: run(x, y, values)

        both = {
            "slopes": slopes,
            "samples": samples,
            "interval": interval,
            "entries": ENTRYWISE,
            **fields,
        }
        op(*overloads, reads=reads, **both)(gain)
        if module is not None:
            _MODULES[module] = _Entry(build, reads)
        return build

    return decorate


def _read(call: Call, name: str) -> Any:
    value = call[name]
    if isinstance(value, str) or value is None:
        return value
    return call.fixed(name) if not isinstance(value, (int, float)) else call.number(name)


def _spread(call: Call, value: float | Tensor, width: int) -> Tensor:
    """One slope for each entry of a sample."""
    value = torch.as_tensor(value, dtype=torch.float64)
    shape = call.output_shape
    if value.ndim == 1 and len(value) > 1:
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    elif value.ndim > len(shape):
        value = value[0]
    return value.expand(shape).reshape(width).contiguous()


def _within(low: float, high: float) -> Callable[[Call], Interval]:
    return lambda call: (low, high)


def _scalars(*names: str) -> Callable[[Call], Roundings]:
    """The rounding of constants that entries are compared with."""
    return lambda call: scalar_rounding(call, *(call[name] for name in names))


def _plain(
    name: str, function: Any, module: Any, kinks: Kinks | None = None, **fields: Any
) -> None:
    """A function without parameters."""
    narrow = kinks or (turning(name) if name in DERIVATIVES else None)
    target = fields.pop("target", f"{name}.default")
    targets = target if isinstance(target, tuple) else (target,)
    curve(*targets, module=module, **fields)(lambda: Curve(function, *SUPREMA[name], narrow))


def _positive(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    return max(0.0, low), max(0.0, high)


def _modulus(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    return (0.0 if low <= 0.0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def _negated(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    return -high, -low


_INF = math.inf
_plain("relu", torch.relu, nn.ReLU, Kinks((0.0,), (0.0, 1.0)), rounding=COPY, interval=_positive)
_plain("abs", torch.abs, layers.Abs, Kinks((0.0,), (-1.0, 1.0)), rounding=COPY, interval=_modulus)
_plain("tanh", torch.tanh, nn.Tanh, interval=_within(-1.0, 1.0))
_plain(
    "sigmoid",
    torch.sigmoid,
    nn.Sigmoid,
    target=("sigmoid.default", "special_expit.default"),
    interval=_within(0.0, 1.0),
)
_plain("softsign", F.softsign, nn.Softsign, target=F.softsign, interval=_within(-1.0, 1.0))
_plain("tanhshrink", F.tanhshrink, nn.Tanhshrink, target=F.tanhshrink)
_plain(
    "log_sigmoid",
    F.logsigmoid,
    nn.LogSigmoid,
    target=("log_sigmoid.default", "log_sigmoid_forward.default"),
    interval=_within(-_INF, 0.0),
)
_plain("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid, interval=_within(0.0, 1.0))
_plain("hardswish", F.hardswish, nn.Hardswish, interval=_within(-0.376, _INF))
_plain("selu", F.selu, nn.SELU, interval=_within(-1.7581, _INF))
_plain("silu", F.silu, nn.SiLU, interval=_within(-0.2785, _INF))
_plain("mish", F.mish, nn.Mish, interval=_within(-0.3089, _INF))
_plain("sin", torch.sin, None, interval=_within(-1.0, 1.0))
_plain("cos", torch.cos, None, interval=_within(-1.0, 1.0))
_plain("atan", torch.atan, None, interval=_within(-1.571, 1.571))
_plain("asinh", torch.asinh, None)
_plain(
    "erf",
    torch.erf,
    None,
    interval=_within(-1.0, 1.0),
    target=("erf.default", "special_erf.default"),
)


def _parameter(**choices: list[Any]) -> Callable[[random.Random], dict[str, Any]]:
    return lambda draw: {name: draw.choice(values) for name, values in choices.items()}


def _ends(low: float, high: float, function: Any) -> Curve:
    if low > high:  # constant
        return Curve(function, 0.0, 0.0)
    return Curve(function, 0.0, 1.0, Kinks((low, high), (0.0, 1.0, 0.0)))


@curve(
    "hardtanh.default",
    reads=("min_val", "max_val"),
    module=nn.Hardtanh,
    rounding=_scalars("min_val", "max_val"),
    interval=lambda call: tuple(sorted((call.number("min_val"), call.number("max_val")))),
    arguments=_parameter(min_val=[-1.0, 0.0, 0.3], max_val=[1.0, 0.7]),
)
def _hardtanh(min_val: float, max_val: float) -> Curve:
    return _ends(min_val, max_val, lambda x: x.clamp(min_val, max_val))


@curve("relu6.default", module=nn.ReLU6, rounding=COPY, interval=_within(0.0, 6.0))
def _relu6() -> Curve:
    return _ends(0.0, 6.0, F.relu6)


@curve(
    "softshrink.default",
    reads=("lambd",),
    module=nn.Softshrink,
    arguments=_parameter(lambd=[0.5, 0.0, 0.1]),
)
def _softshrink(lambd: float) -> Curve:
    knots = (-lambd, lambd)
    function = lambda x: F.softshrink(x, lambd)  # noqa: E731
    return Curve(function, 0.0, 1.0, Kinks(knots, (1.0, 0.0, 1.0)))


@curve(
    "gelu.default",
    reads=("approximate",),
    module=nn.GELU,
    interval=_within(-0.1701, _INF),
    arguments=_parameter(approximate=["none", "tanh"]),
)
def _gelu(approximate: str) -> Curve:
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return Curve(lambda x: F.gelu(x, approximate=approximate), *SUPREMA[name], turning(name))


def _leaky(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    slope = call.number("negative_slope")
    if slope < 0.0:
        return -_INF, _INF
    return (low if low >= 0.0 else down(low * slope)), (high if high >= 0.0 else up(high * slope))


@curve(
    "leaky_relu.default",
    reads=("negative_slope",),
    module=nn.LeakyReLU,
    rounding=2.0,
    interval=_leaky,
    arguments=_parameter(negative_slope=[0.01, 0.0, -1.5, 1.0, 2.5]),
)
def _leaky_relu(negative_slope: float) -> Curve:
    a = negative_slope
    narrow = Kinks((0.0,), (a, 1.0))
    return Curve(lambda x: F.leaky_relu(x, a), min(a, 1.0), max(a, 1.0), narrow)


@curve(
    "rrelu.default",
    reads=("lower", "upper"),
    module=nn.RReLU,
    rounding=2.0,
    arguments=lambda draw: {"lower": draw.choice([-1.0, 0.1]), "upper": 1.5},
)
def _rrelu(lower: float, upper: float) -> Curve:
    slope = (lower + upper) / 2  # in eval
    low, high = min(slope, 1.0), max(slope, 1.0)
    low, high = down(low) if low < 1 else low, up(high) if high > 1 else high
    return Curve(lambda x: F.leaky_relu(x, slope), low, high)


def _slope_of(draw: random.Random) -> dict[str, Any]:
    return {"weight": constant(draw, 1)}


@curve(
    "prelu.default",
    "_prelu_kernel.default",
    reads=("weight",),
    module=nn.PReLU,
    rounding=2.0,
    arguments=_slope_of,
)
def _prelu(weight: Tensor) -> Curve:
    weight = weight.detach().to("cpu", torch.float64)
    one = torch.ones_like(weight)
    return Curve(
        lambda x: torch.where(x >= 0, x, weight * x),
        torch.minimum(weight, one),
        torch.maximum(weight, one),
        Kinks((0.0,), (weight, 1.0)),
    )


@curve(
    "elu.default",
    reads=("alpha", "scale", "input_scale"),
    refuse="elu must have input_scale >= 0: else it grows without bound to the left",
    arguments=_parameter(
        alpha=[1.0, 0.3, 2.0, -1.0, 0.0],
        scale=[1.0, -2.0, 1.05],
        input_scale=[1.0, 0.5, 3.0, 0.0, -1.0],
    ),
)
def _elu(alpha: float, scale: float, input_scale: float) -> Curve | None:
    if input_scale < 0.0:
        return None
    size = mul_up(abs(scale), abs(alpha), input_scale)
    left = math.copysign(size, scale * alpha)
    least, most = min(0.0, scale, left), max(0.0, scale, left)
    narrow = Turns(
        lambda x: torch.where(x > 0.0, scale, left * (x * input_scale).exp()),
        ((0.0, left), (0.0, scale)),
        (least, most),
        absolute=1e-14 * size,
    )
    function = lambda x: torch.ops.aten.elu.default(x, alpha, scale, input_scale)  # noqa: E731
    return Curve(function, least, most, narrow)


_MODULES[nn.ELU] = _Entry(lambda alpha: _elu(alpha, 1.0, 1.0), ("alpha",))


@curve(
    "celu.default",
    reads=("alpha",),
    module=nn.CELU,
    refuse="celu must have a positive alpha",
    arguments=_parameter(alpha=[1.0, 0.3, 4.0]),
)
def _celu(alpha: float) -> Curve | None:
    if alpha <= 0.0:
        return None
    return Curve(lambda x: F.celu(x, alpha), *SUPREMA["celu"], turning("celu", 1.0 / alpha))


def jumps_in_float64(threshold: float) -> bool:
    """Whether float64 sees the jump of softplus at its threshold, of log1p(exp(-threshold))."""
    return math.exp(-threshold) > 2.0**-54 * threshold


def _softplus_rounding(call: Call) -> Any:
    """Beyond the rounding of log1p(exp(x)), the jump to x at the threshold, below float32's.

    Where float64 would see the jump, float64 inputs are refused.
    """
    beta, threshold = call.number("beta"), call.number("threshold")
    if call.operand.dtype == torch.float64 and jumps_in_float64(threshold):
        call.refuse(
            "softplus of float64 must have threshold >= 34, because it jumps at the threshold",
            "Use threshold=40, or certify the model in float32",
        )
    root = math.sqrt(float(math.prod(call.output_shape))) * (1.0 + 2.0**-40)
    jump = math.log1p(math.exp(-threshold)) / beta * (1.0 + 2.0**-40)

    def rounding(relative: Callable[..., float]) -> Rounding:
        # |softplus(x)| is at most |x| + log(2) / beta, and the gain adds |x| once more.
        return Rounding(SMOOTH, 2.0, root * (0.7 / beta + jump / relative(SMOOTH)))

    return rounding


@curve(
    "softplus.default",
    reads=("beta", "threshold"),
    module=nn.Softplus,
    rounding=_softplus_rounding,
    interval=_within(0.0, _INF),
    refuse="softplus must have beta > 0 and threshold >= 20, for it jumps at the threshold",
    arguments=_parameter(beta=[1.0, 0.5, 3.0], threshold=[20, 40.0, 60.0]),
)
def _softplus(beta: float, threshold: float) -> Curve | None:
    if not (beta > 0.0 and threshold >= 20.0):
        return None
    function = lambda x: F.softplus(x, beta, threshold)  # noqa: E731
    return Curve(function, *SUPREMA["softplus"], turning("softplus", beta))


@curve(
    "threshold.default",
    reads=("threshold", "value"),
    module=nn.Threshold,
    rounding=_scalars("threshold", "value"),
    refuse="threshold must set entries to the threshold itself, else it jumps there",
    arguments=_parameter(threshold=[0.0, 0.5], value=[0.0, 0.5]),
)
def _threshold(threshold: float, value: float) -> Curve | None:
    if threshold != value:
        return None
    function = lambda x: F.threshold(x, threshold, value)  # noqa: E731
    return Curve(function, 0.0, 1.0, Kinks((threshold,), (0.0, 1.0)))


def _minus(a: Values, absolute: bool) -> Any:
    return a["self"] if absolute else -a["self"]


def _minus_form(state: Any, forms: list[Form]) -> Form | None:
    return scaled(forms[0], torch.tensor(-1.0, dtype=torch.float64), 0)


_plain(
    "neg",
    torch.neg,
    None,
    rounding=COPY,
    interval=_negated,
    linear=Linear(_minus),
    kernel=_minus_form,
)


# --- comparisons with constants ------------------------------------------------------------------


def _clamped(call: Call) -> Interval:
    low, high = interval_of(call.operand)
    for name, larger in (("min", True), ("max", False)):
        value = call.given(name)
        if isinstance(value, (int, float)):
            low, high = (
                (max(low, value), max(high, value))
                if larger
                else (min(low, value), min(high, value))
            )
        elif value is not None and larger:
            high = _INF
        elif value is not None:
            low = -_INF
    return low, high


def _clamp_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    low, high = draw.choice([(-1.0, 1.0), (0.2, None), (None, 0.1), (1.0, -1.0)])
    if draw.random() < 0.3:
        bound = constant(draw, *shape)
        return lambda x, y: torch.clamp(x, min=bound)
    return lambda x, y: torch.clamp(x, low, high)


@op(
    "clamp.default",
    "clamp.Tensor",
    "clamp_min.default",
    "clamp_min.Tensor",
    "clamp_max.default",
    "clamp_max.Tensor",
    reads=("min", "max"),
    interval=_clamped,
    entries=LARGEST,
    samples=_clamp_samples,
)
def _clamp(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    ends = [call.given("min"), call.given("max")]
    low, high = (None if end is None else call.as_constant(end, "min or max") for end in ends)
    rounding = scalar_rounding(call, *ends)
    if low is not None and high is not None and bool((low > high).all()):
        return exact(0.0, "constant: min > max", rounding)
    return exact(amplification(call), "largest slope", rounding)


def _larger(call: Call) -> Interval:
    known = [interval_of(x) for x in call.operands]
    if len(known) < 2:
        return -_INF, _INF
    pick = max if "max" in call.op else min
    return pick(low for low, _ in known), pick(high for _, high in known)


def _extreme_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    fixed = constant(draw, *shape[-1:])
    function = draw.choice([torch.maximum, torch.minimum, torch.fmax])
    two = draw.random() < 0.6
    return lambda x, y: function(x, y if two else fixed)


@op(
    "maximum.default",
    "minimum.default",
    "max.other",
    "min.other",
    "fmax.default",
    "fmin.default",
    reads=("other",),
    interval=_larger,
    entries=LARGEST,
    samples=_extreme_samples,
)
def _extreme(call: Call) -> Step:
    if len(call.operands) == 2:
        return Step(each_repeated(call), "larger or smaller of two", "hypot", COPY)
    rounding = scalar_rounding(call, *call.args)
    return upper(amplification(call), "larger or smaller of it and a constant", rounding)


# --- vectors -------------------------------------------------------------------------------------


def activation_of(module: nn.Module, width: int) -> Activation | None:
    """The slopes of a module that acts on vectors of `width` entries; None if it is unknown.

    The class must be a known one itself: a subclass may compute something else.
    """
    if type(module) is layers.MaxMin or type(module) is layers.GroupSort:
        if module.dim in (1, -1):
            return sorting(module, width)
        return None
    if type(module) is layers.HouseholderActivation and module.dim in (1, -1):
        return reflections(module, width)
    entry = _MODULES.get(type(module))
    if entry is None:
        return None
    found = entry.build(**{name: getattr(module, name) for name in entry.reads})
    if found is None:
        return None
    lower, upper = (
        torch.as_tensor(v, dtype=torch.float64).expand(width).contiguous()
        for v in (found.lower, found.upper)
    )
    value = _first(found.function, found.narrow)
    value = None if value is None else value.expand(width)
    return _activation(found.function, lower, upper, found.narrow, value)


def _first(function: Any, narrow: Narrow | None) -> Tensor | None:
    """The value at the first knot, in the shape of the parameters of the function."""
    if not isinstance(narrow, Kinks):
        return None
    return function(torch.tensor(narrow.knots[0], dtype=torch.float64))


def _activation(
    function: Any, lower: Tensor, upper: Tensor, narrow: Narrow | None, value: Tensor | None
) -> Activation:
    if not isinstance(narrow, Kinks) or value is None:
        chords = narrow.chords if isinstance(narrow, Turns) else None
        return Activation(function, lower, upper, narrow=narrow, chords=chords)
    slopes = [torch.as_tensor(s, dtype=torch.float64).expand_as(lower) for s in narrow.slopes]
    pieces = Pieces(None, None, narrow.knots, torch.stack(slopes), value)
    chords = narrow.chords
    return Activation(function, lower, upper, narrow=narrow, chords=chords, pieces=pieces)
