"""Reads by boolean masks, `x[:, self.mask]`, traced as reads by integers.

A trace does not know how many entries a mask has, so what it reads has no size. The buffers of a
model are constants: their places are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["MaskedReads"]


class MaskedReads(TorchFunctionMode):
    """Replaces boolean buffers and attributes in reads by the places where they are true."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.buffers = {n: _places(t) for n, t in _buffers(model) if t.dtype == torch.bool}
        attributes = [v for m in model.modules() for v in vars(m).values()]
        self.attributes = [
            (v, _places(v)) for v in attributes if type(v) is Tensor and v.dtype == torch.bool
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            found = [self._read(part) for part in parts]
            if any(places is not None for places in found):
                args = (args[0], _index(parts, found))
        return func(*args, **(kwargs or {}))

    def _read(self, part: Any) -> list[list[int]] | None:
        """The places of a mask that is known; None for another index."""
        if not isinstance(part, Tensor) or part.dtype != torch.bool or not part.ndim:
            return None
        for mask, places in self.attributes:
            if mask is part:
                return places
        # While a trace runs, the model holds stand-ins without values under the same names.
        names = (name for name, buffer in _buffers(self.model) if buffer is part)
        return self.buffers.get(next(names, ""))


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_buffers(remove_duplicate=False))


def _places(mask: Tensor) -> list[list[int]]:
    """The indices of the true entries, one list for each dim."""
    return [column.tolist() for column in mask.detach().nonzero(as_tuple=True)]


def _index(parts: tuple[Any, ...], found: list[list[list[int]] | None]) -> tuple[Any, ...]:
    index: list[Any] = []
    for part, places in zip(parts, found, strict=True):
        known = places or []
        index += [torch.tensor(p, dtype=torch.long, device=part.device) for p in known]
        if places is None:
            index.append(part)
    return tuple(index)
