"""A rule holds for what the class of a module computes: a module that was changed has none."""

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import Bound, certify, recurrent_bound, register_rule
from orthonet.certify.rules import module_rule
from orthonet.errors import UncertifiableError

CIRCULAR = {"padding": "same", "padding_mode": "circular"}


class Loud(nn.Module):
    def forward(self, x):
        return 100.0 * x


class LoudRNN(nn.RNN):
    def forward(self, x, hx=None):
        return tuple(100 * t for t in super().forward(x))


def _rnn(cls=nn.RNN):
    return cls(2, 3, batch_first=True, nonlinearity="relu")


def _with(layer, change):
    change(layer)
    return layer.eval()


def _hook(module):
    module.register_forward_hook(lambda m, args, out: 100 * out)


def _replace(name, child):
    return lambda layer: setattr(layer, name, child)


def _flat(rnn):
    rnn._flat_weights = [10 * w.detach() for w in rnn._flat_weights]


def _own_forward(layer):
    layer.activation.forward = lambda x: 100 * x


ZOO = {
    "sll": lambda: layers.SLLLinear(4, 4),
    "cpl": lambda: layers.CPLLinear(4, 4),
    "sandwich": lambda: layers.SandwichLinear(4, 4),
    "sll_conv": lambda: layers.SLLConv2d(2, 2, 3),
    "sandwich_conv": lambda: layers.SandwichConv2d(2, 2, 3, **CIRCULAR),
    "lipnext": lambda: layers.LipNeXtBlock2d(4),
}
CHANGES = {
    "replaced": _replace("activation", Loud()),
    "of this library": _replace("activation", layers.Scale(100.0)),
    "hooked": lambda layer: _hook(layer.activation),
    "own forward": _own_forward,
    "jumps": _replace("activation", nn.Softplus(threshold=-5.0)),
    "weights hooked": lambda layer: next(layer.children()).register_forward_pre_hook(
        lambda m, args: None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ZOO)
def test_a_layer_with_another_child_has_no_rule(name, change):
    assert module_rule(ZOO[name]().eval()) is not None
    assert module_rule(_with(ZOO[name](), CHANGES[change])) is None


CHANGED = {
    "shift": lambda: _with(layers.LipNeXtBlock2d(4), _replace("shift", Loud())),
    "dim": lambda: _with(layers.LipNeXtBlock2d(4), lambda m: setattr(m.activation, "dim", 0)),
    "final of a subclass": lambda: layers.FinalState(_rnn(LoudRNN)),
    "final hooked": lambda: _with(
        layers.FinalState(_rnn()),
        lambda m: m.rnn.register_forward_hook(lambda m, a, o: (100 * o[0], 100 * o[1])),
    ),
    "flat weights": lambda: layers.FinalState(_with(_rnn(), _flat)),
    "channels": lambda: _with(
        layers.LOTConv2d(2, 2, 3, **CIRCULAR), lambda m: setattr(m, "out_channels", 1)
    ),
    "channels of soc": lambda: _with(
        layers.SOCConv2d(2, 2, 3, **CIRCULAR), lambda m: setattr(m, "out_channels", 1)
    ),
    "statistics": lambda: _with(
        layers.BatchLipNorm(2), lambda m: setattr(m, "running_mean", torch.zeros(4))
    ),
}
SHAPES = {
    "shift": (4, 3, 3),
    "dim": (4, 3, 3),
    "channels": (2, 4, 4),
    "channels of soc": (2, 4, 4),
    "statistics": (2,),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_layer_is_refused_or_bounded_as_it_is(name):
    model, x = CHANGED[name]().eval(), torch.randn(2, *SHAPES.get(name, (4, 2)))
    try:
        bound = certify(model, x[:1], lower=False).constant.value
    except UncertifiableError:
        return
    with torch.no_grad():
        slope = (model(x[:1]) - model(x[1:])).norm() / (x[:1] - x[1:]).norm()
    assert bound >= float(slope)


@pytest.mark.parametrize("change", ["subclass", "hook", "flat", "parametrization"])
def test_the_constant_of_a_changed_recurrent_layer_is_not_read_from_its_weights(change):
    rnn = _rnn(LoudRNN if change == "subclass" else nn.RNN).eval()
    if change == "hook":
        rnn.register_forward_hook(lambda m, a, o: o)
    elif change == "flat":
        _flat(rnn)
    elif change == "parametrization":
        nn.utils.parametrize.register_parametrization(rnn, "weight_hh_l0", nn.Tanh())
    with pytest.raises(UncertifiableError, match="must compute what its class defines"):
        recurrent_bound(rnn, 4)
    with pytest.raises(UncertifiableError):
        certify(layers.FinalState(rnn).eval(), torch.zeros(1, 4, 2))
    assert recurrent_bound(_rnn().eval(), 4).value > 0


def test_a_rule_of_a_user_holds_for_children_without_hooks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x)

    register_rule(Block)(lambda module, shape: Bound(7.0))
    model = Block().eval()
    assert certify(model, torch.zeros(1, 2)).constant.value == 7.0
    model.inner.register_forward_hook(lambda m, args, out: 100 * out)
    assert certify(model, torch.zeros(1, 2)).constant.value != 7.0
