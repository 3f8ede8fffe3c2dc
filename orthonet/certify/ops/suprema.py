r"""The derivatives of scalar functions, and their least and largest values, stated once.

Each pair encloses the range of the derivative over the whole line; irrational ends are rounded
outward. Between the places of `TURNS` the derivatives are monotone.
`tests/certify/test_suprema.py` proves every line in ball arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from orthonet.certify.mlp.slopes import Turns, sech2

__all__ = ["DERIVATIVES", "SIXTH", "SUPREMA", "TURNS", "turning"]

SIXTH = float(torch.tensor(1.0 / 6.0, dtype=torch.float32))
"""1 / 6 as float32 kernels hold it, which is a little more."""

SUPREMA: dict[str, tuple[float, float]] = {
    "abs": (-1.0, 1.0),  # sign(x)
    "asinh": (0.0, 1.0),  # 1 / sqrt(1 + x^2)
    "atan": (0.0, 1.0),  # 1 / (1 + x^2)
    "celu": (0.0, 1.0),  # min(1, e^(x / alpha)), alpha > 0
    "cos": (-1.0, 1.0),  # -sin(x)
    "erf": (0.0, 1.1283791670956),  # 2 / sqrt(pi) e^(-x^2), at 0
    # Phi(x) + x phi(x), at -sqrt(2) and sqrt(2)
    "gelu": (-0.1289041451852, 1.1289041451852),
    # the derivative of x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, at +-1.418504
    "gelu_tanh": (-0.1289930686588, 1.1289930686588),
    "hardsigmoid": (0.0, SIXTH),  # 1 / 6 in [-3, 3]
    "hardswish": (-3.0 * SIXTH, 9.0 * SIXTH),  # (2 x + 3) / 6 in [-3, 3]
    "log_sigmoid": (0.0, 1.0),  # 1 / (1 + e^x)
    # the derivative of x tanh(log(1 + e^x)), at -2.256376 and 1.490571
    "mish": (-0.1125261223895, 1.0884981612518),
    "neg": (-1.0, -1.0),
    "relu": (0.0, 1.0),
    "selu": (0.0, 1.7580993408474),  # scale alpha e^x, at 0 from the left
    "sigmoid": (0.0, 0.25),  # s (1 - s)
    # s (1 + x (1 - s)), s = 1 / (1 + e^-x), at +-2.399357
    "silu": (-0.0998393201289, 1.0998393201289),
    "sin": (-1.0, 1.0),  # cos(x)
    "softplus": (0.0, 1.0),  # 1 / (1 + e^(-beta x)), beta > 0
    "softsign": (0.0, 1.0),  # 1 / (1 + |x|)^2
    "tanh": (0.0, 1.0),  # 1 - tanh(x)^2
    "tanhshrink": (0.0, 1.0),  # tanh(x)^2
}

TURNS: dict[str, tuple[float | None, float | None]] = {
    "asinh": (None, 0.0),
    "atan": (None, 0.0),
    "celu": (None, None),
    "cos": (0.5 * math.pi, -0.5 * math.pi),  # and again after 2 pi
    "erf": (None, 0.0),
    "gelu": (-math.sqrt(2.0), math.sqrt(2.0)),
    "gelu_tanh": (-1.4185040087908283, 1.4185040087908283),
    "hardsigmoid": (None, 3.0),
    "hardswish": (-3.0, 3.0),
    "log_sigmoid": (None, None),
    "mish": (-2.2563763963607931, 1.4905711794854284),
    "selu": (None, 0.0),
    "sigmoid": (None, 0.0),
    "silu": (-2.3993572805154677, 2.3993572805154677),
    "sin": (math.pi, 0.0),  # and again after 2 pi
    "softplus": (None, None),
    "softsign": (None, 0.0),
    "tanh": (None, 0.0),
    "tanhshrink": (0.0, None),
}
"""Where the derivative has its least and its largest value, if it turns there."""


def _mish_slope(x: Tensor) -> Tensor:
    soft = torch.logaddexp(x, torch.zeros_like(x))
    return torch.tanh(soft) + x * sech2(soft) * torch.sigmoid(x)


def _gelu_slope(x: Tensor) -> Tensor:
    density = (-0.5 * x.square()).exp() / math.sqrt(2.0 * math.pi)
    return 0.5 * torch.erfc(x / -math.sqrt(2.0)) + x * density


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    c = math.sqrt(2.0 / math.pi)
    inner, rate = c * (x + 0.044715 * x * x * x), c * (1.0 + 0.134145 * x * x)
    return torch.sigmoid(2.0 * inner) + 0.5 * x * sech2(inner) * rate


DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "asinh": lambda x: (1.0 + x.square()).sqrt().reciprocal(),
    "atan": lambda x: (1.0 + x.square()).reciprocal(),
    "celu": lambda x: x.clamp(max=0.0).exp(),
    "cos": lambda x: -x.sin(),
    "erf": lambda x: (-x.square()).exp() * (2.0 / math.sqrt(math.pi)),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "hardsigmoid": lambda x: (x.abs() <= 3.0).to(x.dtype) * SIXTH,
    "hardswish": lambda x: torch.where(
        x.abs() <= 3.0, (2.0 * x + 3.0) * SIXTH, (x > 0.0).to(x.dtype)
    ),
    "log_sigmoid": lambda x: torch.sigmoid(-x),
    "mish": _mish_slope,
    "selu": lambda x: torch.where(x > 0.0, 1.0507009873554805, 1.7580993408473766 * x.exp()),
    "sigmoid": lambda x: 0.25 * sech2(0.5 * x),
    "silu": lambda x: torch.sigmoid(x) * (1.0 + x * torch.sigmoid(-x)),
    "sin": torch.cos,
    "softplus": torch.sigmoid,
    "softsign": lambda x: (1.0 + x.abs()).square().reciprocal(),
    "tanh": sech2,
    "tanhshrink": lambda x: 1.0 - sech2(x),
}
"""In float64, to an absolute error of 2.5e-15."""


def turning(name: str, rate: float = 1.0) -> Turns:
    """Return the slopes of a function by its name, as a function of `rate` x."""
    places = zip(TURNS[name], SUPREMA[name], strict=True)
    turns = tuple((place, end) for place, end in places if place is not None)
    period = 2.0 * math.pi if name in ("sin", "cos") else 0.0
    # Kernels of float32 hold 1 / 6 as `SIXTH`, others as 1 / 6.
    relative = 2.0**-23 if name.startswith("hard") else 1e-14
    derivative = DERIVATIVES[name]
    at = derivative if rate == 1.0 else lambda x: derivative(rate * x)
    return Turns(at, turns, SUPREMA[name], period, relative)
