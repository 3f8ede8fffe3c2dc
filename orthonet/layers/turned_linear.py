r"""A linear layer whose backward spares one product of the size of its weight.

For a square weight at the center, \(M = c\,U\), the gradient in M depends on that in U through
\(S = U^\top \nabla_U\) alone. For the rows of a batch \(\nabla_U = (\nabla_y)^\top x\), so that
\(S = (\nabla_y U)^\top x = \nabla_x^\top x\): the gradient of the input, which backward needs
anyway, takes the place of that of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _torch
from orthonet.reparametrizers import OrthoWeight
from orthonet.reparametrizers.providers import compiled_turn, frame_of

__all__ = ["turned_linear"]


def turned_linear(layer: Any, x: Tensor) -> Tensor | None:
    """Return the output of `layer`, or None where the ordinary way is the faster one."""
    weight = layer.parametrization
    if (
        layer.in_features != layer.out_features
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or type(weight) is not OrthoWeight
        or _torch.is_hooked(weight, backward=True)
        or weight.original.dtype != x.dtype
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    if torch.compiler.is_compiling():
        if x.ndim < 2:
            return None
        turned = compiled_turn(weight, x, layer.bias, layer._factor)
        return None if turned is None else turned[0]
    frame = frame_of(weight)
    if frame is None:
        return None
    return _TurnedLinear.apply(x, *frame, layer.bias, layer._factor)


class _TurnedLinear(torch.autograd.Function):
    r"""\(y = K x U^\top + b\) as a function of x, of T in \(U e^T\) at T = 0, and of b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, frame: Tensor, bias: Tensor | None, factor: float
    ) -> Tensor:
        ctx.save_for_backward(x, u)
        ctx.factor = factor
        return nn.functional.linear(x, u if factor == 1.0 else u * factor, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        scaled = grad if ctx.factor == 1.0 else grad * ctx.factor
        grad_x = scaled @ u
        inputs = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # differentiated again: by way of U
            grad_u = scaled.reshape(rows.shape).T @ inputs
            return grad_x, grad_u, None, grad_bias, None
        return grad_x, None, grad_x.reshape(inputs.shape).T @ inputs, grad_bias, None
