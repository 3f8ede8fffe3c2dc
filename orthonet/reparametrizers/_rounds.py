"""One word from the accelerator a step: the decisions of all warm orthogonalizers, read together.

How many passes a weight needs depends on how far it has moved, which the device knows and the host
has to ask for. The first weight that is read after an optimizer step asks for all of them at once;
the others find their answer waiting. An answer is for one state of one parameter: it is dropped
when the parameter is another tensor, has another version or when any optimizer has stepped.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from orthonet.linalg._polar_steps import Measured, measure
from orthonet.reparametrizers._cache_state import steps

__all__ = ["Rounds"]

_State = tuple[int, int, int]


class Rounds:
    """Who takes part, and the answers that have not been fetched yet."""

    def __init__(self) -> None:
        self._members: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tensor]] = (
            weakref.WeakKeyDictionary()
        )
        self._answers: weakref.WeakKeyDictionary[nn.Module, tuple[_State, Measured, float]] = (
            weakref.WeakKeyDictionary()
        )
        self._seen = -1

    def decide(self, module: nn.Module, w: Tensor) -> tuple[Measured, float]:
        """What `measure` gave for the parameter `w` of `module`, and its bound as a number."""
        if self._seen != steps():
            self._answers.clear()
            self._seen = steps()
        self._members[module] = weakref.ref(w)
        waiting = self._answers.get(module)
        if waiting is None or waiting[0] != _state(w):
            self._ask(w.device)
        _, measured, bound = self._answers.pop(module)
        return measured, bound

    def _ask(self, device: torch.device) -> None:
        asked: list[tuple[nn.Module, _State, Measured]] = []
        for module, reference in list(self._members.items()):
            w = reference()
            if w is None or w.device != device or not module.training or not w.requires_grad:
                continue
            known = self._answers.get(module)
            if known is None or known[0] != _state(w):
                x = w.detach()
                measured = measure(x if x.shape[-2] >= x.shape[-1] else x.mT)
                asked.append((module, _state(w), measured))
        bounds = read([measured.bound for _, _, measured in asked])
        for (module, state, measured), bound in zip(asked, bounds, strict=True):
            self._answers[module] = (state, measured, bound)


def _state(w: Tensor) -> _State:
    return id(w), w._version, w.data_ptr()


def read(bounds: list[Tensor]) -> list[float]:
    """The one place where the host waits."""
    return torch.stack([bound.float() for bound in bounds]).tolist()
