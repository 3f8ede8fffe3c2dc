"""SGD and Adam on every space that has a gradient, a retraction and a transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from orthonet import _checks
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds import Manifold, Rn
from orthonet.optim._base import PointOptimizer, adam_factor

__all__ = ["RiemannianAdam", "RiemannianOptimizer", "RiemannianSGD", "check_point"]


def check_point(owner: object, space: Manifold, p: Tensor) -> None:
    """`p` must be a point of `space`, in a dtype whose rounding keeps it there."""
    _checks.require(
        isinstance(space, Manifold),
        owner,
        "space must be a space of orthonet.manifolds",
        "Use e.g. {'params': [...], 'space': orthonet.manifolds.Sphere()}",
        space=space,
    )
    if isinstance(space, Rn):
        return
    _checks.require(
        p.dtype == compute_dtype(p.dtype),
        owner,
        f"a point of {space!r} must be stored in float32 or float64, because rounding to half "
        "precision takes it off the space",
        "Keep it in float32 and use torch.autocast",
        dtype=p.dtype,
    )
    found = space.contains(p.detach(), max(1e-3, space.tolerance(p)))
    _checks.require(
        bool(found),
        owner,
        f"a parameter must lie on {space!r}: {found.reason}",
        "Project it with p.copy_(space.project(p)) under torch.no_grad()",
        NotOnManifoldError,
        shape=tuple(p.shape),
        distance=float(f"{found.distance:.3g}"),
    )


class RiemannianOptimizer(PointOptimizer):
    """Base class: a subclass moves one parameter.

    Every group has a `space`, by default `Rn()`; its parameters are points of it.
    """

    # with its Riemannian gradient, its space, its state and its group
    _move: Callable[[Tensor, Tensor, Manifold, Any, dict[str, Any]], None]

    def _check_points(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            check_point(self, self.space_of(p, group), p)

    def space_of(self, p: Tensor, group: dict[str, Any]) -> Manifold:
        """Return the space of a parameter: that of its group, unless a subclass knows better."""
        return group["space"]

    def _with_gradients(self, group: dict[str, Any]) -> list[Tensor]:
        params = super()._with_gradients(group)
        self._require_finite([cast(Tensor, p.grad) for p in params])
        return params

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            grad, space = cast(Tensor, p.grad), self.space_of(p, group)
            if group["weight_decay"]:
                grad = grad.add(p, alpha=group["weight_decay"])
            self._move(p, space.gradient(p, grad), space, self.state[p], group)


class RiemannianSGD(RiemannianOptimizer):
    r"""Riemannian gradient descent with momentum, on any space of `orthonet.manifolds`.

    \[ m_t = \mu\,T(m_{t-1}) + (1 - d)\,\mathrm{grad} f(x_t), \qquad
       x_{t+1} = R_{x_t}(-\eta\,m_t) \]

    with the space's gradient, retraction R and transport T from \(x_{t-1}\) to \(x_t\). On `Rn()`
    it is `torch.optim.SGD`. For orthogonal matrices, `StiefelSGD` moves all of one shape at once.

    Args:
        params: Parameters, or groups of them. A group may have its own `space`.
        lr: Learning rate.
        momentum: Factor of the momentum.
        dampening: Dampening of the gradient in the momentum.
        weight_decay: Factor of the penalty \(\tfrac12 \|x\|^2\), whose gradient is added before it
            is made Riemannian. On spaces of points of one norm it does nothing.
        nesterov: Whether to step along \(\mathrm{grad} f + \mu m_t\).
        space: The space of groups that name none.

    Guarantee:
        After each step every parameter is on its space, as far as `space.retract` is: to rounding.

    Raises:
        NotOnManifoldError: A parameter is off its space.
        ValueError: A value is out of range.

    Examples:
        >>> from orthonet.manifolds import Sphere
        >>> x = torch.nn.Parameter(Sphere().sample((3,)))
        >>> optimizer = RiemannianSGD([x], lr=0.1, space=Sphere())
        >>> x[0].backward()
        >>> optimizer.step()
        >>> bool(Sphere().contains(x))
        True

    References:
        Bonnabel, *Stochastic gradient descent on Riemannian manifolds*, IEEE Trans. Automat.
        Control 58 (2013).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        space: Manifold | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "space": Rn() if space is None else space,
        }
        super().__init__(params, defaults)

    def _move(
        self, p: Tensor, g: Tensor, space: Manifold, state: Any, group: dict[str, Any]
    ) -> None:
        m, momentum = g, group["momentum"]
        if momentum and "momentum_buffer" in state:  # the first is the gradient, not dampened
            m = state["momentum_buffer"] * momentum + g * (1.0 - group["dampening"])
        y = space.retract(p, -group["lr"] * (g + m * momentum if group["nesterov"] else m))
        if momentum:
            state["momentum_buffer"] = space.transport(p, y, m).clone()
        p.copy_(y)


class RiemannianAdam(RiemannianOptimizer):
    r"""Adam on any space of `orthonet.manifolds`, with AMSGrad.

    \[ m_t = \beta_1 T(m_{t-1}) + (1 - \beta_1)\,g_t, \quad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,\tfrac1n \|g_t\|_{x_t}^2, \quad
       x_{t+1} = R_{x_t}\Big(-\eta\,\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}\Big) \]

    with \(g_t = \mathrm{grad} f(x_t)\), the bias corrections \(\hat m_t = m_t / (1 - \beta_1^t)\)
    and \(\hat v_t = v_t / (1 - \beta_2^t)\), and n the number of entries of a point. The second
    moment is one number for each point (matrix, vector), because single entries have no meaning on
    a curved space; on products of lines (`Rn`, `Nonnegative`, `Bounded`) it is one for each entry,
    and on `Rn()` this is `torch.optim.Adam`.

    Args:
        params: Parameters, or groups of them. A group may have its own `space`.
        lr: Learning rate: about the root mean square change of an entry in a step.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: See [`RiemannianSGD`][orthonet.optim.RiemannianSGD].
        amsgrad: Divide by the largest \(\sqrt{\hat v}\) so far.
        space: The space of groups that name none.

    Guarantee:
        That of [`RiemannianSGD`][orthonet.optim.RiemannianSGD].

    Raises:
        NotOnManifoldError: A parameter is off its space.
        ValueError: A value is out of range.

    References:
        Bécigneul & Ganea, *Riemannian adaptive optimization methods*, ICLR 2019.
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
        space: Manifold | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "space": Rn() if space is None else space,
        }
        super().__init__(params, defaults)

    def _move(
        self, p: Tensor, g: Tensor, space: Manifold, state: Any, group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        square = self._square(space, p, g)
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(square)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(square)
        state["step"] += 1
        m = state["exp_avg"].lerp(g, 1.0 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).add_(square, alpha=1.0 - beta2)
        if group["amsgrad"]:
            v = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], v))
        y = space.retract(p, -group["lr"] * adam_factor(v, state["step"], group) * m)
        state["exp_avg"].copy_(space.transport(p, y, m))
        p.copy_(y)

    def _square(self, space: Manifold, p: Tensor, g: Tensor) -> Tensor:
        """The squared length of `g`, by the number of entries, shaped to be multiplied with it."""
        square = space.inner(p, g, g).clamp_min(0.0)
        for _ in range(p.ndim - square.ndim):
            square = square[..., None]
        entries = p.numel() // max(square.numel(), 1)
        return square / max(entries, 1)
