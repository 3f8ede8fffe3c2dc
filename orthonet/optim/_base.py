"""What the optimizers share: groups and their checks; on the Stiefel manifold batches and ranks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from orthonet import _checks
from orthonet._torch import foreach_norm, is_shard
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.distributed import whole
from orthonet.linalg.matrix import gram_defect
from orthonet.optim._stiefel_steps import Block, blocks, move_by_ranks, retract

__all__ = ["PointOptimizer", "StiefelOptimizer", "adam_factor", "require_orthogonal"]


def require_orthogonal(owner: object, params: Sequence[Tensor]) -> None:
    """Every parameter must be a matrix (or batch) in float32 or float64, orthogonal to 1e-3."""
    for p in params:
        _checks.require(
            p.ndim >= 2,
            owner,
            "a parameter on the manifold must be a matrix or a batch of matrices (*batch, m, n)",
            "Put biases and scales into a group with stiefel=False",
            shape=tuple(p.shape),
        )
        _checks.require(
            p.dtype in (torch.float32, torch.float64),
            owner,
            "a parameter on the manifold must be stored in float32 or float64, because rounding to "
            "half precision takes it off the manifold again",
            "Keep it in float32 and use torch.autocast, or FSDP2's MixedPrecisionPolicy",
            dtype=p.dtype,
        )
    for p in params:
        if p.is_meta or 0 in p.shape:
            continue
        x = whole(p.detach()).double()
        x = x if x.shape[-2] >= x.shape[-1] else x.mT
        # |sigma - 1| <= |sigma^2 - 1|
        worst = float(gram_defect(x.mT @ x).amax())
        _checks.require(
            worst <= 1e-3,
            owner,
            "a parameter on the manifold must be semi-orthogonal",
            "Initialize it by orthonet.init.orthogonal_, project it with "
            "p.copy_(orthonet.linalg.polar(p)) under torch.no_grad(), or put it into a group with "
            "stiefel=False",
            NotOnManifoldError,
            shape=tuple(p.shape),
            residual=float(f"{worst:.3g}"),
        )


def _groups_or_tensors(owner: object, params: Any) -> list[Any]:
    """The parameters as a list: tensors, groups, or pairs of a name and a tensor."""
    entries = [] if isinstance(params, (str, dict, Tensor)) else params
    found = list(entries) if hasattr(entries, "__iter__") else []
    _checks.require(
        bool(found)
        and all(
            "params" in p if isinstance(p, dict) else isinstance(p, (Tensor, tuple)) for p in found
        ),
        owner,
        "params must be an iterable of tensors or of groups, and not empty",
        "Pass model.parameters(), or orthonet.convert.manifold_groups(model); a group is a dict "
        "with the key 'params'",
        params=params,
    )
    return found


class PointOptimizer(Optimizer, abc.ABC):
    """Base class of optimizers whose parameters are points: their groups, and what a step needs."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(_groups_or_tensors(self, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            NotOnManifoldError: A parameter is no point of its space.
            ValueError: An option is out of range, or a parameter of the wrong kind.
        """
        group = {**self.defaults, **param_group}
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        self._check_group(group)
        self._check_points([p[1] if isinstance(p, tuple) else p for p in params], group)
        super().add_param_group({**param_group, "params": params})

    @abc.abstractmethod
    def _check_points(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Every parameter must be a point of its space."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """The options that the group has must be in range."""
        if not isinstance(group["lr"], Tensor):
            _checks.in_range(self, 0.0, float("inf"), lr=group["lr"])
        _checks.in_range(self, 0.0, float("inf"), weight_decay=group["weight_decay"])
        momentum, dampening = group.get("momentum", 0.0), group.get("dampening")
        _checks.in_range(self, 0.0, float("inf"), momentum=momentum)
        _checks.require(
            dampening is None or not group["nesterov"] or (momentum > 0 and dampening == 0),
            self,
            "nesterov needs momentum > 0 and dampening = 0",
            "Set momentum=0.9, or nesterov=False",
            momentum=momentum,
            dampening=dampening,
        )
        betas = group.get("betas", (0.0, 0.0))
        _checks.require(
            isinstance(betas, (tuple, list))
            and len(betas) == 2
            and all(isinstance(beta, (int, float, Tensor)) and 0.0 <= beta < 1.0 for beta in betas),
            self,
            "betas must be two numbers in [0, 1)",
            "Use (0.9, 0.999)",
            betas=betas,
        )
        _checks.in_range(self, 0.0, float("inf"), eps=group.get("eps", 0.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients of now.

        Args:
            closure: Evaluates the model and returns the loss; called once, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse or not finite; nothing has been moved.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for params, group in [(self._with_gradients(g), g) for g in self.param_groups]:
            if params:
                self._step(params, group)
        return loss

    @abc.abstractmethod
    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters of a group, which have gradients."""

    def _with_gradients(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a gradient, which must be dense."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            _checks.require(
                p.grad.layout is torch.strided,
                self,
                "gradients must be dense",
                "Use sparse=False in the embedding",
                layout=p.grad.layout,
            )
        return params

    def _require_finite(self, grads: list[Tensor]) -> None:
        """Gradients must be finite; their norms, which cost less, are checked first."""
        for grad, norm in zip(grads, foreach_norm(grads) if grads else (), strict=True):
            _checks.require(
                bool(norm.isfinite()) or bool(grad.isfinite().all()),
                self,
                "gradients must be finite",
                "Skip the step, clip the gradients, or lower the learning rate",
                shape=tuple(grad.shape),
            )


def adam_factor(v: Tensor, steps: Tensor, group: dict[str, Any]) -> Tensor:
    """What corrects the bias of the first moment and divides by the root of the second one, `v`."""
    # in float64, since 1 - 0.999 has four digits in float32
    first, second = ((1.0 - beta ** steps.double()).to(v) for beta in group["betas"])
    return ((v / second).sqrt().add_(group["eps"]) * first).reciprocal()


class StiefelOptimizer(PointOptimizer):
    """Base class: a subclass says what to do with one block, and with plain parameters.

    A group with `stiefel=False` holds plain parameters.

    Attributes:
        process_group: The processes that share the work, or None.
    """

    _step_plain: Callable[[list[Tensor], Any, dict[str, Any]], None]  # of plain parameters
    _kept: tuple[str, ...] = ("momentum_buffer",)  # names of what is kept of each parameter

    def __init__(self, params: ParamsT, defaults: dict[str, Any], process_group: Any) -> None:
        self.process_group = process_group
        super().__init__(params, {**defaults, "stiefel": True})

    def _check_points(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not group["stiefel"]:
            return
        require_orthogonal(self, params)
        _checks.require(
            group["weight_decay"] == 0,
            self,
            "weight_decay must be 0 on the manifold, where every matrix has the same norm and "
            "the decay is normal to it",
            "Leave it out, or give it to the groups with stiefel=False",
            weight_decay=group["weight_decay"],
        )

    def __getstate__(self) -> dict[str, Any]:
        # a process group cannot be pickled; it is given anew
        return {**super().__getstate__(), "process_group": None}

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not group["stiefel"]:
            self._step_plain(params, self.state, group)
            return
        try:
            self._step_on_manifold(params, group)
        except ValueError:
            grads: list[Any] = [p.grad for p in params]
            self._require_finite([g.to_local() if is_shard(g) else g for g in grads])
            raise

    def _step_on_manifold(self, params: list[Tensor], group: dict[str, Any]) -> None:
        names, found = self._kept if group.get("momentum", True) else (), blocks(params)
        for block in found:  # by all processes, since shards are gathered
            block.kept = [self._state_of(p, names) for p in block.params]
            block.grad = block.gather([cast(Tensor, p.grad) for p in block.params])
            block.state = {name: block.gather([s[name] for s in block.kept]) for name in names}
            pairs = zip(block.params, block.kept, strict=True)
            before = [s["step"].expand(*p.shape[:-2], 1, 1) for p, s in pairs]
            block.steps = block.gather(before) + 1
        move_by_ranks(found, lambda mine: self._move(mine, group), self.process_group)

    def _state_of(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The state of a parameter, in which these are present."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for name in names:
            if name not in state and name == "exp_avg_sq":  # one number for each matrix
                state[name] = torch.zeros(*p.shape[:-2], 1, 1, dtype=p.dtype, device=p.device)
            elif name not in state:
                state[name] = torch.zeros_like(p)
        return state

    def _move(self, found: list[Block], group: dict[str, Any]) -> None:
        """Move the points of blocks, and change their states."""
        retract(found, lambda block: _moved(block.x, *self._direction(block, group), group["lr"]))

    @abc.abstractmethod
    def _direction(self, block: Block, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The direction D of the step X - lr D and a factor of it; sets the new `block.state`."""


def _moved(x: Tensor, d: Tensor, factor: Tensor | None, lr: float | Tensor) -> Tensor:
    """X - lr factor D."""
    if isinstance(lr, Tensor):
        factor, lr = (lr if factor is None else lr * factor), 1.0
    return torch.sub(x, d, alpha=lr) if factor is None else torch.addcmul(x, d, factor, value=-lr)
