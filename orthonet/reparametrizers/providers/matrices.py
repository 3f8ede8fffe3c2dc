"""The matrices that the engine keeps at the center: which they are, and which make one batch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _torch
from orthonet.linalg.retraction import CenteredMap, Moved
from orthonet.reparametrizers.weight import Weight, alive

__all__ = [
    "Member",
    "groups_of",
    "manageable",
    "member",
    "members_of",
    "stacked",
    "untied",
    "write",
]

_ALONE_FROM = 384  # smaller side from which one matrix fills a processor
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
    """Those whose matrices make one batch; a large matrix on the CPU stays alone."""
    groups: dict[Any, list[Member]] = {}
    for held in members:
        p = held.parameter
        groups.setdefault((p.shape[-2:], p.dtype, p.device, held.map), []).append(held)
    for group in groups.values():
        p = group[0].parameter
        large = p.is_cpu and min(p.shape[-2:]) >= _ALONE_FROM
        chunk: list[Member] = []
        for held in group:
            size = sum(m.parameter.numel() for m in (*chunk, held))
            if chunk and (large or size > _LARGEST):
                yield chunk
                chunk = []
            chunk.append(held)
        yield chunk


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The matrices of a group, (k, m, n); a single matrix as it stands."""
    if len(tensors) == 1:
        x = tensors[0]
        return x.view(x.shape[-2:]) if x.shape[:-2].numel() == 1 else x.view(-1, *x.shape[-2:])
    return torch.cat([p.view(-1, *p.shape[-2:]) for p in tensors])


def write(group: Sequence[Member], result: Moved) -> list[Tensor]:
    """Write the matrices that have moved; the others keep their bits and their version."""
    points = result.point.reshape(-1, *result.point.shape[-2:])
    parameters, pieces, first = [], [], 0
    for _, p, _ in group:
        count = p.shape[:-2].numel()
        if any(result.written[first : first + count]):
            parameters.append(p)
            pieces.append(points[first : first + count].view(p.shape))
        first += count
    _torch.foreach_copy_(parameters, pieces)
    return parameters
