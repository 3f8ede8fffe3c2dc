"""The list of parametrizations of one tensor: torch's, with an assignment that can be trusted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from orthonet import _checks

__all__ = ["ConstrainedList"]


class ConstrainedList(ParametrizationList):
    """As torch's list, except for assignment.

    - It writes in place. torch's replaces the storage of the parameter, which detaches it from
      DistributedDataParallel and from captured graphs.
    - All or nothing: a refused value leaves every parameter and buffer as it was.
    - Assigning the very tensor that was read before the last assignment undoes that assignment, bit
      for bit. `torch.func.functional_call(module, {"weight": X})` does that on leaving.
    """

    _read: Any = None
    _undo: Any = None

    def forward(self) -> Tensor:
        """The value of the tensor."""
        value = super().forward()
        if not torch.compiler.is_compiling():
            self._read = weakref.ref(value)
        return value

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> None:
        """Set the tensor to `value`.

        Raises:
            ValueError: another shape.
            NotOnManifoldError: `value` does not satisfy the constraints; nothing has been changed.
        """
        undo = self._undo
        if undo is not None and undo[0]() is value:
            self._restore(undo[1])
            self._undo = None
            return
        before = [t.clone() for t in self._state()]
        try:
            self._assign(value)
        except (RuntimeError, ValueError, TypeError):
            self._restore(before)
            raise
        read = self._read() if self._read is not None else None
        self._undo = (self._read, before) if read is not None and read is not value else None

    def _assign(self, value: Tensor) -> None:
        for parametrization in reversed(list(self.children())):
            inverse: Callable[[Tensor], Tensor] | None = getattr(
                parametrization, "right_inverse", None
            )
            if inverse is None:
                _checks.fail(
                    type(parametrization),
                    "the parametrization must have a right_inverse to be assigned to",
                    "Add one, or assign to .parametrizations.<name>.original",
                )
            value = inverse(value)
        values = [value] if self.is_tensor else list(value)
        for original, new in zip(self._originals(), values, strict=True):
            if original.shape == new.shape:
                original.copy_(new)
            else:  # another parametrization of variable size
                original.set_(new.to(original))  # type: ignore[arg-type]

    def _originals(self) -> list[Tensor]:
        if self.is_tensor:
            return [self.original]
        return [getattr(self, f"original{i}") for i in range(self.ntensors)]

    def _state(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know nothing of what was read."""
        state = self.__dict__.copy()
        state.pop("_read", None)
        state.pop("_undo", None)
        return state
