"""What groups of weights whose work is shared out among processes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from orthonet import _checks
from orthonet.linalg._ranks import assign, rank_and_size
from orthonet.reparametrizers._group import Group
from orthonet.reparametrizers._weight import OrthoWeight

__all__ = ["RankGroup", "buffers_written"]


class RankGroup(Group):
    """The matrices of a model, each computed by one process of a group.

    Copies and pickles belong to no group.
    """

    def __init__(
        self, process_group: Any, weights: Sequence[OrthoWeight], costs: list[float]
    ) -> None:
        super().__init__()
        self.process_group = process_group
        for weight in weights:
            self.join(weight)
        self.rank, self.size = rank_and_size(process_group)
        self.owners = assign(costs, self.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(None), ()

    def present(self) -> list[OrthoWeight]:
        """The members, which must be those of the time when the work was shared out."""
        members = [m for ref in self.members if (m := ref()) is not None]
        _checks.require(
            len(members) == len(self.owners) and all(m._group is self for m in members),
            "share_among_ranks",
            "the model must have the matrices that it had when the work was shared out",
            "Call share_among_ranks again in all processes",
            RuntimeError,
        )
        return members


def buffers_written(weight: OrthoWeight) -> list[Tensor]:
    """The buffers that computing the matrix may write, such as vectors of power iteration."""
    return [
        buffer
        for step in (weight.normalizer, weight.orthogonalizer)
        for name, buffer in step.named_buffers()
        if name not in getattr(step, "_fixed", ())
    ]
