r"""A linear layer whose backward spares one product of the size of its weight.

With the re-centred parameter \(M = c U\), U square, \(y = U x + b\), the gradient is
\(\nabla_M = U (S - S^\top) / 2c\) with \(S = U^\top \nabla_U\), and for the rows of a batch
\(S = (\nabla_y U)^\top x = \nabla_x^\top x\): the gradient of the input, which backward needs
anyway, in place of that of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orthonet._torch import is_hooked
from orthonet.linalg import polar
from orthonet.linalg._matrix import minus_transpose
from orthonet.linalg._polar_gradient import differentiable_gradient
from orthonet.linalg.polar import save_centred, saved_centred
from orthonet.reparametrizers import OrthoWeight
from orthonet.reparametrizers._cache_state import steps

__all__ = ["fused_linear"]


def fused_linear(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """The output of `layer`, or None where the ordinary way is the only or the faster one.

    It is taken where a forward pass would re-centre the parameter (training, eager or compiled, a
    warm polar orthogonalizer without a normalizer), the weight is square, and the input needs its
    gradient. The parameter is then all that another use of the weight in the same step has to know:
    it finds it re-centred and adds its own gradient. As nothing is cached for such a use, a
    parameter that has been re-centred here and not changed since goes the ordinary way, so that the
    second of several forward passes in one step computes the weight for all that follow.
    """
    weight = layer._modules["parametrization"]
    if (
        layer.in_features != layer.out_features
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or type(weight) is not OrthoWeight
        or layer._factor != 1.0
        or weight._group is not None
        or is_hooked(weight)
        or weight.original.dtype != x.dtype
    ):
        return None
    compiling, original = torch.compiler.is_compiling(), weight.original
    if not compiling and vars(layer).get("_fused_at") == _state(original):
        return None
    centred = weight.recentre_()
    if centred is None:
        return None
    if not compiling:
        layer._fused_at = _state(original)  # type: ignore[assignment]
    return _FusedLinear.apply(x, original, *centred, layer.bias)  # type: ignore[return-value]


def _state(w: Tensor) -> tuple[int, int, int]:
    return w._version, w.data_ptr(), steps()


class _FusedLinear(torch.autograd.Function):
    """x U^T + b as a function of x, W = c U and b; see above."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, u: Tensor, scale: Tensor | float, bias: Tensor | None
    ) -> Tensor:
        save_centred(ctx, scale, x, w, u)
        return nn.functional.linear(x, u, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, w, u), scale = saved_centred(ctx)
        _, needs_w, _, _, needs_bias = ctx.needs_input_grad
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            u = polar(w)
            outer = grad.flatten(0, -2).T @ x.flatten(0, -2)
            return grad @ u, differentiable_gradient(w, u, outer), None, None, grad_bias
        grad_x, grad_w = grad @ u, None
        if needs_w:
            s = grad_x.flatten(0, -2).T @ x.flatten(0, -2)
            grad_w = (u @ minus_transpose(s)).mul_(0.5 / scale)
        return grad_x, grad_w, None, None, grad_bias
