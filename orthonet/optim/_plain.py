"""The Euclidean steps of the parameters that are not on the manifold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthonet import _torch

__all__ = ["adam_step", "sgd_step"]


def sgd_step(params: list[Tensor], states: Any, group: dict[str, Any]) -> None:
    """As `torch.optim.SGD`."""
    grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    momentum, decay = group["momentum"], group["weight_decay"]
    if decay:
        grads = list(_torch.foreach_add(grads, params, alpha=decay))
    if momentum:
        for p, grad in zip(params, grads, strict=True):
            buffer = states[p].get("momentum_buffer")
            if buffer is None:  # at first the gradient, without dampening
                states[p]["momentum_buffer"] = grad.detach().clone()
            else:
                buffer.mul_(momentum).add_(grad, alpha=1.0 - group["dampening"])
        buffers = [states[p]["momentum_buffer"] for p in params]
        ahead = group["nesterov"]
        grads = list(_torch.foreach_add(grads, buffers, alpha=momentum)) if ahead else buffers
    _torch.foreach_sub_(params, _torch.foreach_mul(grads, group["lr"]))


def adam_step(params: list[Tensor], states: Any, group: dict[str, Any]) -> None:
    """As `torch.optim.AdamW`: entrywise second moments, decoupled weight decay."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    for p in params:
        if not states[p]:
            states[p]["step"] = torch.tensor(0.0, dtype=torch.float32)
            states[p]["exp_avg"] = torch.zeros_like(p)
            states[p]["exp_avg_sq"] = torch.zeros_like(p)
        states[p]["step"] += 1
    first = [states[p]["exp_avg"] for p in params]
    second = [states[p]["exp_avg_sq"] for p in params]
    _torch.foreach_lerp_(first, grads, 1.0 - beta1)
    _torch.foreach_mul_(second, beta2)
    _torch.foreach_addcmul_(second, grads, grads, 1.0 - beta2)
    steps = [states[p]["step"] for p in params]
    if group["weight_decay"]:
        _torch.foreach_mul_(params, 1.0 - lr * group["weight_decay"])
    for p, m, v, step in zip(params, first, second, steps, strict=True):
        count = step.double()  # in float32, 1 - 0.999 has four digits
        first_share, second_share = (1.0 - beta**count for beta in (beta1, beta2))
        denominator = v.sqrt().div_(second_share.sqrt().to(p)).add_(group["eps"])
        p.sub_((m / denominator).mul_(lr / first_share.to(p)))
