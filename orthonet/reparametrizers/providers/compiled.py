"""Weights inside of `torch.compile`: one opaque operation a weight, which reads as eager code does.

A compiled graph cannot ask whether a parameter has changed since its value was made. The operation
asks when it runs: it finds the weight that its tensors belong to, reads it, and copies the value,
because the compiler takes the memory of a result for its own. Its backward pass is that of the
eager read. So a compiled layer has the nodes of a plain layer and two more, whatever the weight,
and nothing is compiled again from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet.reparametrizers.weight import Weight, alive

__all__ = ["compiled_read"]

_known: dict[tuple[int, ...], weakref.ref[Weight]] = {}  # by the places of the parameters


def compiled_read(weight: Weight) -> Tensor:
    """The value of `weight`, traced as one operation where that is possible.

    It is not while `torch.export` traces, whose programs must run elsewhere, and where other
    tensors stand in for the parameters (`torch.func.functional_call`, FSDP2): there the map itself
    is traced.
    """
    parameters = list(weight.parameters())
    if _torch.is_exporting() or weight._sharded or not weight.caching:
        return weight.evaluate()
    if any(type(p) is not nn.Parameter for p in parameters):
        return weight.evaluate()
    return _read(parameters, list(weight.shape))


@torch.library.custom_op("orthonet::weight", mutates_args=())
def _read(parameters: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return _owner(parameters)().clone(memory_format=torch.contiguous_format)


@_read.register_fake
def _(parameters: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return parameters[0].new_empty(shape)


@torch.library.custom_op("orthonet::weight_backward", mutates_args=())
def _pull_back(parameters: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    weight = _owner(parameters)
    own = list(weight.parameters())
    learning = [p for p in own if p.requires_grad]
    with torch.enable_grad():
        value = weight()
    found = iter(torch.autograd.grad(value, learning, grad, allow_unused=True))
    grads = [next(found) if p.requires_grad else None for p in own]
    return [
        torch.zeros_like(p) if g is None else g.clone()
        for p, g in zip(own, grads, strict=True)
    ]


@_pull_back.register_fake
def _(parameters: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    return [torch.empty_like(p) for p in parameters]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
    return _pull_back(list(ctx.saved_tensors), grad), None


_read.register_autograd(_backward, setup_context=_setup)


def _places(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in parameters)


def _owner(parameters: Sequence[Tensor]) -> Weight:
    """The weight of which these are the parameters."""
    places = _places(parameters)
    reference = _known.get(places)
    weight = None if reference is None else reference()
    if weight is not None and _places(list(weight.parameters())) == places:
        return weight
    for weight in alive():
        own = list(weight.parameters())
        if len(own) == len(places) and _places(own) == places:
            if len(_known) > 4096:
                _known.clear()
            _known[places] = weakref.ref(weight)
            return weight
    _checks.fail(
        "torch.compile",
        "the parameters of a constrained weight must be those of a module of this process",
        "Do not pass the parameters of one model to another inside of the compiled function",
        RuntimeError,
        shapes=[tuple(p.shape) for p in parameters],
    )
