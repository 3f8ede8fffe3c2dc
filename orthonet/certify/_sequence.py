r"""Maps of sequences: their l2 constant in closed form, from the constants of one step.

Let a step obey \(\|F(h, x) - F(h', x')\| \le a\|h - h'\| + b\|x - x'\|\). From the same first
state, two input sequences lead to states whose distances e obey \(e_t \le a e_{t-1} + b d_t\), so
\(e \le b L d\) entry by entry with the lower triangular Toeplitz matrix
\(L_{ij} = a^{i-j}\), and \(\|e\|_2 \le b \|L\|_2 \|d\|_2\).
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from orthonet import _checks, layers
from orthonet.certify._bound import Bound
from orthonet.certify.rounding.recurrent import StepConstants, recurrent_rounding
from orthonet.certify.rules import Step, module_rule, register_rule, upper
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.bounds.rounding import add_up, div_up, down, hypot_up, mul_up, sqrt_up, up
from orthonet.linalg.bounds.sizes import absolute_matrix

__all__ = ["recurrent_bound", "sequence_bound"]

_STEPS = 10_000_000


def sequence_bound(
    steps: int, state: float = 1.0, gain: float = 1.0, *, final: bool = False
) -> Bound:
    r"""Bound the map from a sequence of inputs to the sequence of states, or to the last state.

    With the constant \(a\) of a step in the state (`state`), \(b\) in the input (`gain`), and
    \(T\) `steps`, from a fixed first state and in l2 over time:

    | | last state (`final`) | all states |
    |---|---|---|
    | a = 1 | \(b\sqrt T\) | \(b / (2 \sin\frac{\pi}{4T + 2}) \approx 2bT/\pi\) |
    | a < 1 | \(b \sqrt{(1 - a^{2T}) / (1 - a^2)}\) | \(b / \sqrt{1 + a^2 - 2a\cos\theta}\) |

    where \(\theta\) is the least positive root of \(\sin (T+1)\theta = a \sin T\theta\), so the
    last entry is below \(b / (1 - a)\). It is the norm of the Toeplitz matrix \((a^{i-j})_{i \ge
    j}\), whose inverse is bidiagonal. These are attained by a scalar linear network, and by every
    orthogonal one with the identity as nonlinearity and a square orthogonal input kernel. For \(a
    \ge 1 + 1/T\), where the norm has no such form, it is bounded by the lesser of its Frobenius
    norm and its largest row sum.

    Args:
        steps: Number of time steps.
        state: Constant of a step in the state.
        gain: Constant of a step in the input.
        final: Bound the map to the last state instead of the map to all states.

    Returns:
        The bound, rounded outward. A Sturm sequence in outward-rounded arithmetic verifies the
        least eigenvalue behind it. Kind `"upper"`.

    Raises:
        ValueError: `steps` is not a positive integer, or a constant is negative or not finite.

    Examples:
        >>> round(sequence_bound(4, final=True).value, 9)
        2.0
        >>> round(sequence_bound(100, state=0.9).value, 2)
        9.65
    """
    owner = "sequence_bound"
    _checks.positive_int(owner, steps=steps)
    _checks.in_range(owner, 1, _STEPS, steps=steps)
    largest = 2.0**500
    _checks.in_range(owner, 0.0, largest, state=state, gain=gain)
    if final:
        return Bound(mul_up(gain, sqrt_up(_power_sum(mul_up(state, state), steps))))
    return Bound(mul_up(gain, _toeplitz_norm(steps, float(state))))


def recurrent_bound(layer: nn.Module, steps: int, *, final: bool = False) -> Bound:
    r"""Bound the map of a recurrent layer on sequences of a given length, in l2 over time.

    The constants of a step come from the deployed weights: \(a = \|W_{hh}\|_2\) and \(b =
    \|W_{ih}\|_2\) for `OrthoRNN` and for a stock `nn.RNN` (whose a is any number), those of its
    docstring for `ContractiveRNN`. The constants of stacked layers multiply; two directions are
    concatenated.

    Args:
        layer: `OrthoRNN`, `ContractiveRNN` or `nn.RNN`, in eval mode (dropout is the identity).
        steps: Number of time steps.
        final: Bound the map to the last state of the last layer instead of the map to its outputs.

    Returns:
        The bound, see [`sequence_bound`][orthonet.certify.sequence_bound].

    Raises:
        UncertifiableError: A layer without a constant: LSTM, GRU, or modReLU with a positive shift.

    Examples:
        >>> from orthonet.layers import OrthoRNN
        >>> layer = OrthoRNN(4, 8, nonlinearity="abs")
        >>> recurrent_bound(layer, 50, final=True).value < recurrent_bound(layer, 50).value
        True
    """
    _require_vanilla(layer)
    return _bound_of(_constants(layer), steps, final)


def _require_vanilla(layer: nn.Module) -> None:
    _checks.require(
        isinstance(layer, (nn.RNN, layers.OrthoRNN, layers.ContractiveRNN)),
        "recurrent_bound",
        "the layer must be OrthoRNN, ContractiveRNN or nn.RNN",
        "The gates of LSTM and GRU multiply states, which has no constant for all inputs",
        UncertifiableError,
        layer=type(layer),
    )
    _checks.require(
        module_rule(layer) is not None,
        "recurrent_bound",
        "the layer must compute what its class defines, with its own parameters",
        "Remove its hooks, its parametrizations and a forward that was set on it: the constant of "
        "a step comes from the weights",
        UncertifiableError,
        layer=type(layer),
    )


def _bound_of(stacked: list[list[StepConstants]], steps: int, final: bool) -> Bound:
    """The product over the layers; the directions of one lie side by side."""
    bound = 1.0
    for number, directions in enumerate(stacked, 1):
        ends = final and number == len(stacked)
        parts = [sequence_bound(steps, d.state, d.gain, final=ends).value for d in directions]
        bound = mul_up(bound, hypot_up(*parts))
    return Bound(bound)


# --- the constants of one step -----------------------------------------------------------------


def _constants(rnn: Any) -> list[list[StepConstants]]:
    """The constants of a step, for each layer and direction."""
    ends = ["", "_reverse"] if rnn.bidirectional else [""]
    return [
        [_step_constants(rnn, f"_l{number}{end}") for end in ends]
        for number in range(rnn.num_layers)
    ]


def _norm(rnn: nn.Module, tensor: Tensor) -> float:
    tensor = tensor.detach().to("cpu", torch.float64)
    if not bool(tensor.isfinite().all()):
        _refuse(rnn, "weights must be finite", "Look for a NaN or an infinity")
    return spectral_norm_bound(tensor)


def _step_constants(rnn: Any, suffix: str) -> StepConstants:
    """The constants of a step in the state and in the input, of its matrices and of |them|."""
    biases = [getattr(rnn, f"bias_{kind}{suffix}", None) for kind in ("ih", "hh")]
    bias = add_up(*(up(float(b.detach().double().norm())) for b in biases if b is not None))
    leak, linear = 1.0, None
    if isinstance(rnn, layers.ContractiveRNN):
        weight_ih, kernel, linear = rnn.step_weights(suffix)
        leak = float(rnn.leak)
    else:
        threshold = getattr(rnn, f"threshold{suffix}", None)
        if threshold is not None and not bool((threshold <= 0).all()):
            _refuse(
                rnn,
                "modReLU with a positive shift jumps at zero, so it has no Lipschitz constant",
                "Clamp the shifts to be <= 0, or use nonlinearity='abs' or 'max_min'",
            )
        kernel, weight_ih = (getattr(rnn, f"weight_{kind}{suffix}") for kind in ("hh", "ih"))
    state, size = mul_up(leak, _norm(rnn, kernel)), mul_up(leak, absolute_matrix(kernel))
    if linear is not None:
        state, size = add_up(state, _norm(rnn, linear)), add_up(size, absolute_matrix(linear))
    return StepConstants(
        state,
        mul_up(leak, _norm(rnn, weight_ih)),
        size,
        mul_up(leak, absolute_matrix(weight_ih)),
        mul_up(leak, bias),
        sum(weight_ih.shape),
    )


def _refuse(module: nn.Module, requirement: str, advice: str) -> NoReturn:
    _checks.fail(module, requirement, advice, UncertifiableError)


# --- the norms of the Toeplitz matrix ----------------------------------------------------------


def _power_sum(ratio: float, terms: int) -> float:
    """Not less than 1 + ratio + ... + ratio^(terms - 1)."""
    if ratio < 1.0 and terms > 64 and ratio**terms < 1e-18:
        return div_up(1.0, down(1.0 - ratio))
    total, power = 0.0, 1.0
    for _ in range(terms):
        total = add_up(total, power)
        power = mul_up(power, ratio)
        if not power or math.isinf(total):
            break
    return total


def _toeplitz_norm(steps: int, a: float) -> float:
    """Not less than the spectral norm of (a^(i - j)) for i >= j, of size `steps`."""
    square = mul_up(a, a)
    row_sum = _power_sum(a, steps)
    weights, power = 0.0, 1.0
    for j in range(steps if a >= 1.0 or steps < 1000 else 0):
        weights = add_up(weights, mul_up(float(steps - j), power))
        power = mul_up(power, square)
    norm = min(row_sum, sqrt_up(weights)) if weights else row_sum
    if steps == 1 or a == 0.0 or a * steps >= steps + 1:
        return norm
    low, high = 0.0, math.pi / (steps + 1)  # of the root theta
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if math.sin((steps + 1) * middle) > a * math.sin(steps * middle):
            low = middle
        else:
            high = middle
    # 1 + a^2 - 2a cos(theta) without cancellation; a little less, until it is verified.
    least = (1.0 - a) ** 2 + 4.0 * a * math.sin(0.5 * low) ** 2
    for slack in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        candidate = least * (1.0 - slack)
        if _below_spectrum(candidate, steps, a):
            return min(norm, div_up(1.0, math.nextafter(math.sqrt(candidate), 0.0)))
    return norm


def _below_spectrum(shift: float, steps: int, a: float) -> bool:
    """Whether M - shift I is proved positive definite, for M = K^T K and K = I - a N.

    K is the inverse of the Toeplitz matrix, N the shift down. M is tridiagonal, with 1 + a^2 on the
    diagonal (1 in its last place) and -a off it. The pivots of the elimination from the last
    place up are computed from below; each increases in the one before, so all positive is a proof.
    """
    square_down, square_up = down(a * a), up(a * a)
    diagonal = down(down(1.0 + square_down) - shift)
    pivot = down(1.0 - shift)
    for _ in range(steps - 1):
        if pivot <= 0.0:
            return False
        pivot = down(diagonal - up(square_up / pivot))
    return pivot > 0.0


# --- rules -------------------------------------------------------------------------------------


def _steps_of(module: Any, input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 2 or not module.batch_first:
        _refuse(
            module,
            "the input must be (batch, time, features), with batch_first=True",
            "A certificate is about single sequences of the batch",
        )
    return input_shape[0]


def _step(rnn: Any, input_shape: tuple[int, ...], what: str, final: bool) -> Step:
    steps = _steps_of(rnn, input_shape)
    _require_vanilla(rnn)
    stacked = _constants(rnn)
    method = f"{what} of {steps} steps, l2 over time"
    rounding = recurrent_rounding(stacked, steps, _toeplitz_norm)
    return upper(_bound_of(stacked, steps, final).value, method, rounding)


@register_rule(nn.RNN, layers.OrthoRNN, layers.ContractiveRNN)
def _recurrent(module: Any, input_shape: tuple[int, ...]) -> Step:
    return _step(module, input_shape, "all states", final=False)


@register_rule(layers.FinalState)
def _final(module: layers.FinalState, input_shape: tuple[int, ...]) -> Step:
    return _step(module.rnn, input_shape, "last state", final=True)


@register_rule(nn.LSTM, nn.GRU, layers.OrthoLSTM, layers.OrthoGRU)
def _gated(module: nn.Module, input_shape: tuple[int, ...]) -> Step:
    _refuse(
        module,
        "gates multiply states, so the map of sequences has no Lipschitz constant for all inputs",
        "Use OrthoRNN or ContractiveRNN",
    )
