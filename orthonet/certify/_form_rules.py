"""Which operations keep an affine island one convolution, and what its kernel becomes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet.certify._affine import _variance
from orthonet.certify._forms import Form, Pairs
from orthonet.certify._rules import Operand

if TYPE_CHECKING:
    from orthonet.certify._state import State

__all__ = ["form_of"]


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
            tuple(state.shape[1:]), state.shape[0], pads=((0, 0),) * dims, stride=one,
            dilation=one, outputs=tuple(state.shape[1:]),
        )  # fmt: skip
    rule = _RULES.get(state.call.op)
    if rule is None or not state.parents:
        return None
    forms = []
    for parent in state.parents:
        if (source, parent) not in known:
            known[source, parent] = _find(parent, source, known)
        form = known[source, parent]
        if form is None:
            return None
        forms.append(form)
    return rule(state, forms)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _pairs(padding: Any, taps: Any, dilation: tuple[int, ...]) -> Pairs:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(taps, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sides = _each(0 if padding == "valid" else padding, len(dilation))
    return tuple((p, p) for p in sides)


def _pointwise(form: Form) -> bool:
    ones = form.kernel is None or all(k == 1 for k in form.kernel.shape[2:])
    plain = all(pad == (0, 0) for pad in form.pads) and all(s == 1 for s in form.stride)
    return ones and plain and not form.transposed


def _convolution(state: State, forms: list[Form]) -> Form | None:
    (form,) = forms
    call, dims = state.call, form.dims
    weight = call.constant(1, "weight")
    if weight.ndim != dims + 2 or not isinstance(call.args[0], Operand):
        return None
    dilation = _each(call.get(5, "dilation", 1), dims)
    own = Form(
        form.size, form.channels, weight, weight.abs(),
        _pairs(call.get(4, "padding", 0), weight.shape[2:], dilation),
        _each(call.get(3, "stride", 1), dims), dilation, call.get(6, "groups", 1),
        outputs=tuple(state.shape[1:]),
    )  # fmt: skip
    if form.kernel is None:
        return _on_identity(form, own)
    if form.transposed:
        return None
    if _pointwise(own):
        own, form = own.dense(), form.dense()
        kernel, majorant = (
            (a.flatten(1) @ b.flatten(1)).unflatten(1, b.shape[1:])
            for a, b in ((own.kernel, form.kernel), (own.majorant, form.majorant))
        )
        count = form.roundings + form.kernel.shape[0] + 2
        return replace(form, kernel=kernel, majorant=majorant, roundings=count)
    if _pointwise(form):
        own, form = own.dense(), form.dense()
        kernel, majorant = (
            torch.einsum("oi...,ij->oj...", a, b.flatten(1))
            for a, b in ((own.kernel, form.kernel), (own.majorant, form.majorant))
        )
        count = form.roundings + form.kernel.shape[0] + 2
        return replace(own, kernel=kernel, majorant=majorant, roundings=count)
    return None


def _on_identity(form: Form, own: Form) -> Form | None:
    """A convolution after padding alone."""
    bare = all(pad == (0, 0) for pad in own.pads)
    if not form.circular:
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(form.pads, own.pads, strict=True))
        return replace(own, pads=pads)
    whole = all(o * s == n for o, s, n in zip(own.outputs, own.stride, own.size, strict=True))
    return replace(own, pads=form.pads, circular=True) if bare and whole else None


def _pad(state: State, forms: list[Form]) -> Form | None:
    (form,) = forms
    call = state.call
    mode = call.get(2, "mode", "constant") if call.op == "pad" else "constant"
    amounts = list(call.get(1, "pad", ()))
    pads = tuple((amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2))[::-1]
    bare = form.kernel is None and all(pad == (0, 0) for pad in form.pads)
    if not bare or len(pads) != form.dims or min(min(p) for p in pads) < 0:
        return None
    if mode not in ("constant", "circular"):
        return None
    return replace(form, pads=pads, circular=mode == "circular", outputs=tuple(state.shape[1:]))


def _transposed(state: State, forms: list[Form]) -> Form | None:
    """A transposed convolution, also behind circular padding that makes it a circular one."""
    (form,) = forms
    call, dims = state.call, form.dims
    weight = call.constant(1, "weight")
    if form.kernel is not None or weight.ndim != dims + 2:
        return None
    stride, crop = _each(call.get(3, "stride", 1), dims), _each(call.get(4, "padding", 0), dims)
    dilation = _each(call.get(7, "dilation", 1), dims)
    own = Form(
        form.size, form.channels, weight, weight.abs(), tuple((p, p) for p in crop), stride,
        dilation, call.get(6, "groups", 1), transposed=True, outputs=tuple(state.shape[1:]),
    )  # fmt: skip
    if all(pad == (0, 0) for pad in form.pads):
        return own
    if not form.circular:
        return None
    shift = []
    for (left, right), n, k, s, d, p, out in zip(
        form.pads, form.size, weight.shape[2:], stride, dilation, crop, own.outputs, strict=True
    ):
        offset = p - s * left  # output o reads input (o + offset - d t) / s, wrapped around
        first, last = offset - d * (k - 1), out - 1 + offset
        if out != s * n or first < -s * left or last > s * (n + right - 1) + s - 1 or offset < 0:
            return None
        shift.append((offset, offset))
    return replace(own, pads=tuple(shift), circular=True)


def _scaled(form: Form, factor: Tensor, roundings: int) -> Form | None:
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


def _batch_norm(state: State, forms: list[Form]) -> Form | None:
    scale = _variance(state).cpu().rsqrt()
    if state.call.get(1, "weight", None) is not None:
        scale = scale * state.call.constant(1, "weight")
    return _scaled(forms[0], scale, 8)


def _factor(state: State, forms: list[Form]) -> Form | None:
    call, form = state.call, forms[0]
    value = [a for a in call.args[:2] if not isinstance(a, Operand)]
    if len(value) != 1 or (call.op == "div" and not isinstance(call.args[0], Operand)):
        return None
    factor = torch.as_tensor(value[0]).detach().cpu().double()
    shape = (1,) * (form.dims + 2 - factor.ndim) + tuple(factor.shape)
    if len(shape) != form.dims + 2 or any(n != 1 for i, n in enumerate(shape) if i != 1):
        return None
    return _scaled(form, 1.0 / factor if call.op == "div" else factor, 3)


def _negated(state: State, forms: list[Form]) -> Form | None:
    return _scaled(forms[0], torch.tensor(-1.0, dtype=torch.float64), 0)


def _same(state: State, forms: list[Form]) -> Form | None:
    return forms[0]


def _aligned(forms: list[Form]) -> list[Form] | None:
    """The same maps with kernels of one size, on one grid."""
    first = forms[0]
    if any(f.transposed or (f.kernel is None and any(p != (0, 0) for p in f.pads)) for f in forms):
        return None
    if len({(f.stride, f.outputs) for f in forms}) != 1:
        return None
    if len({f.circular for f in forms if not _pointwise(f)}) > 1:
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


def _sum(state: State, forms: list[Form]) -> Form | None:
    call = state.call
    alpha = call.get(2, "alpha", 1)
    operands = [isinstance(a, Operand) for a in call.args[:2]]
    if not all(operands):  # a constant shifts, and changes nothing unless it widens the shape
        if tuple(state.shape[1:]) != forms[0].outputs or state.shape[0] != _channels(forms[0]):
            return None
        place = operands.index(True)
        factor = {("sub", 1): -alpha, ("add", 1): alpha, ("rsub", 0): -alpha}.get(
            (call.op, place), 1
        )
        form = forms[0]
        return form if factor == 1 else _scaled(form, torch.tensor(float(factor)).double(), 1)
    pair = forms if len(forms) == 2 else [forms[0], forms[0]]
    if state.call.args[0]._state is not state.parents[0]:
        pair = pair[::-1]
    aligned = _aligned(pair)
    if aligned is None or tuple(state.shape[1:]) != pair[0].outputs:
        return None
    a, b = aligned
    if a.kernel.shape != b.kernel.shape:
        return None
    first, second = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.op]
    return replace(
        a,
        kernel=first * a.kernel + second * b.kernel,
        majorant=abs(first) * a.majorant + abs(second) * b.majorant,
        roundings=max(a.roundings, b.roundings) + 3,
    )


def _channels(form: Form) -> int:
    if form.kernel is None:
        return form.channels
    return form.kernel.shape[1] * form.groups if form.transposed else form.kernel.shape[0]


def _join(state: State, forms: list[Form]) -> Form | None:
    call = state.call
    parts = call.get(0, "tensors", ())
    if call.get(1, "dim", 0) % (len(state.shape) + 1) != 1 or not all(
        isinstance(p, Operand) for p in parts
    ):
        return None
    lookup = dict(zip(state.parents, forms, strict=True))
    aligned = _aligned([lookup[p._state] for p in parts])
    if aligned is None:
        return None
    return replace(
        aligned[0],
        kernel=torch.cat([f.kernel for f in aligned]),
        majorant=torch.cat([f.majorant for f in aligned]),
        roundings=max(f.roundings for f in aligned),
    )


def _average(state: State, forms: list[Form]) -> Form | None:
    (form,) = forms
    call, dims = state.call, form.dims
    window = _each(call.get(1, "kernel_size", 1), dims)
    stride = _each(call.get(2, "stride", None) or window, dims)
    pads = _pairs(call.get(3, "padding", 0), window, (1,) * dims)
    odd = call.get(4, "ceil_mode", False) or call.get(6, "divisor_override", None) is not None
    uneven = not call.get(5, "count_include_pad", True) and any(p != (0, 0) for p in pads)
    if form.kernel is not None or odd or uneven:
        return None
    kernel = torch.full((form.channels, 1, *window), 1 / math.prod(window), dtype=torch.float64)
    own = Form(form.size, form.channels, kernel, kernel, pads, stride, (1,) * dims,
               form.channels, outputs=tuple(state.shape[1:]), roundings=2)  # fmt: skip
    return _on_identity(form, own)


_RULES = {
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution, "pad": _pad,
    "constant_pad_nd": _pad, "conv_transpose1d": _transposed, "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed, "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm, "mul": _factor, "div": _factor,
    "neg": _negated, "add": _sum, "sub": _sum, "rsub": _sum, "cat": _join, "clone": _same,
    "detach": _same, "alias": _same, "dropout": _same, "to": _same, "contiguous": _same,
    "avg_pool1d": _average, "avg_pool2d": _average, "avg_pool3d": _average,
}  # fmt: skip


def _getitem(state: State, forms: list[Form]) -> Form | None:
    """The first part of a batch norm; other tuples are left to matrices."""
    return forms[0] if "batch_norm" in state.parents[0].call.op else None


_RULES["getitem"] = _getitem
