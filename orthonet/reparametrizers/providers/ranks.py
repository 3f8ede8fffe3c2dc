"""`share_among_ranks`: after a step, each process retracts its part of the matrices of a model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import distributed as dist
from torch import nn

from orthonet import _checks, _torch
from orthonet.linalg.distributed import assign, exchange, rank_and_size
from orthonet.linalg.matrix import stacked
from orthonet.linalg.retraction import Moved
from orthonet.reparametrizers.providers import shards
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.reparametrizers.providers.matrices import Member, manageable, member
from orthonet.reparametrizers.providers.shards import centered, cost, flags
from orthonet.reparametrizers.weight import Weight

__all__ = ["share_among_ranks"]


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
    for share in list(ENGINE.shares):
        if isinstance(share, Shared):
            share.leave(weights)
    if kinds == {True}:
        owners, size = shards.owners(matrices)
    else:
        group = dist.new_group() if process_group is None and enabled else process_group
        size = rank_and_size(group)[1]
        owners = assign([cost(p) for p in matrices], size)
        if enabled:
            ENGINE.shares.append(Shared(group, weights, owners))
    pairs = list(zip(named, owners, strict=True))
    return tuple(tuple(name for (name, _), o in pairs if o == rank) for rank in range(size))


class Shared:
    """The matrices of a model, each retracted by one process of a group."""

    def __init__(self, group: Any, weights: Sequence[Weight], owners: Sequence[int]) -> None:
        self.group, self.rank = group, rank_and_size(group)[0]
        pairs = zip(weights, owners, strict=True)
        self.members = [(weakref.ref(weight), owner) for weight, owner in pairs]

    def _present(self) -> list[tuple[Weight, int]]:
        """The matrices that are alive, and who retracts each; the end, if there are none."""
        found = [(w, owner) for member, owner in self.members if (w := member()) is not None]
        if not found and self in ENGINE.shares:
            ENGINE.shares.remove(self)
        return found

    def leave(self, weights: Iterable[Weight]) -> None:
        """Share these no longer."""
        gone = set(map(id, weights))
        self.members = [pair for pair in self.members if id(pair[0]()) not in gone]
        self._present()

    def __call__(self, owned: set[int], moved: list[Member]) -> list[Member]:
        """Retract all members among the `owned` parameters; the others of `moved` are left.

        Which have moved is not asked: all processes must find the same members.
        """
        present = self._present()
        _checks.require(
            len(present) in (0, len(self.members)),
            "share_among_ranks",
            "the model must have the matrices that it had when the work was distributed",
            "Call share_among_ranks again in all processes",
            RuntimeError,
        )
        taken: dict[int, tuple[Member, int]] = {}
        for weight, owner in present:
            held = member(weight)
            if held is not None and id(held.parameter) in owned:
                p = held.parameter
                if p.requires_grad and manageable(weight, p):
                    taken[id(p)] = held, owner
        if taken:
            owners = {id(held.weight): owner for held, owner in taken.values()}
            members = [held for held, _ in taken.values()]
            ENGINE.serve(members, lambda groups: self._retracted(groups, owners))
        return [m for m in moved if id(m.parameter) not in taken]

    def _retracted(self, groups: Sequence[Sequence[Member]], owners: dict[int, int]) -> list[Moved]:
        """The centered matrices of all processes, of which this one has computed its part."""
        members = [m for group in groups for m in group]
        whose = [owners[id(m.weight)] for m in members]
        pieces = {i: m.parameter.detach() for i, m in enumerate(members)}
        mine = {i: p for i, p in pieces.items() if whose[i] == self.rank}
        marks = centered(members, mine)
        both = [*(pieces | mine).values(), *marks]
        received = exchange(both, whose * 2, self.group)
        told = iter(zip(received, flags(received[len(members) :]), strict=False))
        results = []
        for group in groups:
            points, found = zip(*itertools.islice(told, len(group)), strict=True)
            written, good = (list(itertools.chain(*some)) for some in zip(*found, strict=True))
            results.append(Moved(stacked(points), written, good, False))
        return results
