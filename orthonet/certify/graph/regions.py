"""Where autocast is on in a graph, and marks of nodes that later steps ask for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from orthonet._torch import without_autocast

__all__ = ["CASTS", "DECOMPOSED", "HALF", "REGION_OFF", "autocast_region"]

HALF = (torch.bfloat16, torch.float16)
CASTS = {"_to_copy", "to", "float", "double", "type_as"}
REGION_OFF, DECOMPOSED = "orthonet_autocast_off", "orthonet_decomposed"
"""Of nodes: inside of a region without autocast; written out by PyTorch's decomposition."""


def autocast_region(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, without its cache of weights; off for None."""
    if dtype is not None:
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    return without_autocast(device)
