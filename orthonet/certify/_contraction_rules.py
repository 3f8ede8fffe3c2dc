"""Rules of products with a constant tensor: einsum, tensordot and products of stacked matrices."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthonet.certify._bound import Bound
from orthonet.certify._norms import matrix_norm
from orthonet.certify._rules import BatchDependent, Call, Operand, Rounding, Step, register_rule
from orthonet.certify._sizes import absolute_matrix
from orthonet.linalg._rounding import mul_up, power_of_two_scale, sqrt_up, squared_norm_up

__all__ = ["product_step", "stacked_step"]

_MATRICES = 256  # of one stack, whose norms are bounded one by one


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
    scale = power_of_two_scale(blocks)  # beside the largest entry what underflows is nothing
    frobenius = sqrt_up(squared_norm_up(blocks / scale, 1)) if scale else 0.0
    return mul_up(frobenius, scale), False


@register_rule("einsum")
def _einsum(call: Call) -> Step:
    equation, tensors = call.args[0], call.args[1]
    if not isinstance(tensors, (tuple, list)):
        tensors = call.args[1:]
    moving = [i for i, t in enumerate(tensors) if isinstance(t, Operand)]
    if len(moving) != 1 or len(tensors) > 2:
        call.refuse(
            "einsum must have one tensor that depends on the input, and one constant at most",
            "A product of two such tensors has no Lipschitz constant; multiply constants before",
        )
    rank = len(call.operands[0].shape) + 1
    place = moving[0]
    ranks = [rank if i == place else _rank(t) for i, t in enumerate(tensors)]
    letters, out = _letters(call, equation, ranks)
    if len(tensors) == 1:
        return product_step(call, letters[0], torch.ones((), dtype=torch.float64), "", out)
    constant = Call(call.op, call.path, tuple(tensors), {}, call.output_shape, call.source)
    weight = constant.constant(1 - place, "operands")
    return product_step(call, letters[place], weight, letters[1 - place], out)


def _rank(constant: Any) -> int:
    if isinstance(constant, BatchDependent):
        constant = constant.value
    return constant.ndim if isinstance(constant, Tensor) else 0


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


@register_rule("tensordot")
def _tensordot(call: Call) -> Step:
    """The sum of X W, or of W X where all dims of W are summed, so that the batch stays first."""
    first = len(call.operands) == 1 and isinstance(call.args[0], Operand)
    weight = call.constant(*((1, "other") if first else (0, "self")))
    rank = len(call.operands[0].shape) + 1
    dims = [call.get(2, "dims_self", ()), call.get(3, "dims_other", ())]
    mine, theirs = dims if first else dims[::-1]
    x = string.ascii_letters[:rank]
    w = list(string.ascii_letters[rank : rank + weight.ndim])
    for a, b in zip(mine, theirs, strict=True):
        w[b % weight.ndim] = x[a % rank]
    kept = [c for c in x if c not in w]
    return product_step(call, x, weight, "".join(w), "".join(kept + [c for c in w if c not in x]))


def stacked_step(call: Call, weight: Tensor, on_the_left: bool) -> Step:
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
        size, place = weight.shape[-2 - dim], len(lead) - dim
        if size == 1:
            continue
        if place < 1:
            call.refuse("dim 0 must stay the batch", "Give the input a dim for each stack")
        if shape[place - 1] == size:
            w.insert(0, lead[place])
        else:
            out[place] = next(names)
            w.insert(0, out[place])
    weight = weight.reshape([*(n for n in weight.shape[:-2] if n > 1), *weight.shape[-2:]])
    tail = [new, *kept] if on_the_left else [*kept, new]
    return product_step(call, "".join(x), weight, "".join(w), "".join([*out, *tail]))
