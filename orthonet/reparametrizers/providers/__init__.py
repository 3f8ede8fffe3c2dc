"""When weights are computed: after optimizer steps by the engine, on demand by the cold cache."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from orthonet import _checks, _torch
from orthonet.reparametrizers.providers import cold_cache, processes
from orthonet.reparametrizers.providers.compiled import compiled_read, compiled_turn
from orthonet.reparametrizers.providers.defer import before_step, defer_pullback
from orthonet.reparametrizers.providers.engine import ENGINE, REEVALUATING_OPTIMIZERS
from orthonet.reparametrizers.providers.processes import share_among_ranks
from orthonet.reparametrizers.weight import COMPILED, PROVIDERS, Provider

__all__ = [
    "REEVALUATING_OPTIMIZERS",
    "compiled_turn",
    "defer_pullback",
    "frame_of",
    "invalidate",
    "share_among_ranks",
]

frame_of = ENGINE.frame


def invalidate(module: nn.Module | None = None) -> None:
    """Forget the constrained weights that have been computed, of `module` or of all modules.

    Needed only after a change that leaves no trace: a write through `tensor.data` or into memory
    that a tensor shares (NumPy, another process, a replayed CUDA graph), when no optimizer has
    stepped since.

    Args:
        module: The module whose weights, and those of its sub-modules, are forgotten.
    """
    if module is not None:
        _checks.module("invalidate", module=module)
    for provider in PROVIDERS:
        provider.forget(module)


@_torch.not_compiled
def _before_step(optimizer: Optimizer, *_: Any) -> None:
    before_step(optimizer)
    cold_cache.count_step()
    ENGINE.before_step(optimizer)
    processes.before_step(optimizer)


@_torch.not_compiled
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    cold_cache.count_step()
    ENGINE.after_step(optimizer)
    processes.after_step(optimizer)


PROVIDERS[:] = [
    Provider(ENGINE, ENGINE.forget),
    Provider(cold_cache.read, cold_cache.forget),
    Provider(processes.read_shards, processes.forget),
]
COMPILED[:] = [compiled_read]
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
