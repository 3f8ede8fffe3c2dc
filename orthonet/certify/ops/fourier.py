"""Discrete Fourier transforms, and products with complex constants, on pairs of reals.

`graph.pairs` writes complex values as real tensors whose last dim holds the real and the imaginary
part. The l2 norm of the pairs is that of the complex values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.ops.registry import (
    ONE,
    Linear,
    Values,
    amplification,
    constant,
    f64,
    op,
    place,
)
from orthonet.certify.rules import COPY, REARRANGEMENT, Call, Operand, Rounding, Step, exact
from orthonet.linalg.bounds.rounding import div_up, down, mul_up, sqrt_up, up

__all__ = ["as_pairs", "fourier", "half_to_real", "times"]

_SCALES = ("backward", "ortho", "forward")
"""What `torch.fft` calls the factors 1, 1/sqrt(n) and 1/n of a forward transform of n entries."""


def as_pairs(x: Tensor) -> Tensor:
    """Real values as complex ones."""
    return torch.stack([x, torch.zeros_like(x)], -1)


def fourier(pairs: Tensor, dims: Sequence[int], scale: int, inverse: bool) -> Tensor:
    """Transform complex values along several dims.

    Args:
        pairs: (..., 2); the last dim is not counted by `dims`.
        dims: Dims of the complex tensor, from the front.
        scale: 0 for no factor, 1 for 1 / sqrt(n) and 2 for 1 / n, with n entries in all dims.
        inverse: Conjugate the exponentials.
    """
    run = torch.fft.ifftn if inverse else torch.fft.fftn
    # The norms of an inverse transform mean the opposite factors.
    norm = _SCALES[2 - scale] if inverse else _SCALES[scale]
    value = run(torch.view_as_complex(pairs.contiguous()), dim=tuple(dims), norm=norm)
    return torch.view_as_real(value)


def half_to_real(pairs: Tensor, dim: int, scale: int, size: int) -> Tensor:
    """The real signal of `size` entries whose spectrum has this half, along one dim.

    Args:
        pairs: (..., 2), with size // 2 + 1 frequencies.
        dim: A dim of the complex tensor, from the front.
        scale: 0 for no factor, 1 for 1 / sqrt(size) and 2 for 1 / size.
        size: Entries of the signal.
    """
    value = torch.view_as_complex(pairs.contiguous())
    return torch.fft.irfft(value, n=size, dim=dim, norm=_SCALES[2 - scale])


def times(pairs: Tensor, factors: Tensor) -> Tensor:
    """The entrywise product of complex values with constants, both as pairs."""
    product = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(factors)
    return torch.view_as_real(product)


@op(
    as_pairs,
    samples=lambda draw, shape: lambda x, y: as_pairs(x),
    linear=Linear(lambda a, absolute: as_pairs(a["x"]), moves=True),
)
def _as_pairs(call: Call) -> Step:
    """Zeros are added, everything else stays."""
    return Step((ONE,), REARRANGEMENT, roundings=COPY)


# --- transforms ----------------------------------------------------------------------------------


def _waves(rows: int, columns: int, inverse: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the phases of a transform; the angles are reduced in integers."""
    places = (torch.arange(rows)[:, None] * torch.arange(columns)[None]) % columns
    angles = places.to(torch.float64) * (2.0 * math.pi / columns)
    return angles.cos(), angles.sin() if inverse else -angles.sin()


def _factor(scale: int, count: int) -> float:
    return (1.0, 1.0 / math.sqrt(count), 1.0 / count)[scale]


def _gain(scale: int, count: int) -> float:
    """sqrt(count) times the factor of a transform."""
    least = down(math.sqrt(count)) if count > 1 else 1.0
    return (sqrt_up(count), 1.0, div_up(1.0, least))[scale]


def _run(a: Values, absolute: bool) -> Any:
    pairs, scale, inverse = a["pairs"], a["scale"], a["inverse"]
    dims = [dim % (pairs.ndim - 1) for dim in a["dims"]]
    for dim in dims:
        size = pairs.shape[dim]
        cos, sin = _waves(size, size, inverse)
        moved = pairs.movedim(dim, -2)
        real, imaginary = moved[..., 0], moved[..., 1]
        if absolute:  # no cosine or sine is above 1
            real = imaginary = (real + imaginary).sum(-1, keepdim=True).expand_as(real)
        else:
            real, imaginary = (
                real @ cos.mT - imaginary @ sin.mT,
                real @ sin.mT + imaginary @ cos.mT,
            )
        pairs = torch.stack([real, imaginary], -1).movedim(-2, dim)
    return pairs * _factor(scale, math.prod(pairs.shape[dim] for dim in dims))


def _terms(state: Any) -> int:
    """Products of a sum along each dim, and 32 roundings of a cosine, a sine and the factor."""
    shape, dims = state.parents[0].shape, state.call["dims"]
    rank = len(shape)
    return sum(2 * shape[dim % rank - 1] + 32 for dim in dims)


def _transform_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim, norm = place(draw, shape), draw.choice(_SCALES)
    size = draw.choice([None, 1, 3, shape[dim % (len(shape) + 1) - 1] + 1])
    run = draw.choice([torch.fft.fft, torch.fft.ifft])
    if draw.random() < 0.5:
        return lambda x, y: run(x, n=size, dim=dim, norm=norm).abs()
    return lambda x, y: torch.view_as_real(torch.fft.rfft(x, n=size, dim=dim, norm=norm))


@op(
    fourier,
    reads=("dims", "scale", "inverse"),
    samples=_transform_samples,
    linear=Linear(_run, _terms, scales=lambda call: [2.0]),
)
def _fourier(call: Call) -> Step:
    """The matrix is sqrt(n) times a unitary one, times the factor."""
    shape = call.operand.shape[:-1]
    count = math.prod(shape[dim] for dim in call.feature_dims(tuple(call["dims"])))
    return exact(_gain(call["scale"], count), "Fourier transform: a multiple of a unitary map")


def _half_run(a: Values, absolute: bool) -> Any:
    pairs, size = a["pairs"], a["size"]
    dim = a["dim"] % (pairs.ndim - 1)
    moved = pairs.movedim(dim, -2)
    # Every frequency stands for itself and its conjugate, but 0 and the highest of an even size.
    weights = torch.full((moved.shape[-2],), 2.0, dtype=torch.float64)
    weights[0] = 1.0
    if size % 2 == 0:
        weights[-1] = 1.0
    if absolute:
        real = (moved.sum(-1) * weights).sum(-1, keepdim=True)
        real = real.expand(*real.shape[:-1], size)
    else:
        cos, sin = _waves(len(weights), size, True)
        ends = (weights == 2.0).to(torch.float64)[:, None]  # of the others nothing imaginary counts
        cos, sin = cos * weights[:, None], sin * weights[:, None] * ends
        real = moved[..., 0] @ cos - moved[..., 1] @ sin
    return real.movedim(-1, dim) * _factor(a["scale"], size)


def _half_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    if shape[-1] < 2:
        return None
    size, norm = 2 * (shape[-1] - 1) + draw.choice([0, 1]), draw.choice(_SCALES)
    return lambda x, y: torch.fft.irfft(torch.complex(x, y), n=size, norm=norm)


@op(
    half_to_real,
    reads=("dim", "scale", "size"),
    samples=_half_samples,
    linear=Linear(_half_run, lambda s: 4 * s.parents[0].shape[s.call["dim"] - 1] + 32),
)
def _half(call: Call) -> Step:
    """The rows of cosines and sines are orthogonal; a frequency between the ends counts twice."""
    size = call["size"]
    gain = _gain(call["scale"], size)
    if size > 2:
        gain = mul_up(gain, sqrt_up(2.0))
    return exact(gain, "real signal of half a spectrum")


# --- products ------------------------------------------------------------------------------------


def _times_run(a: Values, absolute: bool) -> Any:
    x, c = a["pairs"], f64(a["factors"], absolute)
    (a1, b1), (a2, b2) = x.unbind(-1), c.unbind(-1)
    sign = 1.0 if absolute else -1.0
    return torch.stack([a1 * a2 + sign * b1 * b2, a1 * b2 + b1 * a2], -1)


def _times_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    c = torch.complex(constant(draw, shape[-1]), constant(draw, shape[-1]))
    return lambda x, y: torch.view_as_real(torch.complex(x, y) * c.to(torch.complex(x, y).dtype))


@op(
    times,
    reads=("factors",),
    samples=_times_samples,
    linear=Linear(
        _times_run,
        lambda state: 4,
        heavy=True,
        when=lambda call: len(call.operands) == 1 and isinstance(call.args[0], Operand),
    ),
)
def _times(call: Call) -> Step:
    """A product with c turns a pair and stretches it by |c|."""
    factors = call.fixed("factors")
    largest = factors.abs().max() if factors.numel() else factors.new_zeros(())
    scale = float(largest)
    gain = 0.0
    if scale:  # squares of entries over the largest cannot overflow, and small ones do not count
        squares = (factors / largest).square().sum(-1).max()
        gain = mul_up(sqrt_up(float(squares) * (1.0 + 2.0**-50)), up(scale))
    gain = mul_up(gain, amplification(call))
    rounding = Rounding(6.0, 1.5 * gain)  # four products, whose moduli are up to sqrt(2) |c|
    return Step((Bound(gain, kind="upper"),), "largest modulus", roundings=rounding)
