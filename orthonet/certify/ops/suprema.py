r"""The least and largest slopes of scalar functions, stated once.

Each pair encloses the range of the derivative over the whole line; irrational ends are rounded
outward. `tests/certify/test_suprema.py` proves every line in ball arithmetic.
"""

from __future__ import annotations

import torch

__all__ = ["SIXTH", "SUPREMA"]

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
