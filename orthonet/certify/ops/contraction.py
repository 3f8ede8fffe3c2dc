"""Products with constant matrices and tensors."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify.norms import matrix_norm
from orthonet.certify.ops.advice import ADVICE, IN_A_BALL
from orthonet.certify.ops.registry import (
    Linear,
    Values,
    added,
    aten_name,
    constant,
    f64,
    first_moves,
    number,
    op,
    wide,
)
from orthonet.certify.rules import BatchDependent, Call, Operand, Rounding, Step
from orthonet.linalg.bounds.rounding import mul_up, power_of_two_scale, sqrt_up, squared_norm_up
from orthonet.linalg.bounds.sizes import absolute_matrix

__all__ = ["bias_norm", "product_step"]

_MATRICES = 256  # of one stack, whose norms are bounded one by one
_SAFE = 1.0 + 2.0**-40  # for the float64 roundings of this bookkeeping itself


# --- one matrix ----------------------------------------------------------------------------------


def _one_matrix(call: Call, weight: Tensor) -> Step:
    if weight.ndim != 2:
        call.refuse(
            "the factor of a matrix product must be a constant matrix",
            "Use torch.nn.Linear, or one product for each matrix",
        )
    gain = Bound(matrix_norm(weight), kind="exact")
    size = "{}x{}".format(*weight.shape)
    return Step((gain,), f"matrix {size}, verified", roundings=max(weight.shape) + 1.0)


def bias_norm(call: Call) -> float:
    """The norm of the bias of a layer, repeated over its outputs."""
    bias = call.given("bias")
    if bias is None:
        return 0.0
    repeats = math.prod(call.output_shape) / max(1, bias.numel())
    return float(bias.detach().double().norm()) * math.sqrt(repeats) * _SAFE


def _as_matrix(weight: Any) -> Any:
    """A weight of one row as a matrix."""
    return weight[None] if weight.ndim == 1 else weight


def _linear_run(a: Values, absolute: bool) -> Any:
    weight = f64(a["weight"], absolute)
    result = a["input"] @ _as_matrix(weight).mT
    return result[..., 0] if weight.ndim == 1 else result


def _linear_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    weight = number(draw) * constant(draw, draw.choice([1, 3, 4]), shape[-1])
    bias = draw.choice([None, constant(draw, len(weight))])
    return lambda x, y: torch.nn.functional.linear(x, weight, bias)


@op(
    "linear.default",
    reads=("weight",),
    free=("bias",),
    offset=bias_norm,
    absolute=lambda call: absolute_matrix(_as_matrix(call.fixed("weight"))),
    linear=Linear(_linear_run, wide, heavy=True, when=first_moves),
    samples=_linear_samples,
)
def _linear(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    return _one_matrix(call, _as_matrix(call.fixed("weight")))


# --- products of matrices and stacks -------------------------------------------------------------

_SECOND = {
    "matmul": "other",
    "mm": "mat2",
    "bmm": "mat2",
    "mv": "vec",
    "inner": "other",
    "addmm": "mat2",
    "baddbmm": "batch2",
    "addmv": "vec",
}
_FIRST = {"addmm": "mat1", "baddbmm": "batch1", "addmv": "mat"}


def _pair(call: Call) -> tuple[Any, Any]:
    return call[_FIRST.get(call.op, "self")], call[_SECOND[call.op]]


def _matmul_run(a: Values, absolute: bool) -> Any:
    name = aten_name(a.target)
    first, second = (f64(a[key], absolute) for key in ("self", _SECOND[name]))
    return first @ (second.mT if name == "inner" and second.ndim > 1 else second)


def _matmul_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    right, left = constant(draw, shape[-1], 3), constant(draw, 2, shape[-2 if shape[1:] else -1])
    vector, stack = constant(draw, shape[-1]), constant(draw, *shape[:-2], shape[-1], 2)
    found = [lambda x, y: x @ right, lambda x, y: torch.inner(x, right.mT)]
    if len(shape) > 1:
        found += [lambda x, y: left @ x, lambda x, y: x @ stack, lambda x, y: x @ vector]
    return draw.choice(found)


def _absolute(call: Call) -> float | None:
    """Of the one matrix; stacks count their roundings themselves."""
    matrices = [a for a in call.arguments.values() if isinstance(a, Tensor) and a.ndim == 2]
    return absolute_matrix(call.as_constant(matrices[-1], "weight")) if matrices else None


@op(
    "matmul.default",
    "mm.default",
    reads=("other", "mat2"),
    absolute=_absolute,
    linear=Linear(_matmul_run, wide, heavy=True),
    samples=_matmul_samples,
)
def _matmul(call: Call) -> Step:
    return _product(call)


@op(
    "bmm.default",
    "mv.default",
    "inner.default",
    reads=("mat2", "vec", "other"),
    linear=Linear(_matmul_run, wide, heavy=True),
)
def _stacked(call: Call) -> Step:
    return _product(call)


def _product(call: Call) -> Step:
    """X @ W, or W @ x, which acts on the columns of every sample; W may be a stack of matrices."""
    first, second = _pair(call)
    if len(call.operands) != 1:
        call.refuse(
            "this operation is certified for one tensor that depends on the input and constants",
            f"A product of two such tensors has no global Lipschitz constant; {IN_A_BALL}; or "
            "register your own rule for the module around it with @register_rule",
        )
    left = isinstance(second, Operand)
    weight = call.as_constant(first if left else second, "input" if left else "other")
    if call.op == "inner":
        if weight.ndim > 2 or left:
            call.refuse("the second factor of inner must be a constant matrix", "Use x @ w.T")
        weight = weight.mT if weight.ndim == 2 else weight
    if weight.ndim != 2:
        return _stacked_step(call, weight, left)
    if left and len(call.operands[0].shape) < 2:
        call.refuse("dim 0 must stay the batch", "Use x @ matrix.T")
    return _one_matrix(call, weight)


def _addmm_run(a: Values, absolute: bool) -> Any:
    name = aten_name(a.target)
    first, second = (f64(a[key], absolute) for key in (_FIRST[name], _SECOND[name]))
    return f64(a["alpha"], absolute) * (first @ second)


def _addmm_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    weight, bias = constant(draw, shape[-1], 3), constant(draw, 3)
    beta, alpha = draw.choice([1.0, 0.0, -2.0]), number(draw)
    if len(shape) == 1:
        return lambda x, y: torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
    return None


@op(
    "addmm.default",
    "baddbmm.default",
    "addmv.default",
    reads=("mat1", "mat2", "batch1", "batch2", "mat", "vec", "beta", "alpha"),
    offset=added,
    absolute=_absolute,
    linear=Linear(
        _addmm_run,
        wide,
        heavy=True,
        when=lambda call: len(call.operands) == 1 and not isinstance(call["self"], Operand),
    ),
    samples=_addmm_samples,
)
def _product_and_shift(call: Call) -> Step:
    if isinstance(call["self"], Operand):
        call.refuse("the tensor to add must be a constant", "Write x + y @ matrix")
    beta, alpha = call.number("beta"), abs(call.number("alpha"))
    step = _product(call)
    if alpha == beta == 1.0 and not isinstance(step.roundings, Rounding):
        return step
    gain = Bound(mul_up(alpha, step.gains[0].value), kind=step.gains[0].kind)
    shift = call.fixed("self")
    repeats = math.prod(call.output_shape) / max(1, shift.numel())
    offset = abs(beta) * float(shift.norm()) * math.sqrt(repeats) * _SAFE
    weight = next(t for t in _pair(call) if not isinstance(t, Operand))
    rounding = step.roundings
    if not isinstance(rounding, Rounding):
        size = absolute_matrix(call.as_constant(weight, "weight"))
        rounding = Rounding(cast(float, rounding), size)
    size = mul_up(alpha, rounding.size)
    return step._replace(gains=(gain,), roundings=Rounding(rounding.count + 3.0, size, offset))


# --- products by letters -------------------------------------------------------------------------


def product_step(call: Call, x: str, weight: Tensor, w: str, out: str) -> Step:
    r"""The norm of \(X \mapsto \sum X_x W_w\), with one letter for each dim and the batch first.

    Letters of both that are kept (s) make it block diagonal, those of both that are summed (c) and
    of W alone (n) are the columns and rows of the blocks, those of X alone that are kept repeat
    them, and those that are summed (r) are a row of ones. So the norm is the largest one of the
    blocks times \(\sqrt r\).
    """
    sizes = dict(zip(x[1:], call.operands[0].shape, strict=True))
    for letter, size in zip(w, weight.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            call.refuse("sizes of one letter must be equal", "Expand the constant by hand")
    if x[0] not in out or x[0] in w:
        call.refuse("dim 0 must stay the batch", "Keep the first letter of x the first of all")
    if any(len(set(letters)) < len(letters) for letters in (x, w, out)) or set(w) - set(x + out):
        call.refuse(
            "every letter must stand once in a tensor, and be summed with the input only",
            "Take the diagonal, or sum the constant, before",
        )
    shared = [letter for letter in w if letter in x and letter in out]
    columns = [letter for letter in w if letter in x and letter not in out]
    rows = [letter for letter in w if letter not in x]
    blocks = weight.permute([w.index(letter) for letter in (*shared, *rows, *columns)])
    blocks = blocks.reshape([math.prod(sizes[c] for c in part) for part in (shared, rows, columns)])
    summed = math.prod(sizes[c] for c in x[1:] if c not in w and c not in out)
    value, exact = _largest(blocks)
    repeated = sqrt_up(summed)
    gain = Bound(mul_up(value, repeated), kind="exact" if exact else "upper")
    terms = summed * math.prod(sizes[c] for c in columns)
    rounding = Rounding(terms + 1.0, mul_up(absolute_matrix(blocks), repeated))
    size = "x".join(map(str, weight.shape))
    return Step((gain,), f"product with a constant {size}", roundings=rounding)


def _largest(blocks: Tensor) -> tuple[float, bool]:
    """The largest norm of a stack of matrices, and whether it is the norm itself."""
    if not blocks.numel():
        return 0.0, True
    if blocks.shape[1] == blocks.shape[2] == 1:
        return float(blocks.abs().max()), True
    if len(blocks) <= _MATRICES:
        return max(matrix_norm(block) for block in blocks), True
    scale = power_of_two_scale(blocks)  # next to the largest entry what underflows is nothing
    frobenius = sqrt_up(squared_norm_up(blocks / scale, 1)) if scale else 0.0
    return mul_up(frobenius, scale), False


def _einsum_run(a: Values, absolute: bool) -> Any:
    return a.target(a["equation"], [f64(v, absolute) for v in a["tensors"]])


def _einsum_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    names = "abcdefgh"[: len(shape)]
    weight, other = constant(draw, shape[-1], 3), constant(draw, 3, 2)
    last = names[-1]
    equation = f"z{names},{last}y->z{names[:-1]}y"
    three = f"z{names},{last}y,yw->z{names[:-1]}w"
    diagonal = constant(draw, shape[-1])
    return draw.choice(
        [
            lambda x, y: torch.einsum(equation, x, weight),
            lambda x, y: torch.einsum(three, x, weight, other),
            lambda x, y: torch.einsum(f"z{names},{last}->z{names}", x, diagonal),
            lambda x, y: torch.einsum(f"z{names}->z{last}", x),
        ]
    )


@op(
    "einsum.default",
    reads=("tensors",),
    free=("path",),
    samples=_einsum_samples,
    linear=Linear(_einsum_run, wide, heavy=True),
)
def _einsum(call: Call) -> Step:
    equation, tensors = call["equation"], call["tensors"]
    moving = [i for i, t in enumerate(tensors) if isinstance(t, Operand)]
    if len(moving) != 1:
        call.refuse(
            "einsum must have one tensor that depends on the input, and constants",
            "A product of two such tensors has no Lipschitz constant",
        )
    rank = len(call.operands[0].shape) + 1
    where = moving[0]
    ranks = [rank if i == where else _rank(t) for i, t in enumerate(tensors)]
    letters, out = _letters(call, equation, ranks)
    x = letters.pop(where)
    fixed = [call.as_constant(t, "operands") for i, t in enumerate(tensors) if i != where]
    if not fixed:
        return product_step(call, x, torch.ones((), dtype=torch.float64), "", out)
    if len(fixed) == 1:
        return product_step(call, x, fixed[0], letters[0], out)
    every = dict.fromkeys("".join(letters))
    kept = "".join(letter for letter in every if letter in x or letter in out)
    merged, terms = _merged(letters, fixed, kept)
    step = product_step(call, x, merged, kept, out)
    # The product of the constants is rounded, by gamma of the terms of their moduli.
    size, _ = _merged(letters, [t.abs() for t in fixed], kept)
    error = mul_up(2.0**-52 * (terms + len(fixed)), sqrt_up(squared_norm_up(size)))
    summed = math.prod(
        s
        for c, s in zip(x[1:], call.operands[0].shape, strict=True)
        if c not in out and c not in kept
    )
    gain = step.gains[0].value + mul_up(2.0 * error, sqrt_up(summed))
    # In whatever order pairs are contracted: no sum has more terms than all letters together.
    lengths = zip(x[1:], call.operands[0].shape, strict=True)
    count = terms * math.prod(s for c, s in lengths if c not in out) + len(tensors)
    absolute: Any = product_step(call, x, size, kept, out).roundings
    rounding = Rounding(count, mul_up(absolute.size, _SAFE))
    return Step((Bound(gain * _SAFE if gain else 0.0),), step.method, roundings=rounding)


def _merged(letters: list[str], fixed: list[Tensor], kept: str) -> tuple[Tensor, int]:
    """The product of constants with the letters `kept`, and how many terms it sums."""
    sizes = {
        c: n
        for names, t in zip(letters, fixed, strict=True)
        for c, n in zip(names, t.shape, strict=True)
    }
    terms = math.prod(n for c, n in sizes.items() if c not in kept)
    return torch.einsum(f"{','.join(letters)}->{kept}", *fixed), terms


def _rank(value: Any) -> int:
    if isinstance(value, BatchDependent):
        value = value.value
    return value.ndim if isinstance(value, Tensor) else 0


def _letters(call: Call, equation: Any, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of the operands and of the output, those of `...` in capitals from the right."""
    left, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_uppercase if c not in left]
    if len(terms) != len(ranks):
        call.refuse("einsum must name the dims of each operand", "Write one term for each")
    found, longest = [], ""
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        if hidden < 0 or (hidden > 0 and "..." not in term) or hidden > len(free):
            call.refuse("einsum must name every dim", "Write one letter for each dim, or '...'")
        names = "".join(free[:hidden])[::-1]
        longest = max(longest, names, key=len)
        found.append(term.replace("...", names))
    if not arrow:
        every = "".join(found)
        out = "..." + "".join(sorted(c for c in set(left) if every.count(c) == 1 and c.isalpha()))
    return found, out.replace("...", longest)


def _tensordot_run(a: Values, absolute: bool) -> Any:
    first, second = (f64(a[key], absolute) for key in ("self", "other"))
    return a.target(first, second, a["dims_self"], a["dims_other"])


@op(
    "tensordot.default",
    reads=("other", "dims_self", "dims_other"),
    linear=Linear(_tensordot_run, wide, heavy=True),
    samples=lambda draw, shape: (
        lambda x, y, w=constant(draw, 2, shape[-1]): torch.ops.aten.tensordot(
            x, w, [len(shape)], [1]
        )
    ),
)
def _tensordot(call: Call) -> Step:
    """The sum of X W, or of W X where all dims of W are summed, so that the batch stays first."""
    first = len(call.operands) == 1 and isinstance(call["self"], Operand)
    weight = call.fixed("other" if first else "self")
    rank = len(call.operands[0].shape) + 1
    dims = [call["dims_self"], call["dims_other"]]
    mine, theirs = dims if first else dims[::-1]
    x = string.ascii_letters[:rank]
    w = list(string.ascii_letters[rank : rank + weight.ndim])
    for a, b in zip(mine, theirs, strict=True):
        w[b % weight.ndim] = x[a % rank]
    kept = [c for c in x if c not in w]
    return product_step(call, x, weight, "".join(w), "".join(kept + [c for c in w if c not in x]))


def _stacked_step(call: Call, weight: Tensor, on_the_left: bool) -> Step:
    """Matrices of a stack, or a vector, times the operand or the operand times them."""
    shape = call.operands[0].shape
    rank = len(shape) + 1
    names = iter(string.ascii_lowercase)
    x = [next(names) for _ in range(rank)]
    if weight.ndim == 1:
        summed = x[-2] if on_the_left else x[-1]
        return product_step(call, "".join(x), weight, summed, "".join(c for c in x if c != summed))
    if rank < 3 and on_the_left:
        call.refuse("dim 0 must stay the batch", "Use x @ matrix.T")
    while weight.ndim > rank or (weight.ndim == rank > 2 and weight.shape[0] == 1):
        if weight.shape[0] != 1:
            call.refuse("dim 0 must stay the batch", "Give the input a dim for each stack")
        weight = weight[0]
    new = next(names)
    # the operand's last two dims, as far as it has them, and what of them is summed
    summed, kept = (x[-2], [x[-1]]) if on_the_left else (x[-1], x[-2:-1] if rank > 2 else [])
    lead = x[: rank - 2] if rank > 2 else x[:1]
    w = [new, summed] if on_the_left else [summed, new]
    out = list(lead)
    for dim in range(1, weight.ndim - 1):  # stacks, from the right
        size, where = weight.shape[-2 - dim], len(lead) - dim
        if size == 1:
            continue
        if where < 1:
            call.refuse("dim 0 must stay the batch", "Give the input a dim for each stack")
        if shape[where - 1] == size:
            w.insert(0, lead[where])
        else:
            out[where] = next(names)
            w.insert(0, out[where])
    weight = weight.reshape([*(n for n in weight.shape[:-2] if n > 1), *weight.shape[-2:]])
    tail = [new, *kept] if on_the_left else [*kept, new]
    return product_step(call, "".join(x), weight, "".join(w), "".join([*out, *tail]))


# --- bilinear maps with one constant factor ------------------------------------------------------


def _bilinear_matrix(call: Call) -> Tensor:
    """The matrix of a bilinear map whose other factor is the same for every sample."""
    weight = call.fixed("weight")
    first = isinstance(call["input1"], Operand)
    other = call.fixed("input2" if first else "input1")
    if other.ndim > 1:
        if math.prod(other.shape[:-1]) != 1:
            call.refuse("the constant factor must be one vector", "Apply one layer to each row")
        other = other.reshape(-1)
    return weight @ other if first else torch.einsum("oij,i->oj", weight, other)


def _bilinear_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    weight, other = constant(draw, 3, shape[-1], 2), constant(draw, 2)
    return lambda x, y: (
        torch.nn.functional.bilinear(x, other.expand(*x.shape[:-1], 2).contiguous(), weight)
        if len(shape) == 1
        else x @ other.new_ones(shape[-1], 1)
    )


@op(
    "bilinear.default",
    reads=("input1", "input2", "weight"),
    free=("bias",),
    offset=bias_norm,
    samples=_bilinear_samples,
)
def _bilinear(call: Call) -> Step:
    if len(call.operands) != 1:
        call.refuse(
            "one factor of a bilinear map must be a constant",
            ADVICE["bilinear"],
        )
    matrix = _bilinear_matrix(call)
    size = torch.linalg.vector_norm(call.fixed("weight")) * torch.linalg.vector_norm(
        call.fixed("input2" if isinstance(call["input1"], Operand) else "input1")
    )
    error = float(size) * 2.0**-50 * call.fixed("weight").shape[-1]
    return Step((Bound((matrix_norm(matrix) + error) * _SAFE),), "matrix of a bilinear map")


# --- cells of recurrent networks -----------------------------------------------------------------


@op(
    "rnn_tanh_cell.default",
    "rnn_relu_cell.default",
    reads=("hx", "w_ih", "w_hh"),
    free=("b_ih", "b_hh"),
    offset=added,
)
def _cell(call: Call) -> Step:
    """tanh(W x + b + U h + c): both gains are norms of matrices."""
    gains, sizes = [], []
    for name, matrix in (("input", "w_ih"), ("hx", "w_hh")):
        if isinstance(call[name], Operand):
            weight = call.fixed(matrix)
            gains.append(Bound(matrix_norm(weight), kind="exact"))
            sizes.append(sum(weight.shape))
    return Step(tuple(gains), "matrices of the cell, verified", roundings=sum(sizes) + 70.0)
