"""Models that a certificate must refuse or pay for: jumps, and what cannot be walked."""

import warnings

import pytest
import torch
from torch import nn

import orthonet.functional
from orthonet.certify import certify
from orthonet.errors import UncertifiableError


class Narrow(nn.Module):
    def forward(self, x):
        return x.float().double() - (1 + 2e-8)


def test_a_cast_to_fewer_bits_jumps():
    with pytest.raises(UncertifiableError, match="must not be cast to float32"):
        certify(Narrow().eval(), torch.zeros(1, 1, dtype=torch.float64))
    certify(nn.Linear(2, 2).eval(), torch.zeros(1, 2))


def test_the_jump_of_softplus_is_counted_as_rounding():
    """At the threshold torch steps from log(1 + e^x) down to x, by 2e-9, which float64 sees."""
    found = certify(nn.Softplus().eval(), torch.zeros(1, 1))
    model = nn.Softplus().double().eval()
    x = torch.tensor([[20.0]], dtype=torch.float64)
    step = float((model(x) - model(x + 1e-12)).abs())
    assert 2e-9 < step < float(found.rounding(x, dtype=torch.float64)) < 3e-9
    low = float(found.rounding(x.float(), dtype=torch.float32))
    assert step < low < 2e-4  # observed 1.6e-4: 64 roundings of 2 * 20 + 0.7


def test_softplus_in_float64_jumps_at_its_default_threshold():
    x = torch.tensor([[20.0]], dtype=torch.float64)
    above = torch.nextafter(x, torch.full_like(x, 21.0))
    secant = float(((nn.Softplus()(above) - nn.Softplus()(x)) / (above - x)).abs())
    assert secant > 1e5
    with pytest.raises(UncertifiableError, match="jumps at the threshold"):
        certify(nn.Softplus().double().eval(), x)
    assert certify(nn.Softplus(1.0, 40.0).double().eval(), x).constant.value == 1.0


def test_what_cannot_be_walked_is_named():
    x = torch.zeros(1, 6)
    with pytest.raises(ValueError, match="example_input must be finite"):
        certify(nn.Linear(6, 3).eval(), x + torch.nan)
    with pytest.raises(UncertifiableError, match="norm_type 2"):
        certify(nn.LPPool2d(3, 2).eval(), torch.randn(2, 3, 6, 6))  # whose output holds NaN
    with torch.inference_mode(), pytest.raises(UncertifiableError, match="inference mode"):
        certify(nn.Linear(6, 3).eval(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Linear(6, 3).eval(), x)
    with pytest.raises(UncertifiableError, match="TorchScript"):
        certify(traced, x)


def test_a_graph_module_is_certified_inside_of_a_module():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph, x = torch.fx.symbolic_trace(model), torch.zeros(1, 4)
    with pytest.raises(UncertifiableError, match=r"nn\.Sequential\(model\)"):
        certify(graph, x)
    found = certify(nn.Sequential(graph).eval(), x)
    assert found.constant.value == certify(model, x).constant.value


class Written(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.function = forward

    def forward(self, x):
        return self.function(x[:, 0], x[:, 1])


def _distances(x, y):
    return torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], dim=-1)


def test_advice_for_functions_of_two_values_is_certified():
    """The advised form computes the same, and has a constant in a ball or on the whole space."""
    torch.manual_seed(0)
    bilinear, fold = nn.Bilinear(4, 4, 1, bias=False), (2, 2)
    x = torch.randn(1, 2, 4)
    pairs = {
        "write it as \\(\\(x @ W": (bilinear, lambda x, y: ((x @ bilinear.weight[0]) * y).sum(-1)),
        "A cosine jumps": (
            nn.functional.cosine_similarity,
            lambda x, y: (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-3),
        ),
        "Write it as torch.linalg": (
            lambda x, y: torch.cdist(x.unflatten(1, fold), y.unflatten(1, fold)),
            lambda x, y: _distances(x.unflatten(1, fold), y.unflatten(1, fold)),
        ),
        "x.var\\(dim\\)": (
            lambda x, y: torch.var_mean(x, -1)[0],
            lambda x, y: x.var(-1),
        ),
        "x.std\\(dim\\)": (lambda x, y: torch.std_mean(x, -1)[0], lambda x, y: x.std(-1)),
        "Take torch.vmap out": (lambda x, y: torch.vmap(nn.ReLU())(x), lambda x, y: x.relu()),
    }
    for message, (refused, advised) in pairs.items():
        with pytest.raises(UncertifiableError, match=message):
            certify(Written(refused).eval(), x, lower=False)
        model = Written(advised).eval()
        want = refused(x[:, 0], x[:, 1]).flatten()
        # The cosine differs by its 1e-3; the rest are sums of 16 products, observed 1e-7.
        torch.testing.assert_close(model(x).flatten(), want, rtol=1e-2, atol=1e-3)
        assert certify(model, x, radius=0.01).constant.value < 100.0


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = orthonet.functional.max_min

    def forward(self, x):
        return self.activation(x)


def test_a_function_with_a_rule_may_be_held_as_an_attribute():
    model = Holding().eval()
    assert certify(model, torch.zeros(1, 4)).constant.value == 1.0
    assert model.activation is orthonet.functional.max_min
