"""The warning about a constrained tensor that somebody has edited in place."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from orthonet.errors import InPlaceEditWarning

__all__ = ["differs", "warn_edited"]

_INSIDE = (f"{Path(__file__).parents[2]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def differs(given: Tensor, value: Tensor) -> bool:
    """Whether a tensor that readers were given is not the value, by more than rounding."""
    given, value = given.detach(), value.detach()
    return not bool((given - value).abs().amax() <= 1e-4 * value.abs().amax())


def warn_edited() -> None:
    """Warn where the tensor is read next, in code that is neither ours nor PyTorch's."""
    warnings.warn(
        "a constrained tensor was edited in place, which has no effect: assign to it instead, e.g. "
        "layer.weight = torch.nn.init.orthogonal_(layer.weight), or draw it anew by "
        "layer.reset_parameters()",
        InPlaceEditWarning,
        stacklevel=_levels_to_the_caller(),
    )


def _levels_to_the_caller() -> int:
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
