"""When values are kept: the switch, the count of optimizer steps, what else is going on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext

__all__ = ["caching", "count_step", "eager", "steps", "usable"]

_enabled = True
_steps = 0  # that optimizers of this process have taken

_C: Any = torch._C
_tracing_state = _C._get_tracing_state
_func_interpreter = _C._functorch.peek_interpreter_stack
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack


def count_step(*_: Any) -> None:
    """Every kept value is out of date."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(count_step)


def steps() -> int:
    """A number that changes with every step of any optimizer of this process."""
    return _steps


class caching:  # noqa: N801 (spelled as torch.no_grad and torch.set_grad_enabled)
    """Switch the cache of constrained weights on or off, for the process or for a block.

    It is on at first. Then a constrained weight is computed when it is first read and kept until an
    optimizer steps, one of its parameters or buffers changes, or the module changes between
    training and evaluation; a backward pass leaves it intact. With the cache off, and for a module
    whose attribute `caching` is false, every read computes it anew.

    Args:
        enabled: Whether weights are kept.

    Examples:
        >>> with caching(False):
        ...     pass  # every read computes
        >>> _ = caching(True)  # from here on, as a function
    """

    def __init__(self, enabled: bool) -> None:
        global _enabled
        self._before, self.enabled = _enabled, enabled
        _enabled = enabled

    def __enter__(self) -> caching:
        return self

    def __exit__(self, *_: object) -> None:
        global _enabled
        _enabled = self._before


def eager() -> bool:
    """Whether nothing watches or transforms what is executed."""
    return (
        _tracing_state() is None
        and _func_interpreter() is None
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and (_function_modes() == 0 or _only_default_device())
    )


def _only_default_device() -> bool:
    modes = (_C._get_function_stack_at(i) for i in range(_function_modes()))
    return all(type(mode) is DeviceContext for mode in modes)


def usable(module: nn.Module) -> bool:
    """Whether values are kept here and now, as far as the switches and surroundings go."""
    return _enabled and module.caching and eager()  # type: ignore[return-value]
