"""What a layer says of its own Lipschitz constant, proved from the weights of its forward.

The weights are taken in the dtype of the layer, with the rounding that they have there, and their
norms are bounded in float64: a weight that was recomputed in float64 would be another layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import up
from orthonet.linalg.bounds.sizes import Rounding

__all__ = [
    "REARRANGEMENT",
    "SAFE",
    "Declared",
    "Norms",
    "at_zero",
    "check_bias",
    "float64",
    "image_of",
    "isometric",
    "length_of",
    "of_rows",
    "refuse",
]

REARRANGEMENT = "rearrangement"
"""The method of a layer that only moves entries: it leaves the bound as it is."""
SAFE = up(1.0 + 2.0**-33)
"""A chain of roundings in float64: entry by entry they change the norm of a matrix of rank r by at
most sqrt(r) times as much, so that this covers 2^9 of them up to r = 10^6."""


class Declared(NamedTuple):
    """The constant of a layer: the layer's method `declared_bound(input_shape, norms)` returns it.

    Attributes:
        value: It, or a proved bound of it.
        method: How it was obtained.
        exact: It is attained up to rounding.
        rounding: The rounding of forward: 0 for copies, None if it is unknown.
    """

    value: float
    method: str
    exact: bool = False
    rounding: float | Rounding | None = None


class Norms(Protocol):
    """Proved norms: of a matrix or a batch of them, and of a convolution."""

    def matrix(self, matrix: Tensor) -> float:
        """Bound the largest spectral norm from above."""
        ...

    def convolution(self, kernel: Tensor, input_size: tuple[int, ...], **geometry: Any) -> float:
        """Bound the norm of the convolution of an input of this size from above."""
        ...


def refuse(module: nn.Module, requirement: str, advice: str) -> NoReturn:
    """Raise an `UncertifiableError` that names the class of a layer."""
    _checks.fail(module, requirement, advice, UncertifiableError)


def float64(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return the finite values of a weight in float64 or complex128, on the CPU."""
    high = torch.complex128 if tensor.is_complex() else torch.float64
    tensor = tensor.detach().to("cpu", high)
    if not bool(tensor.isfinite().all()):
        refuse(module, "weights and statistics must be finite", "Look for a NaN or an infinity")
    return tensor


def image_of(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the size of an image of the batch."""
    if len(input_shape) != 3:
        refuse(module, "the input must have a batch dimension", "Use x.unsqueeze(0)")
    return input_shape[1], input_shape[2]


def length_of(bias: Tensor | None, repeats: int = 1) -> float:
    """Return the norm of a bias that is added at so many places."""
    return 0.0 if bias is None else float(bias.detach().double().norm()) * repeats**0.5 * SAFE


def check_bias(module: nn.Module, channels: int, *tensors: Tensor | None) -> None:
    """Refuse tensors of other sizes than the channels that they are added to or multiplied with.

    Adding them would repeat channels.
    """
    if any(t is not None and t.shape != (channels,) for t in tensors):
        refuse(
            module,
            f"its bias and statistics must have one entry for each of its {channels} channels",
            "Make the layer anew for another number of channels",
        )


def at_zero(module: Any, entries: int) -> float:
    """Return the norm of so many values of the activation at zero."""
    value = float(module.activation(torch.zeros(1, dtype=torch.float64)).abs())
    return value * entries**0.5 * SAFE


def isometric(
    module: Any, input_shape: tuple[int, ...], rounding: float | Rounding | None
) -> Declared:
    """Return the bound of an activation made of pieces of isometries of the channels."""
    if module.dim % (len(input_shape) + 1) == 0:
        refuse(module, "the channels must not be the batch", "Choose another dim")
    return Declared(1.0, "pieces of isometries", rounding=rounding)


def of_rows(rounding: Rounding, input_shape: tuple[int, ...]) -> Rounding:
    """Count the offset of one row for all rows of a sample."""
    return rounding._replace(offset=rounding.offset * math.prod(input_shape[:-1]) ** 0.5 * SAFE)
