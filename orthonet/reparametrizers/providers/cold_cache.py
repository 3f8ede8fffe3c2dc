"""The cold cache: a computed weight, kept until something that it was computed from changes.

`read(weight)` returns what `weight.evaluate()` computes. The value is kept in a slot of the weight,
with a `Record` of all that it depends on: the tensors of the module and its sub-modules (their
versions and storages), their attributes, and the number of optimizer steps that the process has
taken, since fused optimizers do not count up the version of a tensor. Parts of the weight that the
engine serves enter as they are served. Where a value cannot be kept (torch.compile, torch.func,
tracing, tensor subclasses, ...) the answer is None, and the weight is computed anew.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _torch
from orthonet.reparametrizers.providers.computation import (
    SWAPPING,
    Computation,
    attach,
    own_graph,
)
from orthonet.reparametrizers.providers.defer import deferred, undeferred
from orthonet.reparametrizers.providers.edits import warn_edited
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.reparametrizers.providers.structure import STATE, Stamps, Structure
from orthonet.reparametrizers.weight import GIVEN, EmptyInCopies, Weight

__all__ = ["count_step", "forget", "read", "slot_of"]

_local = threading.local()  # .computing: this thread is inside of `evaluate`
_steps = 0  # that optimizers of this process have taken


def count_step() -> None:
    """Mark every kept value as stale."""
    global _steps
    _steps += 1


def forget(module: nn.Module) -> None:
    """Mark the kept values of `module` and its sub-modules as stale."""
    for part in module.modules():
        slot = vars(part).get(STATE)
        if slot is not None:
            slot.current = None


class Slot(EmptyInCopies):
    """What a module keeps."""

    __slots__ = ("current", "lock", "off", "structure")

    def __init__(self) -> None:
        self.current: tuple[Structure, Stamps, Kept] | None = None
        self.structure: Structure | None = None  # one for which values may be kept
        self.lock = threading.RLock()
        self.off = False  # for good: what the module computes depends on more than can be seen


def slot_of(module: nn.Module) -> Slot:
    """The slot of `module`, made when it is first asked for."""
    slot = vars(module).get(STATE)
    return vars(module).setdefault(STATE, Slot()) if slot is None else slot


class Kept:
    """A computation whose output is kept, and the tensor that readers are given."""

    __slots__ = ("computation", "constant", "generation", "graphed", "recorded", "stamp", "stream")

    def __init__(self, computation: Computation, generation: int, recorded: bool) -> None:
        self.computation = computation
        self.generation = generation
        self.recorded = recorded  # whether it was computed with a graph
        self.constant = computation.outputs[0].detach()
        self.graphed: Tensor | None = None
        self.stamp, self.stream = _torch.Stamp(self.constant), _torch.current_stream(self.constant)

    def current(self) -> bool:
        """Whether optimizers and readers have left it alone."""
        return (
            self.generation == _steps
            and self.stamp.holds(self.constant)
            and (self.stream is None or self._same_stream())
        )

    def _same_stream(self) -> bool:
        """Neither work of another stream nor, in a CUDA graph, of an earlier time."""
        constant = self.constant
        return self.stream == _torch.current_stream(constant) and not _torch.capturing(constant)

    def get(self, grad: bool) -> Tensor | None:
        """The value; None if it is to be differentiable (`grad`) and has been computed without."""
        if grad and not self.recorded:
            return None
        if not grad or not self.computation.outputs[0].requires_grad:
            if self.constant.requires_grad:  # a reader has changed it
                self.constant = self.constant.detach()
            return self.constant
        waiting = deferred(self.computation)
        if waiting is not None:
            return waiting[0]
        if self.graphed is None:
            (self.graphed,) = attach(self.computation)
        return self.graphed


def keepable(module: nn.Module) -> Structure | None:
    """What `module` is made of, if a value that is computed from it may be kept."""
    slot = slot_of(module)
    structure = slot.structure
    if structure is not None and structure.fits(module) and structure.settled() and not slot.off:
        return structure
    structure = Structure(module)
    slot.structure = structure if _all_seen(module, structure) else None
    return slot.structure


def _all_seen(module: nn.Module, structure: Structure) -> bool:
    """Whether a change of any tensor of `module` would be seen."""
    parts = list(module.modules())
    if any(slot.off for part in parts if (slot := vars(part).get(STATE)) is not None):
        return False
    if any(isinstance(part, Weight) and part._sharded for part in parts):
        return False
    registered = {id(p) for part in parts for p in part._parameters.values()}
    buffers = {id(b) for part in parts for b in part._buffers.values()}
    for t in structure.tensors:
        if (id(t) in registered and type(t) is not nn.Parameter) or not _torch.cannot_change_unseen(
            t
        ):
            return False
        if id(t) not in registered and type(t) is not Tensor:
            return False
        if id(t) not in registered and t.requires_grad and not (id(t) in buffers and t.is_leaf):
            return False
    structure.settle()
    return bool(structure.tensors)


def _hit(weight: Weight, slot: Slot) -> Tensor | None:
    """The kept value of `weight`, if there is one and it is current."""
    if slot.current is None:
        return None
    structure, stamps, kept = slot.current
    if not (kept.current() and stamps.hold() and structure.fits(weight)):
        return None
    return kept.get(stamps.requires_grad and torch.is_grad_enabled())


def _edited(_: Structure, stamps: Stamps, kept: Kept) -> bool:
    """Whether a reader has written to the value, and to nothing that it was computed from."""
    return kept.generation == _steps and stamps.hold() and not kept.stamp.holds(kept.constant)


def _keep(weight: Weight, structure: Structure, kept: Kept) -> None:
    """Keep a value that has just been computed; a user's map may have written to itself."""
    slot = slot_of(weight)
    if not structure.fits(weight):
        audited, structure = structure.audited, Structure(weight)
        structure.settle()
        structure.audited = audited
        slot.structure = structure
    slot.current = (structure, Stamps(structure), kept)


def read(weight: Weight) -> Tensor | None:
    """The value of `weight.evaluate()`, from its slot; None where it cannot be kept."""
    if not weight.may_be_kept() or getattr(_local, "computing", False):
        return None
    slot = slot_of(weight)
    seen = slot.current
    value = _hit(weight, slot)
    if value is not None:
        return value
    with slot.lock:  # while another thread computes, the module holds aliases of its parameters
        if slot.current is not seen:  # another thread may have been faster
            value = _hit(weight, slot)
            if value is not None:
                return value
        edited = slot.current is not None and _edited(*slot.current)
        slot.current = None  # free what is out of date first
        if edited:
            warn_edited()
        structure = keepable(weight)
        if structure is None:
            return None
        _local.computing = True
        try:
            return _computed(weight, structure)
        finally:
            _local.computing = False


def _computed(weight: Weight, structure: Structure) -> Tensor:
    """Compute the value, keep it if that is safe, and return it."""
    tensors = structure.tensors
    now, versions = _steps, [t._version for t in tensors]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    random = None if recorded in structure.audited else _random_states(tensors)
    with SWAPPING if _has_map(weight) else contextlib.nullcontext():
        computation = _compute_on_aliases(weight, structure, recorded)
    kept = Kept(computation, now, recorded)
    if random is not None:
        if recorded and _foreign(computation):
            slot_of(weight).off = True
            return weight.evaluate()
        if random == _random_states(tensors):
            structure.audited.add(recorded)
    # In eval mode the module writes nothing, so another thread has.
    disturbed = not weight.training and versions != [t._version for t in tensors]
    if recorded in structure.audited and not disturbed:
        _keep(weight, structure, kept)
    value = kept.get(recorded)
    return weight.evaluate() if value is None else value


def _has_map(weight: Weight) -> bool:
    """Whether the engine looks at parameters of `weight` or of its parts."""
    return any(isinstance(part, Weight) and part.map is not None for part in weight.modules())


def _compute_on_aliases(weight: Weight, structure: Structure, recorded: bool) -> Computation:
    """Evaluate with an alias in place of every tensor of `weight` that requires a gradient.

    The aliases share memory and version counter with what they stand for, so that a user's map may
    write to its parameters; gradients stop at them, so no hook of a parameter runs too early. A
    part that the engine serves is given the alias of its value.
    """
    aliases: dict[int, Tensor] = {}
    inputs: list[Tensor] = []
    swapped: list[tuple[dict[str, Any], str, Tensor | None]] = []

    def swap(place: dict[str, Any], name: str, tensor: Tensor) -> None:
        if id(tensor) not in aliases:
            own = tensor.detach()
            parameter = isinstance(tensor, nn.Parameter)
            aliases[id(tensor)] = nn.Parameter(own) if parameter else own.requires_grad_()
            inputs.append(tensor)
        swapped.append((place, name, place.get(name)))
        place[name] = aliases[id(tensor)]

    hooked = False
    served = _served_parts(weight, swapped)
    try:
        if not recorded:
            with torch.inference_mode(False), torch.no_grad():
                return Computation((), (), (weight.evaluate(),))
        with own_graph() as hooked:
            for part, value in served:
                if value.requires_grad:
                    swap(vars(part), GIVEN, value)
            inside = {id(m) for part, _ in served for m in part.modules()}
            for part_id, place, name in structure.homes:
                tensor = place[name]
                if tensor.requires_grad and part_id not in inside:
                    swap(place, name, tensor)
            output = weight.evaluate()
    finally:
        for place, name, before in reversed(swapped):
            if before is None:
                place.pop(name, None)
            else:
                place[name] = before
    watched = [t for t in structure.tensors if isinstance(t, nn.Parameter)]
    return Computation(inputs, list(aliases.values()), (output,), watched, hooked)


def _served_parts(
    weight: Weight, swapped: list[tuple[dict[str, Any], str, Tensor | None]]
) -> list[tuple[Weight, Tensor]]:
    """Give the parts that the engine serves their values."""
    served = []
    for part in weight.modules():
        if part is weight or not isinstance(part, Weight):
            continue
        with undeferred():
            value = ENGINE(part)
        if value is not None:
            served.append((part, value))
            swapped.append((vars(part), GIVEN, None))
            vars(part)[GIVEN] = value
    return served


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
