"""Whole networks: the bound against Jacobians, the table, and everything that is refused."""

import copy
import json
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import layers
from orthonet.certify import Bound, certify, register_rule, rules
from orthonet.errors import UncertifiableError
from tests.certify.functions import Lambda
from tests.references import jacobian_reference


def steepest(model: nn.Module, x: torch.Tensor) -> float:
    """The largest Jacobian norm at the samples x."""
    return max(float(torch.linalg.matrix_norm(jacobian_reference(model, s), 2)) for s in x)


MIXES = (
    lambda x, f: x + f(x),
    lambda x, f: x - 0.5 * f(x),
    lambda x, f: torch.cat([x, f(x)], 1),
    lambda x, f: torch.cat([x[:, :2], f(x)[:, 2:] + x[:, 2:]], 1),
    lambda x, f: f(f(x)),
    lambda x, f: torch.maximum(f(x), x),
)


def random_network() -> tuple[nn.Module, torch.Tensor]:
    channels, size = 4, random.choice([5, 6, 8])
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    blocks: list[nn.Module] = []
    activation = lambda: random.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.PReLU])()  # noqa: E731
    for _ in range(random.randint(1, 3)):
        choice = random.randint(0, 4)
        if choice == 0:
            taps, out = random.choice([1, 2, 3]), random.choice([4, 6])
            pad = random.randint(0, taps - 1)
            mode = random.choice(["zeros", "circular"]) if pad else "zeros"
            blocks.append(
                nn.Conv2d(
                    channels,
                    out,
                    taps,
                    random.choice([1, 1, 2]),
                    pad,
                    groups=random.choice([1, 2]),
                    padding_mode=mode,
                )
            )
            channels = out
        elif choice == 1:
            blocks.append(nn.BatchNorm2d(channels))
        elif choice == 2:
            blocks.append(random.choice([nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1)]))
        else:
            mix = random.choice(MIXES)
            branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), activation())
            blocks.append(Lambda(mix, branch))
            channels = 2 * channels if mix is MIXES[2] else channels
        blocks.append(activation())
    model = nn.Sequential(*blocks, nn.Flatten()).double()
    with torch.no_grad():
        model = nn.Sequential(*model, nn.Linear(model(x).shape[1], 3).double())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
                module.weight.uniform_(-2, 2)
    return model.eval(), x


def test_networks_of_ours_have_constant_one():
    x = torch.rand(2, 3, 8, 8)
    model = nn.Sequential(
        layers.OrthoConv2d(3, 16, 3, padding=1, padding_mode="circular"),
        layers.MaxMin(),
        layers.ConvexResidual(
            nn.Sequential(layers.OrthoConv2d(16, 16, 3, padding=1), layers.GroupSort(4))
        ),
        layers.ConcatResidual(layers.OrthoConv2d(8, 8, 3, padding=1), shuffle=True),
        layers.AdditiveResidual(layers.Abs()),
        layers.L2NormResidual(nn.ReLU()),
        layers.L2NormPool(2),
        layers.ScaledAvgPool(3, 1, 1),
        layers.SpaceToDepth2d(2),
        layers.LayerCentering(),
        layers.BatchCentering(64),
        layers.HouseholderActivation(64),
        layers.AdaptiveL2NormPool(1),
        nn.Flatten(),
        layers.OrthoLinear(64, 10),
    ).eval()
    certificate = certify(model, x)
    # the average over overlapping windows loses norm at this size; observed 0.7616, and at most
    # 1.2e-6 above 1 in front of it
    assert certificate.constant.value < 0.77
    assert max(row.cumulative for row in certificate.rows if row.op != "add") < 1 + 1e-5
    assert steepest(model, x) <= certificate.constant.value
    paths = [row.path for row in certificate.rows]
    assert {"2.branch.0", "2", "5.branch", "14"} <= set(paths)


def test_normalization_puts_the_constant_into_input_units():
    torch.manual_seed(1)  # of the matrix: the constant lies between 1 and 4
    model = nn.Sequential(
        layers.Normalize([0.5, 0.4, 0.3], [0.25, 0.5, 1.0]),
        nn.Flatten(),
        layers.OrthoLinear(12, 4),
    ).eval()
    constant = certify(model, torch.zeros(1, 3, 2, 2)).constant.value
    truth = float(torch.linalg.matrix_norm(jacobian_reference(model, torch.zeros(3, 2, 2)), 2))
    # normalization and layer are one matrix; allowed 1e-6 in float32, observed 8e-8
    assert 3.0 < constant < 4.0
    assert constant == pytest.approx(truth, rel=1e-6)


def test_the_deployed_weight_counts():
    layer = nn.Linear(8, 8).eval()
    before = certify(layer, torch.zeros(1, 8)).constant.value
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert certify(layer, torch.zeros(1, 8)).constant.value == pytest.approx(2 * before, rel=1e-12)
    nn.utils.parametrizations.orthogonal(layer)
    constant = certify(layer.eval(), torch.zeros(1, 8)).constant
    assert constant.value == pytest.approx(1.0, abs=1e-5)  # observed 4e-7
    assert constant.kind == "exact"


def test_residual_concatenation_and_shared_modules():
    shared = nn.Linear(4, 4).double()
    norm = certify(shared.eval(), torch.zeros(1, 4).double()).constant.value
    x = torch.randn(3, 4, dtype=torch.float64)
    for function, expected in (
        (lambda x, f: x + f(x).relu(), 1 + norm),
        (lambda x, f: f(f(x).relu()), norm * norm),
        (lambda x, f: torch.cat((f(x).relu(), x), 1), (1 + norm * norm) ** 0.5),
        (lambda x, f: f(x).relu() + f(-x).relu(), 2 * norm),
        (lambda x, f: f(x) + f(-x), 0.0),  # affine: what it computes counts
    ):
        model = Lambda(function, shared).eval()
        bound = certify(model, x, effort="fast").constant.value
        assert bound == pytest.approx(expected, rel=1e-9, abs=1e-12)
        closer = certify(model, x).constant.value  # knows two affine maps in a chain
        assert steepest(model, x) * (1 - 1e-12) <= closer <= bound


def test_scales_and_constant_models():
    layer = nn.Linear(3, 3).double().eval()
    for scale in (1e-18, 1e18):
        with torch.no_grad():
            layer.weight.copy_(scale * torch.eye(3, dtype=torch.float64))
        model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer)).eval()
        bound = certify(model, torch.zeros(1, 3, dtype=torch.float64)).constant.value
        assert bound == pytest.approx(scale * scale, rel=1e-9)
        assert bound >= scale * scale
    constant = Lambda(lambda x: x.new_zeros(x.shape[0], 2)).eval()
    assert certify(constant, torch.zeros(1, 3)).constant == Bound(0.0, kind="exact")


def test_certify_writes_nothing_and_repeats_itself():
    model, x = random_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))
    first, second = certify(model, x), certify(model, x)
    assert first.constant == second.constant
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_table_and_json():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).eval()
    certificate = certify(model, torch.zeros(1, 3, 5, 5), effort="fast")
    table = certificate.table()
    assert [line.split()[1] for line in table.splitlines()[2:-1]] == [
        "conv2d",
        "relu",
        "flatten",
        "linear",
    ]
    assert "3x5x5" in table
    assert f"{certificate.constant.value:.9g}" in table.splitlines()[-1]
    content = json.loads(certificate.to_json())
    assert content["constant"] == {
        "value": certificate.constant.value,
        "norm": "l2",
        "kind": "upper",
    }
    assert content["rows"][0]["method"] == "matrix 36x75"
    assert content["rows"][-1]["cumulative"] == certificate.constant.value


class Doubled(nn.Linear):
    """Looks like a linear layer and is not."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


def test_a_subclass_with_another_map_is_looked_into():
    x = torch.randn(2, 4, dtype=torch.float64)
    model = Doubled(4, 4).double().eval()
    norm = float(torch.linalg.matrix_norm(model.weight.detach(), 2))
    assert certify(model, x).constant.value == pytest.approx(2 * norm, rel=1e-9)
    images = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    conv = DoubledConv(2, 3, 3, padding=1).double().eval()
    assert certify(conv, images).constant.value == pytest.approx(steepest(conv, images), rel=1e-9)


def test_hooks_and_replaced_forwards_count():
    x = torch.randn(2, 4, dtype=torch.float64)
    hooked = nn.Linear(4, 4).double().eval()
    norm = float(torch.linalg.matrix_norm(hooked.weight.detach(), 2))
    hooked.register_forward_hook(lambda module, args, output: 3 * output)
    assert certify(hooked, x).constant.value == pytest.approx(3 * norm, rel=1e-9)
    patched = nn.Linear(4, 4).double().eval()
    norm = float(torch.linalg.matrix_norm(patched.weight.detach(), 2))
    patched.forward = lambda x: 5 * F.linear(x, patched.weight)
    assert certify(patched, x).constant.value == pytest.approx(5 * norm, rel=1e-9)


class Gated(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


REFUSED = {
    "product": (lambda x: x * x.flip(1), "operation='mul'"),
    "square": (lambda x: x**2, "Powers have no global Lipschitz constant"),
    "quotient": (lambda x: 1 / (x.abs() - 1), "operation='reciprocal'"),
    "where": (lambda x: torch.where(x > 0, x, x + 1), "operation='gt'"),
    "cast": (lambda x: x.long().float(), "operation='to'"),
    "step": (lambda x: torch.sign(x), "operation='sign'"),
    "sqrt": (lambda x: x.abs().sqrt(), "operation='sqrt'"),
    "normalize": (lambda x: F.normalize(x), "div|normalize|norm"),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        "Dot-product attention has no global Lipschitz constant",
    ),
    "input matrix": (lambda x: x @ x.T, "batch"),
    "item": (lambda x: x * x.sum().item(), "batch"),
    "branch": (lambda x: x if x.sum() > 0 else 2 * x, "without branches on the values"),
    "batch mean": (lambda x: x - x.mean(0), "along the batch dimension|dim 0 must stay"),
    "batch mean kept": (lambda x: x - x.mean(0, keepdim=True), "batch"),
    "batch flip": (lambda x: x.flip(0), "must not act along the batch"),
    "batch flip of many": (lambda x: x.flip(1, 0), "must not act along the batch"),
    "batch roll": (lambda x: x.roll(1), "must not act along the batch"),
    "batch sort": (lambda x: x.sort(0)[0], "must not act along the batch"),
    "batch softmax": (lambda x: x.softmax(0), "must not act along the batch"),
    "batch cat": (lambda x: torch.cat([x, x]), "dim 0 must stay the batch|along the batch"),
    "batch chunk": (lambda x: sum(x.chunk(2)), "batch"),
    "batch flatten": (lambda x: x.flatten(0), "dim 0 must stay the batch"),
    "transposition": (lambda x: x.transpose(0, 1), "dim 0 must stay the batch"),
    "pairs of samples": (lambda x: x[:, :1] - x[:, 0], "dim 0 must stay the batch"),
    "index of the batch": (lambda x: x[[0, 0]], "dim 0 must stay|any size"),
    "fixed batch": (lambda x: x.view(4, -1), "run on batches of any size|dim 0 must stay"),
    "batch scale": (lambda x: x * x.shape[0], "argument 'other' must be a constant"),
    "batch branch": (lambda x: x if x.shape[0] > 1 else 2 * x, "on each other or on their number"),
    "noise": (lambda x: x + torch.randn(6), "function of its input alone"),
    "no output": (lambda x: None, "output must be a tensor"),
    "softplus": (lambda x: F.softplus(x, threshold=1.0), "jumps at the threshold"),
    "dropout": (lambda x: F.dropout(x, training=True), "function of its input alone|switched off"),
    "norm of order 1/2": (lambda x: x.norm(p=0.5, dim=1), "must be the Euclidean one"),
    "norm of order 1/2 in linalg": (
        lambda x: torch.linalg.norm(x, ord=0.5, dim=1),
        "must be the Euclidean one",
    ),
    "bits": (lambda x: x.view(torch.int32), "float32 or float64|another dtype"),
    "half": (lambda x: x.half().float(), "operation='half'|float32 or float64"),
    "attribute T": (lambda x: x.T, "dim 0 must stay the batch"),
    "rounded": (lambda x: torch.div(x, 2.0, rounding_mode="floor"), "must not round"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    function, message = REFUSED[name]
    model = nn.Sequential(nn.Identity(), Lambda(function)).eval()
    with pytest.raises(UncertifiableError, match=message):
        certify(model, torch.randn(4, 6))


def test_an_argument_that_a_layer_does_not_read_is_none_of_its_tensors():
    """PyTorch's encoder drops the mask of a causal call: the trace has no tensor for it."""

    def forward(x, layer):
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return layer(layer(x, src_mask=mask, is_causal=True), src_mask=mask, is_causal=True)

    model = Lambda(forward, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    with pytest.raises(UncertifiableError, match="attention has no global Lipschitz constant"):
        certify(model, torch.zeros(1, 4, 8))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            "attention has no global Lip",
        ),
        (
            lambda: Lambda(
                lambda x, f: f(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)
            ),
            "attention has no global Lip",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "weights must be initialized"),
        (lambda: nn.LayerNorm(8, eps=0.0), "must have a positive eps"),
        (lambda: Lambda(lambda x: torch.polar(x, x).real), "Complex values may be"),
    ],
    ids=["encoder", "attention", "lazy", "layer norm", "complex"],
)
def test_modules_that_are_refused(module, message):
    with pytest.raises(UncertifiableError, match=message):
        certify(module().eval(), torch.randn(1, 5, 8))


def test_an_unknown_module_is_named_with_its_path():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Gated())).eval()
    with pytest.raises(UncertifiableError, match=r"operation='mul', path='1\.1'.*"):
        certify(model, torch.zeros(1, 4))
    with pytest.raises(UncertifiableError, match="register_rule"):
        certify(Lambda(lambda x, f: f(x)[0], nn.LSTM(4, 4)).eval(), torch.zeros(1, 3, 4))


def test_a_registered_rule_is_used(monkeypatch):
    monkeypatch.setattr(rules, "_MODULES", dict(rules._MODULES))
    monkeypatch.setattr(rules, "_FUNCTIONS", dict(rules._FUNCTIONS))
    seen = []

    @register_rule(Gated)
    def gated(module, input_shape):
        seen.append(input_shape)
        return Bound(1.1), "the slope of SiLU"

    certificate = certify(nn.Sequential(nn.ReLU(), Gated()).eval(), torch.zeros(5, 4))
    assert seen == [(4,)]
    assert certificate.constant.value == pytest.approx(1.1)
    assert certificate.rows[-1].method == "the slope of SiLU"

    register_rule(Gated)(lambda module, input_shape: Bound(0.9, kind="estimate"))
    with pytest.raises(UncertifiableError, match="must return a proved Bound"):
        certify(Gated().eval(), torch.zeros(5, 4))

    register_rule(torch.sign)(lambda call: Bound(7.0))
    for spelling in (torch.sign, lambda x: x.sign(), lambda x: x.clone().sign_()):
        assert certify(Lambda(spelling).eval(), torch.ones(1, 4)).constant.value == 7.0
    with pytest.raises(ValueError, match="must be a subclass of"):
        register_rule(3)


def test_train_mode_is_refused_wherever_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout())).eval()
    model[1][0].train()
    with pytest.raises(UncertifiableError, match=r"path='1\.0'.*model\.eval\(\)"):
        certify(model, torch.zeros(1, 4))
    with pytest.raises(UncertifiableError, match=r"model\.eval\(\)"):
        certify(nn.BatchNorm1d(4), torch.zeros(1, 4))
    frozen = nn.BatchNorm1d(4, track_running_stats=False).eval()
    with pytest.raises(UncertifiableError, match="running statistics"):
        certify(frozen, torch.zeros(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    with pytest.raises(UncertifiableError, match=r"weights must be finite, got path='0\.weight'"):
        certify(model, torch.zeros(1, 4))


def test_inputs_and_precision_are_checked():
    model = nn.Linear(4, 4).eval()
    with pytest.raises(ValueError, match="example_input must be a floating-point tensor"):
        certify(model, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UncertifiableError, match=r"=Tensor\(shape=\(1, 5\).*Pass a batch"):
        certify(model, torch.zeros(1, 5))
    with pytest.raises(UncertifiableError, match="must be float32 or float64"):
        certify(nn.Linear(4, 4).bfloat16().eval(), torch.zeros(1, 4, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert certify(model, torch.zeros(0, 4)).constant.value > 0


def test_inplace_activations_of_common_networks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.norm(self.conv(x))
            y += x
            return self.relu(y)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), Block(), Block()).double()
    model = model.eval()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    assert certify(model, x).constant.value >= steepest(model, x)
