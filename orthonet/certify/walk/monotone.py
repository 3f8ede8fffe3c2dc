"""Proofs that a model is monotone along some of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from orthonet import _checks, layers
from orthonet.certify._certify import certify
from orthonet.certify.norms import effort as with_effort
from orthonet.certify.walk.entries import Costs
from orthonet.linalg.bounds.rounding import down

__all__ = ["prove_monotone"]


def prove_monotone(model: layers.Monotone, example_input: Tensor) -> Tensor:
    r"""Return proved lower bounds of the slopes of a monotone model, one for each input.

    The bound of the slopes of f along input i is that of `certify(f, x, norm="l1", to="linf")`,
    but for each input on its own. The slope of the model is at least \(\lambda\) less this bound,
    times the direction. Where the result is not negative, every output is monotone along the input.

    Args:
        model: A [`Monotone`][orthonet.layers.Monotone] in eval mode.
        example_input: A batch for it.

    Shape:
        example_input: (N, features); returns (features,), float64: for a direction of 0 the least
        slope, at most 0.

    Guarantee:
        \(d_i\,\partial_i y \ge r_i\) at almost all inputs for every output y, r the result, in
        exact arithmetic with the deployed weights; the same for all secants along the inputs.

    Raises:
        ValueError: `model` is not a `Monotone`, or the input does not fit.
        UncertifiableError: The function cannot be certified.

    Examples:
        >>> from orthonet.layers import LinfLinear, MaxMin, Monotone
        >>> f = torch.nn.Sequential(LinfLinear(3, 8, norm="l1"), MaxMin(), LinfLinear(8, 1))
        >>> slopes = prove_monotone(Monotone(f, (1, 1, -1)).eval(), torch.zeros(1, 3))
        >>> bool((slopes >= 0).all())
        True
    """
    _checks.require(
        isinstance(model, layers.Monotone) and type(model).forward is layers.Monotone.forward,
        "prove_monotone",
        "model must be an orthonet.layers.Monotone",
        "Wrap the function: Monotone(f, directions)",
        model=type(model).__name__,
    )
    _checks.tensor("prove_monotone", example_input=example_input)
    with torch.no_grad():
        model(example_input)  # refuses another number of inputs
    found = certify(model.function, example_input, norm="l1", to="linf", lower=False)
    walker = found._graph()
    with torch.no_grad(), with_effort("default"):
        costs = Costs(walker, "linf").whole([s for s in walker.outputs if s is not None])
    slopes = torch.full((len(model.directions),), found.constant.value, dtype=torch.float64)
    for cost in costs.values():
        slopes = torch.minimum(slopes, cost.reshape(-1))
    if not costs:  # the function is constant
        slopes = torch.zeros_like(slopes)
    rises = [model.slope(example_input.dtype) * abs(d) for d in model.directions]
    return torch.tensor(
        [
            r - s if r == s or s == 0.0 else down(r - s)
            for r, s in zip(rises, slopes.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
