"""Sums, means, norms, order statistics and softmax along feature dims."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F

from orthonet.certify.norms import matrix_norm
from orthonet.certify.ops.advice import ADVICE
from orthonet.certify.ops.entries import ORDERED, RUNNING, SOFTMAX, lengths
from orthonet.certify.ops.registry import (
    SMOOTH,
    Linear,
    Values,
    as_input,
    first_moves,
    op,
    place,
    wide,
)
from orthonet.certify.rules import COPY, Call, Rounding, Step, exact, of_squares, upper
from orthonet.linalg.bounds.rounding import div_up, down, sqrt_up

__all__: list[str] = []


def _without_dtype(a: Values, absolute: bool) -> Any:
    """A sum in float64, whatever dtype the model takes it in."""
    return a.target(*a.args, **{k: v for k, v in a.kwargs.items() if k != "dtype"})


_SUM = Linear(_without_dtype, wide, when=first_moves)


def _dims_of(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dims = sorted({1 + draw.randrange(len(shape)) for _ in range(2)})
    return draw.choice([dims, dims[:1]])


def _sum_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dims, keep, f = _dims_of(draw, shape), True, draw.choice([torch.sum, torch.mean])
    return lambda x, y: f(x, dims, keepdim=keep)


# That a cast to fewer bits is refused is checked for every node by its dtype.
@op(
    "sum.default",
    "sum.dim_IntList",
    "mean.default",
    "mean.dim",
    reads=("dim", "keepdim"),
    free=("dtype",),
    linear=_SUM,
    samples=_sum_samples,
)
def _reduce(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    places = call.feature_dims(call.given("dim"))
    count = math.prod(call.operand.shape[place] for place in places)
    root = sqrt_up(count)
    if call.op == "sum":
        return exact(root, f"sum of {count}", float(count))
    return exact(div_up(root, count), f"mean of {count}", count + 1.0)


@op(
    "cumsum.default",
    reads=("dim",),
    free=("dtype",),
    linear=_SUM,
    samples=lambda draw, shape: lambda x, y, d=place(draw, shape): x.cumsum(d),
)
def _cumsum(call: Call) -> Step:
    call.operand  # noqa: B018
    (where,) = call.feature_dims(call["dim"])
    size = call.operand.shape[where]
    value = matrix_norm(torch.ones(size, size, dtype=torch.float64).tril())
    return exact(value, f"triangle of ones {size}x{size}", float(size))


# --- norms ---------------------------------------------------------------------------------------


def _norm_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    order = draw.choice([2, 1, 2.0, 3, 1.5, math.inf, 4.0])
    dims = _dims_of(draw, shape)
    return lambda x, y: torch.linalg.vector_norm(x, order, dims, keepdim=True)


def _order(call: Call) -> float:
    order = call.given("ord", call.given("p", 2))
    return 2.0 if order is None else float(order)


@op(
    "norm.Scalar",
    "norm.ScalarOpt_dim",
    "linalg_vector_norm.default",
    "linalg_norm.default",
    reads=("p", "ord", "dim", "keepdim"),
    free=("dtype",),
    interval=lambda call: (0.0, math.inf),
    entries=lengths(_order),
    samples=_norm_samples,
)
def _norm(call: Call) -> Step:
    order = call.given("ord", call.given("p", 2))
    dims = call.given("dim")
    places = call.feature_dims(dims)
    if "linalg_norm" in str(call.target) and order is not None and len(places) != 1:
        order = "of matrices"
    order = 2.0 if order is None else order
    if isinstance(order, bool) or not isinstance(order, (int, float)) or order < 1.0:
        call.refuse("a norm must be the Euclidean one, or of an order >= 1", "Use ord=2")
    count = math.prod(call.operand.shape[place] for place in places)
    if order == 2.0 or order == math.inf:
        rounding = of_squares(count, math.prod(call.output_shape), count)
        return exact(1.0, "a norm is 1-Lipschitz", rounding)
    if order > 2.0:
        return exact(1.0, "a norm of order > 2 is 1-Lipschitz")
    # |x|_p <= n^(1/p - 1/2) |x|_2, attained by equal entries.
    power = 1.0 / order - 0.5
    value = sqrt_up(count) if order == 1 else count**power * (1.0 + 2.0**-40)
    rounding = float(count) if order == 1 else None
    return exact(value, f"norm of order {order} of {count} entries", rounding)


def _std_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = 1 + draw.randrange(len(shape))
    if shape[dim - 1] < 2:
        return None
    unbiased = draw.random() < 0.5
    return lambda x, y: x.std(dim, keepdim=True, unbiased=unbiased)


@op(
    "std.default",
    "std.dim",
    "std.correction",
    reads=("dim", "unbiased", "correction", "keepdim"),
    interval=lambda call: (0.0, math.inf),
    entries=lengths(lambda call: 2.0, scaled=True),
    samples=_std_samples,
)
def _std(call: Call) -> Step:
    """The norm of a projection, over the root of the number of degrees of freedom."""
    call.operand  # noqa: B018
    places = call.feature_dims(call.given("dim"))
    count = math.prod(call.operand.shape[place] for place in places)
    correction = call.given("correction", 1)
    correction = 1 if correction is None else correction
    if "unbiased" in call.arguments:
        correction = 1 if call.flag("unbiased") else 0
    freedom = count - correction
    if freedom <= 0:
        call.refuse(
            "a deviation must be taken over more than `correction` entries", "Use unbiased=False"
        )
    return exact(div_up(1.0, down(math.sqrt(freedom))), f"deviation of {count} entries")


# --- order statistics ----------------------------------------------------------------------------


def _extreme_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = place(draw, shape)
    return draw.choice(
        [
            lambda x, y: x.amax(dim, keepdim=True),
            lambda x, y: x.min(dim, keepdim=True)[0],
            lambda x, y: x.amin([dim], keepdim=True),
            lambda x, y: x.max(dim, keepdim=True).values,
        ]
    )


def _along(call: Call, name: str = "dim") -> Step:
    call.operand  # noqa: B018
    call.feature_dims(call[name])
    return exact(1.0, "selection or order", COPY)


@op(
    "amax.default",
    "amin.default",
    "max.dim",
    "min.dim",
    "max.default",
    "min.default",
    reads=("dim", "keepdim"),
    interval=as_input,
    entries=ORDERED,
    samples=_extreme_samples,
)
def _extreme(call: Call) -> Step:
    call.operand  # noqa: B018
    call.feature_dims(call.given("dim"))
    return exact(1.0, "selection or order", COPY)


@op(
    "sort.default",
    "sort.stable",
    reads=("dim",),
    free=("stable", "descending"),
    interval=as_input,
    entries=ORDERED,
    samples=lambda draw, shape: lambda x, y, d=place(draw, shape): x.sort(d).values,
)
def _sort(call: Call) -> Step:
    return _along(call)


def _topk_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = place(draw, shape)
    count = draw.randrange(1, 1 + shape[dim - 1 if dim > 0 else dim])
    options = {"largest": draw.random() < 0.5, "sorted": draw.random() < 0.7}
    return lambda x, y: x.topk(count, dim, **options).values


@op(
    "topk.default",
    reads=("k", "dim", "sorted"),
    free=("largest",),
    interval=as_input,
    entries=ORDERED,
    samples=_topk_samples,
)
def _topk(call: Call) -> Step:
    if not call.flag("sorted", True):
        call.refuse(
            "the largest entries must be sorted, for their order may jump otherwise",
            "Use sorted=True",
        )
    return _along(call)


def _rank_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim = place(draw, shape)
    rank = draw.randrange(1, 1 + shape[dim - 1 if dim > 0 else dim])
    return draw.choice(
        [
            lambda x, y: x.median(dim, keepdim=True).values,
            lambda x, y: x.kthvalue(rank, dim, keepdim=True).values,
        ]
    )


@op(
    "median.dim",
    "kthvalue.default",
    reads=("k", "dim", "keepdim"),
    interval=as_input,
    entries=ORDERED,
    samples=_rank_samples,
)
def _rank(call: Call) -> Step:
    """Order statistics are 1-Lipschitz in the largest change of an entry."""
    return _along(call)


@op(
    "cummax.default",
    "cummin.default",
    reads=("dim",),
    interval=as_input,
    entries=RUNNING,
    samples=lambda draw, shape: (
        lambda x, y, d=place(draw, shape), f=draw.choice([torch.cummax, torch.cummin]): (
            f(x, d).values
        )
    ),
)
def _running(call: Call) -> Step:
    """Every output follows the first entry where that is the largest."""
    (where,) = call.feature_dims(call["dim"])
    count = call.operand.shape[where]
    return exact(sqrt_up(count), f"extreme of up to {count} entries, each of all before", COPY)


# --- softmax -------------------------------------------------------------------------------------


@op(
    "logsumexp.default",
    reads=("dim", "keepdim"),
    entries=ORDERED,
    samples=lambda draw, shape: (
        lambda x, y, d=place(draw, shape): torch.logsumexp(x, d, keepdim=True)
    ),
)
def _log_sum_exp(call: Call) -> Step:
    call.feature_dims(call["dim"])
    rounding = SMOOTH + math.prod(call.operand.shape)
    return exact(1.0, "gradient is a distribution", rounding)


def _softmax_samples(draw: random.Random, shape: tuple[int, ...]) -> Any:
    dim, f = place(draw, shape), draw.choice([torch.softmax, torch.log_softmax])
    return lambda x, y: f(x, dim)


@op(
    "softmax.int",
    "log_softmax.int",
    "_softmax.default",
    "_log_softmax.default",
    reads=("dim",),
    free=("dtype", "half_to_float"),
    samples=_softmax_samples,
    entries=SOFTMAX,
    interval=lambda call: (0.0, 1.0) if call.op == "softmax" else (-math.inf, 0.0),
)
def _softmax(call: Call) -> Step:
    call.operand  # noqa: B018
    dim = call["dim"]
    if not isinstance(dim, int):
        call.refuse("softmax must name its dim", "Pass dim=1 or another feature dimension")
    (where,) = call.feature_dims(dim)
    # With the differences d to the largest entry, sum softmax d <= log n: what d rounds is bounded.
    count = call.operand.shape[where]
    rows = math.prod(call.operand.shape) // max(1, count)
    offset = math.sqrt(rows) * (3.0 + 2.0 * math.log(max(1, count)))
    if call.op == "softmax":
        rounding = Rounding(count + 140.0, 0.0, offset)
        # of one entry it is constant, and so is its logarithm
        return exact(0.5 if count > 1 else 0.0, "largest Jacobian of softmax", rounding)
    offset, size = offset * math.sqrt(count), 2.0 + 2.0 * math.sqrt(count)
    rounding = Rounding(count + 140.0, size, offset)
    steepest = sqrt_up(count) if count > 1 else 0.0
    return exact(steepest, "largest Jacobian of log-softmax", rounding)


# --- normalization by a length -------------------------------------------------------------------

_LEAST = 1e-6


@op(
    F.normalize,
    reads=("p", "dim", "eps"),
    samples=lambda draw, shape: (
        lambda x, y, d=place(draw, shape), e=draw.choice([1e-3, 0.5]): F.normalize(x, dim=d, eps=e)
    ),
)
def _normalize(call: Call) -> Step:
    """The projection to a ball of radius eps, divided by eps."""
    call.operand  # noqa: B018
    call.feature_dims(call["dim"])
    eps = call.number("eps")
    if call["p"] != 2 or call.given("out") is not None or eps < _LEAST:
        call.refuse(f"normalize must have p=2 and eps >= {_LEAST}", ADVICE["normalize"])
    return exact(div_up(1.0, eps), "projection to a ball, over its radius")


@op(
    F.local_response_norm,
    reads=("size", "alpha", "beta", "k"),
    samples=lambda draw, shape: (
        (lambda x, y, n=draw.choice([2, 3]): F.local_response_norm(x, n, 0.3, 0.75, 1.5))
        if len(shape) > 1
        else None
    ),
)
def _response(call: Call) -> Step:
    r"""x_i / D_i^beta with D_i = k + alpha / n * sum of squares of n entries around.

    The Jacobian is diag(D^-beta) minus 2 beta alpha / n x_i x_j D_i^(-beta - 1). Of the latter,
    entries off the diagonal are at most beta k^-beta, because 2 |x_i x_j| alpha / n <= D_i - k;
    each row and each column has n - 1 of them. On the diagonal it is at most twice as large.
    """
    size, alpha, beta, k = (call.number(name) for name in ("size", "alpha", "beta", "k"))
    powers = beta * abs(math.log(k)) if 0.0 < k < math.inf else math.inf
    if not (powers < 700.0 and alpha >= 0.0 and beta >= 0.0):
        call.refuse(
            "a response norm must have k > 0, alpha >= 0, beta >= 0 and a k^-beta in range",
            "Use the default parameters",
        )
    value = k**-beta * (max(1.0, 2.0 * beta - 1.0) + (size - 1.0) * beta) * (1.0 + 2.0**-40)
    return upper(value, "by construction")
