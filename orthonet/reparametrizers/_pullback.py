"""The autograd side of the cache: one node in front of a computation that is kept.

The computed tensor hangs in the outer graph by a single node that saves nothing, so that any number
of backward passes run through it. The computation itself is a graph of its own, from aliases of the
inputs to the outputs, owned by a `Computation`; the node pulls gradients back through it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from orthonet import _checks

__all__ = ["Computation", "attach", "defer_if_asked", "defer_pullback", "own_graph"]


class Computation:
    """Outputs computed from `leaves`, which are aliases of the `inputs` of the outer graph."""

    __slots__ = ("deferral", "hooked", "inputs", "leaves", "outputs", "rank", "versions")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
        watched: Sequence[Tensor] = (),
        hooked: bool = False,
        rank: int = 0,
    ) -> None:
        self.inputs = tuple(inputs)
        self.leaves = tuple(leaves)
        self.outputs = tuple(outputs)
        # parameters that must not change in place before backward; autograd sees to it where it
        # has saved them itself, which it has not where `hooked` is set
        self.versions = [(t, t._version) for t in watched]
        self.hooked = hooked
        self.rank = rank  # those that others are computed from have the greater one
        self.deferral: _Deferral | None = None

    def pull_back(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradient of the inputs, from that of the outputs."""
        if self.hooked:
            self.require_unchanged()
        pairs = self._pairs(grads)
        if not pairs:
            return (None,) * len(self.inputs)
        outputs, given = zip(*pairs, strict=True)
        with torch.autocast(self.leaves[0].device.type, enabled=False):
            return torch.autograd.grad(
                outputs, self.leaves, given, retain_graph=True, allow_unused=True
            )

    def pull_back_differentiably(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As `pull_back`, as a node of the outer graph, of which the gradients are inputs too."""
        result: list[Tensor | None] = [None] * len(self.inputs)
        pairs = self._pairs(grads)
        if not pairs:
            return result
        outputs, given = zip(*pairs, strict=True)
        with own_graph() as hooked, torch.autocast(given[0].device.type, enabled=False):
            aliases = [g.detach().requires_grad_() for g in given]
            pulled = torch.autograd.grad(
                outputs, self.leaves, aliases, create_graph=True, allow_unused=True
            )
        found = [i for i, g in enumerate(pulled) if g is not None]
        if not found:
            return result
        computation = Computation(
            (*self.inputs, *given),
            (*self.leaves, *aliases),
            [pulled[i] for i in found],
            [t for t, _ in self.versions],
            hooked or self.hooked,
        )
        for i, g in zip(found, attach(computation), strict=True):
            result[i] = g
        return result

    def _pairs(self, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        return [
            (output, grad)
            for output, grad in zip(self.outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]

    def require_unchanged(self) -> None:
        """Raise if a parameter has been modified in place since the outputs were computed."""
        _checks.require(
            all(t._version == version for t, version in self.versions),
            "backward",
            "a parameter of a constrained weight has been modified in place since the forward pass",
            "Call backward before the parameters change, or run the forward pass again",
            RuntimeError,
        )


@contextlib.contextmanager
def own_graph() -> Iterator[bool]:
    """Record a graph that no surrounding mode or hook on saved tensors (checkpointing) sees.

    Yields whether such hooks had to be kept away; autograd does not check then that what it has
    saved is unchanged.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if _saving_hooks() is None:
            yield False
        else:
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                yield True


def _saving_hooks() -> Any:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return () if top is None else top(True)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _PullBack(torch.autograd.Function):
    """The outputs of a computation in the outer graph."""

    @staticmethod
    def forward(ctx: Any, computation: Computation, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.computation = computation
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in computation.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        computation: Computation = ctx.computation
        if torch.is_grad_enabled():
            return (None, *computation.pull_back_differentiably(grads))
        deferral = computation.deferral
        if deferral is not None and deferral.take(computation, grads):
            return (None,) * (1 + len(computation.inputs))
        return (None, *computation.pull_back(grads))


def attach(computation: Computation) -> tuple[Tensor, ...]:
    """The outputs, differentiable in the inputs."""
    return _PullBack.apply(computation, *computation.inputs)  # type: ignore[return-value]


# Deferred pull-back -------------------------------------------------------------------------------


class _Deferral:
    """Gradients of computed tensors that wait for their pull-back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # backward runs on threads of the autograd engine
        self.sums: dict[Computation, list[Tensor | None]] = {}
        self.open = True

    def take(self, computation: Computation, grads: Sequence[Tensor | None]) -> bool:
        """Add `grads` to what waits; False when it is too late."""
        with self.lock:
            if not self.open:
                return False
            sums = self.sums.get(computation)
            if sums is None:
                self.sums[computation] = [None if g is None else g.clone() for g in grads]
                return True
            for i, grad in enumerate(grads):
                total = sums[i]
                if grad is not None:
                    sums[i] = grad.clone() if total is None else total.add_(grad)
            return True

    def close(self) -> None:
        """Pull everything back into the `.grad` of the parameters."""
        while self.sums:
            rank = min(computation.rank for computation in self.sums)
            ready = [computation for computation in self.sums if computation.rank == rank]
            inputs: list[Tensor] = []
            grads: list[Tensor] = []
            for computation in ready:
                computation.require_unchanged()
                pulled = computation.pull_back(self.sums.pop(computation))
                for tensor, grad in zip(computation.inputs, pulled, strict=True):
                    if grad is not None and tensor.requires_grad:
                        inputs.append(tensor)
                        grads.append(grad)
            if inputs:
                torch.autograd.backward(inputs, grads)
        self.open = False

    def waits_for(self, optimizer: Optimizer) -> bool:
        """Whether a parameter of `optimizer` would get a gradient."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with self.lock:
            watched = [t for computation in self.sums for t, _ in computation.versions]
        return any(id(t) in owned for t in watched)


_local = threading.local()
_open: list[_Deferral] = []  # of all threads


@contextlib.contextmanager
def defer_pullback() -> Iterator[None]:
    """Accumulate micro-batches at the cost of one pass through the constraints.

    Inside, `backward()` adds up the gradients of the constrained weights themselves; on exit their
    sum is pulled back to the parameters, once. Parameters that are not constrained (biases) get
    their gradient at once. Wrap forward and backward passes of all micro-batches:

        with orthonet.defer_pullback():
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    It costs one tensor of the size of each weight and saves all pull-backs but one. Weights that
    are not cached (see [`caching`][orthonet.caching]) are pulled back as usual, and so is every
    `backward(create_graph=True)`. Use `backward()` inside: `torch.autograd.grad` with respect to
    the parameters of a constraint finds nothing there yet. If the body raises, what waits is
    dropped. A context inside another one does nothing.

    With DistributedDataParallel, wrap all micro-batches but the last, together with its
    `no_sync()`; run the last one, which synchronizes, outside.

    Raises:
        RuntimeError: the optimizer steps inside although gradients of its parameters wait; a
            parameter has been modified in place inside; a synchronizing forward of
            DistributedDataParallel runs inside.
    """
    if getattr(_local, "deferral", None) is not None:
        yield
        return
    deferral = _local.deferral = _Deferral()
    _open.append(deferral)
    try:
        yield
        _local.deferral = None
        deferral.close()
    finally:
        _local.deferral = None
        deferral.open = False
        _open.remove(deferral)


def defer_if_asked(computation: Computation) -> None:
    """Called when a tensor is read: let its backward wait if this thread is in `defer_pullback`."""
    if not _open:
        return
    deferral = getattr(_local, "deferral", None)
    if deferral is None:
        return
    replica = DistributedDataParallel._get_active_ddp_module()
    _checks.require(
        replica is None or not replica.require_backward_grad_sync,
        "defer_pullback",
        "a forward pass of DistributedDataParallel that will synchronize must be outside, for its "
        "backward would send gradients that are not there yet",
        "Put the other micro-batches inside, together with model.no_sync()",
        RuntimeError,
    )
    computation.deferral = deferral


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    _checks.require(
        not any(deferral.waits_for(optimizer) for deferral in tuple(_open)),
        type(optimizer),
        "step() must come after the end of defer_pullback(), for gradients wait there",
        "Leave the context first",
        RuntimeError,
    )


register_optimizer_step_pre_hook(_before_step)
