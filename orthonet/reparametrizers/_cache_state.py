"""When values are kept: the switch, the count of optimizer steps, what else is going on."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from orthonet._torch import eager

__all__ = ["caching", "count_step", "steps", "usable"]

_enabled = True
_steps = 0  # that optimizers of this process have taken


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


def usable(module: nn.Module) -> bool:
    """Whether values are kept here and now, as far as the switches and surroundings go."""
    return _enabled and module.caching and eager()  # type: ignore[return-value]
