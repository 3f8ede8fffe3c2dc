"""Affine islands, matrices of constants, several inputs and outputs, pairs of outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import convert, layers
from orthonet.certify import certify, norms
from tests.certify.functions import Lambda
from tests.references import jacobian_reference


def batch_norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    module.running_mean.normal_()
    module.running_var.uniform_(0.2, 3)
    nn.init.uniform_(module.weight, -2, 2)
    return module


ISLANDS = {
    "conv and batch norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), batch_norm(6)),
    "batch norm and conv": lambda: nn.Sequential(batch_norm(4), nn.Conv2d(4, 6, 3, padding=0)),
    "strided": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), batch_norm(6), nn.Conv2d(6, 4, 1)),
    "residual": lambda: Lambda(lambda x, f: x + 0.5 * f(x), nn.Conv2d(4, 4, 3, padding=1)),
    "difference": lambda: Lambda(
        lambda x, f, g: f(x) - g(x),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, (5, 1), padding=(2, 0), groups=2),
    ),
    "concatenation": lambda: Lambda(
        lambda x, f: torch.cat([x, f(x)], 1), nn.Conv2d(4, 2, 3, padding=1)
    ),
    "circular": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), batch_norm(4)
    ),
    "average": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), batch_norm(4)),
    "circular transposed": lambda: convert.to_plain(
        layers.OrthoConvTranspose2d(4, 1, 2, 2, padding_mode="circular")
    ),
    "grouped, dilated": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), batch_norm(4)
    ),
}


@pytest.mark.parametrize("name", ISLANDS)
@pytest.mark.parametrize("written", [True, False], ids=["matrix", "kernel"])
def test_islands_are_what_they_compute(name, written, monkeypatch):
    torch.manual_seed(1)
    model = ISLANDS[name]().double().eval()
    x = torch.zeros(1, 4, 8, 6, dtype=torch.float64)
    if not written:  # too large to be written out: by the kernel, on a torus
        limits = {k: norms.Limits(k, 0, 0, 0, 0) for k in norms.EFFORTS}
        monkeypatch.setattr(norms, "EFFORTS", limits)
        monkeypatch.setattr("orthonet.linalg.bounds.convolutions._DENSE_SIDE", 0)
    truth = float(torch.linalg.matrix_norm(jacobian_reference(model, x[0]), 2))
    found = certify(model, x, lower=False)
    assert found.constant.value >= truth * (1 - 1e-12)
    # a matrix is exact, observed 1e-11; a torus as small as this is off by up to 17 %
    assert found.constant.value <= truth * (1 + 1e-9 if written else 1.25)


def test_average_and_linear_are_one_matrix():
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model = model.double().eval()
    x = torch.rand(1, 8, 4, 4, dtype=torch.float64)
    found = certify(model, x)
    truth = float(torch.linalg.matrix_norm(jacobian_reference(model, x[0] + 1), 2))
    assert truth <= found.constant.value * (1 + 1e-12) <= truth * (1 + 1e-9)
    weight = model[3].weight.detach() / 4  # the mean of 16 numbers has norm 1 / 4
    for i in range(3):
        for j in range(3):
            distance = float((weight[i] - weight[j]).norm())
            assert distance <= float(found.pairs[i, j]) * (1 + 1e-14) + 1e-300
            assert i == j or float(found.pairs[i, j]) <= distance * (1 + 1e-9)


def test_pieces_that_are_processed_apart():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Linear(4, 4)
            nn.utils.parametrizations.orthogonal(self.conv)

        def forward(self, x):
            a, b = x.split(4, 1)
            return torch.cat([b, self.conv(a).relu()], 1)

    model = nn.Sequential(*(Half() for _ in range(4))).double().eval()
    bound = certify(model, torch.zeros(1, 8, dtype=torch.float64)).constant.value
    assert bound <= 1 + 1e-5  # by norms of the parts 4.0; observed 2.4e-7


def test_unrolled_recurrence():
    """h_t depends on x_1, ..., x_t: a triangle of constants, not one sum for each step."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(3, 5)

        def forward(self, x):
            h, states = x.new_zeros(x.shape[0], 5), []
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
                states.append(h)
            return torch.stack(states, 1)

    model = Recurrent().double().eval()
    x = 0.1 * torch.randn(1, 6, 3, dtype=torch.float64)
    bound = certify(model, x).constant.value
    truth = float(torch.linalg.matrix_norm(jacobian_reference(model, x[0]), 2))
    assert truth <= bound <= 6 * truth  # observed 4.2


def test_several_inputs_and_outputs():
    a, b = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()
    model = Lambda(lambda x, y, f, g: (f(x) + g(y), F.relu(x)), a, b).eval()
    inputs = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    found = certify(model, inputs)
    wa, wb = a.weight.detach(), b.weight.detach()
    zero = torch.zeros(3, 2, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    joint = torch.cat([torch.cat([wa, wb], 1), torch.cat([eye, zero], 1)])
    truth = float(torch.linalg.matrix_norm(joint, 2))
    assert truth <= found.constant.value <= 1.5 * truth  # observed 1.13
    assert [bound.value >= 1.0 for bound in found.outputs] == [
        bound.value >= 1 for bound in found.outputs
    ]
    assert found.outputs[1].value == 1.0
    assert found.input_shape == ((3,), (2,))


def test_resnet_with_batch_norm_beats_the_product():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                batch_norm(8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1),
                batch_norm(8),
            )

        def forward(self, x):
            return torch.relu(x + self.f(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), Block()).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = certify(model, x[:1])
    assert found.lower is not None
    assert 0 < found.lower.value <= found.constant.value
    assert any("conv2d+batch_norm" in row.op for row in found.rows)
