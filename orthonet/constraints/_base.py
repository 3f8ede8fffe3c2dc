"""Moving the base of dynamic trivializations, by hand or after every so many optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from orthonet import _checks
from orthonet.constraints._registration import entry_of
from orthonet.manifolds import Parametrization

__all__ = ["rebase_every", "update_base"]

Moments = Literal["transport", "reset", "keep"]
_FIRST = ("exp_avg", "momentum_buffer")  # state entries that are averages of gradients


def _lists(module: nn.Module, tensor_name: str | None) -> Iterator[parametrize.ParametrizationList]:
    if tensor_name is not None:
        _checks.require(
            parametrize.is_parametrized(module, tensor_name),
            "update_base",
            f"{type(module).__name__} must have a constrained tensor of that name",
            "Constrain it first, e.g. orthonet.orthogonal(module, tensor_name)",
            tensor_name=tensor_name,
        )
        yield entry_of(module, tensor_name)
        return
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList):
            yield part


@torch.no_grad()
def update_base(
    module: nn.Module,
    tensor_name: str | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    moments: Moments = "transport",
) -> None:
    """Move the base of constrained tensors to their present values, which stay the same.

    Riemannian gradient descent is this after every optimizer step, with that optimizer as the
    rule for the step. Now and then, it keeps the coordinates where the trivialization is nearly
    an isometry. The new base is projected onto its space, so it never drifts. Everything is
    written in place, so DistributedDataParallel and optimizers keep their references.

    Args:
        module: A module.
        tensor_name: Name of a constrained tensor of it; None for all in it and its children.
        optimizer: The optimizer whose state is to follow.
        moments: What becomes of the averages that `optimizer` keeps of the coordinates' gradients:
            "transport" pushes them forward by the differential of the map to the present point and
            expresses them in the coordinates there (averages of squares stay), "reset" sets
            all of them to zero, "keep" leaves all.

    Raises:
        ValueError: The tensor is not constrained, or `moments` is unknown.

    Examples:
        >>> import orthonet
        >>> layer = orthonet.orthogonal(nn.Linear(3, 3), init="sample")
        >>> before = layer.weight.clone()
        >>> update_base(layer, "weight")
        >>> layer.weight.allclose(before, atol=1e-6)
        True
    """
    _checks.one_of("update_base", ("transport", "reset", "keep"), moments=moments)
    _checks.module("update_base", module=module)
    if optimizer is not None:
        _checks.optimizer("update_base", optimizer=optimizer)
    for item in _lists(module, tensor_name):
        first = item[0]
        if not isinstance(first, Parametrization) or not item.is_tensor:
            continue
        original: Tensor = item.original
        state = optimizer.state.get(original, {}) if optimizer is not None else {}
        averages = [state[key] for key in _FIRST if _is_like(state.get(key), original)]
        averages = averages if moments == "transport" else []
        start, *carried = first.update_base(original, *averages)
        original.copy_(start)
        for average, value in zip(averages, carried, strict=True):
            average.copy_(value)
        for value in state.values() if moments == "reset" else ():
            if isinstance(value, Tensor):
                value.zero_()


def _is_like(value: object, original: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == original.shape


def rebase_every(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 100,
    *,
    moments: Moments = "transport",
) -> RemovableHandle:
    """Call `update_base` on `module` after every `steps` steps of `optimizer`.

    Args:
        module: A module; all its constrained tensors are rebased.
        optimizer: The optimizer of their coordinates.
        steps: Number of steps; 1 is Riemannian gradient descent.
        moments: See [`update_base`][orthonet.constraints.update_base].

    Returns:
        A handle; its `remove()` ends the rebasing.

    Raises:
        ValueError: `steps` is not a positive integer.
        TypeError: `optimizer` is no optimizer of PyTorch.

    Examples:
        >>> import orthonet
        >>> layer = orthonet.orthogonal(nn.Linear(3, 3))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = rebase_every(layer, optimizer, steps=1)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> handle.remove()
    """
    _checks.positive_int("rebase_every", steps=steps)
    _checks.optimizer("rebase_every", optimizer=optimizer)
    count = 0

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal count
        count += 1
        if count % steps == 0:
            update_base(module, optimizer=optimizer, moments=moments)

    return optimizer.register_step_post_hook(hook)
