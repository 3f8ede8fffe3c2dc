"""A write into a constrained weight, which has no effect, is warned about once."""

import pytest
import torch
from torch import nn

import orthonet
from orthonet import layers
from orthonet.errors import InPlaceEditWarning
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import BatchedQROrthogonalization, register

LAYERS = {
    "linear": lambda: OrthoLinear(4, 6),
    "exponential": lambda: OrthoLinear(4, 6, ortho_params=orthonet.EXP_ORTHO_PARAMS),
    "half": lambda: OrthoLinear(4, 6, dtype=torch.bfloat16),
    "conv": lambda: OrthoConv2d(4, 6, 3),
    "free conv": lambda: OrthoConv2d(4, 4, 3, ranks="free"),
    "rko": lambda: OrthoConv2d(4, 6, 3, method="rko"),
    "aol": lambda: layers.AOLConv2d(4, 6, 3),
    "unit rows": lambda: layers.UnitNormLinear(4, 6),
    "registered": lambda: register(nn.Linear(4, 4), "weight", BatchedQROrthogonalization((4, 4))),
    "verb": lambda: orthonet.orthogonal(nn.Linear(4, 4)),
}
EDITS = {
    "nn.init": nn.init.ones_,
    "data": lambda w: w.data.fill_(0.125),
    "detach": lambda w: w.detach().mul_(2.0),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_an_edit_has_no_effect_and_is_told_once(make, edit, grad):
    layer = make()
    with torch.set_grad_enabled(grad):
        before = layer.weight.detach().clone()
        edit(layer.weight)
        with pytest.warns(InPlaceEditWarning, match="assign to it instead") as seen:
            assert torch.equal(layer.weight, before)
        assert len(seen) == 1 and seen[0].filename == __file__
        assert torch.equal(layer.weight, before)  # silent: a warning would be an error


def test_initializing_a_whole_model_is_told_once():
    def initialize(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)

    model = nn.Sequential(
        OrthoConv2d(2, 4, 2),
        OrthoConv2d(4, 4, 2),
        nn.Flatten(),
        OrthoLinear(4, 4),
        OrthoLinear(4, 4),
        OrthoLinear(4, 3),
        OrthoLinear(3, 3, ortho_params=orthonet.EXP_ORTHO_PARAMS),
    )
    x = torch.randn(2, 2, 3, 3)
    model(x)

    def first_use():
        model.apply(initialize)
        return model(x)

    with pytest.warns(InPlaceEditWarning) as seen:
        y = first_use()
    assert len({str(w.message) for w in seen}) == 1 and len(seen) <= 2  # one of each provider
    assert y.abs().max() > 0
    model(x).sum().backward()


def test_an_assignment_of_what_was_edited_is_none():
    first, second = OrthoLinear(4, 4), OrthoLinear(4, 4)  # kept as one batch
    x = torch.randn(2, 4)
    before = second(first(x)).detach()
    first.weight = nn.init.orthogonal_(first.weight)
    assert not torch.allclose(second(first(x)), before)
    conv, other = OrthoConv2d(4, 4, 1), OrthoConv2d(4, 4, 1)
    other.weight.sum(), conv.weight.sum()
    conv.weight = nn.init.eye_(conv.weight.detach()[:, :, 0, 0])[:, :, None, None]
    assert torch.allclose(conv.weight[:, :, 0, 0], torch.eye(4), atol=1e-6)
    assert torch.allclose(
        other.weight[:, :, 0, 0] @ other.weight[:, :, 0, 0].T, torch.eye(4), atol=1e-5
    )


def test_an_optimizer_step_after_an_edit_goes_on():
    model = nn.Sequential(OrthoLinear(4, 4), OrthoLinear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sin().sum().backward()
    nn.init.zeros_(model[0].weight)
    optimizer.step()
    sigma = torch.linalg.svdvals(model[0].weight)
    assert (sigma - 1).abs().max() <= 2e-6
