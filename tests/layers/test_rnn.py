"""Recurrent cells and layers against their `nn` twins, and what they promise beyond them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import orthonet
from orthonet import layers, linalg
from orthonet.errors import NotOnManifoldError, ProjectionWarning
from orthonet.layers.recurrent import gated as _rnn_gated
from orthonet.layers.recurrent import kernels as _rnn_kernels
from orthonet.layers.recurrent.kernels import INITIALIZATIONS
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.testing import LAYER_LAWS, orthogonality_error, tolerances
from orthonet.testing.laws import assert_compiles
from tests.presets import PRESETS

INPUTS, HIDDEN, TIME, BATCH = 3, 4, 5, 4


class First(nn.Module):
    """The outputs of a recurrent module without its states, as the laws expect it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        y = self.module(x)
        return y if isinstance(y, torch.Tensor) else y[0]


def rnn(cls="OrthoRNN", *args, **kwargs):
    return lambda: First(getattr(layers, cls)(INPUTS, HIDDEN, *args, batch_first=True, **kwargs))


LAYERS = {
    "tanh": rnn(),
    "modrelu, 2 layers, both directions": rnn("OrthoRNN", 2, "modrelu", bidirectional=True),
    "exponential": rnn(triv="exponential"),
    "max_min": rnn("OrthoRNN", 1, "max_min", bias=False, init="henaff"),
    "GRU": rnn("OrthoGRU", 2, init="cayley"),
    "LSTM": rnn("OrthoLSTM", 2, bidirectional=True, proj_size=2, triv="cayley"),
    "contractive": rnn("ContractiveRNN", 2, "abs"),
    "leaky": rnn("ContractiveRNN", leak=0.5, init="identity"),
}
CELLS = {
    "RNN cell": lambda: layers.OrthoRNNCell(INPUTS, HIDDEN, nonlinearity="modrelu"),
    "GRU cell": lambda: layers.OrthoGRUCell(INPUTS, HIDDEN, bias=False),
    "LSTM cell": lambda: First(layers.OrthoLSTMCell(INPUTS, HIDDEN)),
}
FACTORIES = {**LAYERS, **CELLS}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, name):
    time = 2 if law is assert_compiles else TIME  # the traced loop is as long as the sequence
    law(FACTORIES[name], (INPUTS,) if name in CELLS else (time, INPUTS))


# --- the interface of the twin -----------------------------------------------------------------

TWINS = {
    "tanh": (layers.OrthoRNN, {}),
    "relu": (layers.OrthoRNN, {"nonlinearity": "relu"}),
    "GRU": (layers.OrthoGRU, {}),
    "LSTM": (layers.OrthoLSTM, {}),
    "LSTM, projected": (layers.OrthoLSTM, {"proj_size": 2}),
}
OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 3, "batch_first": True},
    "both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


def pair(name, **options):
    cls, keywords = TWINS[name]
    layer = cls(INPUTS, HIDDEN, dtype=torch.float64, **keywords, **options)
    return layer, layer.to_plain()


def first_state(layer, batch=(BATCH,)):
    number = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(number, *batch, layer.proj_size or HIDDEN, dtype=torch.float64)
    if not isinstance(layer, layers.OrthoLSTM):
        return h
    return h, torch.randn(number, *batch, HIDDEN, dtype=torch.float64)


def flat(result):
    """All tensors of the result of a recurrent module."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "batch_sizes"):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def same(layer, twin, *inputs):
    mine, its = flat(layer(*inputs)), flat(twin(*inputs))
    assert len(mine) == len(its)
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # observed 4e-16


@pytest.fixture(params=[False, True], ids=["kernel", "loop"])
def path(request, monkeypatch):
    """Both ways through the gated layers: PyTorch's kernel, and the loop that is compiled."""
    if request.param:
        monkeypatch.setattr(_rnn_gated, "_differentiated_by_torch", lambda: True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_computes_what_its_twin_computes(name, options):
    layer, twin = pair(name, **options)
    assert isinstance(layer, nn.RNNBase)
    x = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64)
    if layer.batch_first:
        x = x.transpose(0, 1)
    same(layer, twin, x)
    same(layer, twin, x, first_state(layer))
    same(layer, twin, torch.randn(TIME, INPUTS, dtype=torch.float64), first_state(layer, ()))
    lengths = torch.tensor([2, 5, 1, 5])
    padded = x if layer.batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    same(layer, twin, packed, first_state(layer))
    ordered = pack_sequence([torch.randn(n, INPUTS, dtype=torch.float64) for n in (4, 4, 2)])
    same(layer, twin, ordered)
    ours, theirs = layer(packed)[0], twin(packed)[0]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)
    assert pad_packed_sequence(ours)[0].shape == pad_packed_sequence(theirs)[0].shape


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_gradients_are_those_of_the_twin(name):
    layer, twin = pair(name, num_layers=2, bidirectional=True)
    x = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64)
    gradients = []
    for module in (layer, twin):
        point = x.clone().requires_grad_()
        sum(t.square().sum() for t in flat(module(point))).backward()
        gradients.append(
            [point.grad, *(getattr(module, n).grad for n in ("weight_ih_l1_reverse", "bias_hh_l0"))]
        )
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "GRU", "LSTM"])
def test_cells_compute_what_their_twins_compute(name):
    cls = {"tanh": layers.OrthoRNNCell, "GRU": layers.OrthoGRUCell, "LSTM": layers.OrthoLSTMCell}
    cell = cls[name](INPUTS, HIDDEN, dtype=torch.float64)
    twin = cell.to_plain()
    assert isinstance(cell, type(twin))
    x, h = (torch.randn(BATCH, n, dtype=torch.float64) for n in (INPUTS, HIDDEN))
    states = (h, h.flip(0)) if name == "LSTM" else h
    same(cell, twin, x)
    same(cell, twin, x, states)
    same(cell, twin, x[0], (states[0][0], states[1][0]) if name == "LSTM" else states[0])
    same(orthonet.to_plain(nn.ModuleList([cell]))[0], cell, x)


@pytest.mark.parametrize("nonlinearity", ["modrelu", "abs", "max_min", "identity"])
def test_no_stock_twin_is_said(nonlinearity):
    with pytest.raises(ValueError, match=r"nn\.RNN has the nonlinearities tanh and relu only"):
        layers.OrthoRNN(2, 4, nonlinearity=nonlinearity).to_plain()
    with pytest.raises(ValueError, match=r"nn\.RNNCell has the nonlinearities"):
        layers.OrthoRNNCell(2, 4, nonlinearity=nonlinearity).to_plain()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "modrelu", "abs", "max_min", "identity"])
def test_the_layer_is_its_cell_step_by_step(nonlinearity):
    layer = layers.OrthoRNN(INPUTS, HIDDEN, nonlinearity=nonlinearity, dtype=torch.float64)
    cell = layers.OrthoRNNCell(INPUTS, HIDDEN, nonlinearity=nonlinearity, dtype=torch.float64)
    state = {k.replace("_l0", ""): v for k, v in layer.state_dict().items()}
    cell.load_state_dict(state)
    x, h = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64), None
    for t, y in enumerate(layer(x)[0]):
        h = cell(x[t], h)
        torch.testing.assert_close(h, y, rtol=0, atol=1e-12)


def test_dropout_acts_between_layers_in_training_only():
    layer = layers.OrthoRNN(INPUTS, 64, 2, dropout=0.5)
    x = torch.randn(TIME, BATCH, INPUTS)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    assert layer.to_plain().dropout == 0.5
    with pytest.warns(UserWarning, match="OrthoGRU: dropout acts between layers"):
        layers.OrthoGRU(INPUTS, HIDDEN, dropout=0.5)


# --- the kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("cls", [layers.OrthoRNN, layers.OrthoLSTM], ids=lambda c: c.__name__)
def test_kernels_stay_orthogonal_in_each_gate(cls, name):
    layer = cls(INPUTS, HIDDEN, 2, ortho_params=PRESETS[name])
    optimizer = torch.optim.RMSprop(layer.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(TIME, BATCH, INPUTS))[0].square().sum().backward()
        optimizer.step()
    gates = layer.weight_hh_l1.unflatten(0, (-1, HIDDEN))
    assert gates.shape[0] == {layers.OrthoRNN: 1, layers.OrthoLSTM: 4}[cls]
    assert orthogonality_error(gates) <= tolerances.PROMISE[torch.float32]  # observed 8e-7


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("name", ["AUTO", "exponential", "cayley"])
@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_orthogonal_after_many_steps(steps, name, optimizer):
    options = {"ortho_params": PRESETS[name]} if name in PRESETS else {"triv": name}
    layer = layers.OrthoRNN(4, 32, nonlinearity="abs", init="henaff", **options)
    moves = optimizer(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        moves.zero_grad()
        layer(torch.randn(3, 4, 4))[1].square().mean().backward()
        moves.step()
    assert orthogonality_error(layer.weight_hh_l0) <= tolerances.PROMISE[torch.float32]  # 1e-6


@pytest.mark.parametrize("options", [{}, {"triv": "exponential"}], ids=["ortho_params", "triv"])
@pytest.mark.parametrize("cls", [layers.OrthoRNN, layers.OrthoGRU, layers.OrthoLSTM])
def test_the_kernel_is_computed_once_a_sequence_and_a_step(cls, options, monkeypatch):
    made = []
    for kind in (orthonet.reparametrizers.OrthoWeight, _rnn_kernels.TrivializedWeight):
        evaluate = kind.evaluate

        def counted(self, evaluate=evaluate):
            made.append(self)
            return evaluate(self)

        monkeypatch.setattr(kind, "evaluate", counted)
    layer = cls(INPUTS, HIDDEN, 2, bidirectional=True, **options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    made.clear()
    for _ in range(2):
        looks = ENGINE.looks
        for _ in range(3):  # micro-batches of one optimizer step
            layer(torch.randn(20, BATCH, INPUTS))[0].sum().backward()
        # By a map of their own, once for each kernel; else all at once, after the step before.
        assert len(made) == len({id(kernel) for kernel in made}) == (4 if options else 0)
        assert ENGINE.looks - looks <= 1
        made.clear()
        optimizer.step()
    cell = layers.OrthoRNNCell(INPUTS, HIDDEN, **options)
    made.clear()
    h, looks = None, ENGINE.looks
    for x in torch.randn(20, BATCH, INPUTS):
        h = cell(x, h)
    h.sum().backward()
    assert len(made) == (1 if options else 0) and ENGINE.looks - looks <= 1


@pytest.mark.parametrize("options", [{}, {"triv": "cayley"}], ids=["ortho_params", "triv"])
def test_initial_kernels(options):
    for init in INITIALIZATIONS:
        layer = layers.OrthoLSTM(3, 7, proj_size=4, init=init, **options)
        assert orthogonality_error(layer.weight_hh_l0.unflatten(0, (4, 7))) <= 2e-6
    for init, low, high in (("cayley", 0.0, torch.pi / 2), ("henaff", -torch.pi, torch.pi)):
        gates = layers.OrthoGRU(3, 60, init=init, **options).weight_hh_l0.detach()
        gates = gates.unflatten(0, (3, 60))
        assert float(gates[:, :2, 2:].abs().max()) < 1e-6
        angles = torch.atan2(gates.diagonal(-1, 1, 2)[:, ::2], gates.diagonal(0, 1, 2)[:, ::2])
        assert low < float(angles.min()) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < float(angles.max()) <= high
    identity = layers.OrthoRNN(3, 4, init="identity", **options).weight_hh_l0
    allowed = tolerances.PROMISE[torch.float32]  # observed 6e-7
    torch.testing.assert_close(identity, torch.eye(4), rtol=0, atol=allowed)


@pytest.mark.parametrize(
    "options",
    [{"ortho_params": orthonet.EXP_ORTHO_PARAMS}, {"triv": "exponential"}, {"triv": "cayley"}],
    ids=str,
)
def test_assignment_projection_and_base(options):
    layer = layers.OrthoGRU(INPUTS, HIDDEN, dtype=torch.float64, **options).eval()
    gates = linalg.haar((3, HIDDEN, HIDDEN), dtype=torch.float64)
    original = layer.recurrent["weight_hh_l0"].original
    layer.weight_hh_l0 = gates.flatten(0, 1)
    torch.testing.assert_close(layer.weight_hh_l0, gates.flatten(0, 1), rtol=0, atol=1e-12)
    assert layer.recurrent["weight_hh_l0"].original is original
    with pytest.raises(NotOnManifoldError, match="OrthoGRU"):
        layer.weight_hh_l0 = 2 * gates.flatten(0, 1)
    with pytest.raises(ValueError, match=r"weight_hh_l0 must have shape \(12, 4\)"):
        layer.weight_hh_l0 = gates[0]
    with pytest.raises(ValueError, match="must be a tensor"):
        layer.weight_hh_l0 = 1.0
    moved = layer.project_("weight_hh_l0", 2 * gates.flatten(0, 1))
    assert moved == pytest.approx(0.5)
    with pytest.raises(ValueError, match="name must be one of 'weight_hh_l0'"):
        layer.project_("weight_hh", gates)
    with torch.no_grad():
        original.add_(0.1 * torch.randn_like(original))
    before = layer.weight_hh_l0.detach()
    layer.update_base()
    torch.testing.assert_close(layer.weight_hh_l0.detach(), before, rtol=0, atol=1e-12)
    base = next(b for n, b in layer.named_buffers() if n.endswith("base"))
    torch.testing.assert_close(base.flatten(0, 1), before, rtol=0, atol=1e-12)
    with pytest.raises(AttributeError, match="weight_hh_l7"):
        _ = layer.weight_hh_l7


def test_checkpoints_of_the_twin_are_projected():
    twin = nn.LSTM(INPUTS, HIDDEN, 2, proj_size=2)
    layer = layers.OrthoLSTM(INPUTS, HIDDEN, 2, proj_size=2)
    with pytest.warns(ProjectionWarning, match="OrthoLSTM: a plain weight_h[hr]_l[01] was"):
        layer.load_state_dict(twin.state_dict())
    wanted = linalg.polar_svd(twin.weight_hh_l1.detach().unflatten(0, (4, HIDDEN)))
    found = layer.weight_hh_l1.unflatten(0, (4, HIDDEN))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert torch.equal(layer.bias_ih_l0, twin.bias_ih_l0)
    other = layers.OrthoLSTM(INPUTS, HIDDEN, 2, proj_size=2)
    other.load_state_dict(layer.to_plain().state_dict())  # silent: nothing moves
    torch.testing.assert_close(other.weight_hh_l0, layer.weight_hh_l0, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="weight_hh_l0 must have shape"):
        layers.OrthoLSTM(INPUTS, 6).load_state_dict(nn.LSTM(INPUTS, 7).state_dict())


def test_copies_are_whole():
    layer = layers.OrthoGRU(INPUTS, HIDDEN, 2)
    x = torch.randn(TIME, BATCH, INPUTS)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(x)[0], layer(x)[0])
    back = copy.deepcopy(layer).double().float()(x)[0]
    torch.testing.assert_close(back, layer(x)[0], rtol=0, atol=1e-6)  # observed 0; torch 2.6: 1e-7
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    shapes = [tuple(w.shape) for w in layer.all_weights[0]]
    assert shapes == [tuple(getattr(nn.GRU(INPUTS, HIDDEN), n).shape) for n in names]


# --- the constraint on the stock layers ----------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_verb_on_a_stock_layer(cls):
    layer = cls(INPUTS, HIDDEN, 2)
    orthonet.orthogonal(layer, "weight_hh_l0")
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(TIME, BATCH, INPUTS)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()
    assert orthogonality_error(layer.weight_hh_l0) <= 2e-6  # as one matrix, all gates together
    plain = cls(INPUTS, HIDDEN, 2)
    plain.load_state_dict({name: getattr(layer, name).detach() for name in plain.state_dict()})
    torch.testing.assert_close(plain(x)[0], layer(x)[0], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single")
def test_the_verb_on_the_flattened_weights_of_cudnn(cls):
    """The kernel is computed, so it is not in cuDNN's buffer: outputs must not use a stale one."""
    layer = cls(INPUTS, HIDDEN, 2, device="cuda")
    layer.flatten_parameters()
    orthonet.orthogonal(layer, "weight_hh_l0")
    x = torch.randn(TIME, BATCH, INPUTS, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()
    plain = cls(INPUTS, HIDDEN, 2)
    plain.load_state_dict({name: getattr(layer, name).detach() for name in plain.state_dict()})
    torch.testing.assert_close(plain(x.cpu())[0], layer(x)[0].cpu(), rtol=0, atol=1e-5)
