"""The contractive recurrent layer, and what recurrent layers and cells refuse."""

import pytest
import torch

import orthonet
from orthonet import layers

INPUTS = 3


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "max_min", "abs", "identity"])
@pytest.mark.parametrize(("leak", "contraction"), [(1.0, 0.9), (0.3, 0.8), (0.5, 0.5), (0.2, 1.0)])
def test_a_step_contracts(nonlinearity, leak, contraction):
    layer = layers.ContractiveRNN(
        INPUTS,
        6,
        nonlinearity=nonlinearity,
        leak=leak,
        contraction=contraction,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))

    def cell(x, h):
        return layer(x[None], h[None])[1][0]

    largest = [0.0, 0.0]
    for scale in (0.01, 1.0, 10.0):
        x, h = (scale * torch.randn(n, dtype=torch.float64) for n in (INPUTS, 6))
        jacobians = torch.autograd.functional.jacobian(cell, (x, h))
        norms = [float(torch.linalg.matrix_norm(j, 2)) for j in jacobians]
        largest = [max(pair) for pair in zip(largest, norms, strict=True)]
    assert largest[0] <= leak * (1 + 1e-9)
    assert largest[1] <= contraction * (1 + 1e-9)
    if leak == 1.0 and nonlinearity in ("abs", "max_min", "identity"):
        assert largest == pytest.approx([leak, contraction])  # attained


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"leak": 0.0}, "leak must be a number in"),
        ({"leak": 0.5, "contraction": 0.4}, r"contraction must be a number in \[0.5, 1\]"),
        ({"contraction": 1.1}, "contraction must be"),
        ({"nonlinearity": "modrelu"}, "nonlinearity must be one of 'tanh'"),
    ],
)
def test_rates_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=f"^ContractiveRNN: .*{message}"):
        layers.ContractiveRNN(2, 4, **keywords)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.OrthoRNN(0, 4), "OrthoRNN: input_size must be an integer >= 1"),
        (lambda: layers.OrthoRNN(2, 0), "hidden_size"),
        (lambda: layers.OrthoGRU(2, 4, 0), "num_layers"),
        (lambda: layers.OrthoGRU(2, 4, triv="qr"), "triv must be one of"),
        (
            lambda: layers.OrthoGRUCell(2, 4, triv="cayley", ortho_params=orthonet.QR_ORTHO_PARAMS),
            "OrthoGRUCell: a kernel must be made either by ortho_params or by triv",
        ),
        (lambda: layers.OrthoGRU(2, 4, 2, dropout=1.5), "dropout must be"),
        (lambda: layers.OrthoLSTM(2, 4, proj_size=4), r"proj_size must be a number in \[0, 3\]"),
        (lambda: layers.OrthoRNN(2, 4, init="zeros"), "init must be one of 'haar'"),
        (lambda: layers.OrthoRNN(2, 4, nonlinearity="gelu"), "nonlinearity must be one of 'tanh'"),
        (lambda: layers.OrthoRNN(2, 5, nonlinearity="max_min"), "hidden_size must be even"),
        (lambda: layers.OrthoRNNCell(2, 5, nonlinearity="max_min"), "hidden_size must be even"),
        (lambda: layers.OrthoLSTMCell(2, 4, init="x"), "OrthoLSTMCell: init must be one of"),
        (lambda: layers.OrthoGRUCell(2, True), "hidden_size must be an integer"),
    ],
)
def test_bad_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(5, 2, 7),), r"OrthoLSTM: input must be \(time, batch, input_size\)"),
        ((torch.zeros(3),), "input must be"),
        ((torch.zeros(0, 2, 3),), "at least one time step"),
        ((torch.zeros(5, 2, 3, dtype=torch.float64),), "input must have the dtype of the param"),
        ((torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))), "hx must be a pair"),
    ],
)
def test_bad_calls(inputs, message):
    with pytest.raises(ValueError, match=message):
        layers.OrthoLSTM(3, 4)(*inputs)


def test_bad_calls_of_cells():
    cell = layers.OrthoLSTMCell(3, 4)
    for inputs, message in (
        ((torch.zeros(2, 2, 3),), "OrthoLSTMCell: input must be"),
        ((torch.zeros(2, 4),), "input must be"),
        ((torch.zeros(2, 3, dtype=torch.long),), "input must be a real floating-point tensor"),
        ((torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 5))), r"hx must be 2 state\(s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cell(*inputs)
