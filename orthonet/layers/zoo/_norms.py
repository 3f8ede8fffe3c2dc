"""Linear layers of constant 1 in l-infinity or l1, and a wrapper that is monotone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers.zoo._base import MappedLinear
from orthonet.linalg.rescaling import bounded_columns, bounded_rows

__all__ = ["L1Linear", "LinfLinear", "Monotone"]

Norm = Literal["l1", "l2", "linf"]
_NORMS = ("l1", "l2", "linf")


def _few(
    shape: Sequence[int],
    *,
    dim: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Half of each vector on one entry, half on all: dense ones would average the signal away."""
    noise = torch.randn(tuple(shape), dtype=dtype, device=device)
    noise = noise / (2.0 * noise.abs().sum(dim, keepdim=True))
    place = torch.arange(shape[1 + dim], device=noise.device) % shape[dim]
    place = place[torch.randperm(len(place), device=noise.device)].unsqueeze(dim)
    return noise.scatter_add(dim, place, 0.5 * noise.gather(dim, place).sign())


class LinfLinear(MappedLinear):
    r"""`nn.Linear` of constant 1 into l-infinity: every row has a dual norm of at most 1.

    For `norm="linf"` the moduli of each row add up to 1 at most, and layers compose with
    activations such as `GroupSort` to networks of constant 1 from l-infinity to l-infinity. With
    `norm="l1"`, as the first layer, no entry is above 1: the network then has slopes in [-1, 1]
    along each input, as `Monotone` needs them.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a learnable bias, zero at first.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters; the weight is computed in float32 at least.
        lipschitz: The constant K of the layer: the weight is multiplied by it.
        norm: The norm of the input, "linf", "l2" or "l1".

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`.

    Guarantee:
        Constant from `norm` to l-infinity at most `lipschitz`, in train and eval mode, for every
        finite parameter; in float32 and float64 without tolerance for `lipschitz=1`.

    Raises:
        ValueError: a size is not a positive integer, `lipschitz` not a positive number, or `norm`
            unknown.

    Examples:
        >>> layer = LinfLinear(8, 4)
        >>> bool((layer.weight.double().abs().sum(1) <= 1.0).all())
        True

    References:
        Anil, Lucas & Grosse, *Sorting out Lipschitz function approximation*, ICML 2019, section 4,
        arXiv:1811.05381; Zhang, Cai, Lu, He & Wang, *Towards certifying l-infinity robustness using
        neural networks with l-inf-dist neurons*, ICML 2021, arXiv:2102.05363, for layers of another
        kind.
    """

    _initial = staticmethod(partial(_few, dim=-1))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
        norm: Norm = "linf",
    ) -> None:
        _checks.one_of(type(self), _NORMS, norm=norm)
        self.norm = norm
        super().__init__(in_features, out_features, bias, device, dtype, lipschitz=lipschitz)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(bounded_rows, norm=self.norm)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.norm == "linf" else f"{text}, norm={self.norm!r}"


class L1Linear(MappedLinear):
    r"""`nn.Linear` of constant 1 from l1: every column has a norm of at most 1.

    Arguments and errors are those of [`LinfLinear`][orthonet.layers.LinfLinear], but for `to`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a learnable bias, zero at first.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        lipschitz: The constant K of the layer.
        to: The norm of the output, "l1", "l2" or "linf".

    Shape:
        Input `(*, in_features)`, output `(*, out_features)`.

    Guarantee:
        Constant from l1 to `to` at most `lipschitz`, in train and eval mode, for every finite
        parameter; in float32 and float64 without tolerance for `lipschitz=1`.

    Examples:
        >>> layer = L1Linear(8, 4)
        >>> bool((layer.weight.double().abs().sum(0) <= 1.0).all())
        True
    """

    _initial = staticmethod(partial(_few, dim=-2))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lipschitz: float = 1.0,
        to: Norm = "l1",
    ) -> None:
        _checks.one_of(type(self), _NORMS, to=to)
        self.to_norm = to
        super().__init__(in_features, out_features, bias, device, dtype, lipschitz=lipschitz)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return partial(bounded_columns, to=self.to_norm)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.to_norm == "l1" else f"{text}, to={self.to_norm!r}"


class Monotone(nn.Module):
    r"""\(f(x) + \lambda \sum_i d_i x_i\): monotone along chosen inputs, free along the others.

    If no slope of f along an input is above \(\lambda\) in modulus, which is a constant of at most
    \(\lambda\) from l1 to l-infinity, then all outputs rise along the inputs with \(d_i = 1\) and
    fall along those with \(d_i = -1\). Every function whose slopes along the chosen
    inputs lie between 0 and \(2 \lambda\) is such a sum, so monotone functions are not lost.

    Args:
        function: f, from (N, features) to (N,) or (N, outputs), e.g. a `LinfLinear` with
            `norm="l1"`, `GroupSort` and further `LinfLinear`.
        directions: d, one of 1, 0 and -1 for each input.
        lipschitz: \(\lambda\).

    Shape:
        Input (N, features); output: that of f.

    Guarantee:
        Monotone in exact arithmetic if the slopes of f are at most `lipschitz`, which
        [`prove_monotone`][orthonet.certify.prove_monotone] proves.

    Raises:
        ValueError: a direction is not one of 1, 0 and -1, `lipschitz` is not a positive number, or,
            when called, the input does not have as many features.

    Examples:
        >>> f = nn.Sequential(LinfLinear(2, 8, norm="l1"), nn.ReLU(), LinfLinear(8, 1))
        >>> model = Monotone(f, (1, -1))
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        >>> low, high, last = model(x)[:, 0].tolist()
        >>> low <= high and last <= high
        True

    References:
        Kitouni, Nolte & Williams, *Expressive monotonic neural networks*, ICLR 2023,
        arXiv:2307.07512.
    """

    signs: Tensor

    def __init__(
        self, function: nn.Module, directions: Sequence[int], lipschitz: float = 1.0
    ) -> None:
        super().__init__()
        _checks.module(self, function=function)
        known = isinstance(directions, Sequence) and all(d in (-1, 0, 1) for d in directions)
        _checks.require(
            known and len(directions) > 0,
            self,
            "directions must be one of 1, 0 and -1 for each input",
            "Pass e.g. directions=(1, 0, -1)",
            directions=directions,
        )
        self.function = function
        self.lipschitz = _checks.lipschitz_constant(type(self), lipschitz)
        like = next((p for p in function.parameters()), torch.zeros(()))
        self.directions = tuple(int(d) for d in directions)
        signs = torch.tensor(self.directions, dtype=like.dtype, device=like.device)
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the function plus the linear rise."""
        _checks.require(
            x.ndim == 2 and x.shape[1] == len(self.directions),
            self,
            f"the input must be (N, {len(self.directions)})",
            "Pass one direction for each input",
            x=x,
        )
        y = self.function(x)
        rise = x @ (self.signs.to(x.dtype) * self.slope(x.dtype))
        return y + (rise if y.ndim == 1 else rise[:, None])

    def slope(self, dtype: torch.dtype) -> float:
        r"""Return the smallest number of a dtype that is not below \(\lambda\)."""
        info = torch.finfo(dtype)
        step = math.ldexp(info.eps, math.frexp(self.lipschitz)[1] - 1)
        step = max(step, info.smallest_normal * info.eps)
        return math.ceil(self.lipschitz / step) * step

    def extra_repr(self) -> str:
        return f"directions={self.directions}, lipschitz={self.lipschitz:g}"
