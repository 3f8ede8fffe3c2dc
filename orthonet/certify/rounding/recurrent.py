r"""The rounding of recurrent layers.

A step \(h_t = \phi(W x_t + K h_{t-1} + \beta)\), or \(h_t = A h_{t-1} + \alpha\phi(\cdot)\) with a
leak, rounds by at most \(g\,(B\|x_t\| + C\|h_{t-1}\| + \|\beta\|)\), where g stands for the
roundings of an entry and B, C for the norms of the matrices of absolute values, C with what the
state and the output add. With \(h'\) the computed states and L the matrix of the powers of the
constant a of a step, in l2 over time,

\[
\|h' - h\| \le \|L(a)\|\, g\,(B\|x\| + C\|h'\| + \sqrt T\|\beta\|), \qquad
\|h'\| \le \|L(a + gC)\|\, ((b + gB)\|x\| + (1 + g)\sqrt T\|\beta\|).
\]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from orthonet.certify.rules import Rounding
from orthonet.linalg.bounds.rounding import add_up, hypot_up, mul_up, sqrt_up

__all__ = ["StepConstants", "recurrent_rounding"]


class StepConstants(NamedTuple):
    """What a step of one layer and direction is made of."""

    state: float  # its constants in the state and in the input
    gain: float
    absolute_state: float  # the same of the absolute values
    absolute_gain: float
    bias: float
    count: int  # of terms in the sums


def recurrent_rounding(
    stacked: list[list[StepConstants]], steps: int, toeplitz: Callable[[int, float], float]
) -> Callable[[Callable[[float, int], float]], Rounding]:
    """The rounding of layers on top of each other, each with one or two directions.

    It depends on the roundoffs by more than a factor, so that a function of them is returned.
    """

    def rounding(relative: Callable[[float, int], float]) -> Rounding:
        count = max(part.count for parts in stacked for part in parts) + 80.0
        g = relative(count, 2)
        root = sqrt_up(steps)
        value, error, widest = (1.0, 0.0), (0.0, 0.0), 1.0  # of |x| and of 1; errors over g
        for parts in stacked:
            values, errors = [], []
            for part in parts:
                lag = toeplitz(steps, part.state)
                whole = add_up(part.absolute_state, 2.0)
                far = toeplitz(steps, add_up(part.state, mul_up(g, whole)))
                through = add_up(part.gain, mul_up(g, part.absolute_gain))
                offset = mul_up(root, part.bias)
                found = (
                    mul_up(far, through, value[0]),
                    mul_up(far, add_up(mul_up(through, value[1]), mul_up(add_up(1.0, g), offset))),
                )
                values.append(found)
                carried = mul_up(lag, part.gain)
                errors.append(
                    tuple(
                        add_up(
                            mul_up(carried, error[i]),
                            mul_up(
                                lag,
                                add_up(
                                    mul_up(part.absolute_gain, value[i]),
                                    mul_up(whole, found[i]),
                                    i * offset,
                                ),
                            ),
                        )
                        for i in (0, 1)
                    )
                )
                widest = max(widest, mul_up(widest, lag, max(1.0, part.gain)))
            value = (hypot_up(*(v[0] for v in values)), hypot_up(*(v[1] for v in values)))
            error = (hypot_up(*(e[0] for e in errors)), hypot_up(*(e[1] for e in errors)))
        return Rounding(count, max(error[0], widest), error[1], 2)

    return rounding
