"""The cold cache: a computed weight, kept until something that it was computed from changes.

`read(weight)` returns what `weight.evaluate()` computes. The value is kept in a slot of the weight,
with a `Snapshot` of all that it depends on: the tensors of the module and its sub-modules (their
versions and storages) and their attributes; and with the number of optimizer steps that the process
has taken, since fused optimizers do not count up the version of a tensor. Parts of the weight that
the engine serves enter as they are served. Where a value cannot be kept (torch.compile, torch.func,
tracing, tensor subclasses, ...) the answer is None, and the weight is computed anew.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _torch
from orthonet.reparametrizers.providers.computation import (
    SWAPPING,
    Computation,
    attach,
    computed,
)
from orthonet.reparametrizers.providers.defer import undeferred
from orthonet.reparametrizers.providers.edits import warn_edited
from orthonet.reparametrizers.providers.engine import ENGINE, Kept
from orthonet.reparametrizers.weight import Slot, Weight

__all__ = ["count_step", "forget", "read"]

_local = threading.local()  # .computing: this thread is inside of `evaluate`
_steps = 0  # that optimizers of this process have taken


def count_step() -> None:
    """Mark every kept value as stale."""
    global _steps
    _steps += 1


def forget(module: nn.Module | None = None) -> None:
    """Mark the kept values of `module` and its sub-modules, or of all modules, as stale."""
    if module is None:
        count_step()
        return
    for part in module.modules():
        if isinstance(part, Weight):
            part._slot.current = None


class Snapshot:
    """The attributes, sub-modules and tensors of a module, by identity, and the tensors' state.

    What is compared is kept alive, so that no identity is used twice. Of the module itself the
    contents are held, not its dictionary, which leads back here.
    """

    __slots__ = ("contents", "stamps", "tables")

    def __init__(self, module: nn.Module) -> None:
        self.tables: list[dict[Any, Any]] = []
        for part in module.modules():
            own = () if part is module else (vars(part), *_torch.forward_hook_tables(part))
            self.tables += [*own, part._parameters, part._buffers, part._modules]
        self.contents = self._contents(module)
        tensors = {id(t): t for t in self.contents if isinstance(t, Tensor)}.values()
        self.stamps = [(t, _torch.Stamp(t)) for t in tensors if _torch.cannot_change_unseen(t)]
        self.stamps = self.stamps if len(self.stamps) == len(tensors) else []

    def _contents(self, module: nn.Module) -> list[object]:
        found: list[object] = [v for v in vars(module).values() if type(v) is not Slot]
        for table in self.tables:
            found += table
            found += table.values()
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors; none if a change of one of them could not be seen."""
        return [t for t, _ in self.stamps]

    def fits(self, module: nn.Module) -> bool:
        """Whether `module` has the same attributes, sub-modules and tensors."""
        now = self._contents(module)
        return len(now) == len(self.contents) and all(map(is_, now, self.contents))

    def unmoved(self) -> bool:
        """Whether no tensor has changed."""
        for t, stamp in self.stamps:
            if t.requires_grad is not stamp.requires_grad or not stamp.holds(t):
                return False
        return True


class Computed(Kept):
    """The value of a computation, and the state of the module that it was made of."""

    __slots__ = ("audited", "generation", "made_of")

    def __init__(self, computation: Computation, made_of: Snapshot, audited: set[bool]) -> None:
        (output,) = computation.outputs
        super().__init__(output)
        self.made_of, self.generation = made_of, _steps
        self.audited = audited  # with a graph, or without: it is known to depend on nothing else
        self.give(computation, attach(computation) if output.requires_grad else (), 0)

    def learns(self) -> bool:
        """Whether a tensor of the module requires a gradient that may reach it."""
        learning = any(t.requires_grad for t in self.made_of.tensors)
        return learning and (self.lacks(True) or self.value.requires_grad)

    def unmoved(self, weight: Weight) -> bool:
        """Whether no optimizer has stepped and no tensor has changed."""
        return self.generation == _steps and self.made_of.unmoved()

    def holds(self, weight: Weight) -> bool:
        """Whether it is the value of `weight` as that stands, attributes included."""
        return super().holds(weight) and self.made_of.fits(weight)


def _all_seen(weight: Weight, snapshot: Snapshot) -> bool:
    """Whether a change of any tensor of `weight` would be seen."""
    parts = list(weight.modules())
    if any(part._sharded or part._slot.off for part in parts if isinstance(part, Weight)):
        return False
    registered = {id(p) for part in parts for p in part._parameters.values()}
    buffers = {id(b) for part in parts for b in part._buffers.values()}
    for t in snapshot.tensors:
        if type(t) is not (nn.Parameter if id(t) in registered else Tensor):
            return False
        if id(t) not in registered and t.requires_grad and not (id(t) in buffers and t.is_leaf):
            return False
    return bool(snapshot.tensors)


def _hit(weight: Weight) -> Tensor | None:
    """The kept value of `weight`, if there is one and it is current."""
    kept = weight._slot.current
    return kept.read() if kept is not None and kept.holds(weight) else None


def read(weight: Weight) -> Tensor | None:
    """The value of `weight.evaluate()`, from its slot; None where it cannot be kept."""
    if not weight.may_be_kept() or getattr(_local, "computing", False):
        return None
    value = _hit(weight)
    if value is not None:
        return value
    slot = weight._slot
    with slot.lock:  # while another thread computes, the module holds aliases of its parameters
        value = _hit(weight)  # another thread may have been faster
        if value is not None:
            return value
        stale, audited = slot.current, set()
        if stale is not None:
            if stale.edited(weight) is not None:
                warn_edited()
            audited = stale.audited if stale.made_of.fits(weight) else audited
        stale = slot.current = None  # free what is out of date first
        _local.computing = True
        try:
            return _computed(weight, Snapshot(weight), audited)
        finally:
            _local.computing = False


def _computed(weight: Weight, before: Snapshot, audited: set[bool]) -> Tensor | None:
    """Compute the value, keep it if that is safe, and return it."""
    if not _all_seen(weight, before):
        return None
    tensors, now = before.tensors, _steps
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    random = None if recorded in audited else _random_states(tensors)
    with undeferred():
        parts = [p for p in weight.modules() if isinstance(p, Weight) and p is not weight]
        served = [(p, value) for p in parts if (value := ENGINE(p)) is not None]
    looked_at = any(p.map is not None for p in (weight, *parts))
    with SWAPPING if looked_at else contextlib.nullcontext():
        computation = computed(weight, served, recorded)
    if random is not None:
        if recorded and _foreign(computation):
            weight._slot.off = True
            return None
        if random == _random_states(tensors):
            audited.add(recorded)
    # In eval mode the module writes nothing, so another thread has.
    disturbed = now != _steps or not (weight.training or before.unmoved())
    # A user's map may have written to itself.
    kept = Computed(computation, Snapshot(weight), audited)
    if recorded in audited and not disturbed:
        weight._slot.current = kept
    return kept.read()


def _random_states(tensors: Sequence[Tensor]) -> list[bytes]:
    """The states of the generators that a computation with `tensors` may draw from."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(d) for d in {t.device for t in tensors if t.is_cuda}]
    return [state.numpy().tobytes() for state in states]


def _foreign(computation: Computation) -> bool:
    """Whether the outputs depend on a leaf that is not among the inputs."""
    known = {id(leaf) for leaf in computation.leaves}
    seen: set[Any] = set()
    stack = [output.grad_fn for output in computation.outputs if output.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in known:
            return True
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return False
