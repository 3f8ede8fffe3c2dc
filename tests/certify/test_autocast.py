"""Certificates under autocast: for the weights as used, and for the rounding of that forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from orthonet import layers
from orthonet.certify import Bound, certified_accuracy, certify, register_rule
from orthonet.certify.graph.replay import Replay
from orthonet.convert import to_plain
from orthonet.errors import UncertifiableError
from orthonet.testing import jacobian
from tests.references import RoundedWeights


class Regions(nn.Module):
    """A middle part in float32, and a head in half precision inside of it."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        with torch.autocast("cpu", enabled=False):
            x = self.middle(x.float()).relu()
            with torch.autocast("cpu", torch.bfloat16):
                return self.last(x)


class Computed(nn.Module):
    """Weights that are computed under autocast, one by a product and one entry by entry."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(6, 6) / 2) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return F.linear(x, self.a @ self.b).tanh() * self.scale + x


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4)), (12,)),
    "orthogonal": (
        lambda: nn.Sequential(layers.OrthoLinear(8, 8), layers.MaxMin(), layers.OrthoLinear(8, 3)),
        (8,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            layers.OrthoConv2d(2, 4, 3, padding=1),
            layers.MaxMin(),
            layers.OrthoConv2d(4, 8, 3, 2, padding=1),
            nn.BatchNorm2d(8),
            layers.OrthoConv2d(8, 8, 3, padding=1, groups=2),
            layers.MaxMin(),
            nn.Flatten(),
            layers.OrthoLinear(72, 4),
        ),
        (2, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, 2), nn.Flatten()
        ),
        (1, 7, 7),
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.LayerNorm(16, eps=0.1),
            nn.Linear(16, 3),
        ),
        (2, 6, 6),
    ),
    "zoo": (
        lambda: nn.Sequential(
            layers.SLLLinear(6, 6), layers.AOLLinear(6, 6), nn.ReLU(), layers.SandwichLinear(6, 4)
        ),
        (6,),
    ),
    "regions": (Regions, (6,)),
    "computed": (Computed, (6,)),
}


def build(name):
    torch.manual_seed(5)
    make, shape = NETS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval(), torch.randn(12, *shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NETS)
def test_constant_and_rounding_hold_for_the_weights_as_used(name, dtype):
    if name == "regions" and dtype == torch.float16:
        pytest.skip("its head is in bfloat16, whatever is asked for")
    model, x = build(name)
    found = certify(model, x[:2], effort="fast", autocast=dtype)
    twin = RoundedWeights(dtype)
    for point in x[:3]:
        if name != "computed":  # its product of weights is no call of F.linear
            matrix = jacobian(lambda v: twin.run(model, v), point).double()
            norm = float(torch.linalg.matrix_norm(matrix, 2))
            assert norm <= found.constant.value * (1 + 1e-6)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        used = model(x).double().flatten(1)
        off = (used - Replay(found._walker.program)(x.double().flatten(1))).norm(dim=1)
    bound = found.rounding(x)
    assert bool((off <= bound).all())
    # observed 5 to 500 times, transposed up to 2000 times
    assert float(bound.max()) < 1e4 * float(off.max())
    assert found.autocast == dtype
    assert f"under {str(dtype)[6:]} autocast" in str(found)


@pytest.mark.parametrize("name", ["orthogonal", "convolutions"])
def test_rounded_weights_exceed_the_certificate_of_float32(name):
    """An orthogonal weight is no longer orthogonal in bfloat16: that is what is bounded."""
    model, x = build(name)
    plain = certify(model, x, effort="fast").constant.value
    half = certify(model, x, effort="fast", autocast=torch.bfloat16).constant.value
    assert plain < half < 1.01 * plain
    if name == "orthogonal":  # a batch norm is not rounded by autocast
        rounded = to_plain(model).bfloat16().float().eval()
        found = certify(rounded, x, effort="fast").constant.value
        # The plain MaxMin is a maximum and a minimum: one matrix, whose norm is rounded outward.
        assert half <= found <= half * (1 + 1e-12)  # observed 4e-13
    layer = layers.OrthoLinear(8, 8).eval()
    found = certify(layer, x.flatten(1)[:, :8], autocast=torch.bfloat16).constant.value
    assert found == pytest.approx(
        float(torch.linalg.matrix_norm(layer.weight.detach().bfloat16().double(), 2)), rel=1e-9
    )  # observed 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_no_point_within_the_radius_changes_the_class_under_autocast(dtype):
    """Attacked with the gradient, on a network whose margins are large beside its rounding."""
    torch.manual_seed(1)
    model = nn.Sequential(layers.OrthoLinear(6, 6), layers.MaxMin(), layers.OrthoLinear(6, 3))
    model = model.eval()
    x = 3 * torch.randn(200, 6)
    found = certify(model, x[:1], autocast=dtype)

    def forward(v):
        with torch.autocast("cpu", dtype):
            return model(v)

    logits = forward(x).detach()
    radius = found.radius(logits, inputs=x)
    sure = radius > 0
    assert int(sure.sum()) > 100, "nothing is certified: the test shows nothing"
    assert bool((radius < found.radius(logits))[sure].all())
    x, logits, radius = x[sure], logits[sure], radius[sure]
    top = logits.argmax(1, keepdim=True)
    least = torch.full((len(x),), torch.inf)
    for share in (0.9, 0.99, 0.9999):
        for other in range(3):
            point = x.clone().requires_grad_()
            for _ in range(10):
                y = model(point)
                gap = (y.gather(1, top)[:, 0] - y[:, other]).sum()
                slope = torch.autograd.grad(gap, point)[0]
                step = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-9)
                point = (x - (share * radius).float()[:, None] * step).requires_grad_()
            assert bool(((point - x).norm(dim=1).double() <= radius).all())
            y = forward(point.detach()).float()
            assert torch.equal(y.argmax(1, keepdim=True), top)
            gap = y.gather(1, top)[:, 0] - y[:, other]
            least = torch.where(top[:, 0] == other, least, torch.minimum(least, gap))
    # the attack comes near: what is left is mostly the rounding that was taken off
    first = logits.float().topk(2, 1).values
    left = least.detach() / (first[:, 0] - first[:, 1])
    assert float(left.median()) < 0.8  # observed 0.2 in float16


def test_float16_that_may_overflow_has_no_radius():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    found = certify(model, torch.zeros(1, 4), autocast=torch.float16)
    x = torch.tensor([[1.0] * 4, [6e4] * 4])
    with torch.no_grad():
        model[0].weight.fill_(0.3)
    found = certify(model, torch.zeros(1, 4), autocast=torch.float16)
    assert found.rounding(x).isfinite().tolist() == [True, False]
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    assert found.radius(logits, inputs=x)[1] == 0.0
    with torch.no_grad():
        model[0].weight.fill_(1e5)
    with pytest.raises(UncertifiableError, match=r"weights must be finite in torch\.float16"):
        certify(model, torch.zeros(1, 4), autocast=torch.float16)
    assert certify(model, torch.zeros(1, 4), autocast=torch.bfloat16).constant.value > 1e5


class Block(nn.Module):
    """A module that users gave a rule for the whole."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


@register_rule(Block)
def _block(module, input_shape):
    return Bound(float(module.inner.weight.detach().double().norm())), "Frobenius norm"


class Entered(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def test_what_is_not_covered_is_refused():
    x = torch.zeros(1, 4)
    assert certify(Block().eval(), x).constant.value > 0
    with pytest.raises(UncertifiableError, match="autocast must not round inside of what has one"):
        certify(Block().eval(), x, autocast=torch.bfloat16)
    with pytest.raises(UncertifiableError, match=r"pass certify\(\.\.\., autocast"):
        certify(Entered().eval(), x)
    with pytest.raises(ValueError, match="autocast must be one of"):
        certify(nn.Linear(4, 4).eval(), x, autocast=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UncertifiableError, match="autocast must be off around the call"),
    ):
        certify(nn.Linear(4, 4).eval(), x)
    assert certify(Entered().eval(), x, autocast=torch.bfloat16).constant.value > 0


def test_accuracy_is_that_of_the_model_under_autocast():
    model = nn.Linear(4, 3).eval()
    seen = []

    class Products(TorchFunctionMode):  # a hook that keeps what it sees would be state
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is nn.functional.linear:
                seen.append(out.dtype)
            return out

    certificate = certify(model, torch.zeros(1, 4), autocast=torch.bfloat16)
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    with Products():
        certified_accuracy(model, [(x, labels)], [0.0], certificate)
    assert seen == [torch.bfloat16]
    assert '"autocast": "bfloat16"' in certificate.to_json()
    assert copy.deepcopy(certificate).autocast == torch.bfloat16
