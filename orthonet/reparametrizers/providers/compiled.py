"""Weights inside of `torch.compile`: one opaque operation a weight, which reads as eager code does.

A compiled graph cannot ask whether a parameter has changed since its value was made. The operation
asks when it runs: it finds the weight by its number, reads it, and copies the value, because the
compiler takes the memory of a result for its own. Its backward pass is that of the eager read. So a
compiled layer has the nodes of a plain layer and two more, whatever the weight, and nothing is
compiled again from step to step.

The number is a tensor in main memory, an input of the graph: layers of one shape share their
compiled code, and CUDA graphs, whose replay would not ask, leave such a graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.reparametrizers.weight import Weight, numbered

__all__ = ["compiled_read", "compiled_turn"]


def compiled_read(weight: Weight) -> Tensor:
    """The value of `weight`, traced as one operation where that is possible.

    It is not while `torch.export` traces, whose programs must run elsewhere, and where other
    tensors stand in for the parameters (`torch.func.functional_call`, FSDP2): there the map itself
    is traced.
    """
    parameters = list(weight.parameters())
    if not weight.opaque or not _is_plain(weight, parameters):
        return weight.evaluate()
    four = [*parameters, None, None, None][:4]
    return _Read.apply(weight.number, tuple(weight.shape), *four)  # type: ignore[return-value]


def _is_plain(weight: Weight, parameters: Sequence[Tensor]) -> bool:
    """Whether compiled code may read the module instead of the parameters that it sees."""
    if weight._sharded or not weight.caching or _torch.is_exporting() or len(parameters) > 4:
        return False
    return all(type(p) is nn.Parameter for p in parameters)


def compiled_turn(
    weight: Weight, x: Tensor, bias: Tensor | None, factor: float
) -> tuple[Tensor, Tensor] | None:
    r"""The output of a square linear layer, whose backward pass takes one product less.

    See `orthonet.layers.turned_linear`. None where the weight cannot be read as one operation.
    """
    parameters = list(weight.parameters())
    if len(parameters) != 1 or not _is_plain(weight, parameters):
        return None
    return _Turned.apply(weight.number, x, parameters[0], bias, factor)  # type: ignore[return-value]


class _Turned(torch.autograd.Function):
    r"""\(y = K x U^\top + b\) as a function of x, of the parameter of U, and of b."""

    @staticmethod
    def forward(
        number: Tensor, x: Tensor, parameter: Tensor, bias: Tensor | None, factor: float
    ) -> tuple[Tensor, Tensor]:
        u = _read(number, list(parameter.shape), parameter.dtype, parameter.device)
        return nn.functional.linear(x, u if factor == 1.0 else u * factor, bias), u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        number, x, _, bias, ctx.factor = inputs
        ctx.save_for_backward(number, x, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.biased = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, x, u = ctx.saved_tensors
        grad_x = (grad if ctx.factor == 1.0 else grad * ctx.factor) @ u
        s = grad_x.flatten(0, -2).mT @ x.flatten(0, -2)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.biased else None
        return None, grad_x, _turn(number, s), grad_bias, None


@torch.library.custom_op("orthonet::weight_turn", mutates_args=())
def _turn(number: Tensor, s: Tensor) -> Tensor:
    with _torch.recording_in_kernel():
        return ENGINE.turn(_weight(number), s).clone(memory_format=torch.contiguous_format)


@_turn.register_fake
def _(number: Tensor, s: Tensor) -> Tensor:
    return torch.empty_like(s, memory_format=torch.contiguous_format)


class _Read(torch.autograd.Function):
    """The value as a function of the parameters, which no operation of the graph reads.

    There are four of them, some of which are None: the compiler cannot trace a function of a
    variable number.
    """

    @staticmethod
    def forward(
        number: Tensor,
        shape: tuple[int, ...],
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        fourth: Tensor | None,
    ) -> Tensor:
        return _read(number, list(shape), first.dtype, first.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.shapes = [None if p is None else p.shape for p in inputs[2:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (number,) = ctx.saved_tensors
        shapes = [shape for shape in ctx.shapes if shape is not None]
        found = _pull_back(number, grad, [shape.numel() for shape in shapes])
        grads = [g.view(shape) for g, shape in zip(found, shapes, strict=True)]
        first, second, third, fourth = [*grads, None, None, None][:4]
        return None, None, first, second, third, fourth


@torch.library.custom_op("orthonet::weight", mutates_args=())
def _read(number: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.no_grad():
        return _weight(number)().clone(memory_format=torch.contiguous_format)


@_read.register_fake
def _(number: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.library.custom_op("orthonet::weight_backward", mutates_args=())
def _pull_back(number: Tensor, grad: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    weight = _weight(number)
    own = list(weight.parameters())
    learning = [p for p in own if p.requires_grad]
    with _torch.recording_in_kernel():
        found = iter(torch.autograd.grad(weight(), learning, grad, allow_unused=True))
    grads = [next(found) if p.requires_grad else None for p in own]
    return [
        p.new_zeros(p.numel()) if g is None else g.flatten().clone()
        for p, g in zip(own, grads, strict=True)
    ]


@_pull_back.register_fake
def _(number: Tensor, grad: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [grad.new_empty(size) for size in sizes]


def _weight(number: Tensor) -> Weight:
    weight = numbered(int(number))
    if weight is None:
        _checks.fail(
            "torch.compile",
            "the module of a constrained weight must be alive when compiled code reads it",
            "Keep a reference to the model",
            RuntimeError,
        )
    return weight
