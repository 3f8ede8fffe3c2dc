"""The parametrizations of one tensor: an assignment that can be trusted, edits that are noticed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.manifolds import Parametrization
from orthonet.reparametrizers import CachedParametrizationList
from orthonet.reparametrizers.weight import EmptyInCopies, relative_distance

__all__ = ["ConstrainedList"]


class _Memory(EmptyInCopies):
    """What was read last, and how to undo the last assignment."""

    __slots__ = ("__weakref__", "read", "undo")

    def __init__(self) -> None:
        self.read: weakref.ref[Tensor] | None = None
        self.undo: tuple[weakref.ref[Tensor], list[Tensor]] | None = None


class ConstrainedList(CachedParametrizationList):
    """As the list of `orthonet.reparametrizers.register`, with a stricter assignment.

    - An assignment changes all or nothing, bases included.
    - Assigning the very tensor that was read before the last assignment undoes that assignment, bit
      for bit: `torch.func.functional_call(module, {"weight": X})` does so when it leaves.
    - An edit of the tensor in place, which cannot reach the coordinates, is warned about.
    """

    _memory: _Memory

    def remember(self) -> None:
        """Begin to remember; once, after the list has been made."""
        self._memory = _Memory()

    def forward(self) -> Tensor:
        """Return the value of the tensor."""
        if torch.compiler.is_compiling():
            return super().forward()
        memory = self._memory
        value = super().forward()
        if memory.read is None or memory.read() is not value:
            memory.read = weakref.ref(value)
        return value

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> None:
        """Set the tensor to `value`.

        Raises:
            ValueError: `value` has another shape, or is complex where the tensor is real.
            NotOnManifoldError: `value` does not satisfy the constraints; nothing has been changed.
        """
        memory = self._memory
        if memory.undo is not None and memory.undo[0]() is value:
            self._restore(memory.undo[1])
            memory.undo = None
            return
        value = self._as_own(value)
        before = [t.clone() for t in self._state()]
        try:
            super().right_inverse(value)
        except (RuntimeError, ValueError, TypeError):
            self._restore(before)
            raise
        read = None if memory.read is None else memory.read()
        memory.undo = memory.read = None
        if read is not None and read is not value:
            memory.undo = (weakref.ref(read, _forget(memory)), before)

    @torch.no_grad()
    def project_(self, value: Tensor, owner: object = None) -> float:
        """Set the tensor to the nearest value, as the last space projects; return the distance.

        Raises:
            ValueError: The space has no projection of `value`, or it has another shape.
        """
        last = self[len(self) - 1]
        self.right_inverse(last.nearest(value) if isinstance(last, Parametrization) else value)
        return relative_distance(self(), value)

    def _as_own(self, value: Tensor) -> Tensor:
        """Return `value` in the dtype of the tensor, as a plain parameter takes it."""
        if value.dtype in {tensor.dtype for tensor in self._state()}:
            return value
        dtype = self().dtype
        _checks.require(
            value.is_complex() if dtype.is_complex else value.is_floating_point(),
            self[len(self) - 1],
            f"the tensor takes {'complex' if dtype.is_complex else 'real floating-point'} values",
            "Pass its real part" if value.is_complex() else f"Convert it, e.g. value.to({dtype})",
            value=value,
        )
        return value.to(dtype)

    def _state(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)


def _forget(memory: _Memory) -> Any:
    """Drop the copy for the undo as soon as the tensor that would ask for it is gone."""
    weak = weakref.ref(memory)

    def callback(_: object) -> None:
        alive = weak()
        if alive is not None:
            alive.undo = None

    return callback
