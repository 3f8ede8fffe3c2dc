"""Affine islands that are one convolution: their kernel, instead of their matrix.

Convolution and batch norm, x + conv(x), pointwise layers around a convolution, averages, slices
and concatenations of channels, and circular padding in front all stay convolutions on the input
of the island. Two zero-padded convolutions do not: what lies between them is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from orthonet.certify._affine import _amplification
from orthonet.certify._bound import Bound
from orthonet.certify._norms import conv_norm
from orthonet.linalg._rounding import (
    UNDERFLOW,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
)

if TYPE_CHECKING:
    from orthonet.certify._state import State

__all__ = ["Form", "Pairs", "form_bound"]

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Form:
    """y[i] = sum_t K_t x[i stride + t dilation - left], zero or periodic outside of x.

    A form without kernel is the identity, with some padding. A transposed one is the adjoint of
    the form with the same kernel.
    """

    size: tuple[int, ...]
    channels: int
    kernel: Any = None
    majorant: Any = None
    """The kernel with all constants replaced by their absolute values."""
    pads: Pairs = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    circular: bool = False
    transposed: bool = False
    outputs: tuple[int, ...] = ()
    roundings: int = 0

    @property
    def dims(self) -> int:
        return len(self.size)

    def dense(self) -> Form:
        """The same map with a kernel, without groups and dilation."""
        dims = self.dims
        kernel, majorant = self.kernel, self.majorant
        if kernel is None or majorant is None:
            kernel = torch.eye(self.channels, dtype=torch.float64).reshape(
                self.channels, self.channels, *[1] * dims
            )
            majorant = kernel
        taps = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel.shape[2:], strict=True)]
        both = []
        for old in (kernel, majorant):
            out = old.shape[0] // self.groups
            new = old.new_zeros(old.shape[0], old.shape[1] * self.groups, *taps)
            spread = tuple(slice(None, None, d) for d in self.dilation)
            for g in range(self.groups):
                rows = slice(g * out, (g + 1) * out)
                columns = slice(g * old.shape[1], (g + 1) * old.shape[1])
                new[(rows, columns, *spread)] = old[rows]
            both.append(new)
        return replace(self, kernel=both[0], majorant=both[1], groups=1, dilation=(1,) * dims)


def form_bound(form: Form, states: list[State]) -> tuple[Bound, str] | None:
    """The norm of a form, and how it was obtained."""
    if form.kernel is None or form.majorant is None:
        return None
    geometry = {
        "stride": form.stride, "padding": form.pads, "dilation": form.dilation,
        "groups": form.groups, "padding_mode": "circular" if form.circular else "zeros",
    }  # fmt: skip
    size = form.outputs if form.transposed else form.size
    found = conv_norm(form.kernel, size, **geometry)
    taps = form.kernel[0, 0].numel()
    error = 0.0
    if form.roundings:
        spread = _amplification(states)
        scale = power_of_two_scale(form.majorant)
        if spread is None or (not scale and found.value):
            return None
        if scale:
            whole = mul_up(sqrt_up(squared_norm_up(form.majorant / scale)), scale)
            lost = mul_up(form.roundings, spread, sqrt_up(form.kernel.numel()), UNDERFLOW)
            relative = mul_up(2.0, gamma(form.roundings))
            error = mul_up(sqrt_up(taps), add_up(mul_up(relative, whole), lost))
    kind = "exact" if found.tight and error <= 1e-9 * found.value else "upper"
    method = f"adjoint: {found.method}" if form.transposed else found.method
    return Bound(add_up(found.value, error), kind=kind), method
