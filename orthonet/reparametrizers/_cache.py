"""A computed weight, kept until something that it was computed from changes.

`read(module)` returns what `module.evaluate()` computes. The value is kept in a slot of the module,
with a `Record` of all that it depends on: the tensors of the module and its sub-modules (their
versions and storages), their attributes, and the number of optimizer steps that the process has
taken, since fused optimizers do not count up the version of a tensor. Where a value cannot be kept
(torch.compile, torch.func, tracing, tensor subclasses, ...) it is computed as if nothing were here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.reparametrizers._cache_record import GROUP, STATE, Stamps, Structure, probe
from orthonet.reparametrizers._cache_state import count_step, steps, usable
from orthonet.reparametrizers._defer import deferred, undeferred
from orthonet.reparametrizers._pullback import Computation, attach, own_graph

__all__ = [
    "GIVEN",
    "GROUP",
    "CachedWeight",
    "Kept",
    "hit",
    "invalidate",
    "keep",
    "keepable",
    "slot_of",
]

GIVEN = "_given"  # the attribute of a module for its value, while something made of it is computed

_local = threading.local()  # .computing: this thread is inside of `evaluate`


def invalidate(module: nn.Module | None = None) -> None:
    """Forget the constrained weights that have been computed, of `module` or of all modules.

    Needed only after a change that leaves no trace: a write through `tensor.data` or into memory
    that a tensor shares (NumPy, another process, a replayed CUDA graph), when no optimizer has
    stepped since.

    Args:
        module: The module whose weights, and those of its sub-modules, are forgotten.
    """
    if module is None:
        count_step()
        return
    for part in module.modules():
        slot = vars(part).get(STATE)
        if slot is not None:
            slot.current = None
        group = vars(part).get(GROUP)
        if group is not None:
            group.forget()


class Slot:
    """What a module keeps; a copy or a pickled one is empty."""

    __slots__ = ("current", "lock", "off", "structure")

    def __init__(self) -> None:
        self.current: tuple[Structure, Stamps, Kept, int] | None = None
        self.structure: Structure | None = None  # one for which values may be kept
        self.lock = threading.RLock()
        self.off = False  # for good: what the module computes depends on more than can be seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


def slot_of(module: nn.Module) -> Slot:
    """The slot of `module`, made when it is first asked for."""
    slot = vars(module).get(STATE)
    return vars(module).setdefault(STATE, Slot()) if slot is None else slot


class Kept:
    """A computation whose outputs are kept, and the tensors that readers are given."""

    __slots__ = ("computation", "constants", "generation", "graphed", "recorded", "state", "stream")

    def __init__(self, computation: Computation, generation: int, recorded: bool) -> None:
        self.computation = computation
        self.generation = generation
        self.recorded = recorded  # whether it was computed with a graph
        self.constants = [output.detach() for output in computation.outputs]
        self.graphed: tuple[Tensor, ...] | None = None
        self.state = [(t, t._version, *_look(t)) for t in self.constants]
        self.stream = _stream(self.constants[0])

    def current(self, index: int) -> bool:
        """Whether optimizers and readers have left it alone."""
        constant, version, entry, value = self.state[index]
        return (
            self.generation == steps()
            and constant._version == version
            and (entry is None or entry.item() == value)
            and (self.stream is None or self._same_stream(constant))
        )

    def _same_stream(self, tensor: Tensor) -> bool:
        """Neither work of another stream nor, in a CUDA graph, of an earlier time."""
        return self.stream == _stream(tensor) and not torch.cuda.is_current_stream_capturing()

    def get(self, index: int, grad: bool) -> Tensor | None:
        """The value; None if it is to be differentiable (`grad`) and has been computed without."""
        if grad and not self.recorded:
            return None
        if not grad or not self.computation.outputs[index].requires_grad:
            constant = self.constants[index]
            if constant.requires_grad:  # a reader has changed it
                constant = self.constants[index] = constant.detach()
            return constant
        waiting = deferred(self.computation)
        if waiting is not None:
            return waiting[index]
        if self.graphed is None:
            self.graphed = attach(self.computation)
        return self.graphed[index]


def _look(tensor: Tensor) -> tuple[Tensor | None, object]:
    entry = probe(tensor)
    return entry, None if entry is None else entry.item()


def _stream(tensor: Tensor) -> object:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


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
    registered = {id(p) for part in parts for p in part._parameters.values()}
    buffers = {id(b) for part in parts for b in part._buffers.values()}
    for t in structure.tensors:
        if type(t) is not (nn.Parameter if id(t) in registered else Tensor):
            return False
        if t.is_meta or t.is_inference() or t.layout is not torch.strided:
            return False
        if id(t) not in registered and t.requires_grad and not (id(t) in buffers and t.is_leaf):
            return False
        if t.device.type == "cpu" and t.is_shared():  # other processes may write
            return False
        if t.is_cuda and torch.cuda.is_current_stream_capturing():  # its replay must compute
            return False
    structure.settle()
    return bool(structure.tensors)


def hit(module: nn.Module) -> Tensor | None:
    """The kept value of `module`, if there is one and it is that of now."""
    slot = vars(module).get(STATE)
    current = None if slot is None else slot.current
    if current is None or not usable(module):
        return None
    structure, stamps, kept, index = current
    if not (kept.current(index) and stamps.hold() and structure.fits(module)):
        return None
    return kept.get(index, stamps.requires_grad and torch.is_grad_enabled())


def keep(module: nn.Module, structure: Structure, kept: Kept, index: int) -> None:
    """Keep a value that has just been computed; `module` may have written to itself meanwhile."""
    slot = slot_of(module)
    if not structure.fits(module):
        audited, structure = structure.audited, Structure(module)
        structure.settle()
        structure.audited = audited
        slot.structure = structure
    slot.current = (structure, Stamps(structure), kept, index)


def read(module: CachedWeight) -> Tensor:
    """The value of `module.evaluate()`, from the slot where possible."""
    if torch.compiler.is_compiling():
        return module.evaluate()
    slot = slot_of(module)
    seen = slot.current
    value = hit(module)
    return _compute(module, slot, seen) if value is None else value


def _compute(module: CachedWeight, slot: Slot, seen: object) -> Tensor:
    with slot.lock:  # while another thread computes, the module holds aliases of its parameters
        if not usable(module) or getattr(_local, "computing", False):
            return module.evaluate()
        if slot.current is not seen:  # another thread may have been faster
            value = hit(module)
            if value is not None:
                return value
        slot.current = None  # free what is out of date first
        structure = keepable(module)
        if structure is None:
            return module.evaluate()
        _local.computing = True
        try:
            return _keep(module, structure)
        finally:
            _local.computing = False


def _keep(module: CachedWeight, structure: Structure) -> Tensor:
    """Compute the value, keep it if that is safe, and return it."""
    tensors = structure.tensors
    now, versions = steps(), [t._version for t in tensors]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    random = None if recorded in structure.audited else _random_states(tensors)
    if recorded:
        computation = _compute_on_aliases(module, structure)
    else:
        with torch.inference_mode(False), torch.no_grad():
            computation = Computation((), (), (module.evaluate(),))
    kept = Kept(computation, now, recorded)
    if random is not None:
        if recorded and _foreign(computation):
            slot_of(module).off = True
            return module.evaluate()
        if random == _random_states(tensors):
            structure.audited.add(recorded)
    # In eval mode the module writes nothing, so another thread has.
    disturbed = not module.training and versions != [t._version for t in tensors]
    if recorded in structure.audited and not disturbed:
        keep(module, structure, kept, 0)
    value = kept.get(0, recorded)
    return module.evaluate() if value is None else value


def _compute_on_aliases(module: CachedWeight, structure: Structure) -> Computation:
    """Evaluate with an alias in place of every tensor of `module` that requires a gradient.

    The aliases share memory and version counter with what they stand for, so the module may write
    to its parameters; gradients stop at them, so no hook of a parameter runs too early. A part that
    belongs to a group is replaced as a whole, by an alias of its value.
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

    try:
        with own_graph() as hooked:
            replaced = _replace_grouped(module, swap) if structure.grouped else ()
            for part, place, name in structure.homes:
                tensor = place[name]
                if tensor.requires_grad and part not in replaced:
                    swap(place, name, tensor)
            output = module.evaluate()
    finally:
        for place, name, before in reversed(swapped):
            if before is None:
                del place[name]
            else:
                place[name] = before
    watched = [t for t in structure.tensors if isinstance(t, nn.Parameter)]
    return Computation(inputs, list(aliases.values()), (output,), watched, hooked)


def _replace_grouped(
    module: nn.Module, swap: Callable[[dict[str, Any], str, Tensor], None]
) -> set[int]:
    """Give the parts that belong to a group their values; return the identities of all therein."""
    replaced: set[int] = set()
    for part in module.modules():
        group = vars(part).get(GROUP)
        if group is None or id(part) in replaced:
            continue
        with undeferred():
            value = group.value(part)
        if value is not None:
            replaced.update(map(id, part.modules()))
            if value.requires_grad:
                swap(vars(part), GIVEN, value)
    return replaced


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


class CachedWeight(nn.Module):
    """Base class of modules that own the raw parameters of one weight and return it when called.

    A subclass defines `evaluate`, which computes the weight from the parameters, buffers and
    attributes of the module and its sub-modules. Calling the module returns it, computed when
    something that it depends on has changed. What `evaluate` writes to its parameters and buffers
    in training mode it writes when it runs, which is once per optimizer step.

    Attributes:
        caching: Set it to False on an instance to have its value computed at every call.
    """

    caching: bool = True
    _sharded: bool = False  # FSDP2 lends the parameters: what is written to them is lost

    def evaluate(self) -> Tensor:
        """Compute the value."""
        _checks.fail(
            self, "a subclass must define evaluate()", "Let it return the weight", TypeError
        )

    def forward(self) -> Tensor:
        """Return the value of `evaluate()`, computed once per optimizer step."""
        return read(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
            # FSDP2 sets its shards so, before it lends full tensors whose changes leave no trace.
            slot_of(self).off = self._sharded = True
