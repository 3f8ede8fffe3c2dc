"""What the tests of known faults share."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.testing import singular_values
from tests.presets import PRESETS

FACTORIES = {
    "linear": (partial(OrthoLinear, 8, 6), (8,)),
    "conv": (partial(OrthoConv2d, 4, 6, 3, padding=1), (4, 6, 6)),
    "conv_stride": (partial(OrthoConv2d, 4, 8, 3, stride=2, padding=1), (4, 6, 6)),
}
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
every_layer = pytest.mark.parametrize(("factory", "shape"), FACTORIES.values(), ids=FACTORIES)


def train(layer: nn.Module, x: Tensor, steps: int, lr: float = 1e-2) -> list[float]:
    """Adam steps toward a random target, then eval mode; returns the losses."""
    layer.train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    target = torch.randn_like(layer(x).detach())
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    layer.eval()
    return history


def excess(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """How far the norm of the dense operator of a layer is above 1."""
    return singular_values(layer, shape)[0].item() - 1


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two entries."""
    return (a - b).detach().abs().max().item()
