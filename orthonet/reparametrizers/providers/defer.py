"""`defer_pullback`: the gradients of computed weights are summed, then pulled back once."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from orthonet import _checks, _torch
from orthonet.reparametrizers.providers.computation import Computation, Gradients, node

__all__ = ["DEFERRING", "before_step", "defer_pullback", "undeferred"]


class _Deferring(threading.local):
    deferral: _Deferral | None = None  # the context of `defer_pullback` that this thread is in


DEFERRING = _Deferring()

OPEN: list[_Deferral] = []  # of all threads


class _Deferral:
    """Gradients of computed tensors that wait for their pull-back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # backward runs on threads of the autograd engine
        self.outputs: dict[Computation, tuple[Tensor, ...]] = {}
        self.sums: dict[Computation, list[Tensor | None]] = {}
        self.open = True

    def give(self, computation: Computation) -> tuple[Tensor, ...]:
        """The outputs, not connected to the parameters, so that none of their hooks runs."""
        replica = _torch.running_ddp()
        _checks.require(
            replica is None or not replica.require_backward_grad_sync,
            "defer_pullback",
            "a forward pass of DistributedDataParallel that will synchronize must be outside, "
            "because its backward would send gradients that do not exist yet",
            "Put the other micro-batches inside, together with model.no_sync()",
            RuntimeError,
        )
        outputs = self.outputs.get(computation)
        if outputs is None:
            anchor = torch.empty((), requires_grad=True)
            take = functools.partial(self.take, computation)
            outputs = self.outputs[computation] = node(take, computation.outputs, (anchor,))
        return outputs

    def take(self, computation: Computation, grads: Gradients) -> Gradients:
        """Add `grads` to what waits; the anchor gets none."""
        _checks.require(
            not torch.is_grad_enabled(),
            "defer_pullback",
            "backward(create_graph=True) must be outside",
            "Leave the context for higher derivatives in the parameters",
            RuntimeError,
        )
        with self.lock:
            _checks.require(
                self.open,
                "defer_pullback",
                "the backward of a forward pass inside must be inside too",
                "Move it into the context",
                RuntimeError,
            )
            sums = self.sums.setdefault(computation, [None] * len(grads))
            for i, grad in enumerate(grads):
                total = sums[i]
                if grad is not None:
                    sums[i] = grad.clone() if total is None else total.add_(grad)
        return (None,)

    def flush(self) -> None:
        """Pull everything back into the `.grad` of the parameters."""
        found: list[tuple[Tensor, Tensor]] = []
        for computation, sums in self.sums.items():
            computation.require_unchanged(sums)
            pairs = zip(computation.inputs, computation.pull_back(sums), strict=True)
            found += [(p, g) for p, g in pairs if g is not None and p.requires_grad]
        if found:
            torch.autograd.backward([p for p, _ in found], [g for _, g in found])

    def close(self) -> None:
        """Forget what waits."""
        with self.lock:
            self.open = False
        self.sums.clear()
        self.outputs.clear()

    def waits_for(self, optimizer: Optimizer) -> bool:
        """Whether a parameter of `optimizer` would get a gradient."""
        owned = set(map(id, _torch.parameters_of(optimizer)))
        with self.lock:
            return any(
                id(tensor) in owned
                for computation, sums in self.sums.items()
                for tensor, _ in computation.watched(sums)
            )


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
    are not cached (see [`caching`][orthonet.caching]) are pulled back as usual. Use `backward()`
    inside; `torch.autograd.grad` with respect to the parameters of a constraint finds them
    unused. It concerns the thread that it is called in. If the body raises, what waits is dropped.
    A context inside another one does nothing.

    With DistributedDataParallel, wrap all micro-batches but the last, together with its
    `no_sync()`; run the last one, which synchronizes, outside.

    Raises:
        RuntimeError: the optimizer steps inside although gradients of its parameters wait; a
            parameter has been modified in place inside; `backward` with `create_graph=True`, or
            outside for a forward pass inside; a synchronizing forward of DistributedDataParallel.
    """
    if DEFERRING.deferral is not None:
        yield
        return
    deferral = DEFERRING.deferral = _Deferral()
    OPEN.append(deferral)
    try:
        yield
        DEFERRING.deferral = None
        deferral.flush()
    finally:
        DEFERRING.deferral = None
        OPEN.remove(deferral)
        deferral.close()


@contextlib.contextmanager
def undeferred() -> Iterator[None]:
    """Read as outside of `defer_pullback`."""
    deferral = DEFERRING.deferral
    DEFERRING.deferral = None
    try:
        yield
    finally:
        DEFERRING.deferral = deferral


def before_step(optimizer: Optimizer) -> None:
    """Refuse a step that would miss gradients which wait."""
    _checks.require(
        not any(deferral.waits_for(optimizer) for deferral in tuple(OPEN)),
        type(optimizer),
        "step() must come after the end of defer_pullback(), for gradients wait there",
        "Leave the context first",
        RuntimeError,
    )
