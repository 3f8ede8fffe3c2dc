"""The cells that are refused, with the text of the error and the reason that the page gives."""

from __future__ import annotations

from typing import NamedTuple

from orthonet.errors import UncertifiableError
from tests.works_with.rows import Row

__all__ = ["Refusal", "refusal"]


class Refusal(NamedTuple):
    """An error that a cell must raise, its text, and why."""

    error: type[Exception]
    match: str
    reason: str


NO_PROJECTION = Refusal(
    RuntimeError,
    r"the weight of a plain layer has no projection|this weight has no assignment",
    "the layer is not one linear map, or it is built in the frequency domain: a plain weight has "
    "no projection onto it",
)
SYMPLECTIC = Refusal(
    RuntimeError,
    "too far from the symplectic group to be projected",
    "an arbitrary matrix has no projection onto the symplectic group",
)
GATES = Refusal(
    UncertifiableError,
    "gates multiply states",
    "gates multiply states, so the map of sequences has no Lipschitz constant",
)
PRODUCT = Refusal(
    AssertionError,
    "looser than that of the layer",
    "the bound 1 depends on how the weights inside the layer fit together; stock layers get the "
    "product of their norms, which is sound and looser: certify the layer itself",
)
_NO_PLAIN_WEIGHT = ("bro", "cpl", "sll", "sandwich", "soc", "lot", "lipnext")


def refusal(column: str, row: Row) -> Refusal | None:
    """Return the refusal that is expected, if any."""
    name = row.name.split(" ")[0]
    if column == "plain_checkpoint":
        if name in _NO_PLAIN_WEIGHT or row.name == "cayley (convolution)":
            return NO_PROJECTION
        return SYMPLECTIC if row.name == "symplectic" else None
    if column == "certificate":
        if row.name in ("OrthoGRU", "OrthoLSTM"):
            return GATES
        return PRODUCT if name in ("cpl", "sll", "sandwich") else None
    if column == "autocast_certificate" and row.name in ("OrthoGRU", "OrthoLSTM"):
        return GATES
    return None
