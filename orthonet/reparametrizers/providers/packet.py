"""Values at the center as functions of their parameters: one node of the graph for many weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from orthonet import _torch
from orthonet.linalg.matrix import split, stacked
from orthonet.linalg.retraction import CenteredMap
from orthonet.reparametrizers.providers.computation import (
    Computation,
    Gradients,
    Watched,
    own_graph,
)

__all__ = ["Centered", "Packet", "Place"]


@dataclass(slots=True, eq=False)
class Centered:
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
        for t in (self.u, self.scale):
            t = t.reshape(-1, *t.shape[-2:])
            rows = [t[first : first + count] for first, count in spans]
            found = rows[0] if len(rows) == 1 else torch.cat(rows)
            parts.append(found[0] if len(found) == 1 else found)
        return Centered(self.map, *parts)

    def pull_back(self, grad: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the parameters, which are `like` these, from that of U."""
        return split(self.map.pull_back(self.u, self.scale, grad), like)


Place = tuple[Centered, tuple[int, int]]
"""Where the matrices of one parameter are: the first of them, and their number."""

Compose = Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]


class Packet(Computation):
    r"""Weights of one kind: matrices at the center, or composed from such by one call.

    The composition is a graph of its own, from the stacked matrices of each part; behind it the
    pull-back is that of the matrices, in closed form. Gradients are differentiated through the cold
    map.

    Without composition the outputs are the matrices and, if they are square, as many *frames*:
    zeros that stand for T in \(U e^T\), whose gradient is \(S = U^\top G\). Where a layer knows S
    without G, the packet spares one of its two products.

    Nothing here holds a module, so that a model is freed when its last reference goes.

    Args:
        rows: The parameters of each part, and the scores of each kind, of all weights.
        parts: The matrices of each part, in the same order.
        compose: As in `Composition`; None for the matrices themselves.
        recorded: Whether gradients may be asked for.
    """

    __slots__ = ("compose", "composed", "parts", "size", "spans")

    def __init__(
        self,
        rows: Sequence[Sequence[Tensor]],
        parts: Sequence[Centered],
        compose: Compose | None = None,
        recorded: bool = True,
    ) -> None:
        self.parts, self.compose, self.size = tuple(parts), compose, len(rows[0])
        leaves: list[Tensor] = []
        if compose is None:
            (part,) = parts
            counts = [p.shape[:-2].numel() for p in rows[0]]
            self.spans = [*zip(itertools.accumulate(counts, initial=0), counts, strict=False)]
            m, n = part.u.shape[-2:]
            matrices = part.u.view(-1, m, n).split(counts)
            outputs = [u.view(p.shape) for u, p in zip(matrices, rows[0], strict=True)]
            if recorded and m == n:
                zero = part.u.new_zeros(())
                outputs += [zero.expand(p.shape) for p in rows[0]]
        else:
            leaves = [part.u.detach() for part in parts]
            leaves += [torch.cat([s.detach() for s in scores]) for scores in rows[len(parts) :]]
            with own_graph(), _torch.without_autocast(leaves[0]):
                leaves = [leaf.requires_grad_(recorded) for leaf in leaves]
                with torch.set_grad_enabled(recorded):
                    self.composed = compose(leaves[: len(parts)], leaves[len(parts) :], self.size)
            outputs = list(self.composed.detach().unbind())
        inputs = [t for row in rows for t in row]
        super().__init__(
            inputs,
            leaves,
            outputs,
            (*inputs, *(part.u for part in parts)),
            recorded=recorded,
        )

    def _rows(self) -> list[Sequence[Tensor]]:
        starts = range(0, len(self.inputs), self.size)
        return [self.inputs[start : start + self.size] for start in starts]

    def _used(self, grads: Gradients) -> list[int]:
        """The weights of which a value or a frame has a gradient."""
        return sorted({i % self.size for i, g in enumerate(grads) if g is not None})

    def watched(self, grads: Gradients) -> Sequence[Watched]:
        """The parameters of the weights that have gradients, and the matrices of all of them."""
        count, used = len(self.inputs), self._used(grads)
        own = [self.versions[k + i] for k in range(0, count, self.size) for i in used]
        return [*own, *self.versions[count:]]

    def pull_back(self, grads: Gradients) -> Gradients:
        """Two products for all matrices of a part; one where only frames have gradients."""
        used = self._used(grads)
        result: list[Tensor | None] = [None] * len(self.inputs)
        if not used or not self.recorded:
            return result
        self.require_unchanged(grads)
        with torch.no_grad(), _torch.without_autocast(self.parts[0].u):
            if self.compose is None:
                found = [self._of_matrices(used, grads)]
            else:
                found = self._of_parts(used, grads)
        for k, row in enumerate(found):
            for i, g in zip(used, row, strict=True):
                result[k * self.size + i] = g
        return result

    def _of_matrices(self, used: Sequence[int], grads: Gradients) -> Sequence[Tensor]:
        """The gradients of these parameters; zeros stand for gradients that are missing."""

        def batch(start: int) -> Tensor | None:
            some = [grads[start + i] if start < len(grads) else None for i in used]
            if all(g is None for g in some):
                return None
            both = zip(some, used, strict=True)
            return stacked([torch.zeros_like(self.outputs[i]) if g is None else g for g, i in both])

        part = self.parts[0].rows([self.spans[i] for i in used])
        like = [self.inputs[i] for i in used]
        g, s = batch(0), batch(self.size)
        if s is None:
            return part.pull_back(cast(Tensor, g), like)
        s = s if g is None else s + part.u.mT @ g
        return split(part.map.turn(part.u, part.scale, s), like)

    def _of_parts(self, used: Sequence[int], grads: Gradients) -> list[Gradients]:
        """The gradients of each part, then of each kind of scores, of these weights."""
        both = zip(grads, self.outputs, strict=True)
        given = torch.stack([torch.zeros_like(o) if g is None else g for g, o in both])
        found = _torch.run_backward((self.composed,), (given,), self.leaves)
        result: list[Gradients] = []
        for grad, row, part in itertools.zip_longest(found, self._rows(), self.parts):
            pieces: Gradients = [None] * self.size
            if grad is not None and part is not None:
                pieces = part.pull_back(grad, row)
            elif grad is not None:
                pieces = grad.split([len(p) for p in row])
            result.append([pieces[i] for i in used])
        return result

    def pull_back_differentiably(self, grads: Gradients) -> list[Tensor | None]:
        """As `pull_back`, by operations of the outer graph."""
        given = zip(self._cold(), grads, strict=False)  # layers read no frames here
        pairs = [(o, g) for o, g in given if g is not None and o.requires_grad]
        result: list[Tensor | None] = [None] * len(self.inputs)
        if not pairs:
            return result
        self.require_unchanged()
        # Some may be frozen, and some may be one tensor in two places.
        learning = {id(t): i for i, t in enumerate(self.inputs) if t.requires_grad}.values()
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

    def _cold(self) -> Sequence[Tensor]:
        """The values by the maps themselves, as differentiable functions of the inputs."""
        rows = self._rows()
        pairs = zip(self.parts, rows, strict=False)
        values = [[part.map.value(p) for p in row] for part, row in pairs]
        if self.compose is None:
            return values[0]
        scores = [torch.cat(list(row)) for row in rows[len(self.parts) :]]
        with _torch.without_autocast(self.parts[0].u):
            return self.compose([*map(stacked, values)], scores, self.size).unbind()
