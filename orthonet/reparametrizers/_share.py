"""Orthogonalization shared out among processes that hold the same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from orthonet import _checks
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg._ranks import exchange, rank_and_size
from orthonet.reparametrizers._cache import GIVEN, GROUP, Kept, hit, invalidate, keep, keepable
from orthonet.reparametrizers._cache_state import steps, usable
from orthonet.reparametrizers._fuse import _require_batchable, unfuse
from orthonet.reparametrizers._group import Batch, kind
from orthonet.reparametrizers._pullback import Computation
from orthonet.reparametrizers._share_group import RankGroup, buffers_written
from orthonet.reparametrizers._share_shards import ShardedGroup, require_alike
from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["share_among_ranks"]

_LARGEST_BATCHED = 256  # smaller side up to which matrices of one shape share a call, as in `fuse`


def share_among_ranks(module: nn.Module, process_group: Any = None) -> tuple[tuple[str, ...], ...]:
    r"""Let each process orthogonalize its part of a model, and all have the results.

    For data-parallel training (DistributedDataParallel, FSDP2, or gradients averaged by hand),
    where all processes would compute the same matrices, of layers and of the factors of kernels
    alike. Matrices are assigned by cost \(n k^2\), the largest first, to the process with the
    least to do, so that the share of the orthogonalization in the cost of a step falls with the
    number of processes.

    **Whole parameters.** The first read of a weight after an optimizer step has each process
    compute its matrices, and one all-gather hands them round. In backward the gradients of the
    matrices are summed where these were computed, and pulled back there; the other processes return
    zeros. The mean over the processes, which DistributedDataParallel forms anyway, is then the
    gradient without sharing. What is sent is one matrix each way.

    **Shards** (`fully_shard`, called before). The first unit that runs after an optimizer step has
    each process collect its raw parameters, in the dtype of the shards (also with a policy of
    mixed precision), and compute its matrices, which only it keeps; every forward pass takes
    matrices from their owners, and every backward pass sums their gradients there. When it ends,
    all processes pull back what is theirs and hand the mean over the processes out to the shards'
    `grad`; a divisor of its own, skipped reductions and post-accumulate hooks that FSDP2 offers do
    not reach these parameters. What is sent on top of FSDP2's own traffic is the raw parameter and
    its gradient once per pass, and a matrix each way. Other tensors or attributes of the
    normalizers and orthogonalizers that you change are seen after the next optimizer step, or
    `invalidate(module)`.

    It acts in training mode with gradients enabled. All processes must then read weights at the
    same places of the program, since that is a collective; in `eval()` or under `torch.no_grad()`
    each process computes for itself, as do copies and pickles of the model, and reads outside of
    the units of FSDP2. If only some processes evaluate the model, let them do so after
    `optimizer.step()`, when all have to compute anew, or on a copy. It rests on the cache: with
    that off, or under torch.compile, each process computes everything. `unfuse` undoes it.

    Args:
        module: The model, of `nn.Module`; before or after DistributedDataParallel wraps it, after
            `fully_shard`.
        process_group: The processes; a new group of all of them if None.

    Returns:
        The names of the matrices that each rank of the group computes.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: Some parameters are shards and others are not; or the normalizer or the
            orthogonalizer of some weights cannot be batched. Nothing has been changed.

    Examples:
        In each process of `torchrun`:

            orthonet.share_among_ranks(model)
            model = DistributedDataParallel(model)
    """
    _checks.require(
        dist.is_available() and dist.is_initialized(),
        "share_among_ranks",
        "torch.distributed must be initialized",
        "Call torch.distributed.init_process_group first, or leave the model as it is",
        RuntimeError,
    )
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, OrthoWeight)]
    weights = [weight for _, weight in found]
    sharded = require_alike(weights)
    for name, weight in found if not sharded else ():
        _require_batchable(name, weight)
    unfuse(module)
    group = dist.new_group() if process_group is None else process_group
    costs = [_cost(weight) for weight in weights]
    shared = (ShardedGroup if sharded else SharedGroup)(group, weights, costs)
    for weight in weights:
        setattr(weight, GROUP, shared)
    invalidate(module)
    return tuple(
        tuple(name for (name, _), owner in zip(found, shared.owners, strict=True) if owner == rank)
        for rank in range(shared.size)
    )


def _require_whole(weight: OrthoWeight) -> None:
    _checks.require(
        type(weight.original) is nn.Parameter and not weight._sharded,
        "share_among_ranks",
        "the parameters must be whole in every process, as they were when the work was shared out",
        "Call fully_shard before share_among_ranks",
        parameter=type(weight.original).__name__,
    )


class SharedGroup(RankGroup):
    """The matrices of a model whose parameters all processes hold."""

    def __init__(
        self, process_group: Any, weights: Sequence[OrthoWeight], costs: list[float]
    ) -> None:
        super().__init__(process_group, weights, costs)
        self.batches: list[tuple[Batch, list[int]]] = []
        self.known: list[Any] = []

    def value(self, weight: OrthoWeight) -> Tensor | None:
        """The value of one member, computed together with all others in training."""
        value = vars(weight).get(GIVEN)
        if value is None:
            value = hit(weight)
        if value is not None or not usable(weight):
            return value
        if not (weight.training and torch.is_grad_enabled() and weight.original.requires_grad):
            return None
        with self.lock:
            value = hit(weight)
            return self._compute(weight) if value is None else value

    def _compute(self, weight: OrthoWeight) -> Tensor | None:
        members = self.present()
        for m in members:
            _require_whole(m)
        structures = [keepable(m) for m in members]
        if None in structures:  # what cannot be kept must be computed at each read
            return None
        now = steps()
        computation = self._computed(members, structures)
        kept = Kept(computation, now, True)
        for index, (m, structure) in enumerate(zip(members, structures, strict=True)):
            keep(m, structure, kept, index)  # type: ignore[arg-type]
        return kept.get(next(i for i, m in enumerate(members) if m is weight), True)

    def _computed(self, members: list[OrthoWeight], structures: list[Any]) -> Computation:
        if (
            not self.batches
            or len(self.known) != len(structures)
            or any(a is not b for a, b in zip(self.known, structures, strict=True))
        ):
            self.batches, self.known = self._batched(members), structures
        outputs = [m.original.new_empty(m.shape, dtype=_dtype(m)) for m in members]
        parts: list[tuple[Computation, list[int]]] = []
        for batch, indices in self.batches:
            part = batch.compute([members[i] for i in indices], True)
            parts.append((part, indices))
            for i, value in zip(indices, part.outputs, strict=True):
                outputs[i] = value.detach()
        pieces, owners, written = list(outputs), list(self.owners), []
        for m, owner in zip(members, self.owners, strict=True):
            state = buffers_written(m)
            if hasattr(m.orthogonalizer, "recentre_"):
                state.append(m.original)  # a warm one may have moved it, to the same point
            written += [(tensor, owner) for tensor in state]
        pieces += [tensor.detach() for tensor, _ in written]
        owners += [owner for _, owner in written]
        with torch.no_grad():
            received = exchange(pieces, owners, self.process_group)
            outputs = received[: len(outputs)]
            for (tensor, owner), value in zip(written, received[len(outputs) :], strict=True):
                if owner != self.rank:
                    tensor.copy_(value)
        return _Shared(self, members, outputs, parts)

    def _batched(self, members: list[OrthoWeight]) -> list[tuple[Batch, list[int]]]:
        """The matrices of this process: small ones of a kind in one call."""
        buckets: list[list[int]] = []
        for i, m in enumerate(members):
            if self.owners[i] != self.rank:
                continue
            wanted = kind(m, mode=True)
            small = min(m.shape[-2:]) <= _LARGEST_BATCHED
            for bucket in buckets if small else ():
                if kind(members[bucket[0]], mode=True) == wanted:
                    bucket.append(i)
                    break
            else:
                buckets.append([i])
        return [(Batch([members[i] for i in bucket]), bucket) for bucket in buckets]


class _Shared(Computation):
    """The matrices of all processes; only those of this one have a graph."""

    __slots__ = ("group", "parts")

    def __init__(
        self,
        group: SharedGroup,
        members: Sequence[OrthoWeight],
        outputs: Sequence[Tensor],
        parts: list[tuple[Computation, list[int]]],
    ) -> None:
        originals = [m.original for m in members]
        outputs = [output.detach().requires_grad_() for output in outputs]
        super().__init__(originals, (), outputs, originals, True)
        self.group, self.parts = group, parts

    def pull_back(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Zeros, but for the matrices of this process: from the sum over all processes."""
        self.require_unchanged()
        group = self.group
        given = [
            torch.zeros_like(output) if grad is None else grad
            for grad, output in zip(grads, self.outputs, strict=True)
        ]
        summed = _sum_at_owners(given, group.owners, group.process_group)
        pulled: list[Tensor | None] = [torch.zeros_like(t) for t in self.inputs]
        for part, indices in self.parts:
            found = part.pull_back([summed[i] for i in indices])
            for i, grad in zip(indices, found, strict=True):
                pulled[i] = grad
        return tuple(pulled)

    def pull_back_differentiably(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Refused."""
        _checks.fail(
            "share_among_ranks",
            "backward with create_graph=True cannot be shared out",
            "Call orthonet.unfuse(model) in all processes",
            RuntimeError,
        )


def _sum_at_owners(tensors: list[Tensor], owners: list[int], process_group: Any) -> list[Tensor]:
    """The sums over the processes, of the tensors that this one owns; one reduction for each."""
    rank, size = rank_and_size(process_group)
    result = list(tensors)
    for owner in range(size):
        indices = [i for i, who in enumerate(owners) if who == owner]
        for dtype in dict.fromkeys(tensors[i].dtype for i in indices):
            chosen = [i for i in indices if tensors[i].dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in chosen])
            dist.reduce(flat, dist.get_global_rank(process_group, owner), group=process_group)
            if owner == rank:
                pieces = flat.split([tensors[i].numel() for i in chosen])
                for i, piece in zip(chosen, pieces, strict=True):
                    result[i] = piece.view_as(tensors[i])
    return result


def _cost(weight: OrthoWeight) -> float:
    n, k = max(weight.shape[-2:]), min(weight.shape[-2:])
    return float(weight.shape[:-2].numel() * n * k * k)


def _dtype(weight: OrthoWeight) -> torch.dtype:
    return compute_dtype(weight.original.dtype)
