"""Weights inside of `torch.compile`: one opaque operation a weight, which reads as eager code does.

A compiled graph cannot ask whether a parameter has changed since its value was made. The operation
asks when it runs: it finds the weight by its number, reads it, and copies the value, because the
compiler takes the memory of a result for its own. Its backward pass is that of the eager read. So a
compiled layer has the nodes of a plain layer and two more, whatever the weight, and nothing is
compiled again from step to step.

The parameters are inputs of the operation, flat, because the compiler copies tensors of four
dimensions into another layout in front of a convolution. Where they are not those of the module,
because the graph has changed them or a functional call has put others in their place, the weight is
computed from them. The number is a tensor in main memory: layers of one shape share their compiled
code, and CUDA graphs, whose replay would not ask, leave such a graph alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet.reparametrizers.providers.computation import pulled_cold
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.reparametrizers.weight import Weight, numbered

__all__ = ["compiled_read", "compiled_turn"]


def compiled_read(weight: Weight) -> Tensor:
    """The value of `weight`, traced as one operation where that is possible.

    It is not while `torch.export` traces, whose programs must run elsewhere, and for the lent
    parameters of FSDP2: there the map itself is traced.
    """
    if _torch.is_exporting() and torch.onnx.is_in_onnx_export():
        sentence = _checks.message(
            "torch.onnx.export",
            "a constrained weight is computed by operations that ONNX may not have",
            "Export orthonet.to_plain(model.eval()), whose weights are stored as they are",
            shape=tuple(weight.shape),
        )
        warnings.warn(sentence, UserWarning, stacklevel=2)
    parameters = list(weight.parameters())
    if not weight.opaque or not _is_plain(weight, parameters):
        return weight.evaluate()
    return _read(weight.number, [p.reshape(-1) for p in parameters], list(weight.shape))


def compiled_turn(
    weight: Weight, x: Tensor, bias: Tensor | None, factor: float
) -> tuple[Tensor, Tensor] | None:
    r"""The output of a square linear layer, whose backward pass takes one product less.

    See `orthonet.layers.turned_linear`. None where the weight cannot be read as one operation.
    """
    parameters = list(weight.parameters())
    if len(parameters) != 1 or not _is_plain(weight, parameters):
        return None
    return _Turned.apply(weight.number, x, parameters[0], bias, factor)


def _is_plain(weight: Weight, parameters: Sequence[Tensor]) -> bool:
    """Whether compiled code may read the module instead of the parameters that it sees."""
    if weight._sharded or not weight.caching or _torch.is_exporting():
        return False
    return all(type(p) is nn.Parameter for p in parameters)


class _Turned(torch.autograd.Function):
    r"""\(y = K x U^\top + b\) as a function of x, of the parameter of U, and of b."""

    @staticmethod
    def forward(
        number: Tensor, x: Tensor, parameter: Tensor, bias: Tensor | None, factor: float
    ) -> tuple[Tensor, Tensor]:
        u = _read(number, [parameter.reshape(-1)], list(parameter.shape))
        return nn.functional.linear(x, u if factor == 1.0 else u * factor, bias), u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        number, x, parameter, bias, ctx.factor = inputs
        ctx.save_for_backward(number, x, parameter, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.biased = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        number, x, parameter, u = ctx.saved_tensors
        grad_x = (grad if ctx.factor == 1.0 else grad * ctx.factor) @ u
        s = grad_x.flatten(0, -2).mT @ x.flatten(0, -2)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.biased else None
        (pulled,) = _pull_back(number, [parameter.reshape(-1)], s, u)
        return None, grad_x, pulled.view(parameter.shape), grad_bias, None


@torch.library.custom_op("orthonet::weight", mutates_args=())
def _read(number: Tensor, parameters: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    weight = _weight(number, parameters)
    with torch.no_grad():
        value = weight()
        return value.clone(memory_format=torch.contiguous_format)


@_read.register_fake
def _(number: Tensor, parameters: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return parameters[0].new_empty(shape)


@torch.library.custom_op(
    "orthonet::weight_backward",
    mutates_args=(),
    schema="(Tensor number, Tensor[] parameters, Tensor grad, Tensor? u=None) -> Tensor[]",
)
def _pull_back(
    number: Tensor, parameters: Sequence[Tensor], grad: Tensor, u: Tensor | None = None
) -> list[Tensor]:
    r"""From the gradient G of the value; from \(S = U^\top G\) where U is given."""
    weight = _weight(number, parameters)
    with _torch.recording_in_kernel():
        grads = ENGINE.pull_back(weight, *((grad,) if u is None else (None, grad)))
        if grads is None:
            found = pulled_cold(weight, grad if u is None else u @ grad)
            grads = [None if g is None else g.clone() for g in found]  # may be `grad` itself
    pairs = zip(parameters, grads, strict=True)
    return [torch.zeros_like(p) if g is None else g.reshape(-1).contiguous() for p, g in pairs]


@_pull_back.register_fake
def _(
    number: Tensor, parameters: Sequence[Tensor], grad: Tensor, u: Tensor | None = None
) -> list[Tensor]:
    return [torch.empty_like(p) for p in parameters]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], *inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[None, list[Tensor], None]:
    number, *parameters = ctx.saved_tensors
    return None, _pull_back(number, parameters, grad), None


_read.register_autograd(_backward, setup_context=_save)


def _weight(number: Tensor, parameters: Sequence[Tensor]) -> Weight:
    """The weight of this number; a copy that holds `parameters` where they are not its own."""
    weight = numbered(int(number))
    if weight is None:
        _checks.fail(
            "torch.compile",
            "the module of a constrained weight must be alive when compiled code reads it",
            "Keep a reference to the model",
            RuntimeError,
        )
    pairs = zip(weight.parameters(), parameters, strict=False)
    # or copies of them that the compiler has made
    same = all(
        own.data_ptr() == given.data_ptr() or torch.equal(own.detach().reshape(-1), given.detach())
        for own, given in pairs
    )
    return weight if same else weight.holding(parameters)
