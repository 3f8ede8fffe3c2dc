"""Values at the center as functions of their parameters: one node of the graph for many weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from orthonet import _torch
from orthonet.linalg.matrix import split, stacked
from orthonet.linalg.retraction import CenteredMap
from orthonet.reparametrizers.providers.computation import Computation, Gradients, own_graph
from orthonet.reparametrizers.weight import Composition

__all__ = ["Centered", "Family", "Packet"]


class Centered(NamedTuple):
    """Matrices at the center, those of several parameters: U, (k, m, n) or (m, n), and c."""

    map: CenteredMap
    u: Tensor
    scale: Tensor

    def rows(self, spans: Sequence[tuple[int, int]]) -> Centered:
        """The matrices of some parameters, each given by its first matrix and their number."""
        if self.u.ndim == 2 and len(spans) == 1:
            return self
        if all(sum(a) == b[0] for a, b in itertools.pairwise(spans)):
            spans = [(spans[0][0], sum(spans[-1]) - spans[0][0])]
        parts: list[Tensor] = []
        for t in self[1:]:
            t = t.reshape(-1, *t.shape[-2:])
            rows = [t[first : first + count] for first, count in spans]
            found = rows[0] if len(rows) == 1 else torch.cat(rows)
            parts.append(found[0] if len(found) == 1 else found)
        return Centered(self.map, *parts)


class _AtCenter(Computation):
    """What packets and families share: gradients are differentiated through the cold map.

    Nothing here holds a module, so that a model is freed when its last reference goes.
    """

    __slots__ = ()

    def cold(self) -> list[Tensor]:
        """The outputs, computed from the inputs by differentiable operations."""
        return []

    def pull_back_differentiably(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As `pull_back`, by operations of the outer graph."""
        outputs = self.cold()
        given = zip(outputs, grads, strict=False)
        pairs = [(o, g) for o, g in given if g is not None and o.requires_grad]
        result: list[Tensor | None] = [None] * len(self.inputs)
        if not pairs:
            return result
        self.require_unchanged()
        learning = [i for i, t in enumerate(self.inputs) if t.requires_grad]  # some may be frozen
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [self.inputs[i] for i in learning],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        for i, g in zip(learning, found, strict=True):
            result[i] = g
        return result


class Packet(_AtCenter):
    r"""U of the parameters of one batch.

    The outputs are the values and, for square matrices, as many *frames*: zeros that stand for T in
    \(U e^T\), whose gradient is \(S = U^\top G\). Where a layer knows S without G, the packet
    spares one of its two products.
    """

    __slots__ = ("centered", "spans")

    def __init__(
        self,
        parameters: Sequence[Tensor],
        values: Sequence[Tensor],
        spans: Sequence[tuple[int, int]],
        centered: Centered,
    ) -> None:
        outputs = list(values)
        if centered.u.shape[-2] == centered.u.shape[-1]:
            zero = centered.u.new_zeros(())
            outputs += [zero.expand(v.shape) for v in values]
        super().__init__(parameters, (), outputs, (*parameters, centered.u))
        self.centered, self.spans = centered, tuple(spans)

    def places_of(self, used: Sequence[int]) -> Sequence[int]:
        """One parameter, and the value that it shares with others."""
        count = len(self.inputs)
        return [*sorted({i % count for i in used}), count]

    def cold(self) -> list[Tensor]:
        """The values by the map itself. Layers read no frames where gradients have a graph."""
        return [self.centered.map.value(p) for p in self.inputs]

    def pull_back(self, grads: Sequence[Tensor | None]) -> Gradients:
        """Two products for all parameters; one where only frames have gradients."""
        count = len(self.inputs)
        values, frames = grads[:count], grads[count:] or [None] * count
        used = [i for i in range(count) if values[i] is not None or frames[i] is not None]
        if not used:
            return (None,) * count
        self.require_unchanged(self.places_of(used))
        centered = self.centered.rows([self.spans[i] for i in used])
        with torch.no_grad(), _torch.without_autocast(centered.u):
            pulled = self._pulled(centered, [(values[i], frames[i]) for i in used])
        pieces = split(pulled, [self.inputs[i] for i in used])
        result: list[Tensor | None] = [None] * count
        for i, piece in zip(used, pieces, strict=True):
            result[i] = piece
        return tuple(result)

    @staticmethod
    def _pulled(centered: Centered, grads: list[tuple[Tensor | None, Tensor | None]]) -> Tensor:
        """From the gradients of values and of frames, of which zeros stand for what is missing."""

        def batch(some: Sequence[Tensor | None]) -> Tensor | None:
            if all(g is None for g in some):
                return None
            both = zip(some, grads, strict=True)
            return stacked([_zeros_like(pair) if g is None else g for g, pair in both])

        g, s = batch([value for value, _ in grads]), batch([frame for _, frame in grads])
        if s is None:
            return centered.map.pull_back(centered.u, centered.scale, cast(Tensor, g))
        s = s if g is None else s + centered.u.mT @ g
        return centered.map.turn(centered.u, centered.scale, s)


class Family(_AtCenter):
    """Weights of one kind, composed by one call from parts at the center.

    The composition is a graph of its own, from the stacked values of each part; behind it the
    pull-back is that of the parts.
    """

    __slots__ = ("compose", "parts", "recorded", "size")

    def __init__(
        self, compositions: Sequence[Composition], parts: Sequence[Centered], recorded: bool
    ) -> None:
        first, self.size = compositions[0], len(compositions)
        self.compose, self.parts = first.compose, tuple(parts)
        inputs: list[Any] = []
        for i in range(len(parts)):
            inputs += [c.parts[i].original for c in compositions]
        for i in range(len(first.scores)):
            inputs += [c.scores[i] for c in compositions]
        leaves = [part.u.detach() for part in parts]
        leaves += [torch.cat([s.detach() for s in scores]) for scores in self._scores(inputs)]
        with own_graph(), _torch.without_autocast(leaves[0]):
            if recorded:
                leaves = [leaf.requires_grad_() for leaf in leaves]
            with torch.set_grad_enabled(recorded):
                value = self._composed(leaves)
        outputs = value.detach().unbind()
        super().__init__(inputs, leaves, outputs, (*inputs, *(part.u for part in parts)))
        self.recorded = value if recorded else None

    def _composed(self, leaves: Sequence[Tensor]) -> Tensor:
        count = len(self.parts)
        return self.compose(leaves[:count], leaves[count:], self.size)

    def _scores(self, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The further parameters, those of all weights for each kind."""
        starts = range(len(self.parts) * self.size, len(inputs), self.size)
        return [inputs[start : start + self.size] for start in starts]

    def places_of(self, used: Sequence[int]) -> Sequence[int]:
        """The parameters of these weights, and the values of all parts."""
        own = [k * self.size + i for k in range(len(self.leaves)) for i in used]
        return [*own, *range(len(self.inputs), len(self.versions))]

    def cold(self) -> list[Tensor]:
        """The values, from the maps of the parts themselves."""
        leaves = []
        for k, part in enumerate(self.parts):
            values = [part.map.value(p) for p in self.inputs[k * self.size : (k + 1) * self.size]]
            leaves.append(stacked(values))
        leaves += [torch.cat(list(scores)) for scores in self._scores(self.inputs)]
        with _torch.without_autocast(leaves[0]):
            return list(self._composed(leaves).unbind())

    def pull_back(self, grads: Sequence[Tensor | None]) -> Gradients:
        """Back through the composition, then two products for all parts of a kind."""
        count = self.size
        used = [i for i in range(count) if grads[i] is not None]
        if not used or self.recorded is None:
            return (None,) * len(self.inputs)
        self.require_unchanged(self.places_of(used))
        given = torch.stack(
            [
                torch.zeros_like(o) if g is None else g
                for g, o in zip(grads, self.outputs, strict=True)
            ]
        )
        result: list[Tensor | None] = []
        with _torch.without_autocast(given):
            found = _torch.run_backward((self.recorded,), (given,), self.leaves)
        with torch.no_grad(), _torch.without_autocast(given):
            for k, grad in enumerate(found):
                parameters = self.inputs[k * count : (k + 1) * count]
                if grad is None:
                    result += [None] * count
                elif k < len(self.parts):
                    part = self.parts[k]
                    pulled = part.map.pull_back(part.u, part.scale, grad)
                    result += split(pulled, parameters)
                else:
                    result += grad.split([len(p) for p in parameters])
        return tuple(g if i % count in used else None for i, g in enumerate(result))


def _zeros_like(some: Sequence[Tensor | None]) -> Tensor:
    """Zeros of the shape of the tensor that is there."""
    return torch.zeros_like(next(t for t in some if t is not None))
