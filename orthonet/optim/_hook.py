"""A retraction after the steps of any optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from orthonet import _checks, _torch
from orthonet.optim._base import require_orthogonal
from orthonet.optim._stiefel_steps import blocks, move_by_ranks, retract, tangent
from orthonet.reparametrizers import REEVALUATING_OPTIMIZERS

__all__ = ["retract_after_step"]


class _Hooks(NamedTuple):
    """What to remove."""

    handles: list[RemovableHandle]

    def remove(self) -> None:
        """Let the optimizer be as it was; the parameters stay where they are."""
        for handle in self.handles:
            handle.remove()


def retract_after_step(
    optimizer: Optimizer,
    params: Iterable[Tensor] | None = None,
    *,
    riemannian: bool = False,
    process_group: Any = None,
) -> _Hooks:
    r"""Have any optimizer of PyTorch keep its matrices semi-orthogonal.

    After each `optimizer.step()` every parameter is replaced by its polar factor, all of one shape
    in one batched call. What the optimizer keeps (momentum, moments) stays as it is, Euclidean:
    the step is a projected one. Fused and foreach implementations, `torch.optim.Muon`, closures,
    schedulers and `torch.amp.GradScaler` work as ever. Weight decay shrinks the matrix before the
    retraction undoes it: it does nothing.

    Args:
        optimizer: The optimizer; one without closures that are evaluated within a step.
        params: The parameters to keep semi-orthogonal; all that the optimizer has if None.
        riemannian: Whether to replace the gradients by their tangent parts
            \(G - X\,\mathrm{sym}(X^\top G)\) before each step, in place, so that what the optimizer
            accumulates is not spoiled by the normal parts, which do not move anything.
        process_group: With one, each of its processes retracts its part of the matrices and all
            receive the results.

    Returns:
        A handle whose `remove()` takes the hook off.

    Guarantee:
        After each step \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in
        float64.

    Raises:
        NotOnManifoldError: A parameter is not semi-orthogonal now.
        TypeError: The optimizer is one of `orthonet.reparametrizers.REEVALUATING_OPTIMIZERS`
            (LBFGS), which moves the parameters many times within one step and compares gradients of
            different points as if they lay in one space.
        ValueError: A parameter is none of the optimizer's, or no matrix of float32 or float64.

    Examples:
        >>> layer = torch.nn.Linear(8, 8)
        >>> _ = torch.nn.init.orthogonal_(layer.weight)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
        >>> hook = retract_after_step(optimizer, [layer.weight])
    """
    _checks.optimizer("retract_after_step", optimizer=optimizer)
    _checks.require(
        not isinstance(optimizer, tuple(REEVALUATING_OPTIMIZERS)),
        "retract_after_step",
        "the optimizer must move the parameters once in a step; LBFGS moves them for each of its "
        "evaluations and compares gradients of different tangent spaces",
        "Use StiefelSGD, or LBFGS on a trivialized layer (OrthoLinear)",
        TypeError,
        optimizer=type(optimizer).__name__,
    )
    known = _torch.parameters_of(optimizer)
    chosen = known if params is None else list(params)
    identities = {id(p) for p in known}
    for p in chosen:
        _checks.require(
            id(p) in identities,
            "retract_after_step",
            "params must belong to the optimizer",
            "Pass the same tensors to both",
            shape=tuple(p.shape),
        )
    require_orthogonal("retract_after_step", chosen)

    @torch.no_grad()
    def project(*_: Any) -> None:
        for block in blocks([p for p in chosen if p.grad is not None]):
            grads: list[Tensor] = [p.grad for p in block.params]  # type: ignore[misc]
            block.put(grads, tangent(block.x, block.gather(grads)))

    @torch.no_grad()
    def retract_all(*_: Any) -> None:
        found = blocks([p for p in chosen if p.grad is not None])
        move_by_ranks(found, lambda mine: retract(mine, lambda block: block.x), process_group)

    handles = [optimizer.register_step_post_hook(retract_all)]
    if riemannian:
        handles.append(optimizer.register_step_pre_hook(project))
    return _Hooks(handles)
