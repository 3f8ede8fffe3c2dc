"""A computed weight, kept until something that it was computed from changes.

`read(module)` returns what `module.evaluate()` computes. The value is kept in a slot of the module,
with a `_Record` of all that it depends on: the tensors of the module and its sub-modules (their
versions and storages), their attributes, and the number of optimizer steps that the process has
taken, since fused optimizers do not count up the version of a tensor. Where a value cannot be kept
(torch.compile, torch.func, tracing, tensor subclasses, ...) it is computed as if nothing were here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext

from orthonet.reparametrizers._pullback import Computation, attach, defer_if_asked, own_graph

__all__ = ["Cached", "CachedWeight", "caching", "hit", "invalidate", "keepable", "slot_of"]

_STATE = "_cached"  # the attribute of a module that holds its slot
_generation = 0  # optimizer steps of this process
_enabled = True
_local = threading.local()  # .computing: this thread is inside of `evaluate`

_C: Any = torch._C
_tracing_state = _C._get_tracing_state
_func_interpreter = _C._functorch.peek_interpreter_stack
_dispatch_modes = _C._len_torch_dispatch_stack
_function_modes = _C._len_torch_function_stack


def _after_step(*_: Any) -> None:
    global _generation
    _generation += 1


register_optimizer_step_post_hook(_after_step)


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


def invalidate(module: nn.Module | None = None) -> None:
    """Forget the constrained weights that have been computed, of `module` or of all modules.

    Needed only after a change that leaves no trace: a write through `tensor.data` or into memory
    that a tensor shares (NumPy, another process, a replayed CUDA graph), when no optimizer has
    stepped since.

    Args:
        module: The module whose weights, and those of its sub-modules, are forgotten.
    """
    if module is None:
        _after_step()
        return
    for part in module.modules():
        slot = vars(part).get(_STATE)
        if slot is not None:
            slot.current = None


class Slot:
    """What a module keeps; a copy or a pickled one is empty."""

    __slots__ = ("audited", "current", "lock", "off")

    def __init__(self) -> None:
        self.current: tuple[_Record, Kept, int] | None = None
        self.lock = threading.RLock()
        self.audited: set[tuple[Any, ...]] = set()
        self.off = False  # for good: what the module computes depends on more than can be seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


def slot_of(module: nn.Module) -> Slot:
    """The slot of `module`, made when it is first asked for."""
    return vars(module).setdefault(_STATE, Slot())


class _Record:
    """What a value of one module was computed from, and whether it is all the same still."""

    __slots__ = (
        "alive",
        "attributes",
        "contents",
        "own",
        "places",
        "requires_grad",
        "size",
        "stamps",
    )

    def __init__(self, module: nn.Module) -> None:
        attributes = vars(module)
        # By identity; what is compared is kept alive, so that no identity is used twice. The slot
        # leads back here, so it is not held.
        self.attributes = tuple(map(id, attributes.values()))
        self.alive = [v for k, v in attributes.items() if k != _STATE]
        self.places = [*_places(module)]
        self.contents = [*chain.from_iterable(map(dict.values, self.places))]
        self.size = len(self.contents)
        self.own = [*_unique(v for v in self.alive + self.contents if isinstance(v, Tensor))]
        self.stamps = [_stamp(t) for t in self.own]
        self.requires_grad = any(t.requires_grad for t in self.own)

    def fits(self, module: nn.Module) -> bool:
        if tuple(map(id, vars(module).values())) != self.attributes:
            return False
        if sum(map(len, self.places)) != self.size:
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self.places)), self.contents)):
            return False
        for tensor, version, pointer, requires_grad, dtype, strides, probe, value in self.stamps:
            if (
                tensor._version != version
                or tensor.data_ptr() != pointer
                or tensor.requires_grad is not requires_grad
                or tensor.dtype is not dtype
                or tensor.stride() != strides
                or (probe is not None and probe.item() != value)
            ):
                return False
        return True


class Kept:
    """A computation whose outputs are kept, and the tensors that readers are given."""

    __slots__ = ("computation", "constants", "generation", "graphed", "recorded", "state", "stream")

    def __init__(self, computation: Computation, generation: int, recorded: bool) -> None:
        self.computation = computation
        self.generation = generation
        self.recorded = recorded  # whether it was computed with a graph
        self.constants = [output.detach() for output in computation.outputs]
        self.graphed: tuple[Tensor, ...] | None = None
        self.state = [(t, t._version, *_probe(t)) for t in self.constants]
        self.stream = _stream(self.constants[0])

    def current(self, index: int) -> bool:
        """Whether optimizers and readers have left it alone."""
        constant, version, probe, value = self.state[index]
        return (
            self.generation == _generation
            and constant._version == version
            and (probe is None or probe.item() == value)
            and (self.stream is None or self.stream == _stream(constant))
        )

    def get(self, index: int, grad: bool) -> Tensor | None:
        """The value; None if it is to be differentiable (`grad`) and has been computed without."""
        if grad and not self.recorded:
            return None
        if not grad or not self.computation.outputs[index].requires_grad:
            constant = self.constants[index]
            if constant.requires_grad:  # a reader has changed it
                constant = self.constants[index] = constant.detach()
            return constant
        if self.graphed is None:
            self.graphed = attach(self.computation)
        defer_if_asked(self.computation)
        return self.graphed[index]


def _places(module: nn.Module) -> Iterator[dict[str, Any]]:
    for part in module.modules():
        if part is not module:
            yield vars(part)
        yield part._parameters
        yield part._buffers
        yield part._modules


def _unique(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(t): t for t in tensors}.values()


def _probe(tensor: Tensor) -> tuple[Tensor | None, float]:
    """An entry of a tensor in main memory: writes that leave no trace change it, mostly."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None, 0.0
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()[:0]
    if flat.numel() == 0:
        return None, 0.0
    probe = flat[int(flat[:4096].abs().argmax())]
    return probe, probe.item()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor,
        tensor._version,
        tensor.data_ptr(),
        tensor.requires_grad,
        tensor.dtype,
        tensor.stride(),
        *_probe(tensor),
    )


def _stream(tensor: Tensor) -> object:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _eager() -> bool:
    """Whether nothing watches or transforms what is executed."""
    return (
        _tracing_state() is None
        and _func_interpreter() is None
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and (_function_modes() == 0 or _only_default_device())
    )


def _only_default_device() -> bool:
    modes = (_C._get_function_stack_at(i) for i in range(_function_modes()))
    return all(type(mode) is DeviceContext for mode in modes)


def keepable(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether a value computed by `module`, which depends on `tensors`, may be kept at all."""
    if any(slot.off for part in module.modules() if (slot := vars(part).get(_STATE)) is not None):
        return False
    registered = {id(p) for part in module.modules() for p in part._parameters.values()}
    buffers = {id(b) for part in module.modules() for b in part._buffers.values()}
    for t in tensors:
        if type(t) is not (nn.Parameter if id(t) in registered else Tensor):
            return False
        if t.is_meta or t.is_inference() or t.layout is not torch.strided:
            return False
        if id(t) not in registered and t.requires_grad and not (id(t) in buffers and t.is_leaf):
            return False
        if t.device.type == "cpu" and t.is_shared():  # other processes may write
            return False
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
    return bool(tensors)


def hit(module: nn.Module) -> Tensor | None:
    """The kept value of `module`, if there is one and it is that of now."""
    slot = vars(module).get(_STATE)
    current = None if slot is None else slot.current
    if current is None or not (_enabled and module.caching and _eager()):
        return None
    record, kept, index = current
    if not (kept.current(index) and record.fits(module)):
        return None
    return kept.get(index, record.requires_grad and torch.is_grad_enabled())


def read(module: Cached) -> Tensor:
    """The value of `module.evaluate()`, from the slot where possible."""
    if torch.compiler.is_compiling():
        return module.evaluate()
    value = hit(module)
    return _compute(module) if value is None else value


def _compute(module: Cached) -> Tensor:
    slot = slot_of(module)
    with slot.lock:  # while another thread computes, the module holds aliases of its parameters
        if not (_enabled and module.caching and _eager()) or getattr(_local, "computing", False):
            return module.evaluate()
        value = hit(module)  # another thread may have been faster
        if value is not None:
            return value
        slot.current = None  # free what is out of date first
        tensors = [t for t, *_ in _Record(module).stamps]
        if not keepable(module, tensors):
            return module.evaluate()
        _local.computing = True
        try:
            return _keep(module, slot, tensors)
        finally:
            _local.computing = False


def _keep(module: Cached, slot: Slot, tensors: Sequence[Tensor]) -> Tensor:
    """Compute the value, keep it if that is safe, and return it."""
    generation, versions = _generation, [t._version for t in tensors]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    audit = (recorded, module.training, *map(id, module.modules()))
    random = None if audit in slot.audited else _random_states(tensors)
    if recorded:
        computation = with_aliases(module, module.evaluate, tensors)
    else:
        with torch.inference_mode(False), torch.no_grad():
            computation = Computation((), (), (module.evaluate(),))
    kept = Kept(computation, generation, recorded)
    if random is not None:
        slot.off = random != _random_states(tensors)
        if recorded and _foreign(computation):
            slot.off = True
            return module.evaluate()
        slot.audited.add(audit)
    # In eval mode the module writes nothing, so another thread has.
    disturbed = not module.training and versions != [t._version for t in tensors]
    if not (slot.off or disturbed):
        slot.current = (_Record(module), kept, 0)
    value = kept.get(0, recorded)
    return module.evaluate() if value is None else value


def with_aliases(
    module: nn.Module, function: Callable[[], Tensor], tensors: Sequence[Tensor]
) -> Computation:
    """Run `function` with an alias in place of every tensor of `module` that requires a gradient.

    The aliases share memory and version counter with what they stand for, so the module may write
    to its parameters; gradients stop at them, so no hook of a parameter runs too early.
    """
    aliases: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    inputs: list[Tensor] = []
    with torch.inference_mode(False):
        for place in _tensor_places(module):
            for name, tensor in place.items():
                if tensor is None or not tensor.requires_grad:
                    continue
                if id(tensor) not in aliases:
                    alias = tensor.detach()
                    parameter = isinstance(tensor, nn.Parameter)
                    alias = nn.Parameter(alias) if parameter else alias.requires_grad_()
                    aliases[id(tensor)] = alias
                    inputs.append(tensor)
                swapped.append((place, name, tensor))
    try:
        for place, name, tensor in swapped:
            place[name] = aliases[id(tensor)]
        with own_graph() as hooked:
            output = function()
    finally:
        for place, name, tensor in swapped:
            place[name] = tensor
    watched = [t for t in tensors if isinstance(t, nn.Parameter)]
    return Computation(inputs, list(aliases.values()), (output,), watched, hooked)


def _tensor_places(module: nn.Module) -> Iterator[dict[str, Any]]:
    for part in module.modules():
        yield part._parameters
        yield part._buffers


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


class Cached:
    """Mixin before an `nn.Module` class: calling it returns `evaluate()`, which is kept.

    `evaluate` must be a function of the parameters, buffers and attributes of the module and its
    sub-modules. What it writes to them in training mode it writes when it is computed, which is
    once per optimizer step.

    Attributes:
        caching: Set it to False on an instance to have its value computed at every call.
    """

    caching: bool = True

    if TYPE_CHECKING:
        training: bool

        def modules(self) -> Iterator[nn.Module]: ...

    def evaluate(self) -> Tensor:
        """Compute the value."""
        raise TypeError(f"{type(self).__name__} must define evaluate()")

    def forward(self) -> Tensor:
        """Return the value of `evaluate()`, computed once per optimizer step."""
        return read(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
            # FSDP2 sets its shards so, before it lends full tensors whose changes leave no trace.
            slot_of(self).off = True  # type: ignore[arg-type]


class CachedWeight(Cached, nn.Module):
    """Base class of the modules that own the raw parameters of one weight."""
