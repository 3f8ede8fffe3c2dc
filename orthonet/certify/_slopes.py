"""What an activation may do to a difference of its inputs: intervals of slopes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import layers
from orthonet.linalg._rounding import UNIT_ROUNDOFF, down, gamma, up

__all__ = ["Activation", "activation_of"]

Narrow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Activation:
    r"""An activation of a vector, seen through the slopes of its chords.

    With an orthogonal basis $Q$ (the identity if None),
    $Q\,(\phi(u) - \phi(v)) = \Theta\,Q\,(u - v)$ with $\Theta$ diagonal and
    $\alpha_j \le \Theta_{jj} \le \beta_j$. Entries of one group (ids from 0, -1 for none) share
    only the bound $\|\Theta_g\| \le \beta$ of a matrix block, with slopes [-beta, beta].

    Attributes:
        function: The map of the last dim, in float64; for the values at the center of a ball.
        lower: The smallest slopes, (n,), float64.
        upper: The largest slopes, (n,), float64.
        basis: Q, (n, n), float64, or None.
        basis_error: Bound of the spectral norm of the rounding in `basis`.
        groups: Ids of groups, (n,), or None.
        narrow: The slopes on intervals of the inputs in the basis, (low, high) -> (lower, upper),
            or None where they cannot be narrowed.
        value_error: Relative error of `function` as it is computed.
    """

    function: Callable[[Tensor], Tensor]
    lower: Tensor
    upper: Tensor
    basis: Tensor | None = None
    basis_error: float = 0.0
    groups: Tensor | None = None
    narrow: Narrow | None = None
    value_error: float = 16 * UNIT_ROUNDOFF

    @property
    def largest(self) -> Tensor:
        """The largest modulus of a slope, (n,)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())


def _kinks(knots: tuple[float, ...], slopes: tuple[float | Tensor, ...]) -> Narrow:
    """The slopes of a piecewise linear function: `slopes[i]` left of `knots[i]`."""

    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least = torch.full_like(low, math.inf)
        most = torch.full_like(low, -math.inf)
        for i, slope in enumerate(slopes):
            left = knots[i - 1] if i else -math.inf
            right = knots[i] if i < len(knots) else math.inf
            touched = (high >= left) & (low <= right)
            value = torch.as_tensor(slope, dtype=low.dtype).expand_as(low)
            least = torch.where(touched, torch.minimum(least, value), least)
            most = torch.where(touched, torch.maximum(most, value), most)
        return least, most

    return narrow


def _bell(derivative: Callable[[Tensor], Tensor], peak: float) -> Narrow:
    """The slopes of a function whose derivative is even, positive and falls away from 0."""
    slack = 1e-14  # 40 times the rounding of the derivatives that are used here

    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        far = torch.maximum(low.abs(), high.abs())
        near = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        least = derivative(far) * (1 - slack) - slack
        return least.clamp_min(0.0), (derivative(near) * (1 + slack) + slack).clamp_max(peak)

    return narrow


def _rising(derivative: Callable[[Tensor], Tensor]) -> Narrow:
    """The slopes of a convex function with slopes in [0, 1]."""
    slack = 1e-14

    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least = (derivative(low) * (1 - slack) - slack).clamp_min(0.0)
        return least, (derivative(high) * (1 + slack) + slack).clamp_max(1.0)

    return narrow


def _sech2(x: Tensor) -> Tensor:
    # 1 - tanh^2 cancels; this form has a small relative error, and underflows to a sound 0.
    e = (-2.0 * x.abs()).exp()
    return 4.0 * e / (1.0 + e).square()


_SELU = 1.0507009873554805  # scale
_SELU_LEFT = 1.0507009873554805 * 1.6732632423543772
_HARD = 0.16666667164  # torch takes the float32 of 1 / 6
# (function, least slope, largest slope, narrowing); suprema with many digits were enclosed by
# interval arithmetic and rounded outward. f(x) - f(-x) = x holds for GELU and SiLU, so that their
# slopes at x and -x add up to 1.
_PLAIN: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], float, float, Narrow | None]] = {
    nn.ReLU: (torch.relu, 0.0, 1.0, _kinks((0.0,), (0.0, 1.0))),
    nn.ReLU6: (F.relu6, 0.0, 1.0, _kinks((0.0, 6.0), (0.0, 1.0, 0.0))),
    nn.Tanh: (torch.tanh, 0.0, 1.0, _bell(_sech2, 1.0)),
    nn.Sigmoid: (torch.sigmoid, 0.0, 0.25, _bell(lambda x: _sech2(x / 2) / 4, 0.25)),
    nn.Softsign: (F.softsign, 0.0, 1.0, _bell(lambda x: (1 + x.abs()).square().reciprocal(), 1.0)),
    nn.LogSigmoid: (F.logsigmoid, 0.0, 1.0, None),
    nn.Tanhshrink: (F.tanhshrink, 0.0, 1.0, None),
    nn.Hardsigmoid: (F.hardsigmoid, 0.0, _HARD, None),
    nn.Hardswish: (F.hardswish, -0.5000001, 1.5000001, None),
    nn.SELU: (F.selu, 0.0, up(_SELU_LEFT), None),
    nn.GELU: (F.gelu, -0.1289930725, 1.1289930725, None),  # the larger interval of the two kinds
    nn.SiLU: (F.silu, -0.0998393238, 1.0998393238, None),
    nn.Identity: (lambda x: x, 1.0, 1.0, None),
    layers.Abs: (torch.abs, -1.0, 1.0, _kinks((0.0,), (-1.0, 1.0))),
}


def activation_of(module: nn.Module, width: int) -> Activation | None:
    """The slopes of a module that acts on vectors of `width` entries; None if it is unknown.

    The class must be a known one itself: a subclass may compute something else.
    """
    entry = _PLAIN.get(type(module))
    if entry is not None:
        function, low, high, narrow = entry
        if isinstance(module, nn.GELU):
            function = lambda x: F.gelu(x, approximate=module.approximate)  # noqa: E731
        return _entrywise(function, low, high, width, narrow)
    if type(module) in (layers.MaxMin, layers.GroupSort) and module.dim in (1, -1):
        return _sorting(module, width)
    if type(module) is layers.HouseholderActivation and module.dim in (1, -1):
        return _reflections(module, width)
    return _with_parameter(module, width)


def _entrywise(
    function: Callable[[Tensor], Tensor], low: float, high: float, width: int, narrow: Narrow | None
) -> Activation:
    least, most = (torch.full((width,), value, dtype=torch.float64) for value in (low, high))
    return Activation(function, least, most, narrow=narrow)


def _with_parameter(module: nn.Module, width: int) -> Activation | None:
    if type(module) is nn.LeakyReLU or type(module) is nn.RReLU:
        leak = (
            module.negative_slope
            if isinstance(module, nn.LeakyReLU)
            else (module.lower + module.upper) / 2  # in eval
        )
        low, high = min(leak, 1.0), max(leak, 1.0)
        if type(module) is nn.RReLU:
            low, high = down(low) if low < 1 else low, up(high) if high > 1 else high
            return _entrywise(lambda x: F.leaky_relu(x, leak), low, high, width, None)
        return _entrywise(
            lambda x: F.leaky_relu(x, leak), low, high, width, _kinks((0.0,), (leak, 1.0))
        )
    if type(module) is nn.PReLU:
        leak = module.weight.detach().to("cpu", torch.float64).expand(width)
        one = torch.ones_like(leak)
        return Activation(
            lambda x: torch.where(x >= 0, x, leak * x),
            torch.minimum(leak, one),
            torch.maximum(leak, one),
            narrow=_kinks((0.0,), (leak, 1.0)),
        )
    if type(module) is nn.ELU and module.alpha >= 0:
        return _entrywise(
            lambda x: F.elu(x, module.alpha), 0.0, max(1.0, module.alpha), width, None
        )
    if type(module) is nn.CELU and module.alpha > 0:
        return _entrywise(lambda x: F.celu(x, module.alpha), 0.0, 1.0, width, None)
    if type(module) is nn.Softplus and module.beta > 0 and module.threshold >= 20:
        beta = module.beta
        return _entrywise(
            lambda x: F.softplus(x, beta, module.threshold), 0.0, 1.0, width,
            _rising(lambda x: torch.sigmoid(beta * x)) if module.threshold >= 40 else None,
        )  # fmt: skip
    if type(module) is nn.Hardtanh and module.min_val <= module.max_val:
        ends = (float(module.min_val), float(module.max_val))
        return _entrywise(lambda x: x.clamp(*ends), 0.0, 1.0, width, _kinks(ends, (0.0, 1.0, 0.0)))
    if type(module) is nn.Softshrink:
        ends = (-float(module.lambd), float(module.lambd))
        return _entrywise(
            lambda x: F.softshrink(x, module.lambd), 0.0, 1.0, width, _kinks(ends, (1.0, 0.0, 1.0))
        )
    return None


def _sorting(module: nn.Module, width: int) -> Activation | None:
    """Sorting moves the mean of a group as it is, and what is left shrinks: a basis of both.

    In pairs what is left is one difference, whose modulus is taken; of larger groups it is a
    vector with a Lipschitz map (Pauli et al. 2024 bound the same two parts).
    """
    size = 2 if isinstance(module, layers.MaxMin) else int(module.group_size)  # type: ignore[arg-type]
    if width % size:
        return None
    count = width // size
    helmert = torch.zeros(size, size, dtype=torch.float64)
    helmert[0] = 1.0 / math.sqrt(size)
    for j in range(1, size):
        helmert[j, :j] = 1.0 / math.sqrt(j * (j + 1))
        helmert[j, j] = -j / math.sqrt(j * (j + 1))
    place = torch.arange(width).reshape(count, size)
    if isinstance(module, layers.MaxMin):
        place = torch.arange(width).reshape(size, count).T
    basis = torch.zeros(width, width, dtype=torch.float64)
    rows = torch.arange(width).reshape(count, size)
    for group, row in zip(place, rows, strict=True):
        basis[row[:, None], group[None]] = helmert
    kept = torch.arange(width) % size == 0
    lower = torch.where(kept, 1.0, -1.0).double()
    groups = torch.where(kept, -1, torch.arange(width) // size) if size > 2 else None
    # Of a pair (a, b) the maximum comes first, or last: (a - b) becomes |a - b| or its negative.
    modulus = _kinks((0.0,), (-1.0, 1.0) if isinstance(module, layers.MaxMin) else (1.0, -1.0))

    def narrow(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        least, most = modulus(low, high)
        return torch.where(kept, 1.0, least), torch.where(kept, 1.0, most)

    return Activation(
        _on_last_dim(module),
        lower,
        torch.ones(width, dtype=torch.float64),
        basis,
        size * gamma(4),  # entries of one block, each with at most four roundings
        groups,
        narrow if size == 2 else None,
        0.0,
    )


def _on_last_dim(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map of a sorting module on the last dim."""
    if isinstance(module, layers.MaxMin):
        return layers.MaxMin(dim=-1)
    return layers.GroupSort(int(module.group_size), dim=-1)  # type: ignore[arg-type]


def _reflections(module: layers.HouseholderActivation, width: int) -> Activation | None:
    """Each pair is kept along one direction, and the modulus is taken along the other."""
    if module.channels != width:
        return None
    half = module.theta.detach().to("cpu", torch.float64) / 2
    count = width // 2
    basis = torch.zeros(width, width, dtype=torch.float64)
    j = torch.arange(count)
    basis[j, j], basis[j, j + count] = half.cos(), half.sin()
    basis[j + count, j], basis[j + count, j + count] = half.sin(), -half.cos()
    kept = torch.arange(width) < count
    own = layers.HouseholderActivation(width, dim=-1, dtype=torch.float64).requires_grad_(False)
    own.theta.copy_(2 * half)  # doubling is exact
    lower = torch.where(kept, 1.0, -1.0).double()
    return Activation(own, lower, torch.ones(width).double(), basis, 2 * gamma(8))
