"""Retractions shared among processes: of parameters that all of them hold, and of shards (FSDP2).

With `share_among_ranks`, each process retracts its part of the matrices after a step, and all get
the results. Where the parameters are shards, each matrix is collected by one process, which brings
it to the center and hands the shards back. In both cases an optimizer step is a collective.

A unit of FSDP2 then lends a matrix at the center, M = c U, so that a read divides by c and a
backward pass is the closed form there. Nothing of the size of a matrix is kept between steps.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from orthonet import _checks, _torch
from orthonet.linalg.distributed import (
    assign,
    by_ranks,
    collect,
    cost,
    hand_out,
    in_rows,
    rank_and_size,
    whole,
)
from orthonet.linalg.matrix import stacked
from orthonet.linalg.retraction import Moved, center, retract
from orthonet.reparametrizers.providers.computation import attach, given
from orthonet.reparametrizers.providers.engine import ENGINE, REEVALUATING_OPTIMIZERS
from orthonet.reparametrizers.providers.matrices import (
    Member,
    groups_of,
    manageable,
    member,
    members_of,
    pieces_of,
    untied,
)
from orthonet.reparametrizers.providers.packet import Centered, Packet
from orthonet.reparametrizers.weight import Weight, caching

__all__ = ["after_step", "forget", "read_shards", "share_among_ranks"]


def share_among_ranks(
    module: nn.Module, process_group: Any = None, *, enabled: bool = True
) -> tuple[tuple[str, ...], ...]:
    r"""Let each process retract its part of the matrices of a model after an optimizer step.

    For data-parallel training in which all processes hold the same parameters
    (DistributedDataParallel, or gradients averaged by hand), and would all bring the same matrices
    \(M\) back to the center \(c\,U\). Matrices are assigned by cost \(n k^2\), the largest first,
    to the process with the least to do. After a step each process retracts its own, and one
    exchange hands the matrices \(c\,U\) round. Everything else stays local: reading a weight, and
    the two products of its backward pass. Parameters have the same bits in all processes.

    **An optimizer step is then a collective**: all processes must take it, in the same order, with
    optimizers that hold the same parameters. Nothing else is one, so that some processes may
    evaluate the model alone, between steps too. Copies and pickles of the model are not shared;
    parameters of `torch.optim.LBFGS` and matrices without a retraction (such as
    `EXP_ORTHO_PARAMS`) are computed by each process for itself.

    With `fully_shard` there is nothing to call: parameters that are shards are distributed in any
    case, and the answer says how.

    Args:
        module: The model; before or after DistributedDataParallel wraps it.
        process_group: The processes; a new group of all of them if None.
        enabled: False undoes it, in all processes: each retracts everything again.

    Returns:
        The names of the matrices that each rank of the group retracts.

    Raises:
        RuntimeError: torch.distributed is not initialized. In an optimizer step: the model has lost
            a matrix since.
        ValueError: Some parameters are shards and others are not. Nothing has been changed.

    Examples:
        In each process of `torchrun`:

            orthonet.share_among_ranks(model)
            model = DistributedDataParallel(model)
    """
    _checks.require(
        dist.is_available() and dist.is_initialized(),
        "share_among_ranks",
        "torch.distributed must be initialized",
        "Call torch.distributed.init_process_group first, or leave the model unchanged",
        RuntimeError,
    )
    found = {
        id(held.parameter): (name, held)
        for name, m in reversed(list(module.named_modules()))
        if isinstance(m, Weight) and (held := member(m)) is not None
    }  # tied weights are one
    named = list(reversed(found.values()))
    weights = [held.weight for _, held in named]
    matrices = [held.parameter for _, held in named]
    kinds = {_torch.is_shard(p) for p in matrices}
    _checks.require(
        len(kinds) < 2,
        "share_among_ranks",
        "the parameters must be whole in every process, or all of them shards of FSDP2",
        "Call fully_shard on every part that has orthogonal matrices, or on none",
        parameters=sorted({type(p).__name__ for p in matrices}),
    )
    for share in ENGINE.shares:
        if isinstance(share, Shared):
            share.leave(weights)
    if kinds == {True}:
        group = _group(matrices[0])
    else:
        group = dist.new_group() if process_group is None and enabled else process_group
    size = rank_and_size(group)[1]
    owners = assign([cost(p) for p in matrices], size)
    if enabled and kinds != {True}:
        ENGINE.shares.append(Shared(group, dict(zip(weights, owners, strict=True))))
    pairs = list(zip(named, owners, strict=True))
    return tuple(tuple(name for (name, _), o in pairs if o == rank) for rank in range(size))


class Shared:
    """The matrices of a model, each retracted by one process of a group."""

    def __init__(self, group: Any, owners: dict[Weight, int]) -> None:
        self.group, self.count = group, len(owners)
        self.owners = weakref.WeakKeyDictionary(owners)

    def leave(self, weights: Iterable[Weight]) -> None:
        """Share these no longer."""
        for weight in weights:
            self.count -= self.owners.pop(weight, None) is not None

    def __call__(self, owned: set[int], moved: list[Member]) -> list[Member]:
        """Retract all members among the `owned` parameters; the others of `moved` are left.

        Which have moved is not asked: all processes must find the same members.
        """
        present = list(self.owners)
        if not present:
            ENGINE.shares.remove(self)
        _checks.require(
            len(present) in (0, self.count),
            "share_among_ranks",
            "the model must have the matrices that it had when the work was distributed",
            "Call share_among_ranks again in all processes",
            RuntimeError,
        )
        members = [
            held
            for weight in present
            if (held := member(weight)) is not None
            and id(held.parameter) in owned
            and held.parameter.requires_grad
            and manageable(weight, held.parameter)
        ]
        if members:
            ENGINE.serve(untied(members), self._retracted)
        taken = {id(held.parameter) for held in members}
        return [m for m in moved if id(m.parameter) not in taken]

    def _retracted(self, groups: Sequence[Sequence[Member]]) -> list[Moved]:
        """The centered matrices of all processes, of which this one has computed its part."""
        members = [m for group in groups for m in group]
        told = by_ranks(
            [[m.parameter.detach(), _mark(m)] for m in members],
            [self.owners[m.weight] for m in members],
            lambda mine: _centered([members[i] for i in mine]),
            self.group,
        )
        found = zip((point for point, _ in told), _flags([mark for _, mark in told]), strict=True)
        results = []
        for group in groups:
            points, flags = zip(*itertools.islice(found, len(group)), strict=True)
            written, good = (list(itertools.chain(*some)) for some in zip(*flags, strict=True))
            results.append(Moved(stacked(points), written, good, False))
        return results


class _Known(NamedTuple):
    """The shard of a matrix that stands at the center, and the state in which it does."""

    parameter: weakref.ref[Tensor]
    version: int  # which a step on shards counts up, and `stamp` does not see
    stamp: _torch.Stamp

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


def _group(p: Any) -> Any:
    """The processes among which a matrix is distributed: those that replicate it work alike."""
    return p.device_mesh.get_group(p.device_mesh.ndim - 1)


# ------------------------------------------------------------------ shards, after a step


def before_step(optimizer: Optimizer) -> None:
    """Lose sight of shards that are moved without a trace, should the step not end."""
    if any(group.get("fused") or group.get("foreach") for group in optimizer.param_groups):
        _shards_of(optimizer)


@torch.no_grad()
def after_step(optimizer: Optimizer) -> None:
    """Bring to the center what `optimizer` holds in shards: a collective of their processes."""
    found = _shards_of(optimizer)
    if not found or not caching.on or isinstance(optimizer, tuple(REEVALUATING_OPTIMIZERS)):
        return
    meshes: dict[Any, list[Member]] = {}
    for held in untied(held for held in found if _manageable(held.weight, held.parameter)):
        meshes.setdefault(getattr(held.parameter, "device_mesh", None), []).append(held)
    with ENGINE.lock:
        for members in meshes.values():
            _retract(members)


def _shards_of(optimizer: Optimizer) -> list[Member]:
    """The matrices that `optimizer` holds in shards, in its order: the same in all processes.

    From here on it is not known where they stand.
    """
    places = {id(p): i for i, p in enumerate(_torch.parameters_of(optimizer))}
    found = [held for held in members_of(places) if _torch.is_shard(held.parameter)]
    for held in found:
        _known.pop(held.weight, None)
    return sorted(found, key=lambda held: places[id(held.parameter)])


def _manageable(weight: Weight, p: Any) -> bool:
    return (
        weight.caching
        and p.requires_grad
        and p.dtype in (torch.float32, torch.float64)
        and p.numel() > 0
        and _local(p).device.type == p.device_mesh.device_type  # not where they are offloaded
        and all(type(way).__name__ in ("Replicate", "Shard") for way in p.placements)
    )


def _retract(members: list[Member]) -> None:
    parts: list[Any] = [m.parameter.detach() for m in members]
    group, rows = _group(parts[0]), list(map(in_rows, parts))
    owners = assign([cost(p) for p in parts], rank_and_size(group)[1])
    wholes = collect(rows, owners, group)

    def center_mine(mine: list[int]) -> list[list[Tensor]]:
        found = _centered([members[i]._replace(parameter=wholes[i]) for i in mine])
        wholes.update((i, point) for i, (point, _) in zip(mine, found, strict=True))
        return [[mark] for _, mark in found]

    marks = by_ranks([[_mark(m)] for m in members], owners, center_mine, group)
    flags = _flags([mark for (mark,) in marks])
    pairs = []
    for p, new, (written, _) in zip(
        parts, hand_out(wholes, rows, owners, group), flags, strict=True
    ):
        local = _local(new.redistribute(placements=p.placements))
        if any(written) and local.numel():
            pairs.append((_local(p), local))
    if pairs:
        _torch.foreach_copy_([p for p, _ in pairs], [new for _, new in pairs])
    for held, (_, good) in zip(members, flags, strict=True):
        if all(good):
            p = held.parameter
            _known[held.weight] = _Known(weakref.ref(p), p._version, _torch.Stamp(_local(p)))


def _mark(held: Member) -> Tensor:
    """Which matrices of a member are written, and which are good: to be told by another process."""
    p = held.parameter
    return torch.empty(2, p.shape[:-2].numel(), dtype=torch.bool, device=p.device)


def _centered(members: Sequence[Member]) -> list[list[Tensor]]:
    """The matrices of some members at the center, and their marks."""
    found: dict[int, list[Tensor]] = {}
    groups = list(groups_of(members))
    for group, moved in zip(groups, ENGINE.retract(groups), strict=True):
        for piece in pieces_of(group, moved):
            marks = torch.tensor([piece.written, piece.good], device=moved.point.device)
            found[id(piece.member.weight)] = [piece.point, marks]
    return [found[id(m.weight)] for m in members]


def _flags(marks: Sequence[Tensor]) -> list[list[list[bool]]]:
    """What the marks of each member say; the host waits once."""
    ENGINE.looks += 1
    told = [iter(row) for row in torch.cat(list(marks), 1).tolist()]
    return [[list(itertools.islice(row, mark.shape[1])) for row in told] for mark in marks]


# ------------------------------------------------------------------ shards, read


def read_shards(weight: Weight) -> Tensor | None:
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
    return attach(Packet([[gathered]], [Centered(way, u, scale)]))[0]
