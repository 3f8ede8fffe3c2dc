"""`geoopt.optim`: optimizers that read the manifold of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from orthonet import manifolds, optim

__all__ = ["RiemannianAdam", "RiemannianSGD"]


class _OnManifolds(torch.optim.Optimizer):
    """An optimizer that asks each parameter for its manifold, and projects every so many steps."""

    def space_of(self, p: Tensor, group: dict[str, Any]) -> manifolds.Manifold:
        """Return the space that a parameter is on."""
        manifold = getattr(p, "manifold", None)
        return group["space"] if manifold is None else manifold.space

    def _stabilize_every(self, stabilize: int | None) -> None:
        self.defaults["stabilize"] = stabilize
        for group in self.param_groups:
            group.setdefault("stabilize", stabilize)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = super().step(closure)
        self._stabilize()
        return loss

    @torch.no_grad()
    def _stabilize(self) -> None:
        """Project the points and their momenta, in every group whose time has come."""
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            if not group["stabilize"] or group["steps"] % group["stabilize"]:
                continue
            for p in group["params"]:
                space = self.space_of(p, group)
                p.copy_(space.project(p))
                for name in ("momentum_buffer", "exp_avg"):
                    if name in self.state[p]:
                        moment = self.state[p][name]
                        moment.copy_(space.tangent(p, moment))


class RiemannianSGD(_OnManifolds, optim.RiemannianSGD):
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
        self._stabilize_every(stabilize)


class RiemannianAdam(_OnManifolds, optim.RiemannianAdam):
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
        self._stabilize_every(stabilize)

    def _square(self, space: manifolds.Manifold, p: Tensor, g: Tensor) -> Tensor:
        mean = super()._square(space, p, g)
        return mean * (p.numel() // max(mean.numel(), 1))
