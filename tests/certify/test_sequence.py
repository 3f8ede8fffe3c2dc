"""Bounds of maps of sequences against the dense Jacobian, and where they are attained."""

import math

import pytest
import torch
from torch import nn

import orthonet
from orthonet import layers
from orthonet.certify import certify, recurrent_bound, sequence_bound
from orthonet.errors import UncertifiableError
from tests.references import jacobian_reference


def toeplitz(steps, a):
    i = torch.arange(steps, dtype=torch.float64)
    lag = i[:, None] - i
    return torch.where(lag >= 0, torch.tensor(a, dtype=torch.float64) ** lag.clamp(min=0), 0.0)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1 - 1e-9, 1.0, 1 + 3e-7, 1.004, 1.05, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 200])
def test_closed_form_is_the_norm_of_the_toeplitz_matrix(steps, a):
    matrix = toeplitz(steps, a)
    sharp = float(torch.linalg.matrix_norm(matrix, 2))
    bound = sequence_bound(steps, a, 3.0)
    assert bound.kind == "upper"
    slack = 0.05 if a * steps >= steps + 1 else 1e-9  # observed 0.019 and 5e-11
    assert 3 * sharp * (1 - 1e-14) <= bound.value <= 3 * sharp * (1 + slack)
    last = float(torch.linalg.vector_norm(matrix[-1]))
    final = sequence_bound(steps, a, 3.0, final=True).value
    assert 3 * last * (1 - 1e-14) <= final <= 3 * last * (1 + 1e-12)  # observed 4e-14


def test_the_orthogonal_case_has_its_closed_form_and_long_sequences_a_limit():
    for steps in (1, 10, 999, 20_000):
        expected = 1 / (2 * math.sin(math.pi / (4 * steps + 2)))
        assert expected * (1 - 1e-15) <= sequence_bound(steps).value <= expected * (1 + 1e-4)
        root = math.sqrt(steps)
        assert root <= sequence_bound(steps, final=True).value <= root * (1 + 1e-12)
    assert 980.0 < sequence_bound(20_000, 0.999).value <= 1000.0 * (1 + 1e-9)
    assert sequence_bound(20_000, 0.5, final=True).value == pytest.approx(math.sqrt(4 / 3))
    assert sequence_bound(5000, 2.0).value == math.inf
    assert sequence_bound(7, 1.0, 0.0).value == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "steps"), ((2.0,), "steps"), ((3, -1.0), "state"), ((3, 1.0, math.nan), "gain")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"sequence_bound: {message} must be"):
        sequence_bound(*arguments)


# --- layers --------------------------------------------------------------------------------------

STEPS, INPUTS, HIDDEN = 4, 3, 4
F64 = {"dtype": torch.float64, "batch_first": True}
LAYERS = {
    "tanh": lambda: layers.OrthoRNN(INPUTS, HIDDEN, **F64),
    "abs, deep": lambda: layers.OrthoRNN(INPUTS, HIDDEN, 2, "abs", **F64),
    "max_min, both": lambda: layers.OrthoRNN(
        INPUTS, HIDDEN, 2, "max_min", bidirectional=True, **F64
    ),
    "relu": lambda: layers.OrthoRNN(INPUTS, HIDDEN, 1, "relu", **F64),
    "contractive": lambda: layers.ContractiveRNN(INPUTS, HIDDEN, 2, "abs", **F64),
    "leaky": lambda: layers.ContractiveRNN(
        INPUTS, HIDDEN, bidirectional=True, leak=0.4, contraction=0.8, **F64
    ),
    "stock": lambda: nn.RNN(INPUTS, HIDDEN, 2, bidirectional=True, **F64),
}


def lower(f, samples=6):
    """The largest singular value of the Jacobian at some points, at several scales."""
    largest = 0.0
    for i in range(samples):
        x = torch.randn(STEPS, INPUTS, dtype=torch.float64) * 10.0 ** (i % 3 - 1)
        norm = torch.linalg.matrix_norm(jacobian_reference(f, x), 2)
        largest = max(largest, float(norm))
    return largest


@pytest.mark.parametrize("name", LAYERS)
def test_bounds_stay_above_the_jacobian(name):
    rnn = LAYERS[name]()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    whole, final = recurrent_bound(rnn, STEPS), recurrent_bound(rnn, STEPS, final=True)
    last = layers.FinalState(rnn)
    assert lower(lambda x: rnn(x)[0]) <= whole.value * (1 + 1e-12)
    assert lower(last) <= final.value * (1 + 1e-12)
    assert final.value <= whole.value
    x = torch.randn(2, STEPS, INPUTS, dtype=torch.float64)
    assert certify(last.eval(), x, lower=False).constant.value == pytest.approx(
        final.value, rel=1e-12
    )


class Outputs(nn.Module):
    def __init__(self, rnn, head):
        super().__init__()
        self.rnn, self.head = rnn, head

    def forward(self, x):
        return self.head(self.rnn(x)[0].flatten(1))


def test_the_outputs_of_a_layer_within_a_model():
    rnn = LAYERS["abs, deep"]()
    head = layers.OrthoLinear(STEPS * HIDDEN, 5, dtype=torch.float64)
    model = Outputs(rnn, head).eval()
    x = torch.randn(2, STEPS, INPUTS, dtype=torch.float64)
    bound = certify(model, x, lower=False).constant.value
    assert bound == pytest.approx(recurrent_bound(rnn, STEPS).value, rel=1e-9)
    assert lower(model) <= bound


def test_attained_by_an_orthogonal_linear_network():
    rnn = layers.OrthoRNN(HIDDEN, HIDDEN, nonlinearity="identity", **F64)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(orthonet.linalg.haar((HIDDEN, HIDDEN), dtype=torch.float64))
    x = torch.zeros(STEPS, HIDDEN, dtype=torch.float64)
    for final, f in ((False, lambda z: rnn(z[None])[0]), (True, lambda z: rnn(z[None])[1])):
        jacobian = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
        sharp = float(torch.linalg.matrix_norm(jacobian, 2))
        assert recurrent_bound(rnn, STEPS, final=final).value == pytest.approx(sharp, rel=1e-9)


def test_a_contractive_network_forgets_at_its_rate():
    rnn = LAYERS["leaky"]()
    limit = math.sqrt(2) * rnn.leak / (1 - rnn.contraction)
    values = [recurrent_bound(rnn, steps).value for steps in (1, 10, 1000)]
    assert values == sorted(values)
    assert values[-1] <= limit * (1 + 1e-9)
    assert values[-1] > 0.99 * limit


def test_what_has_no_constant_is_refused():
    x = torch.randn(2, 2, INPUTS)
    for cls in (nn.LSTM, nn.GRU, layers.OrthoLSTM, layers.OrthoGRU):
        model = Outputs(cls(INPUTS, HIDDEN, batch_first=True), nn.Identity())
        with pytest.raises(UncertifiableError, match="gates multiply states"):
            certify(model.eval(), x)
        with pytest.raises(UncertifiableError, match="must be OrthoRNN, Contractive"):
            recurrent_bound(model.rnn, 5)
    jumping = layers.OrthoRNN(INPUTS, HIDDEN, nonlinearity="modrelu", batch_first=True)
    with torch.no_grad():
        jumping.threshold_l0.copy_(torch.tensor([-1.0, 0.0, 1e-6, -1.0]))
    with pytest.raises(UncertifiableError, match="modReLU with a positive shift"):
        recurrent_bound(jumping, 5)
    with torch.no_grad():
        jumping.threshold_l0.clamp_(max=0.0)
    assert recurrent_bound(jumping, 5).value > 0
    with pytest.raises(UncertifiableError, match="with batch_first=True"):
        certify(Outputs(layers.OrthoRNN(INPUTS, HIDDEN), nn.Identity()).eval(), x)
    broken = layers.OrthoRNN(INPUTS, HIDDEN)
    with torch.no_grad():
        broken.weight_ih_l0[0, 0] = math.nan
    with pytest.raises(UncertifiableError, match="weights must be finite"):
        recurrent_bound(broken, 5)
