"""Rules of matrix products, normalization, recurrent cells, and of our own functions."""

from __future__ import annotations

import math

from torch import Tensor

from orthonet import functional
from orthonet.certify._bound import Bound
from orthonet.certify._contraction_rules import stacked_step
from orthonet.certify._norms import matrix_norm
from orthonet.certify._rules import (
    COPY,
    Call,
    Operand,
    Rounding,
    Step,
    exact,
    of_squares,
    register_rule,
    upper,
)
from orthonet.certify._sizes import absolute_matrix
from orthonet.linalg._rounding import add_up, div_up, down, mul_up, up

__all__: list[str] = []


def _matrix(call: Call, weight: Tensor) -> Bound:
    if weight.ndim != 2:
        call.refuse(
            "the factor of a matrix product must be a constant matrix",
            "Use torch.nn.Linear, or one product for each matrix",
        )
    return Bound(matrix_norm(weight), kind="exact")


@register_rule("linear")
def _linear(call: Call) -> Step:
    call.operand  # noqa: B018 (refuses a second one)
    return _one_matrix(call, call.constant(1, "weight"))


def _one_matrix(call: Call, weight: Tensor) -> Step:
    gain = _matrix(call, weight)
    size = "{}x{}".format(*weight.shape)
    return Step((gain,), f"matrix {size}, verified", roundings=max(weight.shape) + 1.0)


@register_rule("matmul", "mm", "bmm", "mv")
def _product(call: Call) -> Step:
    """X @ W, or W @ x, which acts on the columns of every sample; W may be a stack of matrices."""
    left = len(call.operands) == 1 and isinstance(call.args[1], Operand)
    if left:
        weight = call.constant(0, "input")
    else:
        call.operand  # noqa: B018 (refuses a second one)
        weight = call.constant(1, "other")
    if weight.ndim != 2:
        return stacked_step(call, weight, left)
    if left and len(call.operands[0].shape) < 2:
        call.refuse("dim 0 must stay the batch", "Use x @ matrix.T")
    return _one_matrix(call, weight)


@register_rule("addmm", "baddbmm")
def _product_and_shift(call: Call) -> Step:
    if isinstance(call.args[0], Operand):
        call.refuse("the tensor to add must be a constant", "Write x + y @ matrix")
    beta, alpha = (call.get(i, n, 1) for i, n in ((3, "beta"), (4, "alpha")))
    if not all(isinstance(v, (int, float)) for v in (beta, alpha)):
        call.refuse("beta and alpha must be numbers", "Use constants of the model")
    inner = Call(call.op, call.path, call.args[1:], {}, call.output_shape, call.source)
    step = _product(inner)
    if alpha == beta == 1 and not isinstance(step.roundings, Rounding):
        return step
    alpha = abs(float(alpha))
    gain = Bound(mul_up(alpha, step.gains[0].value), kind=step.gains[0].kind)
    added = call.constant(0, "input")
    repeats = math.prod(call.output_shape) / max(1, added.numel())
    offset = abs(float(beta)) * float(added.norm()) * math.sqrt(repeats) * (1.0 + 2.0**-40)
    weight = next(t for t in call.args[1:] if not isinstance(t, Operand))
    rounding = step.roundings
    if not isinstance(rounding, Rounding):
        rounding = Rounding(float(rounding), absolute_matrix(weight))  # type: ignore[arg-type]
    size = mul_up(alpha, rounding.size)
    return step._replace(gains=(gain,), roundings=Rounding(rounding.count + 3.0, size, offset))


@register_rule("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: Call) -> Step:
    native = call.op != "batch_norm"
    if not native and call.get(5, "training", False):
        call.refuse(
            "normalization must use running statistics, not those of the batch",
            "Use track_running_stats=True and train it again",
        )
    variance = call.constant(4, "running_var") + call.get(6 if native else 7, "eps", 1e-5)
    if not bool((variance > 0).all()):
        call.refuse("running_var + eps must be positive", "Use a positive eps")
    scale = variance.rsqrt()
    if call.get(1, "weight", None) is not None:
        scale = scale * call.constant(1, "weight").abs()
    call.constant(3, "running_mean")
    # Four roundings of a non-negative number.
    value = mul_up(float(scale.max()), up(1.0 + 2.0**-49))
    return exact(value, "diagonal of running statistics", 6.0)


@register_rule("_native_batch_norm_legit", "native_batch_norm", "_batch_norm_impl_index")
def _batch_statistics(call: Call) -> Step:
    call.refuse(
        "normalization must use running statistics, not those of the batch",
        "Use track_running_stats=True and train it again",
    )


_NORMALIZERS = {
    "layer_norm": (2, 4),
    "group_norm": (2, 4),
    "instance_norm": (1, 7),
    "rms_norm": (2, 3),
}


@register_rule(*_NORMALIZERS)
def _normalization(call: Call) -> Step:
    """Centering is a projection, and x / sqrt(mean(x^2) + eps) has slope at most 1 / sqrt(eps)."""
    scale, last = _NORMALIZERS[call.op]
    eps = call.get(last, "eps", 1e-5 if call.op != "rms_norm" else None)
    if not isinstance(eps, (int, float)) or eps <= 0.0:
        call.refuse("a normalization must have a positive eps", "Use the default eps=1e-5")
    if call.op == "instance_norm" and not call.get(5, "use_input_stats", True):
        scaled = Call("batch_norm", call.path, (*call.args[:5], False, 0.1, eps), {},
                      call.output_shape, call.source)  # fmt: skip
        step = _batch_norm(scaled)
        repeats = math.sqrt(math.prod(call.output_shape[1:]))
        variance, size = call.constant(4, "running_var") + eps, step.gains[0].value
        offset = float((call.constant(3, "running_mean") * variance.rsqrt()).norm())
        if call.get(1, "weight", None) is not None:
            offset *= float(call.constant(1, "weight").abs().max())
        if call.get(2, "bias", None) is not None:
            offset += float(call.constant(2, "bias").norm())
        rounding = Rounding(8.0, size, offset * repeats * (1.0 + 2.0**-40))
        return step._replace(roundings=rounding)
    gain = 1.0
    if call.get(scale, "weight", None) is not None:
        gain = float(call.constant(scale, "weight").abs().max())
    root = down(math.sqrt(eps))
    return upper(mul_up(gain, div_up(1.0, root)), "1 / sqrt(eps): normalizing a small input")


@register_rule("rnn_tanh_cell", "rnn_relu_cell")
def _cell(call: Call) -> Step:
    """tanh(W x + b + U h + c): both gains are norms of matrices."""
    gains, sizes = [], []
    for place, name in ((0, "w_ih"), (1, "w_hh")):
        if isinstance(call.args[place], Operand):
            weight = call.constant(place + 2, name)
            gains.append(_matrix(call, weight))
            sizes.append(sum(weight.shape))
    return Step(tuple(gains), "matrices of the cell, verified", roundings=sum(sizes) + 70.0)


@register_rule(functional.max_min, functional.group_sort, functional.householder)
def _sorting(call: Call) -> Step:
    """1-Lipschitz whatever the pairs are, as long as they lie within one sample."""
    if call.op == "householder":
        call.constant(1, "theta")
    call.feature_dims(call.get(1 if call.op == "max_min" else 2, "dim", 1))
    return exact(1.0, "by construction", 16.0 if call.op == "householder" else COPY)


@register_rule(functional.absolute)
def _absolute(call: Call) -> Step:
    call.operand  # noqa: B018
    return exact(1.0, "by construction", COPY)


@register_rule(functional.l2_norm_pool, functional.global_l2_norm_pool)
def _pooling(call: Call) -> Step:
    spatial = call.get(1, "kernel_size" if "global" not in call.op else "spatial", None)
    dims = spatial if isinstance(spatial, int) else len(tuple(spatial or ()))
    if len(call.operand.shape) < dims:
        call.refuse("the batch dimension must not be pooled", "Add a channel dimension")
    # The scale is a float that was computed in a few roundings.
    count = math.prod(call.operand.shape)
    rounding = of_squares(count, math.prod(call.output_shape), count)
    return upper(add_up(1.0, 2.0**-48), "by construction", rounding)
