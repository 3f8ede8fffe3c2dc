"""Reads by boolean masks that are constants of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orthonet
from orthonet.errors import UncertifiableError
from tests.certify.functions import Lambda


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor([True, False, True, True, False, False]))
        self.register_buffer("square", torch.tensor([[True, False, True], [False, True, True]]))
        self.attribute = torch.tensor([False, True, False, True, True, True])
        self.linear = nn.Linear(3, 2)


def _model(function: object) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(function, _Masked()).eval()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m: m.linear(x[:, m.kept]),
        lambda x, m: x.reshape(-1, 2, 3)[:, m.square],
        lambda x, m: 2 * x[..., m.attribute],
        lambda x, m: torch.cat([x[:, m.kept], x[:, [0, 0]]], 1),
    ],
    ids=["buffer", "two dims", "attribute", "with integers"],
)
def test_a_constant_mask_reads_what_it_says(function) -> None:
    model, x = _model(function), torch.randn(3, 6)
    constant = orthonet.certify(model, x, lower=False).constant.value
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0].double(), x[0])
    truth = float(torch.linalg.matrix_norm(jacobian.double(), 2))
    # All maps are affine, of 6 columns in float32: 1e-6 of rounding in the Jacobian at most.
    assert truth * (1 - 1e-6) <= constant <= truth * (1 + 1e-6)


def test_masks_that_change_or_depend_on_the_input_are_refused() -> None:
    def changes(x: Tensor, m: _Masked) -> Tensor:
        m.attribute = ~m.attribute
        return x[:, m.attribute]

    for function in (
        changes,
        lambda x, m: x[:, x[0] > 0],
        lambda x, m: x[x[:, 0] > 0],
        lambda x, m: torch.masked_select(x, m.kept),
        lambda x, m: x[m.kept[: x.shape[0]]],
    ):
        with pytest.raises(UncertifiableError):
            orthonet.certify(_model(function), torch.randn(3, 6))
