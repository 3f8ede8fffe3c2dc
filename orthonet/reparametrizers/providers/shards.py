"""Weights whose parameters are shards (FSDP2): retracted after a step by all processes together.

After a step of an optimizer each matrix is collected by one process, which brings it to the center
and hands the shards back: an optimizer step is a collective. A unit of FSDP2 then lends a matrix at
the center, M = c U, so that a read divides by c and a backward pass is the closed form there.
Nothing of the size of a matrix is kept between steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orthonet import _torch
from orthonet.linalg.distributed import assign, collect, exchange, hand_out, rank_and_size, whole
from orthonet.linalg.matrix import stacked
from orthonet.linalg.retraction import center, retract
from orthonet.reparametrizers.providers.computation import attach, given
from orthonet.reparametrizers.providers.engine import ENGINE, REEVALUATING_OPTIMIZERS
from orthonet.reparametrizers.providers.matrices import (
    Member,
    groups_of,
    members_of,
    pieces_of,
    untied,
)
from orthonet.reparametrizers.providers.packet import Centered, Packet
from orthonet.reparametrizers.weight import Weight, caching

__all__ = ["after_step", "centered", "cost", "flags", "forget", "owners", "read"]


class _Known:
    """The shard of a matrix that stands at the center, and the state in which it does."""

    __slots__ = ("parameter", "stamp", "version")

    def __init__(self, p: Tensor) -> None:
        self.parameter, self.version, self.stamp = (
            weakref.ref(p),
            p._version,
            _torch.Stamp(_local(p)),
        )

    def holds(self, p: Tensor) -> bool:
        """Whether `p`, the shard or what a unit has gathered from it, stands at the center."""
        shard = self.parameter()
        return (
            shard is not None
            and (p is shard or not _torch.is_shard(p))
            and (p.dtype, p.shape) == (shard.dtype, shard.shape)
            and shard._version == self.version
            and self.stamp.holds(_local(shard))
        )


_known: weakref.WeakKeyDictionary[Weight, _Known] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _local(p: Any) -> Tensor:
    return p.to_local() if _torch.is_shard(p) else p


def forget(module: nn.Module | None = None) -> None:
    """Look anew at the parameters of `module`, or of all modules, when they are read."""
    for weight in list(_known) if module is None else module.modules():
        if isinstance(weight, Weight):
            _known.pop(weight, None)


def cost(p: Tensor) -> float:
    """What a retraction costs, in operations to a factor."""
    return float(p.numel() * min(p.shape[-2:]))


def _group(p: Any) -> Any:
    """The processes among which a matrix is distributed: those that replicate it work alike."""
    return p.device_mesh.get_group(p.device_mesh.ndim - 1)


def owners(matrices: Sequence[Tensor]) -> tuple[list[int], int]:
    """Who retracts each matrix, if one optimizer holds these and no others, and of how many."""
    size = rank_and_size(_group(matrices[0]))[1]
    return assign([cost(p) for p in matrices], size), size


# ------------------------------------------------------------------ after a step


@torch.no_grad()
def after_step(optimizer: Optimizer) -> None:
    """Bring to the center what `optimizer` holds in shards: a collective of their processes."""
    given = _torch.parameters_of(optimizer)
    places = {id(p): i for i, p in enumerate(given)}
    found = [held for held in members_of(places) if _torch.is_shard(held.parameter)]
    for held in found:
        _known.pop(held.weight, None)
    if not found or not caching.on or isinstance(optimizer, tuple(REEVALUATING_OPTIMIZERS)):
        return
    moved = untied(
        held
        for held in found
        if held.parameter.requires_grad and _manageable(held.weight, held.parameter)
    )
    moved.sort(key=lambda held: places[id(held.parameter)])  # the same order in all processes
    meshes: dict[Any, list[Member]] = {}
    for held in moved:
        meshes.setdefault(getattr(held.parameter, "device_mesh", None), []).append(held)
    with ENGINE.lock:
        for members in meshes.values():
            _retract(members)


def _manageable(weight: Weight, p: Any) -> bool:
    return (
        weight.caching
        and p.dtype in (torch.float32, torch.float64)
        and p.numel() > 0
        and _local(p).device.type == p.device_mesh.device_type  # not where they are offloaded
        and all(type(way).__name__ in ("Replicate", "Shard") for way in p.placements)
    )


def _retract(members: list[Member]) -> None:
    parts: list[Any] = [m.parameter.detach() for m in members]
    group = _group(parts[0])
    whose, _ = owners(parts)
    collected = collect(parts, whose, group)
    marks = centered(members, collected)
    handed = hand_out(collected, parts, whose, group)
    told = flags(exchange(marks, whose, group))
    pairs = [
        (_local(p), _local(new))
        for p, new, (written, _) in zip(parts, handed, told, strict=True)
        if any(written) and _local(p).numel()
    ]
    if pairs:
        _torch.foreach_copy_([p for p, _ in pairs], [new for _, new in pairs])
    for held, (_, good) in zip(members, told, strict=True):
        if all(good):
            _known[held.weight] = _Known(held.parameter)


def centered(members: Sequence[Member], mine: dict[int, Tensor]) -> list[Tensor]:
    """Bring the matrices of some members to the center, in place of those in `mine`.

    Returns marks for all members: which of their matrices are written, and which are good; filled
    in for those in `mine`.
    """
    marks = [_local(m.parameter).new_empty(2, m.parameter.shape[:-2].numel()) for m in members]
    places = {id(members[i].weight): i for i in mine}
    own = [members[i]._replace(parameter=mine[i].contiguous()) for i in sorted(mine)]
    groups = list(groups_of(own))
    batches = [(stacked([m.parameter for m in group]), group[0].map) for group in groups]
    for group, found in zip(groups, ENGINE.retracted(batches), strict=True):
        for piece in pieces_of(group, found):
            i = places[id(piece.member.weight)]
            mine[i], marks[i] = piece.point, found.point.new_tensor([piece.written, piece.good])
    return marks


def flags(marks: Sequence[Tensor]) -> list[tuple[list[bool], list[bool]]]:
    """What the marks of each parameter say; the host waits once."""
    ENGINE.looks += 1
    numbers = iter(torch.cat([mark.flatten() for mark in marks]).tolist())
    rows = [[bool(next(numbers)) for _ in range(mark.numel())] for mark in marks]
    return [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]


# ------------------------------------------------------------------ reading


def read(weight: Weight) -> Tensor | None:
    """The value of a weight that is made of shards, where these stand at the center."""
    composition = weight.composition()
    parts = (weight,) if composition is None else composition.parts
    if not any(part._sharded for part in parts) or not weight.may_be_kept():
        return None
    if composition is None:
        return _at_center(weight)
    values = [(part, value) for part in parts if (value := _at_center(part)) is not None]
    with given(values):
        return weight.evaluate() if values else None


def _at_center(weight: Weight) -> Tensor | None:
    """The value of one matrix, gathered here or lent by its unit; None elsewhere.

    A shard that no step has been seen to leave at the center is looked at, at the cost of one
    product a read.
    """
    p, way, known = weight._parameters.get("original"), weight.map, _known.get(weight)
    if p is None or way is None or p.dtype not in (torch.float32, torch.float64) or not p.numel():
        return None
    gathered = whole(p)
    with _torch.without_autocast(gathered):
        x = gathered.detach()
        x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else x
        if known is None or not known.holds(p):
            (found,) = retract([(x, way)], move=False)
            if not all(found.good):
                return None
        u, scale = center(x)
    value = u.view(p.shape)
    if not (torch.is_grad_enabled() and gathered.requires_grad):
        return value
    spans = [(0, p.shape[:-2].numel())]
    return attach(Packet([gathered], [value], spans, Centered(way, u, scale)))[0]
