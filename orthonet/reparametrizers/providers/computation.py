"""The autograd side of the cache: one node in front of a computation that is kept.

The computed tensor hangs in the outer graph by a single node that saves nothing, so that any number
of backward passes run through it. The computation itself is a graph of its own, from aliases of the
inputs to the outputs, owned by a `Computation`; the node pulls gradients back through it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from orthonet import _checks, _torch

__all__ = ["SWAPPING", "Computation", "Gradients", "attach", "own_graph", "pulled_cold"]

Gradients = tuple[Tensor | None, ...]

SWAPPING = threading.RLock()
"""Held while a weight with a map has aliases in place of its parameters, and while the engine looks
at parameters: another thread never takes an alias for a parameter."""
if hasattr(os, "register_at_fork"):  # or a fork beside a thread that holds it never gets it
    os.register_at_fork(
        before=SWAPPING.acquire,
        after_in_parent=SWAPPING.release,
        after_in_child=SWAPPING.release,
    )


class Computation:
    """Outputs computed from `leaves`, which are aliases of the `inputs` of the outer graph."""

    __slots__ = ("hooked", "inputs", "leaves", "outputs", "versions")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
        watched: Sequence[Tensor] = (),
        hooked: bool = False,
    ) -> None:
        self.inputs = tuple(inputs)
        self.leaves = tuple(leaves)
        self.outputs = tuple(outputs)
        # parameters that must not change in place before backward; autograd sees to it where it
        # has saved them itself, which it has not where `hooked` is set
        self.versions = [(t, t._version) for t in watched]
        self.hooked = hooked

    def pull_back(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradient of the inputs, from that of the outputs."""
        if self.hooked:
            self.require_unchanged()
        pairs = self._pairs(grads)
        if not pairs:
            return (None,) * len(self.inputs)
        outputs, given = zip(*pairs, strict=True)
        with _torch.without_autocast(self.leaves[0]):
            return _torch.run_backward(outputs, given, self.leaves)

    def pull_back_differentiably(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As `pull_back`, as a node of the outer graph, of which the gradients are inputs too."""
        result: list[Tensor | None] = [None] * len(self.inputs)
        pairs = self._pairs(grads)
        if not pairs:
            return result
        outputs, given = zip(*pairs, strict=True)
        with own_graph() as hooked, _torch.without_autocast(given[0]):
            aliases = [g.detach().requires_grad_() for g in given]
            pulled = torch.autograd.grad(
                outputs, self.leaves, aliases, create_graph=True, allow_unused=True
            )
        found = [(i, g) for i, g in enumerate(pulled) if g is not None]
        if not found:
            return result
        computation = Computation(
            (*self.inputs, *given),
            (*self.leaves, *aliases),
            [g for _, g in found],
            [t for t, _ in self.versions],
            hooked or self.hooked,
        )
        for (i, _), g in zip(found, attach(computation), strict=True):
            result[i] = g
        return result

    def _pairs(self, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        return [
            (output, grad)
            for output, grad in zip(self.outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]

    def places_of(self, used: Sequence[int]) -> Sequence[int]:
        """The places among the watched parameters that these outputs depend on."""
        return range(len(self.versions))

    def require_unchanged(self, used: Sequence[int] | None = None) -> None:
        """Raise if a parameter has been modified in place since the outputs were computed.

        Args:
            used: The places of the parameters that count; all of them if None.
        """
        versions = self.versions if used is None else [self.versions[i] for i in used]
        _checks.require(
            all(t._version == version for t, version in versions),
            "backward",
            "a parameter of a constrained weight has been modified in place since the forward pass",
            "Call backward before the parameters change, or run the forward pass again",
            RuntimeError,
        )


class own_graph:  # noqa: N801 (spelled as torch.no_grad)
    """Record a graph that no surrounding mode or hook on saved tensors (checkpointing) sees.

    Yields whether such hooks had to be kept away; autograd does not check then that what it has
    saved is unchanged.
    """

    __slots__ = ("_stack",)

    def __enter__(self) -> bool:
        self._stack, hooked = ExitStack(), _torch.has_saved_tensor_hooks()
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            self._stack.enter_context(torch.inference_mode(False))
            self._stack.enter_context(torch.enable_grad())
        if hooked:
            self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        return hooked

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


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
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        computation: Computation = ctx.computation
        if torch.is_grad_enabled():
            return (None, *computation.pull_back_differentiably(grads))
        return (None, *computation.pull_back(grads))


def attach(computation: Computation) -> tuple[Tensor, ...]:
    """The outputs, differentiable in the inputs."""
    return _PullBack.apply(computation, *computation.inputs)


def pulled_cold(weight: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of the parameters of a weight through its `evaluate`; no hook of them runs."""
    swapped: dict[int, tuple[Tensor, Tensor]] = {}
    homes = [(m._parameters, n) for m in weight.modules() for n in m._parameters]
    with SWAPPING:
        try:
            with own_graph():
                for place, name in homes:
                    p = place[name]
                    if p is not None:
                        swapped.setdefault(id(p), (p, torch.nn.Parameter(p.detach())))
                        place[name] = swapped[id(p)][1]
                value = weight.evaluate()
        finally:
            back = {id(alias): p for p, alias in swapped.values()}
            for place, name in homes:
                place[name] = back.get(id(place[name]), place[name])
    aliases = [alias for _, alias in swapped.values()]
    return list(_torch.run_backward((value,), (grad,), aliases))
