"""Cells and layers of recurrent networks."""

from __future__ import annotations

from orthonet.certify._bound import Bound
from orthonet.certify.norms import matrix_norm
from orthonet.certify.ops.registry import added, op
from orthonet.certify.rules import Call, Operand, Step

__all__: list[str] = []


@op(
    "rnn_tanh_cell.default",
    "rnn_relu_cell.default",
    reads=("hx", "w_ih", "w_hh"),
    free=("b_ih", "b_hh"),
    offset=added,
)
def _cell(call: Call) -> Step:
    """tanh(W x + b + U h + c): both gains are norms of matrices."""
    gains, sizes = [], []
    for name, matrix in (("input", "w_ih"), ("hx", "w_hh")):
        if isinstance(call[name], Operand):
            weight = call.fixed(matrix)
            gains.append(Bound(matrix_norm(weight), kind="exact"))
            sizes.append(sum(weight.shape))
    return Step(tuple(gains), "matrices of the cell, verified", roundings=sum(sizes) + 70.0)
