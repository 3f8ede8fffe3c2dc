"""Robust accuracy under attack, against cases whose truth is known."""

import pytest
import torch
from torch import nn

from orthonet.certify import certified_accuracy, certify, empirical_accuracy
from orthonet.layers import MaxMin, OrthoLinear


class Threshold(nn.Module):
    """Class 0 where the mean exceeds 1/2; the worst move goes along the diagonal."""

    def forward(self, x):
        gap = x.flatten(1).mean(1) - 0.5
        return torch.stack((gap, -gap), 1)


def test_of_a_threshold_it_is_exact():
    level = torch.tensor([0.3, 0.45, 0.55, 0.8, 0.9]).double()
    x = level.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    y = torch.tensor([1, 1, 0, 0, 1])  # the last one is wrong from the start
    distance = 4 * (level - 0.5).abs()  # 0.8, 0.2, 0.2, 1.2
    radii = [1.0, 0.0, 0.3, 0.1]
    expected = [int((distance[:4] > r).sum()) / 5 for r in radii]
    assert empirical_accuracy(Threshold().eval(), x, y, radii, batch_size=2) == expected
    assert expected == [0.2, 0.8, 0.4, 0.8]


def test_it_is_never_below_what_is_certified():
    torch.manual_seed(0)
    model = nn.Sequential(OrthoLinear(8, 8), MaxMin(), OrthoLinear(8, 3)).double().eval()
    x = torch.rand(40, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 3
    radii = (0.02, 0.1, 0.2)
    found = empirical_accuracy(model, x, y, radii, steps=10)
    proved = certify(model, x[:1]).certified_accuracy(model(x), y, radii)
    assert found == sorted(found, reverse=True)
    assert all(p <= f <= 35 / 40 for p, f in zip(proved, found, strict=True))
    assert proved[0] > 0
    assert callable(certified_accuracy)


def test_bad_arguments():
    model = Threshold().eval()
    with pytest.raises(ValueError, match="sample"):
        empirical_accuracy(model, torch.zeros(0, 4), torch.zeros(0), [0.1])
    with pytest.raises(ValueError, match="eval mode"):
        empirical_accuracy(Threshold(), torch.zeros(1, 4), torch.ones(1).long(), [0.1])
    with pytest.raises(ValueError, match="numbers >= 0"):
        empirical_accuracy(model, torch.zeros(1, 4), torch.ones(1).long(), [-0.1])
