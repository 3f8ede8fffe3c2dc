import pytest
import torch
from torch import nn

from orthonet.convert import to_plain
from orthonet.layers import MaxMin, OrthoConv2d, OrthoLinear, UnitNormLinear
from orthonet.testing import tolerances


class Net(nn.Module):
    """A network with a shared layer, a nested one and a module that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrthoConv2d(1, 4, 3, padding=1), MaxMin())
        self.mix = OrthoLinear(16, 16)
        self.again = self.mix
        self.head = UnitNormLinear(16, 3)

    def forward(self, x):
        x = self.mix(self.stem(x).flatten(1)[:, :16])
        return self.head(self.again(x))


@pytest.mark.parametrize("train", [True, False])
def test_outputs_are_equal_and_the_model_is_left_alone(train):
    model = Net().train(train)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = to_plain(model)
    x = torch.randn(5, 1, 4, 4)
    # twice four layers of at most 16 terms; observed 2.4e-7 of 2.7e-6 times the largest output
    y = model(x).detach()
    allowed = tolerances.rounding(torch.float32, 2 * 4 * 16, float(y.abs().max()))
    torch.testing.assert_close(plain(x), y, atol=allowed, rtol=0)
    assert type(plain) is Net
    assert type(plain.stem[0]) is nn.Conv2d
    assert isinstance(plain.stem[1], torch.fx.GraphModule)
    assert plain.again is plain.mix
    assert type(plain.mix) is nn.Linear
    assert plain.training is train
    assert plain.stem[0].training is train
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    after = model.state_dict()
    parameters = [k for k in before if not k.endswith(".u")]  # moved by the forward in train mode
    assert all(torch.equal(before[k], after[k]) for k in parameters)


def test_a_single_layer_and_a_model_without_any():
    layer = OrthoLinear(3, 2)
    assert type(to_plain(layer)) is nn.Linear
    stock = nn.Sequential(nn.Linear(2, 2))
    copy = to_plain(stock)
    assert copy is not stock
    assert copy[0].weight is not stock[0].weight
    with pytest.raises(ValueError, match=r"to_plain: model must be a torch\.nn\.Module"):
        to_plain(torch.ones(1))
