"""One retraction per optimizer step, for all orthogonal matrices of the process.

The parameter of a weight with a `map` stands at the center, M = c U. After a step of an optimizer
the parameters that it has moved are gathered by shape and map, brought back to the center by one
program a group, and U is kept. Until the next step a read returns U, and a backward pass takes the
closed form at the center, in one node of the graph a group. The host waits once: for the bounds of
all groups, which choose the programs.

A parameter that another hand has moved is looked at when it is read: at the center, the read is as
above; elsewhere the weight is computed by its cold map. No read writes anything.
"""

from __future__ import annotations

import abc
import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from orthonet import _checks, _torch
from orthonet.linalg.matrix import stacked
from orthonet.linalg.retraction import Moved, center, retract
from orthonet.reparametrizers.providers.computation import (
    SWAPPING,
    Computation,
    attach,
)
from orthonet.reparametrizers.providers.defer import DEFERRING
from orthonet.reparametrizers.providers.edits import differs, warn_edited
from orthonet.reparametrizers.providers.matrices import (
    Member,
    groups_of,
    manageable,
    member,
    pieces_of,
    untied,
)
from orthonet.reparametrizers.providers.packet import Centered, Packet, Place
from orthonet.reparametrizers.weight import Composition, Weight, alive, caching

__all__ = ["ENGINE", "REEVALUATING_OPTIMIZERS", "Engine"]

REEVALUATING_OPTIMIZERS: set[type[Optimizer]] = {LBFGS}
"""Optimizers that compare parameters and gradients of several evaluations within one step.

No retraction moves their parameters, and weights are computed by the cold maps. Add the class of an
optimizer of your own that does so.
"""


_LEARNS = operator.attrgetter("requires_grad")


class Kept(abc.ABC):
    """A value of a weight, and what readers are given: a constant, or a function of parameters."""

    __slots__ = ("constant", "source", "stamp", "stream", "value", "where")

    def __init__(self, where: Tensor) -> None:
        self.where, self.stream = where, _torch.current_stream(where)
        # Of which outputs it is one; these in the graph; its place. None: it has not been computed.
        self.source: tuple[Computation, Sequence[Tensor], int] | None = None

    def give(self, computation: Computation, graphed: Sequence[Tensor], place: int) -> None:
        """Let the value be an output; readers are given tensors that share its memory."""
        self.value = computation.outputs[place]
        self.stamp, self.constant = _torch.Stamp(self.value), self.value.detach()
        self.source = computation, graphed, place

    def lacks(self, grad: bool) -> bool:
        """Whether the value has not been computed, or without the graph that `grad` needs."""
        return self.source is None or (grad and not self.source[0].recorded)

    def read(self) -> Tensor | None:
        """What a reader is given here and now; None if it has not been computed."""
        source = self.source  # another thread may put another there
        if source is None:
            return None
        if torch.is_grad_enabled() and self.learns():
            return _in_graph(*source[:2])[source[2]] if source[0].recorded else None
        if self.constant.requires_grad:  # a reader has changed it
            self.constant = self.constant.detach()
        return self.constant

    @abc.abstractmethod
    def learns(self) -> bool:
        """Whether the value depends on a parameter that requires a gradient."""

    @abc.abstractmethod
    def unmoved(self, weight: Weight) -> bool:
        """Whether everything that the value of `weight` depends on is as it was."""

    def touched(self) -> bool:
        """Whether a reader may have written to the value."""
        return self.source is not None and not self.stamp.holds(self.value)

    def edited(self, weight: Weight) -> Tensor | None:
        """The value, if readers may have written to it and to nothing that it depends on."""
        return self.value if self.touched() and self.unmoved(weight) else None

    def holds(self, weight: Weight) -> bool:
        """Whether it is the value of `weight` as that stands, and readers have left it alone."""
        # Work of another stream may not be done yet; what is captured will not ask when replayed.
        elsewhere = self.stream is not None and (
            self.stream != _torch.current_stream(self.where) or _torch.capturing(self.where)
        )
        return not elsewhere and self.unmoved(weight) and not self.touched()


class Reading(Kept):
    """What the engine has seen of one weight: where its matrices stand at the center.

    A weight has matrices of its own, or is composed of those of its `parts`. If one of them does
    not stand at the center, `places` is empty, and nobody looks again until something moves.
    """

    __slots__ = ("compose", "inputs", "kind", "made_of", "parts", "places", "stamps")

    def __init__(
        self,
        weight: Weight,
        made_of: _torch.ModuleStamp,
        stamps: Sequence[tuple[Tensor, _torch.Stamp]],
        places: tuple[Place, ...],
        parts: tuple[tuple[Weight, Reading], ...] = (),
        composition: Composition | None = None,
    ) -> None:
        # of the matrices, then of the scores
        self.inputs = (*(r.inputs[0] for _, r in parts), *(t for t, _ in stamps))
        super().__init__(self.inputs[0])
        self.made_of, self.stamps, self.places, self.parts = made_of, stamps, places, parts
        self.compose = None if composition is None else composition.compose
        key: Hashable = weight.composed if composition is None else composition.key
        # Weights of one kind may share a node.
        self.kind = (key, *(centered for centered, _ in places))

    def unmoved(self, weight: Weight) -> bool:
        """Whether its map, its parameters and those of its parts are as they were."""
        if not self.made_of.holds(weight):
            return False
        for tensor, stamp in self.stamps:
            if not stamp.holds(tensor):
                return False
        for part, reading in self.parts:
            if part._slot.reading is not reading or not reading.holds(part):
                return False
        return True

    def learns(self) -> bool:
        """Whether a parameter that the value depends on requires a gradient."""
        return any(map(_LEARNS, self.inputs))


Group = Sequence[Member]
Retraction = Callable[[Sequence[Group]], list[Moved]]  # of the parameters of groups
# From the identities of the parameters of an optimizer, and those that it has moved, to the rest.
Share = Callable[[set[int], list[Member]], list[Member]]


class Engine:
    """The hook behind optimizer steps, and the provider of the values that it makes."""

    def __init__(self) -> None:
        self.lock = SWAPPING
        self.squares: dict[Any, bool] = {}  # whether the last step of a kind of group needed E^2
        self.looks = 0  # how often the host has waited
        self.shares: list[Share] = []  # who retract some weights together with other processes
        # The DistributedDataParallel that has read a weight last
        self.homes: weakref.WeakKeyDictionary[Weight, object] = weakref.WeakKeyDictionary()

    def forget(self, module: nn.Module | None = None) -> None:
        """Look anew at the parameters of `module`, or of all modules, when they are read."""
        own = None if module is None else set(map(id, module.parameters()))
        with self.lock:
            for weight in alive():
                if own is None or any(id(p) in own for p in weight._parameters.values()):
                    weight._slot.reading = None

    def before_step(self, optimizer: Optimizer) -> None:
        """Lose sight of what a fused optimizer moves without a trace, should its step not end."""
        if any(group.get("fused") for group in optimizer.param_groups):
            with self.lock:
                self._moved(set(map(id, _torch.parameters_of(optimizer))))

    def after_step(self, optimizer: Optimizer) -> None:
        """Bring back to the center what `optimizer` has moved."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            owned = set(map(id, _torch.parameters_of(optimizer)))
            moved = self._moved(owned)
            if caching.on and not isinstance(optimizer, tuple(REEVALUATING_OPTIMIZERS)):
                moved = [m for m in moved if m.parameter.requires_grad]
                for share in tuple(self.shares):
                    moved = share(owned, moved)
                self.serve(moved, self.retract)

    def _moved(self, owned: set[int]) -> list[Member]:
        """The matrices of an optimizer that have moved, in the order of their construction.

        Their readings are gone then, because a move without a trace may have been too small to be
        undone; so are those of all weights that are out of date, to free what they hold.
        """
        moved = []
        for weight in alive():
            reading = weight._slot.reading
            # Fused optimizers do not count the version up, and some clear the gradients in `step`.
            # A gradient that is left from before it was frozen moves a parameter.
            mine = [p for p in weight._parameters.values() if id(p) in owned]
            if any(p is not None and (p.requires_grad or p.grad is not None) for p in mine):
                reading = None
            if reading is not None and reading.holds(weight):
                continue
            weight._slot.reading = None
            held = member(weight) if mine else None
            if held is not None and manageable(weight, held.parameter):
                moved.append(held)
        return moved

    def serve(self, members: Group, retracted: Retraction) -> None:
        """Bring the parameters to the center, or see which stand there, and record the places."""
        groups = list(groups_of(untied(members)))
        # Before anything is read: what another thread writes meanwhile must not pass for this.
        made_of = [_torch.ModuleStamp(m.weight) for m in members]
        stamps = {id(m.parameter): _torch.Stamp(m.parameter) for m in members}
        places: dict[int, Place] = {}
        for group, result in zip(groups, retracted(groups), strict=True):
            pieces = list(pieces_of(group, result))
            # The others keep their bits and their version.
            moved = [
                (piece.member.parameter, piece.point) for piece in pieces if any(piece.written)
            ]
            if moved:
                _torch.foreach_copy_([p for p, _ in moved], [point for _, point in moved])
            stamps |= {id(p): _torch.Stamp(p) for p, _ in moved}
            if any(result.good):
                centered = Centered(group[0].map, *center(result.point))
                for piece in pieces:
                    if all(piece.good):
                        place = centered, (piece.first, len(piece.good))
                        places[id(piece.member.parameter)] = place
        for (weight, p, _), own in zip(members, made_of, strict=True):
            if any(t is p for t in own.own):  # nobody has put another in its place
                found = (places[id(p)],) if id(p) in places else ()
                weight._slot.reading = Reading(weight, own, [(p, stamps[id(p)])], found)

    def retract(self, groups: Sequence[Group], move: bool = True) -> list[Moved]:
        """The parameters of each group at the center; not moved, they are only looked at.

        With a guess from the last step of what is needed.
        """
        if not groups:
            return []
        self.looks += 1
        batches = [(stacked([m.parameter.detach() for m in g]), g[0].map) for g in groups]
        if not move:  # another thread may be about to move what `stacked` has not copied
            pairs = zip(groups, batches, strict=True)
            batches = [(x.clone() if len(g) == 1 else x, way) for g, (x, way) in pairs]
        kinds = [(*x.shape, x.dtype, way.name) for x, way in batches]
        squares = [self.squares.get(kind, True) for kind in kinds]
        with _torch.without_autocast(batches[0][0]):
            found = retract(batches, move=move, squares=squares)
        for kind, result in zip(kinds, found, strict=True):
            if any(result.written):
                self.squares[kind] = result.squared
        return found

    def reading(self, weight: Weight) -> Reading | None:
        """The reading of `weight`; None where its matrices do not stand at the center."""
        if not weight.may_be_kept():
            return None
        reading = weight._slot.reading
        if reading is None or not reading.holds(weight):
            reading = self._renewed(weight)
        return reading if reading is not None and reading.places else None

    def __call__(self, weight: Weight) -> Tensor | None:
        """The value of `weight`, where its matrices stand at the center."""
        reading = self.reading(weight)
        if reading is None:
            return None
        value = reading.read()
        if value is None:
            with self.lock:
                self._compute(weight, reading)
            value = reading.read()
        return value

    def _renewed(self, weight: Weight) -> Reading | None:
        """What is found of `weight` now, and a warning if a reader has written to what was."""
        with self.lock:
            before = weight._slot.reading
            given = None if before is None else before.edited(weight)
            reading = self._find(weight)
        if given is not None and reading is not None and reading.places:
            self._tell_of_edits(weight, given, reading)
        return reading

    def _tell_of_edits(self, weight: Weight, given: Tensor, reading: Reading) -> None:
        """Warn, once for all weights, if a reader has written to the value of this one.

        Weights of a batch share a version counter: the values themselves tell whose was written to.
        """
        with self.lock, torch.no_grad():
            if reading.lacks(False):
                self._compute(weight, reading)
            if not differs(given, reading.value):
                return
            for other in alive():
                seen = other._slot.reading
                if seen is not None and seen.touched():
                    other._slot.reading = None
        warn_edited()

    def _find(self, weight: Weight, look: bool = True) -> Reading | None:
        """The reading of `weight` as it stands; its matrices are looked at if nobody has."""
        reading = weight._slot.reading
        if reading is not None and reading.holds(weight):
            return reading
        composition = weight.composition()
        if composition is None:
            return self._look(weight) if look else None
        made_of, scores = _torch.ModuleStamp(weight), composition.scores
        parts = [(part, self._find(part, look)) for part in composition.parts]
        held = tuple((part, r) for part, r in parts if r is not None and r.places)
        seen = all(map(_torch.cannot_change_unseen, scores))
        # A hook of a part runs where the weight is computed.
        if len(held) < len(parts) or not seen or not made_of.holds(weight):
            return None
        places = tuple(place for _, r in held for place in r.places)
        stamps = [(score, _torch.Stamp(score)) for score in scores]
        reading = Reading(weight, made_of, stamps, places, held, composition)
        weight._slot.reading = reading
        return reading

    def _look(self, weight: Weight) -> Reading | None:
        """Look at the matrix of `weight`, together with all others that nobody has looked at."""
        held = member(weight)
        if held is None:
            return None
        if _torch.capturing(held.parameter):
            _checks.fail(
                weight,
                "a weight cannot be read while a CUDA graph is captured, whose replay would not "
                "see that it has changed",
                "Capture orthonet.to_plain(model), or use torch.compile without CUDA graphs",
                RuntimeError,
            )
        if not manageable(weight, held.parameter):
            return None
        every = [m for other in alive() if (m := member(other)) is not None]
        managed = [m for m in every if manageable(m.weight, m.parameter)]
        unknown = [m for m in managed if self._find(m.weight, look=False) is None]
        with torch.inference_mode(False), torch.no_grad():
            self.serve(unknown, functools.partial(self.retract, move=False))
        return self._find(weight, look=False)

    def _compute(self, weight: Weight, reading: Reading) -> None:
        """Compute the value of `weight`, together with those of its kind that have none yet."""
        grad, home = torch.is_grad_enabled() and reading.learns(), self._home(weight, reading)
        readings = [reading]  # also if another thread moves it now
        for other in alive():
            seen = other._slot.reading or self._find(other, look=False)
            if (
                seen is not None
                and seen.kind == reading.kind
                and seen is not reading
                and seen.lacks(grad)
                and other.caching
                and self._home(other, seen) == home
                and seen.holds(other)
            ):
                readings.append(seen)
        readings.sort(key=lambda r: r.places[0][1])
        keys = [tuple(map(id, r.inputs)) for r in readings]
        every = dict(zip(keys, readings, strict=True))  # tied weights have one place
        packet = _packet(list(every.values()), grad)
        graphed, places = attach(packet) if grad else (), {k: i for i, k in enumerate(every)}
        for key, r in zip(keys, readings, strict=True):
            r.give(packet, graphed, places[key])

    def _home(self, weight: Weight, reading: Reading) -> object:
        """What weights have in common that may share a node of the graph.

        A node of which a pass uses some outputs calls the hooks of the other parameters, too, with
        no gradient. Those of a user or of another DistributedDataParallel do not expect that.
        """
        running: Any = _torch.running_ddp()
        if running is not None and self.homes.get(weight) != weakref.ref(running):
            for part in running.modules():
                if isinstance(part, Weight):
                    self.homes[part] = weakref.ref(running)
        if any(map(_torch.is_hooked_tensor, reading.inputs)):
            return weight
        return self.homes.get(weight), reading.learns()

    def pull_back(self, weight: Weight, *grads: Tensor | None) -> list[Tensor | None] | None:
        """The gradients of the parameters of `weight` from that of its value, and of its frame.

        None where the weight does not stand at the center. No hook of a parameter runs.
        """
        reading = self.reading(weight)
        if reading is None:
            return None
        with self.lock:
            return _packet([reading], True).gradients_of(list(weight.parameters()), grads)

    def frame(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        r"""The value and the frame of a square matrix at the center; None elsewhere."""
        value = self(weight)
        reading = weight._slot.reading
        if value is None or not value.requires_grad or reading is None or reading.source is None:
            return None
        computation, graphed, place = reading.source
        outputs, count = _in_graph(computation, graphed), len(computation.inputs)
        return (outputs[place], outputs[count + place]) if len(outputs) > count else None


def _in_graph(computation: Computation, graphed: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs as functions of their inputs; inside `defer_pullback`, of nothing."""
    deferral = DEFERRING.deferral
    return graphed if deferral is None else deferral.give(computation)


def _packet(readings: Sequence[Reading], recorded: bool) -> Packet:
    """Weights of one kind as functions of their parameters."""
    rows = list(zip(*(r.inputs for r in readings), strict=True))
    columns = zip(*(r.places for r in readings), strict=True)
    with torch.inference_mode(False):
        parts = [column[0][0].rows([span for _, span in column]) for column in columns]
        return Packet(rows, parts, readings[0].compose, recorded)


ENGINE = Engine()
