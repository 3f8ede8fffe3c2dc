"""The bound of the rounding of a forward pass, and what it takes off a radius."""

import copy
import pickle

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import Bound, certify, register_rule
from orthonet.errors import UncertifiableError

NETS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)),
        (20,),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ),
        (3, 12, 12),
    ),
    "ours": lambda: (
        nn.Sequential(
            layers.OrthoConv2d(3, 8, 3, padding=1),
            layers.MaxMin(),
            layers.SpaceToDepth2d(2),
            layers.L2NormPool(2),
            nn.Flatten(),
            layers.OrthoLinear(288, 10),
        ),
        (3, 12, 12),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_rounding_is_bounded(name):
    model, shape = NETS[name]()
    model = model.eval()
    x = torch.randn(16, *shape)
    found = certify(model, x[:1], lower=False)
    exact = nn.Sequential(*(m.to_plain() if hasattr(m, "to_plain") else m for m in model))
    with torch.no_grad():
        low = model(x).double()
        high = exact.eval().double()(x.double())
        observed = torch.linalg.vector_norm(low - high, dim=1)
    model.float()
    bound = found.rounding(x, dtype=torch.float32)
    assert bool((observed <= bound).all())
    assert float(bound.max()) < 1e4 * float(observed.max())  # observed 60 to 800 times
    wider = found.rounding(x, within=1.0, dtype=torch.float32)
    assert bool((wider > bound).all())
    assert bool((found.rounding(x, dtype=torch.bfloat16) > 1e2 * bound).all())
    radius, less = found.radius(low), found.radius(low, inputs=x)
    assert bool((less < radius).all())
    assert bool((found.radius(low, inputs=x, dtype=torch.float64) <= radius).all())
    assert bool((less >= 0).all())


NORMALIZED = {
    "layer": (lambda: nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12)), (12,)),
    "layer of rows": (lambda: nn.LayerNorm((3, 4), eps=1e-3), (2, 3, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "instance": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 4)),
    "root mean square": (lambda: nn.RMSNorm(12, eps=1e-4), (12,)),
    "instance, stored": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 4, 4),
    ),
    "softmax": (lambda: nn.Softmax(1), (5, 3)),
    "log-softmax": (lambda: nn.LogSoftmax(2), (2, 9)),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_rounding_of_normalizations_is_bounded(name):
    """Beside inputs of any size and of a mean far from zero, where the variance is canceled."""
    torch.manual_seed(2)
    model, shape = NORMALIZED[name]
    model = model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    found = certify(model, torch.zeros(1, *shape), lower=False)
    exact = copy.deepcopy(model).double()
    x = torch.randn(24, *shape)
    x[:6] *= 1e-4
    x[6:12] += 30.0
    x[12:18] *= 300.0
    with torch.no_grad():
        observed = torch.linalg.vector_norm((model(x) - exact(x.double())).flatten(1), dim=1)
    bound = found.rounding(x)
    assert bool((observed <= bound).all())
    # observed 20 to 3000 times for plain inputs
    assert float(bound[18:].max()) < 1e4 * float(observed[18:].max())
    assert bool((found.rounding(x, within=0.1) >= bound).all())
    assert bool(found.rounding(x, dtype=torch.float64).lt(bound).all())


RESIDUALS = {
    "root mean square": lambda: layers.L2NormResidual(nn.Linear(12, 12)),
    "prescaled": lambda: layers.PrescaledResidual(nn.Linear(12, 12), 0.3),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_rounding_of_residuals_is_bounded_at_any_scale(name):
    """Also where the squares of the entries underflow in float32."""
    torch.manual_seed(3)
    model = nn.Sequential(RESIDUALS[name](), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias.zero_()
    found = certify(model, torch.zeros(1, 12), lower=False)
    x = torch.randn(30, 12) * torch.logspace(-30, 4, 30)[:, None]
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        observed = torch.linalg.vector_norm(model(x) - exact(x.double()), dim=1)
    bound = found.rounding(x)
    assert bool((observed <= bound).all())
    assert float(bound[-1]) < 1e4 * float(observed[-1])


class Length(nn.Module):
    """The norm of each channel."""

    def forward(self, x):
        return torch.linalg.vector_norm(x, dim=(2, 3))


POOLS = {
    "windows": lambda: layers.L2NormPool(3, 2),
    "adaptive": lambda: layers.AdaptiveL2NormPool(2),
    "global": lambda: layers.GlobalL2NormPool(),
    "power average": lambda: nn.LPPool2d(2, 3, 2),
    "norm": lambda: Length(),
}


@pytest.mark.parametrize("name", POOLS)
def test_rounding_of_norms_is_bounded_where_squares_underflow(name):
    model = POOLS[name]().eval()
    found = certify(model, torch.zeros(1, 2, 6, 6), lower=False)
    x = torch.randn(60, 2, 6, 6) * torch.logspace(-30, 4, 60)[:, None, None, None]
    observed = (model(x) - model(x.double())).flatten(1).norm(dim=1)
    assert bool((observed <= found.rounding(x)).all())
    lost = (observed > 1e-3 * x.flatten(1).norm(dim=1)).sum()
    assert int(lost) > 5, "nothing was lost: the test shows nothing"


class States(nn.Module):
    """All states of a recurrent layer."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def scaled_rnn(factor):
    rnn = nn.RNN(4, 6, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        nn.init.orthogonal_(rnn.weight_hh_l0).mul_(factor)
    return rnn


def shifted_rnn():
    rnn = layers.OrthoRNN(4, 6, nonlinearity="modrelu", batch_first=True)
    nn.init.constant_(rnn.threshold_l0, -0.1)
    return rnn


RECURRENT = {
    "tanh": lambda: States(layers.OrthoRNN(4, 6, batch_first=True)),
    "abs, last": lambda: layers.FinalState(
        layers.OrthoRNN(4, 6, nonlinearity="abs", batch_first=True)
    ),
    "modrelu": lambda: States(shifted_rnn()),
    "two layers, two directions": lambda: States(
        layers.OrthoRNN(4, 6, 2, nonlinearity="abs", bidirectional=True, batch_first=True)
    ),
    "stock": lambda: States(nn.RNN(4, 6, 2, batch_first=True)),
    "expanding": lambda: States(scaled_rnn(1.2)),
    "shrinking": lambda: States(scaled_rnn(0.5)),
    "contractive": lambda: States(layers.ContractiveRNN(4, 6, batch_first=True)),
    "leak": lambda: States(layers.ContractiveRNN(4, 6, leak=0.5, batch_first=True)),
}


STEPS = 12  # torch.export unrolls them
SLOPES = {"tanh": torch.tanh, "relu": torch.relu, "abs": torch.abs}


def states_in_float64(rnn, x):
    """Step by step, with the weights as they are deployed."""
    for number in range(rnn.num_layers):
        found = []
        for end in ["", "_reverse"][: 1 + rnn.bidirectional]:
            suffix, leak, linear = f"_l{number}{end}", 1.0, None
            if isinstance(rnn, layers.ContractiveRNN):
                inner, kernel, linear = rnn.step_weights(suffix)
                leak = rnn.leak
            else:
                inner, kernel = (getattr(rnn, f"weight_{kind}{suffix}") for kind in ("ih", "hh"))
            kinds = [f"bias_{kind}{suffix}" for kind in ("ih", "hh")]
            bias = sum(getattr(rnn, kind).double() for kind in kinds if hasattr(rnn, kind))
            h, states = torch.zeros(len(x), kernel.shape[0], dtype=torch.float64), []
            for entry in (x.flip(1) if end else x).unbind(1):
                z = entry @ inner.double().mT + bias + h @ kernel.double().mT
                if rnn.nonlinearity == "modrelu":
                    threshold = getattr(rnn, f"threshold{suffix}").double()
                    new = z.sign() * torch.relu(z.abs() + threshold)
                else:
                    new = SLOPES[rnn.nonlinearity](z)
                h = leak * new if linear is None else h @ linear.double().mT + leak * new
                states.append(h)
            states = torch.stack(states, 1)
            found.append(states.flip(1) if end else states)
        x = torch.cat(found, -1)
    return x


@pytest.mark.parametrize("name", RECURRENT)
def test_rounding_of_recurrent_layers_is_bounded(name):
    """The rounding of a state goes on to the later ones."""
    torch.manual_seed(4)
    model = RECURRENT[name]().eval()
    found = certify(model, torch.zeros(1, STEPS, 4), lower=False)
    x = torch.randn(24, STEPS, 4) * torch.logspace(-20, 2, 24)[:, None, None]
    with torch.no_grad():
        truth = states_in_float64(model.rnn, x.double())
        truth = truth[:, -1] if "last" in name else truth
        observed = torch.linalg.vector_norm((model(x) - truth).flatten(1), dim=1)
        bound = found.rounding(x)
        assert bool((observed <= bound).all())
        # observed 1.7e-2 for states that grow, 2e-3 at most for the others
        assert float(bound[-1] / (found.constant.value * x[-1].norm())) < 3e-2
        assert bool((found.rounding(x, within=0.1) >= bound).all())
        assert bool((found.rounding(x, dtype=torch.bfloat16) > 1e2 * bound).all())


def test_what_cannot_be_bounded_is_refused():
    class Own(nn.Module):
        def forward(self, x):
            return x * 1.0

    register_rule(Own)(lambda module, input_shape: Bound(1.0))
    found = certify(Own().eval(), torch.zeros(1, 5))
    with pytest.raises(UncertifiableError, match="rounding of this operation is not known"):
        found.rounding(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        found.rounding(torch.zeros(1, 5), dtype=torch.int32)
    again = pickle.loads(pickle.dumps(found))
    assert again.constant == found.constant
    with pytest.raises(UncertifiableError, match="Call certify again"):
        again.rounding(torch.zeros(1, 5))


def test_the_lower_bound_is_reached():
    torch.manual_seed(0)
    linear = nn.Linear(8, 8).double().eval()
    found = certify(linear, torch.zeros(1, 8, dtype=torch.float64))
    truth = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    assert found.lower is not None
    assert 0.98 * truth <= found.lower.value <= truth  # observed 1e-4 below
    assert certify(linear, torch.zeros(1, 8).double(), effort="fast").lower is None
