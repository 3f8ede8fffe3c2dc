"""A model at its random initialization is told that a projection keeps nothing of it."""

import warnings

import pytest
import torch
from torch import nn

import orthonet
from orthonet import orthogonalize

INITIALIZATIONS = {
    "default": lambda module: None,
    "torchvision's resnets": lambda module: nn.init.kaiming_normal_(
        module.weight, mode="fan_out", nonlinearity="relu"
    ),
    "Kaiming's, uniform": lambda module: nn.init.kaiming_uniform_(module.weight),
    "Xavier's": lambda module: nn.init.xavier_uniform_(module.weight),
    "Xavier's, normal": lambda module: nn.init.xavier_normal_(module.weight),
    "timm's": lambda module: nn.init.trunc_normal_(module.weight, std=0.02),
}


def network(initialize=INITIALIZATIONS["default"]):
    model = nn.Sequential(
        nn.Conv2d(3, 40, 5),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 40, 1),
        nn.Flatten(),
        nn.Linear(160, 60),
        nn.ReLU(),
        nn.Linear(60, 10),
    )
    for index in (0, 3, 5, 7):
        initialize(model[index])
    return model


def told(model):
    """Whether it is, before anything is projected."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, report = orthogonalize(model, rules={nn.Module: False}, return_report=True)
    assert report.changed == ()
    messages = [str(w.message) for w in seen]
    assert all("random initialization" in m and "weights='reset'" in m for m in messages)
    return len(messages) == 1


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_every_usual_initialization_is_recognized(name):
    for seed in range(5):
        torch.manual_seed(seed)
        assert told(network(INITIALIZATIONS[name]))
    assert told(nn.LSTM(32, 64)) or name != "default"


def test_trained_and_orthogonal_weights_are_projected_silently():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    assert not told(model)
    partly = network()
    partly[5].weight.data.mul_(1.5)  # one layer is enough
    assert not told(partly)
    for layer in (orthonet.OrthoLinear(64, 64), orthonet.OrthoConv2d(16, 32, 3)):
        assert not told(orthonet.to_plain(layer))  # exported by us
    assert not told(nn.Linear(4, 4))  # too few entries to judge, and nothing to wait for


def test_reset_says_nothing():
    orthogonalize(network(), weights="reset", return_report=True)  # a warning would be an error
