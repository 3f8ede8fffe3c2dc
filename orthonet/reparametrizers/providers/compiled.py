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
from orthonet.reparametrizers.weight import Weight, numbered

__all__ = ["compiled_read"]


def compiled_read(weight: Weight) -> Tensor:
    """The value of `weight`, traced as one operation where that is possible.

    It is not while `torch.export` traces, whose programs must run elsewhere, and where other
    tensors stand in for the parameters (`torch.func.functional_call`, FSDP2): there the map itself
    is traced.
    """
    parameters = list(weight.parameters())
    if not weight.opaque or weight._sharded or not weight.caching or _torch.is_exporting():
        return weight.evaluate()
    if len(parameters) > 4 or any(type(p) is not nn.Parameter for p in parameters):
        return weight.evaluate()
    four = [*parameters, None, None, None][:4]
    return _Read.apply(weight.number, tuple(weight.shape), *four)  # type: ignore[return-value]


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
        return _read(number, list(shape), first.new_empty(0))

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
def _read(number: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    with torch.no_grad():
        return _weight(number)().clone(memory_format=torch.contiguous_format)


@_read.register_fake
def _(number: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)


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
