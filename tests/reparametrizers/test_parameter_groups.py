"""Every parameter in one group, raw ones undecayed; and what decay does to a trivialized weight."""

import pytest
import torch
from torch import nn

import orthonet
from orthonet.constraints import orthogonal
from orthonet.layers import MaxMin, OrthoConv2d, OrthoGRU, OrthoLinear
from orthonet.reparametrizers import Weight
from tests.works_with.rows import ROWS


def named(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_the_groups_of_a_mixed_model():
    model = nn.ModuleDict(
        {
            "conv": OrthoConv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "act": MaxMin(),
            "plain": nn.Linear(4, 4),
            "verb": orthogonal(nn.Linear(4, 4)),
            "rnn": OrthoGRU(4, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    plain, constrained, vectors = orthonet.parameter_groups(
        model, lr=0.1, weight_decay=0.01, constrained_lr=0.2
    )
    assert (plain["name"], plain["lr"], plain["weight_decay"]) == ("plain", 0.1, 0.01)
    assert named(model, plain) == {"plain.weight", "rnn.weight_ih_l0"}
    assert (constrained["lr"], constrained["weight_decay"]) == (0.2, 0.0)
    raw = {name for name, _ in model.named_parameters() if "parametrization" in name}
    assert named(model, constrained) == raw | {"rnn.recurrent.weight_hh_l0.original"}
    assert vectors["weight_decay"] == 0.0
    assert "norm.weight" in named(model, vectors)
    groups = (plain, constrained, vectors)
    every = [p for group in groups for p in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(every) == len({id(p) for p in every})
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("row", ROWS.values(), ids=repr)
def test_no_raw_matrix_of_any_layer_is_decayed(row):
    layer = row.make()
    groups = {g["name"]: named(layer, g) for g in orthonet.parameter_groups(layer, lr=0.1)}
    allowed = {"rnn.weight_ih_l0"}
    assert groups.get("plain", set()) <= allowed
    assert groups["constrained"]
    # one question, one answer: what holds a constrained weight is a `Weight`
    held = [m for name, m in layer.named_modules() if name.endswith("parametrization")]
    assert all(isinstance(m, Weight) for m in held)


def test_decay_leaves_the_weight_and_grows_the_gradient():
    torch.manual_seed(0)
    layer = OrthoLinear(6, 6, ortho_params=orthonet.POLAR_ORTHO_PARAMS)
    (raw,) = (p for name, p in layer.named_parameters() if name.endswith("original"))
    weight = layer.weight.detach().clone()
    target = torch.randn(6, 6)
    (layer.weight * target).sum().backward()
    before = raw.grad.norm()
    with torch.no_grad():
        raw.mul_(0.5)
    raw.grad = None
    torch.testing.assert_close(layer.weight, weight, atol=1e-6, rtol=0)  # observed 0
    (layer.weight * target).sum().backward()
    torch.testing.assert_close(raw.grad.norm(), 2 * before, rtol=1e-5, atol=0)


def test_what_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter_groups: lr must be a number"):
        orthonet.parameter_groups(model, lr=-1.0)
    with pytest.raises(ValueError, match="some parameter must require a gradient"):
        orthonet.parameter_groups(model.requires_grad_(False), lr=0.1)
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module"):
        orthonet.parameter_groups(list(model.parameters()), lr=0.1)
