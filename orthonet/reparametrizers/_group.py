"""Weights of one shape that are computed by one batched call."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthonet.linalg._matrix import compute_dtype
from orthonet.reparametrizers._cache import (
    GIVEN,
    Kept,
    generation,
    hit,
    keepable,
    slot_of,
    usable,
)
from orthonet.reparametrizers._cache_record import INTERNAL, Record
from orthonet.reparametrizers._pullback import Computation, own_graph

if TYPE_CHECKING:
    from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["Batch", "Group", "kind"]

# What differs between weights that a batch can hold.
_FREE = INTERNAL | {"weight_shape", "_fresh", "_parameters", "_buffers", "_modules"}


def kind(weight: OrthoWeight, *, mode: bool = False) -> list[Any]:
    """What weights that are computed together have in common; with `mode`, train or eval too."""
    original = weight.original
    found: list[Any] = [original.shape[-2:], original.dtype, original.device]
    for part in (*weight.normalizer.modules(), *weight.orthogonalizer.modules()):
        values = [(n, v) for n, v in vars(part).items() if n not in _FREE and n != "training"]
        found += [type(part), values, list(part._buffers), list(part._modules)]
        if mode:
            found.append(part.training)
    return found


class Batch:
    """The normalizer and the orthogonalizer of several weights, for all matrices at once."""

    def __init__(self, members: Sequence[OrthoWeight]) -> None:
        self.members = [weakref.ref(m) for m in members]
        self.kind = kind(members[0], mode=True)
        self.shapes = [m.original.shape for m in members]
        self.counts = [math.prod(shape[:-2]) for shape in self.shapes]
        self.steps = [copy.deepcopy(s) for s in (members[0].normalizer, members[0].orthogonalizer)]
        size = (sum(self.counts), *self.shapes[0][-2:])
        for step in self.steps:
            for part in step.modules():
                if "weight_shape" in vars(part):
                    part.weight_shape = size

    def holds(self, members: Sequence[OrthoWeight]) -> bool:
        """Whether it has been made for these, as they are."""
        return (
            len(members) == len(self.members)
            and all(ref() is m for ref, m in zip(self.members, members, strict=True))
            and self.shapes == [m.original.shape for m in members]
            and self.kind == kind(members[0], mode=True)
        )

    def compute(self, members: Sequence[OrthoWeight], recorded: bool) -> Computation:
        """The values of `members`, each of the shape of its own."""
        dtype = members[0].original.dtype
        work = compute_dtype(dtype)
        with torch.inference_mode(False), torch.no_grad():
            state = self._gather(members)
            leaf = torch.cat([m.original.flatten(0, -3) if m.original.ndim > 2 else m.original[None]
                              for m in members]).to(work)  # fmt: skip
        if recorded:
            # A parameter where the modules get one without the batch: they may write to it.
            leaf = nn.Parameter(leaf) if dtype == work else leaf.requires_grad_()
            with own_graph() as hooked:
                outputs = self._run(leaf)
        else:
            hooked = False
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._run(leaf)
        with torch.inference_mode(False), torch.no_grad():
            self._scatter(members, leaf if leaf._version else None, state)
        originals = [m.original for m in members]

        def spread(pulled: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            grad = pulled[0]
            if grad is None:
                return (None,) * len(self.shapes)
            pieces = zip(grad.split(self.counts), self.shapes, strict=True)
            return tuple(piece.reshape(shape).to(dtype) for piece, shape in pieces)

        if not recorded:
            return Computation((), (), outputs, originals)
        return Computation(originals, (leaf,), outputs, originals, hooked, rank=1, spread=spread)

    def _run(self, matrices: Tensor) -> list[Tensor]:
        with torch.autocast(matrices.device.type, enabled=False):
            for step in self.steps:
                matrices = step(matrices)
        pieces = zip(matrices.split(self.counts), self.shapes, strict=True)
        return [piece.view(shape) for piece, shape in pieces]

    def _buffers(self, members: Sequence[OrthoWeight]) -> list[tuple[nn.Module, str, list[Tensor]]]:
        """Each buffer of the batch: where it is, and what stands for it in the members."""
        found = []
        for index, name in enumerate(("normalizer", "orthogonalizer")):
            own = self.steps[index].modules()
            theirs = zip(*(getattr(m, name).modules() for m in members), strict=True)
            for part, parts in zip(own, theirs, strict=True):
                for buffer, value in part._buffers.items():
                    if value is not None:
                        found.append((part, buffer, [p._buffers[buffer] for p in parts]))
        return found

    def _gather(self, members: Sequence[OrthoWeight]) -> list[tuple[Tensor, list[Tensor]]]:
        state = []
        for part, name, values in self._buffers(members):
            shapes = zip(values, self.shapes, self.counts, strict=True)
            batch = torch.cat([v.reshape(n, *v.shape[len(s) - 2 :]) for v, s, n in shapes])
            part._buffers[name] = batch
            state.append((batch, values))
        return state

    def _scatter(
        self,
        members: Sequence[OrthoWeight],
        written: Tensor | None,
        state: list[tuple[Tensor, list[Tensor]]],
    ) -> None:
        """Give the members what the modules have written."""
        for batch, values in state:
            if batch._version:
                for value, piece in zip(values, batch.split(self.counts), strict=True):
                    value.copy_(piece.view_as(value))
        if written is not None:
            for member, piece in zip(members, written.split(self.counts), strict=True):
                if member.original.requires_grad:
                    member.original.copy_(piece.view_as(member.original))


class Group:
    """The weights that are computed together when one of them is read.

    A copy, or a pickled one, is empty at first: copied weights join when they are read.
    """

    def __init__(self) -> None:
        self.members: list[weakref.ref[OrthoWeight]] = []
        self.lock = threading.RLock()
        self.batch: Batch | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group()

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        return Group, ()

    def join(self, weight: OrthoWeight) -> None:
        """Count `weight` in from its next computation on."""
        if not any(ref() is weight for ref in self.members):
            self.members.append(weakref.ref(weight))

    def value(self, weight: OrthoWeight) -> Tensor | None:
        """The value of one member in the dtype of the computation; None where it is not kept."""
        value = vars(weight).get(GIVEN)
        if value is None:
            value = hit(weight)
        if value is not None or not usable(weight):
            return value
        with self.lock:
            value = hit(weight)
            return self._compute(weight) if value is None else value

    def _compute(self, weight: OrthoWeight) -> Tensor | None:
        self.join(weight)
        self.members = [ref for ref in self.members if ref() is not None]
        wanted = kind(weight, mode=True)
        members = [
            m
            for ref in self.members
            if (m := ref()) is not None
            and m._group is self
            and m.caching
            and (m is weight or kind(m, mode=True) == wanted)
            and keepable(m, [*m.parameters(), *m.buffers()])
        ]
        if not any(m is weight for m in members):
            return None
        if self.batch is None or not self.batch.holds(members):
            self.batch = Batch(members)
        for m in members:
            slot_of(m).current = None  # free what is out of date first
        now, versions = generation(), [m.original._version for m in members]
        recorded = torch.is_grad_enabled() and any(m.original.requires_grad for m in members)
        kept = Kept(self.batch.compute(members, recorded), now, recorded)
        # In eval mode nothing is written here, so another thread has changed what was read.
        if weight.training or versions == [m.original._version for m in members]:
            for index, m in enumerate(members):
                slot_of(m).current = (Record(m), kept, index)
        index = next(i for i, m in enumerate(members) if m is weight)
        return kept.get(index, torch.is_grad_enabled() and weight.original.requires_grad)
