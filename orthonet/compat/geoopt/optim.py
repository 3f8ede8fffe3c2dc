"""`geoopt.optim`: optimizers that read the manifold of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from orthonet import manifolds, optim

__all__ = ["RiemannianAdam", "RiemannianSGD"]


def _space(p: Tensor, group: dict[str, Any]) -> manifolds.Manifold:
    manifold = getattr(p, "manifold", None)
    return group["space"] if manifold is None else manifold.space


@torch.no_grad()
def _stabilize(optimizer: torch.optim.Optimizer) -> None:
    """Project the points and their momenta, in every group whose time has come."""
    for group in optimizer.param_groups:
        group["steps"] = group.get("steps", 0) + 1
        if not group["stabilize"] or group["steps"] % group["stabilize"]:
            continue
        for p in group["params"]:
            space = _space(p, group)
            p.copy_(space.project(p))
            for name in ("momentum_buffer", "exp_avg"):
                if name in optimizer.state[p]:
                    moment = optimizer.state[p][name]
                    moment.copy_(space.tangent(p, moment))


class RiemannianSGD(optim.RiemannianSGD):
    """Gradient descent with momentum, on the manifold that each `ManifoldParameter` knows.

    The options are those of [`RiemannianSGD`][orthonet.optim.RiemannianSGD], and one more.

    Args:
        stabilize: Project every so many steps; points do not drift here.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        stabilize: int | None = None,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self.defaults["stabilize"] = stabilize
        for group in self.param_groups:
            group.setdefault("stabilize", stabilize)

    def space_of(self, p: Tensor, group: dict[str, Any]) -> manifolds.Manifold:
        """Return the space that a parameter is on."""
        return _space(p, group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = super().step(closure)
        _stabilize(self)
        return loss


class RiemannianAdam(optim.RiemannianAdam):
    """Adam, on the manifold that each `ManifoldParameter` knows.

    The second moment of a curved point is its squared gradient norm, as in geoopt, so `lr` is about
    the length of its step. The options are those of
    [`RiemannianAdam`][orthonet.optim.RiemannianAdam]
    and `stabilize` as of `RiemannianSGD` here.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        stabilize: int | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
        self.defaults["stabilize"] = stabilize
        for group in self.param_groups:
            group.setdefault("stabilize", stabilize)

    def space_of(self, p: Tensor, group: dict[str, Any]) -> manifolds.Manifold:
        """Return the space of the manifold of a parameter."""
        return _space(p, group)

    def _square(self, space: manifolds.Manifold, p: Tensor, g: Tensor) -> Tensor:
        mean = super()._square(space, p, g)
        return mean * (p.numel() // max(mean.numel(), 1))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = super().step(closure)
        _stabilize(self)
        return loss
