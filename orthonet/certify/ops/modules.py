"""Rules of modules whose operations, bounded one by one, would not give their constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

from torch import nn

from orthonet import _checks, layers
from orthonet.certify._bound import Bound
from orthonet.certify.ops.advice import IN_A_BALL
from orthonet.certify.ops.entries import MEAN
from orthonet.certify.ops.registry import op
from orthonet.certify.rules import Call, Rounding, Step, exact, of_squares, register_rule, upper
from orthonet.errors import UncertifiableError
from orthonet.layers.residual import root_mean_square
from orthonet.linalg.bounds.rounding import sqrt_up, up

__all__ = ["BoundOf", "Shape", "refuse_module"]

Shape = tuple[int, ...]
BoundOf = Callable[[nn.Module, Shape], Bound]


def refuse_module(module: nn.Module, requirement: str, advice: str) -> NoReturn:
    """Raise an `UncertifiableError` that names the class of a module."""
    _checks.fail(module, requirement, advice, UncertifiableError)


@register_rule(layers.LayerCentering)
def _layer_centering(module: layers.LayerCentering, input_shape: Shape) -> Step:
    rank = len(input_shape) + 1
    if any(dim % rank == 0 for dim in module.dim):
        refuse_module(
            module, "the mean must not be taken over the batch", "Choose feature dimensions"
        )
    return exact(1.0, "orthogonal projection", math.prod(input_shape) + 4.0)


@register_rule(layers.AdaptiveL2NormPool)
def _adaptive_pool(module: layers.AdaptiveL2NormPool, input_shape: Shape) -> Step:
    if len(input_shape) < module.dims:
        refuse_module(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    # The scale is a float that was computed in a few roundings.
    size = math.prod(input_shape)
    return upper(up(1.0 + 2.0**-48), "by construction", of_squares(size, size, size))


@op(
    root_mean_square,
    reads=("y",),
    entries=MEAN,
    samples=lambda draw, shape: root_mean_square,
)
def _pair(call: Call) -> Step:
    """The norm of a pair is 1-Lipschitz, so its root mean square is with both gains halved."""
    if len(call.operands) != 2:
        call.refuse("both arguments must depend on the input", "Use the norm of one of them")
    half = Bound(sqrt_up(0.5))
    # Squares below 2^-126 are lost, roots below 2^-63: that much in units of the roundings.
    rounding = Rounding(16.0, 1.0, math.prod(call.output_shape) ** 0.5 * 2.0**-42)
    return Step((half, half), "root mean square of two", "hypot", rounding)


@register_rule(nn.MultiheadAttention, nn.TransformerEncoderLayer)
def _attention(module: nn.Module, input_shape: Shape) -> Step:
    refuse_module(
        module,
        "dot-product attention has no global Lipschitz constant: its scores are products",
        "Use orthonet.layers.DistanceAttention, CosineAttention or TokenMixing instead; "
        f"{IN_A_BALL}",
    )
