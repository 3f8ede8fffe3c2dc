"""Constraints registered on stock modules: their weights are folded as forward computes them."""

import pytest
import torch
from torch import nn

from orthonet import constraints
from orthonet.certify import certify

VERBS = {
    "orthogonal": constraints.orthogonal,
    "almost_orthogonal": constraints.almost_orthogonal,
    "low_rank": lambda layer: constraints.low_rank(layer, "weight", 2),
    "positive_definite": constraints.positive_definite,
    "sln": constraints.sln,
}


@pytest.mark.parametrize("name", VERBS)
def test_the_constant_is_the_norm_of_the_weight(name):
    """In-place operations inside a region without autocast must be made functional as well.

    They were left out of the folding once, and an orthogonal weight had the constant 0.5.
    """
    layer = VERBS[name](nn.Linear(4, 8 if "ortho" in name or name == "low_rank" else 4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    found = certify(layer.eval(), torch.zeros(1, 4), effort="fast").constant.value
    norm = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    assert norm <= found * (1 + 1e-12)
    assert found == pytest.approx(norm, rel=1e-6)  # observed 0
