"""The autograd side of what is kept: one node in front of a computation.

The computed tensor hangs in the outer graph by a single node that saves nothing, so that any number
of backward passes run through it. The computation itself is a graph of its own, from aliases of the
inputs to the outputs, owned by a `Computation`; the node pulls gradients back through it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from orthonet import _checks, _torch
from orthonet.reparametrizers.weight import GIVEN, Weight

__all__ = [
    "SWAPPING",
    "Computation",
    "Gradients",
    "Watched",
    "attach",
    "computed",
    "given",
    "node",
    "own_graph",
    "pulled_cold",
]

Gradients = Sequence[Tensor | None]
Watched = tuple[Tensor, int]  # a tensor that must not change before backward, and its version


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

    __slots__ = ("hooked", "inputs", "leaves", "outputs", "recorded", "versions")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
        watched: Sequence[Tensor] = (),
        hooked: bool = False,
        recorded: bool = True,
    ) -> None:
        self.inputs = tuple(inputs)
        self.leaves = tuple(leaves)
        self.outputs = tuple(outputs)
        # parameters that must not change in place before backward; autograd sees to it where it
        # has saved them itself, which it has not where `hooked` is set
        self.versions: list[Watched] = [(t, t._version) for t in watched]
        self.hooked = hooked
        self.recorded = recorded  # whether there is a graph to pull gradients back through

    def pull_back(self, grads: Gradients) -> Gradients:
        """The gradient of the inputs, from that of the outputs."""
        if self.hooked:
            self.require_unchanged()
        outputs, given = self._used(grads)
        if not outputs:
            return (None,) * len(self.inputs)
        with _torch.without_autocast(self.leaves[0]):
            return _torch.run_backward(tuple(outputs), tuple(given), self.leaves)

    def pull_back_differentiably(self, grads: Gradients) -> Gradients:
        """As `pull_back`, as a node of the outer graph, of which the gradients are inputs too."""
        result: list[Tensor | None] = [None] * len(self.inputs)
        outputs, given = self._used(grads)
        if not outputs:
            return result
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

    def _used(self, grads: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """The differentiable outputs that have a gradient, and these."""
        pairs = zip(self.outputs, grads, strict=True)
        used = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        return [o for o, _ in used], [g for _, g in used]

    def gradients_of(self, parameters: Sequence[Tensor], grads: Gradients) -> list[Tensor | None]:
        """The gradients of some parameters, from those of the outputs; no hook of them runs."""
        pulled = dict(zip(map(id, self.inputs), self.pull_back(grads), strict=True))
        return [pulled.get(id(p)) for p in parameters]

    def watched(self, grads: Gradients) -> Sequence[Watched]:
        """What the outputs that have these gradients depend on."""
        return self.versions

    def require_unchanged(self, grads: Gradients | None = None) -> None:
        """Raise if something that these outputs, or all, depend on has been modified in place."""
        watched = self.versions if grads is None else self.watched(grads)
        _checks.require(
            all(t._version == version for t, version in watched),
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
    hooked = _torch.has_saved_tensor_hooks()
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        if hooked:
            stack.enter_context(saved_tensors_hooks(lambda t: t, lambda t: t))
        yield hooked


class _Node(torch.autograd.Function):
    """Tensors in the outer graph, whose gradients a function takes."""

    @staticmethod
    def forward(
        ctx: Any, back: Callable[..., Gradients], outputs: Sequence[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back = back
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.back(grads))


def node(
    back: Callable[[Gradients], Gradients], outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs as functions of the inputs, whose gradients `back` makes of theirs."""
    return _Node.apply(back, outputs, *inputs)


def attach(computation: Computation) -> tuple[Tensor, ...]:
    """The outputs of a computation, differentiable in its inputs: for all readers, by one node."""

    def back(grads: Gradients) -> Gradients:
        if torch.is_grad_enabled():
            return computation.pull_back_differentiably(grads)
        return computation.pull_back(grads)

    with torch.inference_mode(False), torch.enable_grad():
        return node(back, computation.outputs, computation.inputs)


@contextlib.contextmanager
def given(parts: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Let parts of a weight have these values, while something made of them is computed."""
    try:
        for part, value in parts:
            vars(part)[GIVEN] = value
        yield
    finally:
        for part, _ in parts:
            vars(part).pop(GIVEN, None)


def computed(
    weight: Weight, served: Sequence[tuple[Weight, Tensor]] = (), recorded: bool = True
) -> Computation:
    """Evaluate a weight, with an alias in place of every tensor of it.

    The aliases share memory and version counter with what they stand for, so that a user's map may
    write to its parameters; gradients stop at them, so no hook of a parameter runs too early, and
    the graph holds no tensor of the module, which PyTorch may swap for another. The `served` parts
    are given aliases of their values.
    """
    if not recorded:
        with given(served), torch.inference_mode(False), torch.no_grad():
            return Computation((), (), (weight.evaluate(),), recorded=False)
    aliases: dict[int, tuple[Tensor, Tensor]] = {}  # of what requires a gradient

    def alias(tensor: Tensor) -> Tensor:
        own, learns = tensor.detach(), tensor.requires_grad
        own = nn.Parameter(own, learns) if isinstance(tensor, nn.Parameter) else own
        if not learns:
            return own
        return aliases.setdefault(id(tensor), (tensor, own.requires_grad_()))[1]

    inside = {id(module) for part, _ in served for module in part.modules()}
    homes = [
        (place, name, tensor)
        for module in weight.modules()
        if id(module) not in inside
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None
    ]
    put: list[Tensor] = []
    with own_graph() as hooked:
        try:
            for place, name, tensor in homes:
                put.append(alias(tensor))
                place[name] = put[-1]  # type: ignore[assignment]
            with given([(part, alias(value)) for part, value in served]):
                output = weight.evaluate()
        finally:
            for (place, name, tensor), own in zip(homes, put, strict=False):
                if place.get(name) is own:  # or the map has put another there
                    place[name] = tensor  # type: ignore[assignment]
    inputs, leaves = zip(*aliases.values(), strict=True) if aliases else ((), ())
    return Computation(inputs, leaves, (output,), list(weight.parameters()), hooked)


def pulled_cold(weight: Weight, grad: Tensor) -> list[Tensor | None]:
    """The gradients of the parameters of a weight through its `evaluate`; no hook of them runs."""
    with SWAPPING:
        computation = computed(weight)
    return computation.gradients_of(list(weight.parameters()), [grad])
