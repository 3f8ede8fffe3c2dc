"""What the optimizers share: groups and their checks; on the Stiefel manifold batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from orthonet import _checks
from orthonet._torch import is_shard
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.distributed import assign, by_ranks, rank_and_size, whole
from orthonet.optim._stiefel_steps import Block, blocks, residual, retract

__all__ = [
    "PointOptimizer",
    "StiefelOptimizer",
    "evaluated",
    "require_orthogonal",
]

State = dict[str, Tensor]
Read = tuple[Block, tuple[Tensor, Tensor, State]]  # a block; its points, gradients and states


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
        x = whole(p.detach())
        worst = float(residual(x if x.shape[-2] >= x.shape[-1] else x.mT).amax())
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


class PointOptimizer(Optimizer):
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

    def _check_points(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Every parameter must be a point of its space."""
        _checks.fail(self, "a subclass must define _check_points()", "Define it", TypeError)

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

    def _require_finite(self, grad: Any) -> None:
        """A gradient must be finite."""
        _checks.require(
            bool(grad.isfinite().all()),
            self,
            "gradients must be finite",
            "Skip the step, clip the gradients, or lower the learning rate",
            shape=tuple(grad.shape),
        )


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, with gradients enabled; None without one."""
    with torch.enable_grad():
        return None if closure is None else closure()


class StiefelOptimizer(PointOptimizer):
    """Base class: a subclass says what to do with one block, and with plain parameters.

    A group with `stiefel=False` holds plain parameters.

    Attributes:
        process_group: The processes that share the work, or None.
    """

    _step_plain: Callable[[list[Tensor], Any, dict[str, Any]], None]  # of plain parameters
    _matrices: tuple[str, ...] = ()  # names of states like the parameter
    _scalars: tuple[str, ...] = ()  # names of states with one number for each matrix

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients of now.

        Args:
            closure: Evaluates the model and returns the loss; called once, before the step.

        Returns:
            What the closure returned, or None.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            params = self._with_gradients(group)
            if group["stiefel"]:
                try:
                    self._step_on_manifold(params, group)
                except ValueError:
                    self._refuse_gradients(params)
                    raise
            elif params:
                self._step_plain(params, self.state, group)
        return loss

    def _refuse_gradients(self, params: list[Tensor]) -> None:
        """Say so if a gradient that is not finite was the cause; nothing has been moved."""
        try:
            for p in params:
                grad: Any = p.grad
                self._require_finite(grad.to_local() if is_shard(grad) else grad)
        except ValueError:
            for p in params:
                self.state[p]["step"] -= 1
            raise

    def _step_on_manifold(self, params: list[Tensor], group: dict[str, Any]) -> None:
        params = [p for p in params if p.numel()]
        names = self._kept(group)
        for p in params:
            self._start(p, names)
        found, kept = list(blocks(params)), (*names, *self._scalars)
        # by all, since to gather the shards of a parameter is a collective
        read = [self._read(block, names) for block in found]

        def moved(mine: list[int]) -> list[list[Tensor]]:
            xs = self._move([(found[i], read[i]) for i in mine], group)
            return [[x, *(read[i][2][n] for n in kept)] for i, x in zip(mine, xs, strict=True)]

        here = [[x, *(state[n] for n in kept)] for x, _, state in read]
        owners = assign([b.cost for b in found], rank_and_size(self.process_group)[1])
        told = by_ranks(here, owners, moved, self.process_group)
        for block, (x, *states) in zip(found, told, strict=True):
            self._write(block, x, dict(zip(kept, states, strict=True)))

    def _move(self, mine: list[Read], group: dict[str, Any]) -> list[Tensor]:
        """The new points of blocks that were read; their states are changed."""
        ys = [_moved(x, *self._direction(x, g, s, group), group["lr"]) for _, (x, g, s) in mine]
        return retract(ys)

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the states like the parameter that this group needs."""
        return self._matrices

    def _start(self, p: Tensor, names: tuple[str, ...]) -> None:
        state = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        for name in self._scalars:
            if name not in state:
                state[name] = torch.zeros(*p.shape[:-2], 1, 1, dtype=p.dtype, device=p.device)
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)

    def _read(self, block: Block, names: tuple[str, ...]) -> tuple[Tensor, Tensor, State]:
        params = block.params
        x, grad = block.gather(params), block.gather([cast(Tensor, p.grad) for p in params])
        kept = (*names, *self._scalars)
        state = {n: block.gather([self.state[p][n] for p in params]) for n in kept}
        for p in params:
            self.state[p]["step"] += 1
        steps = [self.state[p]["step"].expand(*p.shape[:-2], 1, 1) for p in params]
        state["step"] = block.gather(steps).double()
        return x, grad, state

    def _write(self, block: Block, x: Tensor, state: State) -> None:
        block.put(block.params, x)
        for name, value in state.items():
            block.put([self.state[p][name] for p in block.params], value)

    def _direction(
        self, x: Tensor, grad: Tensor, state: State, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The direction D of the step X - lr D and a factor of it; puts new tensors in `state`."""
        _checks.fail(self, "a subclass must define _direction()", "Define it", TypeError)


def _moved(x: Tensor, d: Tensor, factor: Tensor | None, lr: float | Tensor) -> Tensor:
    """X - lr factor D."""
    if isinstance(lr, Tensor):
        factor, lr = (lr if factor is None else lr * factor), 1.0
    return torch.sub(x, d, alpha=lr) if factor is None else torch.addcmul(x, d, factor, value=-lr)
