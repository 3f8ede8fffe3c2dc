"""A stock model in, orthogonal layers out: the dense operators, the report, what is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import orthonet
from orthonet.certify import certify
from orthonet.convert import orthogonalize
from orthonet.layers import MaxMin, OrthoConv2d, OrthoLinear
from orthonet.testing import singular_values, tolerances

ALLOWED = tolerances.OPERATOR_PROMISE  # observed 2.6e-6 and 7e-15


def converted(model, **options):
    return orthogonalize(model, return_report=True, **options)


LAYERS = {  # name: layer, shape of one sample, whether all singular values must be 1
    "linear": (lambda: nn.Linear(5, 8), (5,), True),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (4, 9), True),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (3, 6, 5), True),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, 2), (2, 4, 4, 4), True),
    "zeros": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 5, 6), False),
    "stride": (lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=2), (4, 7, 8), False),
    "shortcut": (lambda: nn.Conv2d(4, 8, 1, 2), (4, 6, 8), True),
    "odd shortcut": (lambda: nn.Conv2d(4, 16, 1, 2, groups=2), (4, 7, 5), True),
    "shortcut1d": (lambda: nn.Conv1d(2, 9, 1, 3), (2, 6), True),
    "cropping": (lambda: nn.Conv2d(2, 18, 2, 3, bias=False), (2, 7, 8), False),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 2, 2), (8, 3, 4), False),
}


@pytest.mark.parametrize("weights", ["project", "reset"])
@pytest.mark.parametrize("name", LAYERS)
def test_dense_operator_of_every_kind_of_layer(name, weights, dtype):
    make, shape, isometric = LAYERS[name]
    model = nn.Sequential(make()).to(dtype)
    new, report = converted(model, weights=weights)
    assert [row.action for row in report.rows] == ["changed"]
    x = torch.randn(2, *shape, dtype=dtype)
    assert new(x).shape == model(x).shape
    values = singular_values(new[0], shape)
    assert float(values.max()) <= 1 + ALLOWED[dtype]
    if isometric:
        assert float(values.min()) >= 1 - ALLOWED[dtype]
    assert (report.rows[0].moved is not None) == (weights == "project")
    if name in ("linear", "cropping", "odd shortcut") and weights == "project":
        constant = certify(new.eval(), x).constant.value
        assert constant <= 1 + 5 * ALLOWED[dtype]


def test_average_before_the_shortcut():
    model = nn.Sequential(nn.Conv2d(8, 4, 1, 2))
    new, _ = converted(model, downsample="average")
    values = singular_values(new, (8, 6, 4))
    assert float(values.max()) <= 1 + 1e-5
    assert float(values.min()) >= 1 - 1e-5  # a co-isometry of averages, which are one too
    kept, report = converted(nn.Sequential(nn.Conv2d(4, 8, 1, 2)), downsample=None)
    assert type(kept[0]) is nn.Conv2d
    assert "kernel_size must be >= stride" in report.skipped[0].reason


def test_an_orthogonal_weight_is_kept_by_projection():
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(8, 2, 1, 2, padding_mode="circular"))
    nn.init.orthogonal_(model[0].weight)
    nn.init.orthogonal_(model[1].weight)
    new, report = converted(model)
    x, image = torch.randn(3, 6), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(new[0](x), model[0](x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new[1](image), model[1](image), atol=1e-5, rtol=1e-5)
    assert all(row.moved < 1e-5 for row in report.changed)


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers(kind, cell):
    options = {} if cell else {"num_layers": 2, "bidirectional": True, "batch_first": True}
    model = getattr(nn, kind + ("Cell" if cell else ""))(3, 4, **options)
    new, report = converted(model)
    x = torch.randn(2, 3) if cell else torch.randn(2, 5, 3)
    new(x), model(x)
    name = "weight_hh" if cell else "weight_hh_l1_reverse"
    kernel = getattr(new, name).view(-1, 4, 4)
    torch.testing.assert_close(
        kernel.mT @ kernel, torch.eye(4).expand_as(kernel), atol=1e-5, rtol=0
    )
    wide = getattr(model, name.replace("hh", "ih"))
    assert torch.equal(getattr(new, name.replace("hh", "ih")), wide)
    assert "the input kernel is free" in report.changed[0].reason


class Tied(nn.Module):
    """Tied weights, a layer used twice, hooks, a subclass, and computed weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda *_: None)
        self.lazy = nn.modules.linear.NonDynamicallyQuantizableLinear(6, 6)
        self.computed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.ours = OrthoLinear(6, 6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.act = nn.ReLU()

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.again(self.act(self.shared(x)))
        return self.head(nn.functional.relu(x))


def test_what_is_left_alone_has_a_reason_and_the_model_is_not_touched():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    new, report = converted(model)
    reasons = {row.name: row.reason for row in report.skipped}
    assert "tied: embedding.weight = head.weight" in reasons["head"]
    assert new.head.weight is new.embedding.weight
    assert "hooks" in reasons["hooked"]
    assert "subclass of nn.Linear" in reasons["lazy"]
    assert "parametrization" in reasons["computed"]
    assert "constrained already" in reasons["ours"]
    assert "single-channel" in reasons["depthwise"]
    assert [row.name for row in report.changed] == ["shared, again"]
    assert new.shared is new.again
    assert type(model.shared) is nn.Linear
    assert {(row.before, row.name) for row in report.notes} == {("add", ""), ("relu", "")}
    assert "1 changed, 8 skipped, 2 noted" in str(report)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in new.parameters()}
    new(torch.randint(10, (2, 3)))
    with pytest.warns(UserWarning, match=r"orthogonalize: 8 modules with parameters stayed"):
        orthogonalize(model)


def test_rules_by_name_by_class_and_in_their_order():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4), nn.ReLU()
    )
    new, report = converted(
        model,
        rules={
            "0": False,
            "1": {"ortho_params": orthonet.QR_ORTHO_PARAMS, "lipschitz": 2.0},
            nn.Linear: "aol",
            nn.ReLU: lambda relu: MaxMin(dim=-1),
        },
        fallback="spectral",
    )
    kinds = [type(module).__name__ for module in new]
    assert kinds == ["Linear", "OrthoLinear", "SpectralConv2d", "AOLLinear", "MaxMin"]
    torch.testing.assert_close(torch.linalg.matrix_norm(new[1].weight, 2), torch.tensor(2.0))
    assert report.skipped[0].reason == "stays as it is, by rule"
    for rules, match in (
        ({"layer*": True}, "every rule must match"),
        ({nn.Conv3d: True}, "every rule must match"),
        ({"0": "nothing"}, "rule must be one of"),
        ({"0": 3}, "a rule must be a bool"),
        ({"0": lambda _: None}, "must return a torch"),
    ):
        with pytest.raises(ValueError, match=match):
            orthogonalize(model, rules=rules)
    for name in ("weights", "downsample", "fallback", "norm", "activation", "pool"):
        with pytest.raises(ValueError, match=f"orthogonalize: {name} must be one of"):
            orthogonalize(model, **{name: "nothing"})
    with pytest.raises(ValueError, match="model must be"):
        orthogonalize(torch.ones(1))


@pytest.mark.parametrize("norm", ["centering", "lip"])
def test_a_whole_network_has_constant_one(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 16, 1, 2),
        nn.InstanceNorm2d(16, affine=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 8),
        nn.GELU(),
        nn.Linear(8, 3),
    ).eval()
    model[1].running_mean.normal_()
    new, report = converted(model, norm=norm, activation="max_min", pool="average")
    assert not report.skipped
    assert not new.training
    centered = new.get_submodule("5")(torch.randn(2, 16, 3, 3))
    assert centered.mean((-2, -1)).abs().max() < 9 * 2.0**-23  # 9 terms; 6e-8 was seen
    x = torch.randn(2, 3, 12, 12)
    assert new(x).shape == (2, 3)
    assert certify(new, x).constant.value <= 1 + 1e-4  # observed 1 + 4e-6
    pooled, _ = converted(model, activation="abs", pool="l2", norm=norm)
    assert certify(pooled, x).constant.value <= 1 + 1e-4


def test_attention_by_rule():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    new, report = converted(layer, rules={nn.MultiheadAttention: True}, norm="centering")
    x = torch.randn(2, 5, 8)
    new(x).sum().backward()
    blocks = [*new.self_attn.in_proj_weight.chunk(3), new.self_attn.out_proj.weight]
    for block in blocks:
        torch.testing.assert_close(block.T @ block, torch.eye(8), atol=1e-5, rtol=0)
    assert type(layer.self_attn) is nn.MultiheadAttention
    assert {"linear1", "linear2", "self_attn"} <= {row.name for row in report.changed}
    stays, report = converted(layer)
    assert "no Lipschitz constant" in {row.name: row.reason for row in report.skipped}["self_attn"]
    assert type(stays.self_attn) is nn.MultiheadAttention


def test_dtype_device_mode_and_frozen_parameters_follow():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Conv2d(2, 4, 1)).double().eval()
    model[1].bias.requires_grad_(False)
    new, _ = converted(model)
    assert new[0].weight.dtype == torch.float64
    assert not new[0].training
    assert not any(p.requires_grad for p in new[0].parameters())
    assert not new[1].bias.requires_grad
    assert all(p.requires_grad for p in new[1].parametrization.parameters())
    meta, _ = converted(nn.Sequential(nn.Linear(4, 4, device="meta")))
    assert all(p.is_meta for p in meta.parameters())


TORCHVISION = {  # options, kinds of the modules that stay, with weights="reset"
    "resnet18": ({}, {"BatchNorm2d"}),
    "resnet50": ({"norm": "centering"}, set()),
    "vgg11_bn": ({"rules": {"classifier.*": False}, "norm": "lip"}, {"Linear"}),
    "convnext_tiny": (
        {"fallback": "aol", "activation": "max_min"},
        {"LayerNorm2d", "LayerNorm", "CNBlock"},
    ),
    "vit_b_16": (
        {"norm": "centering"},
        {"VisionTransformer", "Encoder", "MultiheadAttention", "NonDynamicallyQuantizableLinear"},
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision_go_through(name):
    torchvision = pytest.importorskip("torchvision")
    options, stay = TORCHVISION[name]
    with torch.device("cpu" if name == "resnet18" else "meta"):  # to see what is exchanged
        model = getattr(torchvision.models, name)()
        new, report = converted(model.eval(), weights="reset", **options)
    if name == "resnet18":
        with torch.no_grad():
            assert new(torch.randn(1, 3, 40, 40)).shape == (1, 1000)
    assert {row.before for row in report.skipped} == stay
    stock = (nn.Linear, nn.Conv2d)
    left = [m for m in new.modules() if type(m) in stock]
    assert len(left) == (3 if name == "vgg11_bn" else 0)
    if name.startswith("resnet"):
        assert len([row for row in report.notes if row.before in ("add", "iadd")]) in (8, 16)
        shortcuts = [row for row in report.changed if "SpaceToDepth2d" in row.after]
        assert len(shortcuts) == 3


def test_a_residual_block_trains_and_its_layers_stay_orthogonal():
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(block(4, 8, 2, shortcut), nn.Flatten(), nn.Linear(128, 4))
    new, _ = converted(model, norm="centering", activation="max_min")
    step = torch.optim.SGD(new.parameters(), 0.05)
    x, y = torch.randn(4, 4, 8, 7), torch.arange(4)
    for _ in range(2):
        step.zero_grad()
        nn.functional.cross_entropy(new(x), y).backward()
        step.step()
    values = singular_values(new[0].downsample[0], (4, 8, 6))
    assert (values - 1).abs().max() < 1e-5
    assert isinstance(new[0].conv1, OrthoConv2d)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_b_16"])
def test_models_of_torchvision_are_projected(name):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)().eval()
    with pytest.warns(UserWarning, match="random initialization"):
        new, report = converted(model, fallback="aol")
    assert all(row.moved is not None for row in report.changed)
    x = torch.randn(1, 3, 224, 224)
    assert bool(new(x).isfinite().all())
    for module in new.modules():
        if isinstance(module, OrthoLinear):
            values = torch.linalg.svdvals(module.weight)
            assert (values - 1).abs().max() < 1e-5


def test_weights_and_keywords_that_cannot_be_used_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"must be those of the layer in the place of nn\.Linear"):
        orthogonalize(model, rules={"1": {"ortho_parms": orthonet.QR_ORTHO_PARAMS}})
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(
        ValueError, match=r"must be finite to be projected, got parameter='1\.weight'"
    ):
        orthogonalize(model)
    assert bool(orthogonalize(model, weights="reset")[1].weight.isfinite().all())


class Conv1D(nn.Module):
    """The twin of `transformers.pytorch_utils.Conv1D`: a linear layer with weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.orthogonal_(self.weight)

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def test_the_conv1d_of_transformers_is_a_linear_layer():
    model = nn.Sequential(Conv1D(8, 4), Conv1D(3, 8))
    model[1].weight.requires_grad_(False)
    nn.init.normal_(model[0].bias)
    new, report = converted(model)
    x = torch.randn(2, 5, 4)
    # an orthogonal weight stays: 5 roundings of 20 terms in float32; observed 6e-7
    torch.testing.assert_close(new(x), model(x), atol=1e-5, rtol=0)
    assert [row.after for row in report.changed] == ["OrthoLinear"] * 2
    assert all("transposed" in row.reason for row in report.changed)
    assert [any(p.requires_grad for p in m.parametrization.parameters()) for m in new] == [
        True,
        False,
    ]
    ruled, _ = converted(model, rules={"0": "aol", "1": False})
    assert [type(m).__name__ for m in ruled] == ["AOLLinear", "Conv1D"]
    model[0].extra = nn.Parameter(torch.ones(1))  # another module of that name
    assert "are used in its forward" in converted(model)[1].skipped[0].reason


def test_the_report_ends_with_the_constant_and_its_causes():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.three((self.two(self.one(x).relu()) + x).relu())

    model, x = nn.Sequential(Sum(), nn.ReLU(), nn.Linear(4, 4), Sum()), torch.randn(2, 4)
    _, report = converted(model)
    assert report.constant is None
    last = str(report).splitlines()[-1]
    assert last.startswith("Lipschitz constant: not known. Pass example_input=x")
    with torch.no_grad():
        model[2].weight.copy_(5 * torch.eye(4))
    new, report = converted(model, rules={"2": False}, example_input=x)
    assert new.training  # the certificate is that of a copy in eval mode
    assert report.constant == pytest.approx(20, rel=1e-4)  # 2 * 5 * 2, to 1e-5 a layer
    first, *others = [(c.path, round(c.factor, 3)) for c in report.causes]
    assert first == ("2", 5)
    assert sorted(others) == [("0", 2), ("3", 2)]
    last = str(report).splitlines()[-1]
    assert last.startswith("Lipschitz constant: at most 20")
    assert "the largest factors: 2 (linear) 5, " in last and "0 (add) 2" in last
    _, report = converted(model[2], example_input=x)
    assert str(report).endswith("Lipschitz constant: at most 1")
    _, report = converted(nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Bilinear(4, 4, 4)),
                          example_input=x)  # fmt: skip
    assert report.constant is None
    assert "none is proved. certify: " in str(report).splitlines()[-1]
