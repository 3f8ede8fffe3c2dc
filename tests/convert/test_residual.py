"""Sums in the code of forward become combinations of constant 1; the model keeps its class."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orthonet.certify import certify
from orthonet.convert import ConvexSum, PrescaledSum, orthogonalize

KINDS = {"convex": ConvexSum, "prescaled": PrescaledSum}


class Block(nn.Module):
    """A residual block as everybody writes it."""

    def __init__(self, channels, out=None, stride=1):
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.downsample = None if out == channels else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        identity = x
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Scaled(nn.Module):
    """A block with a gain for each channel, and another code in train mode."""

    def __init__(self, channels, depth=3):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.linspace(-3, 2, channels).view(-1, 1, 1))
        self.block = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Tanh())

    def forward(self, x):
        branch = F.dropout(self.layer_scale * self.block(x), 0.5, self.training)
        return torch.add(x, branch)


class Net(nn.Module):
    """Sums in blocks and in the code of the whole, and a method besides forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.Sequential(Block(4), Block(4, 8, 2), Scaled(8))
        self.mix = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)

    def features(self, x):
        return self.stages(self.stem(x))

    def forward(self, x):
        x = self.features(x)
        x = x + self.mix(x) + torch.relu(x)
        return self.head(torch.flatten(self.pool(x), 1))


def converted(model, **options):
    return orthogonalize(
        model, norm="centering", pool="l2", weights="reset", return_report=True, **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_constant_is_one_and_the_class_stays(kind):
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    new, report = converted(model, residual=kind)
    x = torch.randn(4, 3, 4, 4)
    if kind == "convex":  # the other one in the next test
        # each of the 8 orthogonal layers is off by at most 1e-5 in float32; observed .997
        assert certify(new, x, effort="fast").constant.value <= 1 + 8e-5
    assert sum("sum in forward" in row.reason for row in converted(model)[1].notes) == 5
    assert isinstance(new, Net)
    assert isinstance(new.stages[0], Block)
    assert type(new).__name__ == "Net"
    assert new.features(x).shape == (4, 8, 2, 2)
    names = ["stages.0.residual", "stages.1.residual", "stages.2.residual", "residual", "residual2"]
    assert {n for n, m in new.named_modules() if type(m) is KINDS[kind]} == set(names)
    assert [row.name for row in report.changed if row.after == KINDS[kind].__name__] == [
        "residual", "residual2", *names[:3],
    ]  # fmt: skip
    assert {row.name for row in report.changed if row.after == "gain"} == {"stages.2"}
    assert not report.skipped
    assert not [row for row in report.notes if "add" in row.before]
    after = model.state_dict()
    assert type(model) is Net and type(model.stages[0]) is Block
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    again, second = converted(new, residual=kind)
    assert not second.changed
    assert torch.equal(again(x), new(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_combination_is_the_one_of_the_formula(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.down(x) + self.two(torch.tanh(self.one(x)))

    model, x = Two().double(), torch.randn(5, 4, dtype=torch.float64)
    new, _ = converted(model, residual=kind, rules={nn.Linear: False})
    parameter = next(new.residual.parameters())
    parameter.data.fill_(0.7)
    down, branch = model.down(x), lambda z: model.two(torch.tanh(model.one(z)))
    if kind == "convex":
        a = torch.sigmoid(parameter)
        expected = (1 - a) * down + a * branch(x)
    else:
        g = parameter.exp()
        expected = (down + branch(g * x)) / (1 + g)
    torch.testing.assert_close(new(x), expected, atol=1e-14, rtol=1e-14)  # 10 roundings of 1.1e-16
    new(x).sum().backward()
    assert parameter.grad.abs() > 0
    isometric, _ = converted(Two().eval(), residual=kind)
    constant = certify(isometric, torch.randn(2, 4), effort="fast").constant.value
    assert constant <= 1 + 3e-5  # three layers, each off by at most 1e-5; observed 1 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_modes_copies_and_pickles(kind):
    torch.manual_seed(0)
    new, _ = converted(Net().eval(), residual=kind)
    x = torch.randn(4, 3, 8, 8)
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twin = copy.deepcopy(new)
    for other in (loaded, twin):
        assert isinstance(other, Net)
        assert torch.equal(other(x), new(x))
        assert list(other.state_dict()) == list(new.state_dict())
        other.head.bias.data.add_(1.0)
        assert not torch.equal(other(x), new(x))
        other.train()
        assert not torch.equal(other(x), other(x))  # the dropout of train mode is there
    assert torch.equal(new(x), new(x))
    signed, _ = converted(of(lambda self, x, scale=1.0: (x + self.one(x)) * scale), residual=kind)
    assert torch.equal(signed(x=torch.ones(1, 4), scale=0.0), torch.zeros(1, 4))


def test_parameters_keep_the_dtype_of_the_module():
    new, _ = converted(Net().double(), residual="convex")
    assert new.residual.logit.dtype == torch.float64
    assert new.stages[0].residual.logit.dtype == torch.float64
    meta, _ = converted(Net().to("meta"), residual="prescaled")
    assert all(p.is_meta for p in meta.parameters())


def of(forward):
    """A module with two layers and this forward."""
    body = {"forward": forward, "__init__": _two_layers}
    return type("Custom", (nn.Module,), body)()


def _two_layers(self):
    nn.Module.__init__(self)
    self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)


REFUSED = {  # name: forward, what the message says
    "alpha": (lambda self, x: torch.add(x, self.one(x), alpha=2), "has one with alpha="),
    "keyword": (lambda self, x: x.add(other=self.one(x)), "has one with other="),
    "values": (lambda self, x: x + self.one(x) if x.sum() > 0 else x, "depends on values or shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused(name):
    forward, match = REFUSED[name]
    model = nn.Sequential(of(forward))
    with pytest.raises(ValueError, match=r"^orthogonalize: .*" + match) as caught:
        converted(model, residual="convex")
    assert "'0'" in str(caught.value) and "rules={'0': False}" in str(caught.value)
    new, _ = converted(model, residual="convex", rules={"0": False})
    assert type(new[0]) is type(model[0])


def test_sums_that_are_no_residuals_stay():
    def forward(self, x):
        rows = x.shape[0] + x.size(1)
        return (self.one(x) + 1.0).view(rows - 4, -1) + self.two.bias

    model = of(forward)
    new, report = converted(model, residual="convex", rules={nn.Linear: False})
    assert type(new) is type(model)
    assert not report.changed
    assert not report.notes
    with pytest.raises(ValueError, match="residual must be one of 'convex', 'prescaled', None"):
        orthogonalize(model, residual="half")
    for kind in (ConvexSum, PrescaledSum):
        with pytest.raises(ValueError, match="init must"):
            kind(-1.0)


@pytest.mark.slow
def test_a_traced_model_is_rewritten_as_well():
    model = nn.Sequential(torch.fx.symbolic_trace(Block(4))).eval()
    new, _ = converted(model, residual="convex")
    assert isinstance(new[0], torch.fx.GraphModule)
    x = torch.randn(2, 4, 6, 6)
    bound = 1 + 3e-5  # two layers, each off by at most 1e-5; observed 1 + 1e-6
    assert certify(new, x, effort="fast").constant.value <= bound
    kept, _ = converted(model)
    assert certify(kept, x, effort="fast").constant.value > 1.9  # the sum adds 1 and 1


TORCHVISION = {  # side of the image, effort, options
    "resnet18": (64, "fast", {}),
    "resnet50": (64, "fast", {}),
    "convnext_tiny": (64, "fast", {"fallback": "aol", "activation": "abs"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision_have_constant_one(name, kind):
    torchvision = pytest.importorskip("torchvision")
    side, effort, options = TORCHVISION[name]
    model = getattr(torchvision.models, name)(weights=None).eval()
    given = {"norm": "centering", "pool": "l2", "weights": "reset", "residual": kind, **options}
    new = orthogonalize(model, **given)
    assert isinstance(new, type(model))
    x = torch.randn(1, 3, side, side)
    certificate = certify(new, x, effort=effort, lower=False)
    assert certificate.constant.value <= 1.01  # observed 1 + 1.2e-5 to 1 + 1.8e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_vggs_of_torchvision_have_constant_one(name):
    """At 224x224 pixels, with one layer for the classifier, whose matrices take minutes each."""
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(weights=None, init_weights=False)
    model.classifier = nn.Linear(25088, 10)
    model.eval()
    options = {"norm": "centering", "pool": "l2", "activation": "max_min", "weights": "reset"}
    new = orthogonalize(model, residual="convex", **options).requires_grad_(False)
    certificate = certify(new, torch.randn(1, 3, 224, 224), effort="fast", lower=False)
    assert certificate.constant.value <= 1.01  # observed 1 + 2.4e-4, whole classifier
