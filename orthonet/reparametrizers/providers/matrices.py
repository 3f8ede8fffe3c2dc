"""The matrices that the engine keeps at the center: which they are, and which make one batch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _torch
from orthonet.linalg.matrix import batches, split
from orthonet.linalg.retraction import CenteredMap, Moved
from orthonet.reparametrizers.weight import Weight, alive

__all__ = [
    "Member",
    "Piece",
    "groups_of",
    "manageable",
    "member",
    "members_of",
    "pieces_of",
    "untied",
]

_LARGEST = 2**22
"""Entries of a group, 16 MB in float32. Its gradients arrive together.

DistributedDataParallel sends 25 MB at a time, as soon as they are there.
"""


class Member(NamedTuple):
    """A weight, and the parameter and the map that it has when it is looked at."""

    weight: Weight
    parameter: Tensor
    map: CenteredMap


def member(weight: Weight) -> Member | None:
    """The matrix that `weight` holds now; None if it holds none that has a map."""
    p = weight._parameters.get("original")
    way = None if p is None else weight.map
    return None if p is None or way is None else Member(weight, p, way)


def members_of(identities: Container[int]) -> Iterator[Member]:
    """The matrices of the process that are among these parameters."""
    for weight in alive():
        held = member(weight) if id(weight._parameters.get("original")) in identities else None
        if held is not None:
            yield held


def untied(members: Iterable[Member]) -> list[Member]:
    """One for each parameter; none for tied weights of two maps, which have no common center."""
    found: dict[int, Member | None] = {}
    for held in members:
        first = found.setdefault(id(held.parameter), held)
        if first is not None and first.map is not held.map:
            found[id(held.parameter)] = None
    return [held for held in found.values() if held is not None]


def manageable(weight: Weight, p: Tensor) -> bool:
    """Whether the parameter may be kept at the center."""
    return (
        weight.caching
        and type(p) is nn.Parameter
        and not weight._sharded
        and p.dtype in (torch.float32, torch.float64)
        and p.numel() > 0
        and p.is_contiguous()
        and _torch.cannot_change_unseen(p)
    )


def groups_of(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Those whose matrices make one batch."""
    return batches(members, lambda m: m.parameter, lambda m: m.map, _LARGEST)


class Piece(NamedTuple):
    """What a retraction has made of one member, and of each of its matrices."""

    member: Member
    first: int  # place of its first matrix in the batch
    point: Tensor
    written: list[bool]
    good: list[bool]


def pieces_of(group: Sequence[Member], result: Moved) -> Iterator[Piece]:
    """The parts of a result, one for each member."""
    first = 0
    points = split(result.point, [m.parameter for m in group])
    for held, point in zip(group, points, strict=True):
        last = first + held.parameter.shape[:-2].numel()
        yield Piece(held, first, point, result.written[first:last], result.good[first:last])
        first = last
