"""Affine islands that are one convolution: their kernel, instead of their matrix.

Convolution and batch norm, x + conv(x), pointwise layers around a convolution, averages, slices
and concatenations of channels, and circular padding in front all stay convolutions on the input
of the island. Two zero-padded convolutions do not: what lies between them is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.norms import conv_norm
from orthonet.certify.ops.registry import each
from orthonet.certify.rules import record_of
from orthonet.certify.walk.islands import amplification_of
from orthonet.linalg.bounds.rounding import (
    UNDERFLOW,
    add_up,
    gamma,
    mul_up,
    power_of_two_scale,
    sqrt_up,
    squared_norm_up,
)

if TYPE_CHECKING:
    from orthonet.certify.walk.state import State

__all__ = [
    "Form",
    "Pairs",
    "aligned",
    "channels_of",
    "form_bound",
    "form_of",
    "on_identity",
    "pairs_of",
    "pointwise",
    "scaled",
    "unchanged",
]

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
        """The number of spatial dims."""
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

    def plus(self, other: Form, first: float, second: float) -> Form | None:
        """The weighted sum with a form that is aligned with this one."""
        if self.kernel.shape != other.kernel.shape:
            return None
        return replace(
            self,
            kernel=first * self.kernel + second * other.kernel,
            majorant=abs(first) * self.majorant + abs(second) * other.majorant,
            roundings=max(self.roundings, other.roundings) + 3,
        )


def form_bound(form: Form, states: list[State]) -> tuple[Bound, str] | None:
    """The norm of a form, and how it was obtained."""
    if form.kernel is None or form.majorant is None:
        return None
    geometry = {
        "stride": form.stride,
        "padding": form.pads,
        "dilation": form.dilation,
        "groups": form.groups,
        "padding_mode": "circular" if form.circular else "zeros",
    }
    size = form.outputs if form.transposed else form.size
    found = conv_norm(form.kernel, size, **geometry)
    taps = form.kernel[0, 0].numel()
    error = 0.0
    if form.roundings:
        spread = amplification_of(states)
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


def form_of(state: State, known: dict[Any, Form | None]) -> Form | None:
    """The island that ends in `state` as one convolution, if it is one."""
    source = state.start
    if (source, state) not in known:
        known[source, state] = _find(state, source, known)
    return known[source, state]


def _find(state: State, source: State, known: dict[Any, Form | None]) -> Form | None:
    if state is source:
        if not 2 <= len(state.shape) <= 4:
            return None
        dims = len(state.shape) - 1
        one = (1,) * dims
        return Form(
            tuple(state.shape[1:]),
            state.shape[0],
            pads=((0, 0),) * dims,
            stride=one,
            dilation=one,
            outputs=tuple(state.shape[1:]),
        )
    record = record_of(state.node.target)
    if record is None or record.kernel is None or not state.parents:
        return None
    forms = []
    for parent in state.parents:
        if (source, parent) not in known:
            known[source, parent] = _find(parent, source, known)
        form = known[source, parent]
        if form is None:
            return None
        forms.append(form)
    return record.kernel(state, forms)


def pairs_of(padding: Any, taps: Any, dilation: tuple[int, ...]) -> Pairs:
    """The padding of a convolution on both sides of each dim."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(taps, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sides = each(0 if padding == "valid" else padding, len(dilation))
    return tuple((p, p) for p in sides)


def pointwise(form: Form) -> bool:
    """Whether the kernel has one tap, without padding and stride."""
    ones = form.kernel is None or all(k == 1 for k in form.kernel.shape[2:])
    plain = all(pad == (0, 0) for pad in form.pads) and all(s == 1 for s in form.stride)
    return ones and plain and not form.transposed


def on_identity(form: Form, own: Form) -> Form | None:
    """A convolution after padding alone."""
    bare = all(pad == (0, 0) for pad in own.pads)
    if not form.circular:
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(form.pads, own.pads, strict=True))
        return replace(own, pads=pads)
    whole = all(o * s == n for o, s, n in zip(own.outputs, own.stride, own.size, strict=True))
    return replace(own, pads=form.pads, circular=True) if bare and whole else None


def scaled(form: Form, factor: Tensor, roundings: int) -> Form | None:
    """The form with its outputs multiplied by one factor for each channel, or by one for all."""
    if form.transposed:
        if factor.numel() != 1:
            return None
    elif form.kernel is None:
        if any(pad != (0, 0) for pad in form.pads):
            return None
        form = form.dense()
    shape = (-1, *[1] * (form.dims + 1))
    kernel, majorant = (
        form.kernel * factor.reshape(shape),
        form.majorant * factor.abs().reshape(shape),
    )
    return replace(form, kernel=kernel, majorant=majorant, roundings=form.roundings + roundings)


def aligned(forms: list[Form]) -> list[Form] | None:
    """The same maps with kernels of one size, on one grid."""
    first = forms[0]
    if any(f.transposed or (f.kernel is None and any(p != (0, 0) for p in f.pads)) for f in forms):
        return None
    if len({(f.stride, f.outputs) for f in forms}) != 1:
        return None
    if len({f.circular for f in forms if not pointwise(f)}) > 1:
        return None
    forms = [f.dense() for f in forms]
    left = [max(f.pads[a][0] for f in forms) for a in range(first.dims)]
    lengths = [
        max(f.kernel.shape[2 + a] + left[a] - f.pads[a][0] for f in forms)
        for a in range(first.dims)
    ]
    result = []
    for form in forms:
        amounts: list[int] = []
        for a in reversed(range(form.dims)):
            before = left[a] - form.pads[a][0]
            amounts += [before, lengths[a] - before - form.kernel.shape[2 + a]]
        pads = tuple(
            (p, max(0, (out - 1) * s + k - n - p))
            for p, out, s, k, n in zip(
                left, form.outputs, form.stride, lengths, form.size, strict=True
            )
        )
        kernel, majorant = F.pad(form.kernel, amounts), F.pad(form.majorant, amounts)
        circular = any(f.circular for f in forms)
        result.append(replace(form, kernel=kernel, majorant=majorant, pads=pads, circular=circular))
    return result


def channels_of(form: Form) -> int:
    """The channels of the output."""
    if form.kernel is None:
        return form.channels
    return form.kernel.shape[1] * form.groups if form.transposed else form.kernel.shape[0]


def unchanged(state: State, forms: list[Form]) -> Form | None:
    """The kernel of an operation that leaves every entry where it is."""
    return forms[0]
