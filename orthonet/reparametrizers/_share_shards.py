"""Orthogonalization shared out among processes that hold shards of the parameters (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from orthonet import _checks
from orthonet._torch import after_backward, backward_pass, is_shard, without_autocast
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg._ranks import collect, exchange, hand_out
from orthonet.reparametrizers._cache_state import steps, usable
from orthonet.reparametrizers._pullback import own_graph
from orthonet.reparametrizers._share_group import RankGroup, buffers_written
from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["ShardedGroup", "require_alike"]


class ShardedGroup(RankGroup):
    """The matrices of a model whose parameters are shards, each kept by the process it falls to.

    When a unit of FSDP2 runs for the first time after an optimizer step, every process collects the
    raw parameters that fall to it, in the dtype of the shards, and computes its matrices, with a
    graph from them. A forward pass takes each matrix from its owner, and a backward pass sums its
    gradient there; at its end all processes pull back what is theirs, at the same time, and hand
    the mean out as gradients of the shards. So the unit's own reduction has nothing to do for these
    parameters, and no process keeps more matrices between the layers than its part.
    """

    def __init__(
        self, process_group: Any, weights: Sequence[OrthoWeight], costs: list[float]
    ) -> None:
        super().__init__(process_group, weights, costs)
        self.places = {id(weight): i for i, weight in enumerate(weights)}
        # FSDP2 puts full parameters in the place of these during a forward pass; these are what the
        # optimizer has
        self.shards = [weight.original for weight in weights]
        self.stamp: Any = None
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}  # of this process: leaf and matrix
        self.task: int | None = None  # the backward pass that is running
        self.sums: dict[int, Tensor | None] = {}  # its gradients; None where others own them

    def forget(self) -> None:
        """Compute anew at the next read."""
        self.stamp = None

    def value(self, weight: OrthoWeight) -> Tensor | None:
        """The value of one member within its unit of FSDP2 in training; None elsewhere."""
        original = weight.original
        if is_shard(original) or not (
            usable(weight)
            and weight.training
            and torch.is_grad_enabled()
            and original.requires_grad
        ):
            return None
        with self.lock:
            now = (steps(), [t._version for t in self.shards])
            if self.stamp != now:
                self._compute()
                self.stamp = now
            return _Lent.apply(original, self, self.places[id(weight)])  # type: ignore[return-value]

    def _compute(self) -> None:
        members = self.present()
        self.graphs = {}  # free what is out of date first
        collected = collect([t.detach() for t in self.shards], self.owners, self.process_group)
        for i, raw in collected.items():
            self.graphs[i] = _computed(members[i], raw)
        written = [
            (buffer, owner)
            for m, owner in zip(members, self.owners, strict=True)
            for buffer in buffers_written(m)
        ]
        if written:
            pieces, owners = zip(*written, strict=True)
            received = exchange([t.detach() for t in pieces], owners, self.process_group)
            with torch.no_grad():
                for buffer, owner, value in zip(pieces, owners, received, strict=True):
                    if owner != self.rank:
                        buffer.copy_(value)

    def lend(self, index: int, like: Tensor) -> Tensor:
        """A copy of one matrix for every process, from its owner."""
        owner = self.owners[index]
        if owner == self.rank:
            value = self.graphs[index][1].detach().clone(memory_format=torch.contiguous_format)
        else:
            value = like.new_empty(like.shape, dtype=compute_dtype(self.shards[index].dtype))
        dist.broadcast(
            value, dist.get_global_rank(self.process_group, owner), group=self.process_group
        )
        return value

    def add(self, index: int, grad: Tensor) -> None:
        """Sum the gradient of one matrix at its owner, to be pulled back when backward ends."""
        owner = self.owners[index]
        summed = grad.clone(memory_format=torch.contiguous_format)
        dist.reduce(
            summed, dist.get_global_rank(self.process_group, owner), group=self.process_group
        )
        task = backward_pass()
        if self.task != task:  # what an interrupted backward pass has left is not meant
            self.task, self.sums = task, {}
            after_backward(self._pull_back)
        held = self.sums.get(index)
        mine = summed if held is None else held + summed
        self.sums[index] = mine if owner == self.rank else None

    @torch.no_grad()
    def _pull_back(self) -> None:
        """Give the shards their gradients: each process pulls back what is its own, all at once."""
        sums, self.task, self.sums = self.sums, None, {}
        order = sorted(sums)
        pulled: dict[int, Tensor] = {}
        for place, index in enumerate(order):
            summed = sums[index]
            if summed is not None:
                leaf, matrix = self.graphs[index]
                with without_autocast(leaf):
                    grad = torch.autograd.grad(matrix, leaf, summed, retain_graph=True)[0]
                pulled[place] = grad / self.size
        shards = [self.shards[i] for i in order]
        grads = hand_out(pulled, shards, [self.owners[i] for i in order], self.process_group)
        for shard, grad in zip(shards, grads, strict=True):
            if shard.grad is None:
                shard.grad = grad
            else:
                shard.grad += grad


def _computed(weight: OrthoWeight, raw: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf of the value `raw` and the matrix of `weight` computed from it, with a graph."""
    with torch.inference_mode(False):
        leaf = raw.to(compute_dtype(raw.dtype)).requires_grad_()
        with own_graph(), without_autocast(leaf):
            # a view is no parameter, so nothing writes to it
            return leaf, weight.orthogonalizer(weight.normalizer(leaf.view_as(leaf)))


class _Lent(torch.autograd.Function):
    """One matrix, from the process that has computed it; its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, group: ShardedGroup, index: int) -> Tensor:
        ctx.group, ctx.index, ctx.stamp = group, index, group.stamp
        return group.lend(index, original)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _checks.require(
            ctx.group.stamp == ctx.stamp,
            "backward",
            "a parameter of a shared-out matrix has been modified since the forward pass",
            "Call backward before the parameters change, or run the forward pass again",
            RuntimeError,
        )
        ctx.group.add(ctx.index, grad)
        return None, None, None  # the shard gets its gradient when backward ends


def require_alike(weights: Sequence[OrthoWeight]) -> bool:
    """Whether the parameters are shards; refuse models of which only some are."""
    kinds = {is_shard(weight.original) for weight in weights}
    odd = next((w for w in weights if type(w.original) is not nn.Parameter), None)
    plain = odd is None or is_shard(odd.original)
    _checks.require(
        len(kinds) < 2 and plain,
        "share_among_ranks",
        "the parameters must be whole in every process, or all of them shards of FSDP2",
        "Call fully_shard on every part that has orthogonal matrices, before share_among_ranks",
        parameters=sorted({type(w.original).__name__ for w in weights}),
    )
    return kinds == {True}
