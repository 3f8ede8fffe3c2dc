"""Weights of one shape that are computed by one batched call."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthonet._torch import without_autocast
from orthonet.linalg._matrix import compute_dtype
from orthonet.reparametrizers._cache import (
    GIVEN,
    Kept,
    hit,
    keep,
    keepable,
    slot_of,
)
from orthonet.reparametrizers._cache_record import INTERNAL, Structure
from orthonet.reparametrizers._cache_state import steps, usable
from orthonet.reparametrizers._pullback import Computation, Gradients, own_graph

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
    """The normalizer and the orthogonalizer of several weights, for all matrices at once.

    A single weight is computed as it stands: products of matrices are faster than those of batches
    of one, and nothing is copied.
    """

    def __init__(
        self, members: Sequence[OrthoWeight], structures: Sequence[Structure | None] = ()
    ) -> None:
        self.members = [weakref.ref(m) for m in members]
        self.structures = tuple(structures)  # of all that might have been taken
        self.shapes = [m.original.shape for m in members]
        self.counts = [math.prod(shape[:-2]) for shape in self.shapes]
        self.steps = [copy.deepcopy(s) for s in (members[0].normalizer, members[0].orthogonalizer)]
        self.alone = len(members) == 1
        size = tuple(self.shapes[0]) if self.alone else (sum(self.counts), *self.shapes[0][-2:])
        for step in self.steps:
            for part in step.modules():
                if "weight_shape" in vars(part):
                    part.weight_shape = size  # type: ignore[assignment]

    def alive(self) -> list[OrthoWeight]:
        """The weights it has been made for."""
        return [m for ref in self.members if (m := ref()) is not None]

    def serves(self, weight: OrthoWeight, structures: Sequence[Structure | None]) -> bool:
        """Whether `weight` is among its members, and all are as they were."""
        return (
            len(structures) == len(self.structures)
            and all(map(is_, structures, self.structures))
            and any(ref() is weight for ref in self.members)
        )

    def compute(self, members: Sequence[OrthoWeight], recorded: bool) -> Computation:
        """The values of `members`, each of the shape of its own."""
        originals = [m.original for m in members]
        dtype = originals[0].dtype
        work = compute_dtype(dtype)
        with torch.inference_mode(False), torch.no_grad():
            state = self._gather(members)
            if self.alone:  # shares memory and version counter with the parameter
                leaf = originals[0].detach().to(work)
            else:
                sizes = zip(originals, self.counts, strict=True)
                leaf = torch.cat([t.view(n, *t.shape[-2:]) for t, n in sizes]).to(work)
        if recorded:
            # A parameter where the modules get one without the batch: they may write to it.
            leaf = nn.Parameter(leaf) if dtype == work else leaf.requires_grad_()
            before = leaf._version
            with own_graph() as hooked:
                outputs = self._run(leaf)
        else:
            hooked, before = False, leaf._version
            with torch.inference_mode(False), torch.no_grad():
                outputs = self._run(leaf)
        with torch.inference_mode(False), torch.no_grad():
            moved = leaf._version != before and not self.alone
            self._scatter(originals, leaf if moved else None, state)

        def spread(pulled: Gradients, grads: Sequence[Tensor | None]) -> Gradients:
            grad = pulled[0]
            if grad is None:
                return (None,) * len(self.shapes)
            pieces = [
                piece.reshape(shape).to(dtype)
                for piece, shape in zip(self._split(grad), self.shapes, strict=True)
            ]
            if not grads:
                return tuple(pieces)
            # what is not used gets no gradient, as without the batch
            return tuple(p if g is not None else None for p, g in zip(pieces, grads, strict=True))

        if not recorded:
            return Computation((), (), outputs, originals)
        return Computation(originals, (leaf,), outputs, originals, hooked, spread)

    def _run(self, matrices: Tensor) -> list[Tensor]:
        with without_autocast(matrices):
            for step in self.steps:
                matrices = step(matrices)
        pieces = zip(self._split(matrices), self.shapes, strict=True)
        return [piece.view(shape) for piece, shape in pieces]

    def _split(self, batch: Tensor) -> Sequence[Tensor]:
        return (batch,) if self.alone else batch.split(self.counts)

    def _gather(self, members: Sequence[OrthoWeight]) -> list[tuple[Tensor, int, list[Tensor]]]:
        """Fill the buffers of the batch from those of the members: (batch, version, theirs)."""
        state = []
        for step, name in zip(self.steps, ("normalizer", "orthogonalizer"), strict=True):
            if next(step.buffers(), None) is None:
                continue
            theirs = zip(*(getattr(m, name).modules() for m in members), strict=True)
            for part, parts in zip(step.modules(), theirs, strict=True):
                for buffer, value in part._buffers.items():
                    if value is None:
                        continue
                    values = [p._buffers[buffer] for p in parts]
                    sizes = zip(values, self.shapes, self.counts, strict=True)
                    pieces = [v.reshape(n, *v.shape[len(s) - 2 :]) for v, s, n in sizes]
                    batch = values[0].clone() if self.alone else torch.cat(pieces)
                    part._buffers[buffer] = batch
                    state.append((batch, batch._version, values))
        return state

    def _scatter(
        self,
        originals: Sequence[Tensor],
        written: Tensor | None,
        state: Sequence[tuple[Tensor, int, list[Tensor]]],
    ) -> None:
        """Give the members what the modules have written."""
        for batch, version, values in state:
            if batch._version != version:
                for value, piece in zip(values, self._split(batch), strict=True):
                    value.copy_(piece.view_as(value))
        if written is not None:
            for original, piece in zip(originals, self._split(written), strict=True):
                if original.requires_grad:
                    original.copy_(piece.view_as(original))


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

    def forget(self) -> None:
        """Compute anew at the next read; values in the slots of the members are not meant."""

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
        alive = [m for ref in self.members if (m := ref()) is not None and m._group is self]
        structures = [keepable(m) for m in alive]
        batch = self.batch
        if batch is None or not batch.serves(weight, structures):
            wanted = kind(weight, mode=True)
            members = [
                m
                for m, structure in zip(alive, structures, strict=True)
                if structure is not None and m.caching and kind(m, mode=True) == wanted
            ]
            if not any(m is weight for m in members):
                return None
            batch = self.batch = Batch(members, structures)
        members = batch.alive()
        for m in members:
            slot_of(m).current = None  # free what is out of date first
        originals = [m.original for m in members]
        now, versions = steps(), [t._version for t in originals]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in originals)
        kept = Kept(batch.compute(members, recorded), now, recorded)
        # In eval mode nothing is written here, so another thread has changed what was read.
        if weight.training or versions == [t._version for t in originals]:
            known = {id(m): s for m, s in zip(alive, structures, strict=True) if s is not None}
            for index, m in enumerate(members):
                keep(m, known[id(m)], kept, index)
        index = next(i for i, m in enumerate(members) if m is weight)
        return kept.get(index, recorded and weight.original.requires_grad)
