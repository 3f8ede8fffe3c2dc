"""`summary`: one line a layer, and what is known of it."""

import logging

import pytest
import torch
from torch import nn

import orthonet
from orthonet import layers


def model():
    return nn.Sequential(
        layers.OrthoConv2d(1, 4, 3, padding=1, padding_mode="circular", ortho_params="qr"),
        nn.BatchNorm2d(4),
        layers.MaxMin(),
        nn.Sequential(nn.Flatten(), layers.OrthoLinear(64, 8)),
        nn.ReLU(),
        orthonet.orthogonal(nn.Linear(8, 8)),
        nn.Linear(8, 3),
    )


X = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
CLASSES = [
    "OrthoConv2d",
    "BatchNorm2d",
    "MaxMin",
    "Flatten",
    "OrthoLinear",
    "ReLU",
    "Linear",
    "Linear",
]


def test_without_an_example_layers_tell_what_they_declare():
    net = model()
    found = orthonet.summary(net)
    assert [row.layer for row in found.rows] == CLASSES
    assert [row.name for row in found.rows][3:5] == ["3.0", "3.1"]
    constraints = [row.constraint for row in found.rows]
    assert constraints == ["orthogonal (qr)", "", "", "", "orthogonal (default)", "", "Stiefel", ""]
    kinds = [row.kind for row in found.rows]
    assert kinds == ["declared", "", "", "", "declared", "", "upper", "upper"]
    norm = float(torch.linalg.matrix_norm(net[6].weight.detach().double(), 2))
    assert norm <= found.rows[-1].constant <= norm * 1.0001  # float64: a few units above
    residuals = [row.residual for row in found.rows]
    assert [r is not None for r in residuals] == [bool(c) for c in constraints]
    assert all(r <= 2e-6 for r in residuals if r is not None)  # the promise in float32
    assert found.certificate is None and all(row.share is None for row in found.rows)


def test_the_residual_is_that_of_the_singular_values():
    layer = layers.OrthoLinear(6, 4)
    weight = layer.weight.detach().double()
    expected = float((torch.linalg.svdvals(weight) - 1).abs().max())
    assert orthonet.summary(layer).rows[0].residual == expected


def test_with_an_example_constants_are_proved_and_the_time_is_shared():
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = orthonet.summary(net, X)
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    by_class = {row.layer: row for row in found.rows}
    assert (by_class["MaxMin"].constant, by_class["MaxMin"].kind) == (1.0, "exact")
    assert by_class["BatchNorm2d"].kind == "joined"
    assert found.certificate is not None and "Lipschitz constant" in str(found)
    shares = [row.share for row in found.rows]
    assert all(share > 0.0 for share in shares) and 0.0 < sum(shares) <= 1.0
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(CLASSES) + 1
    assert found._repr_html_().count("<tr>") == 1 + len(CLASSES)


def test_layers_inside_of_a_module_with_a_constrained_tensor_of_its_own_are_listed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.layer = nn.Parameter(torch.eye(3)), layers.OrthoLinear(3, 3)

        def forward(self, x):
            return self.layer(x @ self.w)

    found = orthonet.summary(orthonet.orthogonal(Net(), "w"))
    assert [(row.name, row.layer) for row in found.rows] == [("", "Net"), ("layer", "OrthoLinear")]
    assert [row.constraint for row in found.rows] == ["Stiefel", "orthogonal (default)"]


def test_what_cannot_be_certified_is_listed_with_the_reason():
    found = orthonet.summary(nn.MultiheadAttention(4, 2), (torch.rand(2, 3, 4),) * 3)
    assert [row.layer for row in found.rows] == ["MultiheadAttention"]
    assert found.certificate is None and "dot-product attention" in str(found).splitlines()[-1]


@pytest.mark.parametrize("function", [orthonet.certify, orthonet.summary, orthonet.evaluate])
def test_a_wrong_shape_is_told_as_it_was_given_and_torch_logs_nothing(function, caplog, capfd):
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()  # stock: torch logs its errors
    x = torch.rand(2, 7)
    rest = (x,)
    if function is orthonet.evaluate:
        rest = ([(x, torch.zeros(2).long())], [0.1])
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="shape=") as caught:
        function(net, *rest)
    text = str(caught.value)
    given = "(1, 7)" if function is orthonet.evaluate else "(2, 7)"
    assert f"shape={given}" in text.replace("[", "").replace("]", "") and "\n" not in text
    assert "must run on example_input" in text and "mat1 and mat2" in text
    assert caplog.records == [] and capfd.readouterr() == ("", "")


def test_a_fixed_batch_size_is_not_taken_for_a_wrong_shape():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(5, 4)

    with pytest.raises(ValueError, match="on batches of any size") as caught:
        orthonet.certify(Fixed().eval(), torch.ones(5, 4))
    assert "\n" not in str(caught.value)
