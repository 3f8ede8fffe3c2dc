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

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from orthonet import _checks, _torch
from orthonet.linalg.matrix import split, stacked
from orthonet.linalg.retraction import CenteredMap, Moved, center, retract
from orthonet.reparametrizers.providers.computation import (
    DEFERRING,
    SWAPPING,
    Computation,
    Readable,
    pulled_cold,
    same_stream,
)
from orthonet.reparametrizers.providers.edits import differs, warn_edited
from orthonet.reparametrizers.providers.matrices import (
    Member,
    Piece,
    groups_of,
    manageable,
    member,
    members_of,
    pieces_of,
    untied,
    write,
)
from orthonet.reparametrizers.providers.packet import Centered, Family, Packet
from orthonet.reparametrizers.weight import Composition, Weight, alive, caching

__all__ = ["ENGINE", "REEVALUATING_OPTIMIZERS", "Engine"]

REEVALUATING_OPTIMIZERS: set[type[Optimizer]] = {LBFGS}
"""Optimizers that compare parameters and gradients of several evaluations within one step.

No retraction moves their parameters, and weights are computed by the cold maps. Add the class of an
optimizer of your own that does so.
"""


@dataclass(slots=True, eq=False)
class Record:
    """The value of one parameter at the center, and the state of the parameter that it belongs to.

    `value` is None for a parameter that does not stand at the center: there is nothing to look at.
    `number` is that of the weight that it was made for, and `steps` are what makes its map.
    """

    number: int
    steps: _torch.ModuleStamp
    parameter: weakref.ref[Tensor]
    stamp: _torch.Stamp
    batch: Batch
    span: tuple[int, int]
    value: Tensor | None
    stream: Any
    kept: _torch.Stamp | None = field(init=False)

    def __post_init__(self) -> None:
        self.kept = None if self.value is None else _torch.Stamp(self.value)

    def made_for(self, weight: Weight) -> bool:
        """Whether it was made for `weight`, whose map is the same still: the map is not asked."""
        return self.number == weight._number[0] and self.steps.holds(weight)

    def of(self, weight: Weight) -> bool:
        """Whether the parameter of `weight` is as it was."""
        p = weight._parameters.get("original")
        return p is not None and self.parameter() is p and self.stamp.holds(p)

    def holds(self, weight: Weight) -> bool:
        """Whether it is the value of the parameter of `weight` as that stands."""
        return (
            self.of(weight)
            and (self.kept is None or self.value is None or self.kept.holds(self.value))
            and (self.stream is None or same_stream(self.stream, self.parameter()))
        )


@dataclass(slots=True, eq=False)
class Batch:
    """The matrices of one group after one retraction, and who reads them together."""

    map: CenteredMap
    centered: Centered | None
    weights: list[weakref.ref[Weight]] = field(default_factory=list)  # of those at the center
    shared: MutableMapping[Any, Shared] = field(default_factory=weakref.WeakValueDictionary)


class Shared(Readable):
    """A computation that several weights read, and the tensors that they are given."""

    __slots__ = ("__weakref__", "constants", "places", "scores", "stamps")

    def __init__(
        self, computation: Computation, members: Iterable[tuple[Weight, Held]], composed: bool
    ) -> None:
        super().__init__(computation)
        # Of what each value is, because a weight may be given other parameters of the same batch.
        self.places = {w._number[0]: (i, held) for i, (w, held) in enumerate(members)}
        scores = [p for _, held in self.places.values() for p in held if isinstance(p, Tensor)]
        self.scores = [(p, _torch.Stamp(p)) for p in scores]
        self.constants = computation.outputs
        # Readers are given these tensors; those of a packet have their stamps in the records.
        self.stamps = tuple(map(_torch.Stamp, self.constants)) if composed else ()

    def place_of(self, weight: Weight, found: Found) -> int | None:
        """The place of the value of `weight`; None if it is not among the outputs as it stands."""
        place, held = self.places.get(weight._number[0], (None, ()))
        current = (
            _same(held, (*found.records, *found.scores))
            and all(stamp.holds(p) for p, stamp in self.scores)
            and all(map(_torch.Stamp.holds, self.stamps, self.constants))
        )
        return place if current else None


class Found:
    """What a read of one weight has found, and what it holds for."""

    __slots__ = (
        *("constant", "given", "own", "parts", "records", "scores", "shared", "stamps", "steps"),
    )

    def __init__(
        self, weight: Weight, records: tuple[Record, ...], composition: Composition | None
    ) -> None:
        self.records = records
        # of a composed weight: whose records these are
        self.parts = () if composition is None else composition.parts
        self.scores = () if composition is None else composition.scores
        self.stamps = tuple(map(_torch.Stamp, self.scores))
        self.own = _own(weight) if self.parts else ()
        # what makes the map of each of them
        self.steps = tuple(_torch.ModuleStamp(part) for part in self.parts or (weight,))
        self.shared: tuple[Shared, int] | None = None  # with gradients, and the place therein
        self.constant: Tensor | None = None
        self.given: tuple[tuple[_torch.Stamp, Tensor], ...] = ()  # of a composed weight, to readers

    def give(self, shared: Shared, place: int) -> None:
        """Remember, of a composed weight, what readers are given."""
        if shared.stamps:
            self.given += ((shared.stamps[place], shared.constants[place]),)

    def touched(self) -> list[Tensor]:
        """What readers were given, if one of them may have written to it."""
        record: Any = self.records[0]
        given = self.given if self.parts else ((record.kept, record.value),)
        return [value for stamp, value in given if not stamp.holds(value)]

    def unmoved(self, weight: Weight) -> bool:
        """Whether the parameters and scores are as they were."""
        held = zip(self.records, self.parts or (weight,), strict=True)
        moved = any(not record.of(part) for record, part in held)
        return not moved and all(map(_torch.Stamp.holds, self.stamps, self.scores))

    def holds(self, weight: Weight) -> bool:
        """Whether it is the value of `weight` as that stands."""
        for stamp, value in self.given:
            if not stamp.holds(value):
                return False
        parts = self.parts or (weight,)
        if self.parts and not _same(_own(weight), self.own):
            return False
        for record, part, step in zip(self.records, parts, self.steps, strict=True):
            if not (step.holds(part) and record.holds(part)):
                return False
        return all(map(_torch.Stamp.holds, self.stamps, self.scores))

    def learns(self) -> bool:
        """Whether a parameter that the value depends on requires a gradient."""
        for record in self.records:
            p = record.parameter()
            if p is not None and p.requires_grad:
                return True
        return any(p.requires_grad for p in self.scores)


Held = tuple[object, ...]  # the records and scores of a weight
Group = Sequence[Member]
Retraction = Callable[[Sequence[Group]], list[Moved]]  # of the parameters of groups
# From the identities of the parameters of an optimizer, and those that it has moved, to the rest.
Share = Callable[[set[int], list[Member]], list[Member]]


class Engine:
    """The hook behind optimizer steps, and the provider of the values that it makes."""

    def __init__(self) -> None:
        self.lock = SWAPPING
        self.records: dict[int, Record] = {}  # by identity of the parameter
        self.squares: dict[Any, bool] = {}  # whether the last step of a kind of group needed E^2
        self.looks = 0  # how often the host has waited
        self.shares: list[Share] = []  # who retract some weights together with other processes
        # The modules of DistributedDataParallel that have read weights, and which is whose
        self.replicas: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.homes: weakref.WeakKeyDictionary[Weight, int] = weakref.WeakKeyDictionary()

    def forget(self, module: nn.Module | None = None) -> None:
        """Look anew at the parameters of `module`, or of all modules, when they are read."""
        with self.lock:
            if module is None:
                self.records.clear()
            else:
                for parameter in module.parameters():
                    self.records.pop(id(parameter), None)
            for weight in alive() if module is None else module.modules():
                if isinstance(weight, Weight):
                    weight._served.found = None

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

        Their records are gone then: a move without a trace may have been too small to be undone.
        """
        moved = []
        for held in members_of(owned):
            p, record = held.parameter, self.records.get(id(held.parameter))
            # Fused optimizers do not count the version up, and some clear the gradients in `step`.
            # A gradient that is left from before it was frozen moves a parameter.
            still = not p.requires_grad and p.grad is None
            if still and (record is None or record.holds(held.weight)):
                continue
            self.records.pop(id(p), None)
            if manageable(held.weight, p):
                moved.append(held)
        self._clear_readers(owned)
        return untied(moved)

    def _clear_readers(self, owned: set[int]) -> None:
        """Free what readers hold of values that are out of date.

        Also what was composed with scores that an optimizer may have moved without a trace.
        """
        for weight in alive():
            found = weight._served.found
            if found is None:
                continue
            scored = any(id(p) in owned for p in found.scores)
            for record in found.records if scored else ():
                record.batch.shared.clear()
            gone = any(self.records.get(id(r.parameter())) is not r for r in found.records)
            if scored or gone or not found.holds(weight):
                weight._served.found = None

    def serve(self, members: Group, retracted: Retraction) -> None:
        """Bring the parameters to the center, or see which stand there, and record their values."""
        groups = list(groups_of(members))
        # Before anything is read: what another thread writes meanwhile must not pass for this.
        stamps = {id(m.parameter): _torch.Stamp(m.parameter) for m in members}
        for group, result in zip(groups, retracted(groups), strict=True):
            pieces = list(pieces_of(group, result))
            stamps |= {id(p): _torch.Stamp(p) for p in write(pieces)}
            self._record(pieces, result, stamps)

    def retract(self, groups: Sequence[Group], move: bool = True) -> list[Moved]:
        """The parameters of each group at the center; not moved, they are only looked at.

        With a guess from the last step of what is needed.
        """
        if not groups:
            return []
        self.looks += 1
        batches = [(stacked([m.parameter.detach() for m in g]), g[0].map) for g in groups]
        kinds = [(*x.shape, x.dtype, way.name) for x, way in batches]
        squares = [self.squares.get(kind, True) for kind in kinds]
        with _torch.without_autocast(batches[0][0]):
            found = retract(batches, move=move, squares=squares)
        for kind, result in zip(kinds, found, strict=True):
            if any(result.written):
                self.squares[kind] = result.squared
        return found

    def _record(
        self, pieces: Sequence[Piece], result: Moved, stamps: dict[int, _torch.Stamp]
    ) -> None:
        way, parameters = pieces[0].member.map, [piece.member.parameter for piece in pieces]
        values: Sequence[Tensor | None] = [None] * len(pieces)
        batch = Batch(way, None)
        if any(result.good):
            batch.centered = Centered(way, *center(result.point))
            values = split(batch.centered.u, parameters)
        for piece, p, value in zip(pieces, parameters, values, strict=True):
            weight = piece.member.weight
            record = self.records[id(p)] = Record(
                weight._number[0],
                _torch.ModuleStamp(weight),
                weakref.ref(p, functools.partial(self._drop, id(p))),
                stamps[id(p)],
                batch,
                (piece.first, len(piece.good)),
                value if all(piece.good) else None,
                _torch.current_stream(p),
            )
            if record.value is not None:
                batch.weights.append(weakref.ref(weight))

    def _drop(self, key: int, _: object) -> None:
        record = self.records.get(key)
        if record is not None and record.parameter() is None:
            del self.records[key]

    def __call__(self, weight: Weight) -> Tensor | None:
        """The value of `weight`, where its parameters stand at the center."""
        if not weight.may_be_kept():
            return None
        served = weight._served
        found = served.found
        if found is None or not found.holds(weight):
            with self.lock:
                before, found = found, self._find(weight)
                served.found = found
            if found is None:
                return None
            if before is not None:
                self._tell_of_edits(weight, before, found)
        if torch.is_grad_enabled() and found.learns():
            shared = found.shared
            if shared is None:
                with self.lock:
                    shared = found.shared = self._shared(weight, found, True)
                found.give(*shared)
            kept, place = shared
            known = kept.graphed if DEFERRING.deferral is None else None
            return (known or kept.outputs())[place]
        value = found.constant
        if value is None or value.requires_grad:
            with self.lock:
                shared, place = self._shared(weight, found, False)
            value = found.constant = shared.constants[place].detach()
            found.give(shared, place)
        return value

    def _tell_of_edits(self, weight: Weight, before: Found, found: Found) -> None:
        """Warn, once for all weights, if a reader has written to the value of this one.

        Weights of a batch share a version counter: the values themselves tell whose was written to.
        """
        touched = before.touched()
        if not touched or not before.unmoved(weight):
            return
        with self.lock, torch.no_grad():
            shared, place = self._shared(weight, found, False)
            if not any(differs(t, shared.constants[place]) for t in touched):
                return
            for other in alive():
                served = other._served
                if served.found is not None and served.found.touched():
                    served.found = None
        warn_edited()

    def pull_back(self, weight: Weight, grad: Tensor) -> list[Tensor | None] | None:
        """The gradients of the parameters of `weight` from that of its value.

        None where the weight does not stand at the center. No hook of a parameter runs.
        """
        with torch.no_grad():
            found = weight._served.found if self(weight) is not None else None
        if found is None:
            return None
        with self.lock, torch.inference_mode(False), torch.enable_grad():
            shared, place = self._shared(weight, found, True, alone=True)
        grads: list[Tensor | None] = [None] * len(shared.constants)
        grads[place] = grad
        return shared.computation.gradients_of(list(weight.parameters()), grads)

    def turn(self, weight: Weight, u: Tensor, s: Tensor) -> Tensor:
        r"""The gradient of `original` from \(S = U^\top G\), for a square matrix U.

        In closed form at the center, and through the cold map elsewhere.
        """
        with torch.no_grad():
            value = self(weight)
            found = weight._served.found if value is not None else None
            record = None if found is None else found.records[0]
            if record is not None and record.batch.centered is not None:
                centered = record.batch.centered.rows([record.span])
                turned = centered.map.turn(centered.u, centered.scale, s.view(centered.u.shape))
                return turned.view(s.shape)
        return cast(Tensor, pulled_cold(weight, u @ s)[0])

    def frame(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        r"""The value and the frame of a square matrix at the center; None elsewhere."""
        value = self(weight)
        found = weight._served.found
        if value is None or found is None or not value.requires_grad or found.shared is None:
            return None
        shared, place = found.shared
        if not isinstance(shared.computation, Packet):
            return None
        outputs, count = shared.outputs(), len(shared.computation.inputs)
        return (outputs[place], outputs[count + place]) if len(outputs) > count else None

    def _find(self, weight: Weight) -> Found | None:
        """Find the records of all parts of `weight`, if all of them stand at the center."""
        composition = weight.composition()
        if composition is not None and not all(
            map(_torch.cannot_change_unseen, composition.scores)
        ):
            return None
        parts = (weight,) if composition is None else composition.parts
        records = [self._present(part) for part in parts]
        held = tuple(r for r in records if r is not None and r.value is not None)
        return Found(weight, held, composition) if len(held) == len(records) else None

    def _present(self, weight: Weight) -> Record | None:
        """The record of a matrix as it stands; looked at with all others that have none."""
        record = self._record_of(weight)
        if record is not None and record.made_for(weight) and record.holds(weight):
            return record
        held = member(weight)
        if held is None:
            return None
        p = held.parameter
        if _torch.capturing(p):
            _checks.fail(
                weight,
                "a weight cannot be read while a CUDA graph is captured, whose replay would not "
                "see that it has changed",
                "Capture orthonet.to_plain(model), or use torch.compile without CUDA graphs",
                RuntimeError,
            )
        record = self.records.get(id(p))
        if record is None or not record.holds(weight):
            if not manageable(weight, p):
                return None
            with torch.inference_mode(False), torch.no_grad():
                self.serve(list(self._unknown()), functools.partial(self.retract, move=False))
        return self._current(held)

    def _record_of(self, weight: Weight) -> Record | None:
        return self.records.get(id(weight._parameters.get("original")))

    def _current(self, held: Member) -> Record | None:
        """The record of a matrix, if that is of its parameter as it stands, and of its map."""
        record = self.records.get(id(held.parameter))
        here = record is not None and record.batch.map is held.map and record.holds(held.weight)
        return record if here else None

    def _unknown(self) -> Iterator[Member]:
        """The matrices of the process whose state nobody has looked at."""
        seen: set[int] = set()
        for weight in alive():
            held = member(weight)
            if held is None or id(held.parameter) in seen or not manageable(weight, held.parameter):
                continue
            if self._current(held) is None:
                seen.add(id(held.parameter))
                yield held

    def _shared(
        self, weight: Weight, found: Found, grad: bool, *, alone: bool = False
    ) -> tuple[Shared, int]:
        """What `weight` reads together with others of its batch, and its place therein."""
        composition = weight.composition()
        batch, number = found.records[0].batch, weight._number[0]
        home = ("alone", number) if alone else self._home(weight)
        if composition is None:
            key: Any = (weight.composed, grad, home)
        else:
            key = (composition.key, *(id(record.batch) for record in found.records), grad, home)
        shared = batch.shared.get(key)
        place = None if shared is None else shared.place_of(weight, found)
        if shared is None or place is None:
            make = self._packet if composition is None else self._family
            with torch.inference_mode(False):
                shared = batch.shared[key] = make(weight, found, grad, home)
            place = shared.places[number][0]
        return shared, place

    def _home(self, weight: Weight) -> object:
        """What weights have in common that may share a node of the graph.

        A node of which a pass uses some outputs calls the hooks of the other parameters, too, with
        no gradient. Those of a user or of another DistributedDataParallel do not expect that.
        """
        running = _torch.running_ddp()
        if running is not None and running not in self.replicas:
            number = self.replicas[running] = 1 + max(self.homes.values(), default=0)
            for part in running.modules():
                if isinstance(part, Weight):
                    self.homes[part] = number
        if any(_torch.is_hooked_tensor(p) for p in weight.parameters()):
            return ("alone", weight._number[0])
        return self.homes.get(weight)

    def _packet(self, weight: Weight, found: Found, grad: bool, home: object) -> Shared:
        """The parameters of one batch, except those that are read by another weight only."""
        batch, alone = found.records[0].batch, isinstance(home, tuple)
        members = [
            (other, record)
            for reference in batch.weights
            if (other := reference()) is not None
            and other.composed == weight.composed
            and (not alone or other is weight)
            and self._shares_node(other, grad, home)
            and (record := self._record_of(other)) is not None
            and record.batch is batch
            and record.holds(other)
        ]
        if not any(other is weight for other, _ in members):  # tied to one of them
            members = [(weight, found.records[0])]
        records: list[Any] = [record for _, record in members]
        packet = Packet(
            [record.parameter() for record in records],
            [record.value for record in records],
            [record.span for record in records],
            cast(Centered, batch.centered),
        )
        return Shared(packet, [(other, (record,)) for other, record in members], False)

    def _family(self, weight: Weight, found: Found, grad: bool, home: object) -> Shared:
        """All weights that are composed as this one is, of parts in the same batches."""
        wanted = [record.batch for record in found.records]
        mine: Any = weight.composition()
        members: list[Any] = [(weight, mine, found.records)]  # also if another thread moves it now
        for other in () if isinstance(home, tuple) else alive():
            composition = other.composition()
            if other is weight or composition is None or composition.key != mine.key:
                continue
            if not other.caching or not self._shares_node(other, grad, home):
                continue
            records = [self._record_of(part) for part in composition.parts]
            triples = zip(records, composition.parts, wanted, strict=True)
            if all(
                r and r.value is not None and r.batch is b and r.holds(p) for r, p, b in triples
            ):
                members.append((other, composition, records))
        members.sort(key=lambda member: member[2][0].span[0])
        parts = [
            cast(Centered, batch.centered).rows([records[i].span for _, _, records in members])
            for i, batch in enumerate(wanted)
        ]
        family = Family([c for _, c, _ in members], parts, grad)
        return Shared(family, [(other, (*r, *c.scores)) for other, c, r in members], True)

    def _shares_node(self, other: Weight, grad: bool, home: object) -> bool:
        """Whether another weight may have its value from the node of those at `home`."""
        if not grad or isinstance(home, tuple):
            return True
        return self._home(other) == home and any(p.requires_grad for p in other.parameters())


def _own(weight: Weight) -> tuple[object, ...]:
    """The parts and scores of a composed weight."""
    return (*weight._modules.values(), *weight._parameters.values())


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


ENGINE = Engine()
