"""Products, softmax and normalizations in balls: no point of a ball refutes their bounds."""

import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthonet.certify import Bound, LocalBound, LocalCertificate, certify
from orthonet.certify.graph.cells import WRITTEN, product_of
from orthonet.certify.local import ball as balls
from orthonet.certify.local.norms import proved_norm
from orthonet.errors import UncertifiableError

_TOKENS, _WIDTH = 4, 6


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(_WIDTH, 3 * _WIDTH)

    def forward(self, x):
        q, k, v = (
            t.view(x.shape[0], _TOKENS, 2, _WIDTH // 2).transpose(1, 2)
            for t in self.project(x).chunk(3, -1)
        )
        mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
        if self.kind == "masked":
            y = (q @ k.transpose(-1, -2)).masked_fill(~mask, -float("inf")).softmax(-1) @ v
        elif self.kind == "fused mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
        elif self.kind == "written out":
            y = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal", scale=0.7)
        return y.transpose(1, 2).reshape(x.shape[0], _TOKENS, _WIDTH)


class Function(nn.Module):
    def __init__(self, function, inside=None):
        super().__init__()
        self.function, self.inside = function, inside

    def forward(self, x):
        return self.function(x) if self.inside is None else self.function(x, self.inside(x))


def _gated(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a.sigmoid() * b, a * F.relu(b)], -1)


def _divided(x):
    return x / (1.0 + x.square().mean(-1, keepdim=True))


_PIECES_AT = None
PIECES = {
    "written out": lambda: Attention("written out"),
    "fused": lambda: Attention("fused"),
    "causal": lambda: Attention("causal"),
    "masked": lambda: Attention("masked"),
    "fused mask": lambda: Attention("fused mask"),
    "layer norm": lambda: nn.LayerNorm(_WIDTH, eps=1e-3),
    "layer norm of all": lambda: nn.LayerNorm((_TOKENS, _WIDTH), elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(_WIDTH, eps=1e-2),
    "group norm": lambda: nn.GroupNorm(2, _TOKENS),
    "swish": lambda: Function(lambda x: x * x.sigmoid()),
    "gates": lambda: Function(_gated),
    "squeeze": lambda: Function(
        lambda x, y: x * y.mean(1, keepdim=True).sigmoid(), nn.Linear(6, 6)
    ),
    "rms by hand": lambda: Function(
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)
    ),
    "quotient": lambda: Function(_divided),
    "cube": lambda: Function(lambda x: x + 0.1 * x**3),
    "exp": lambda: Function(lambda x: (0.5 * x).exp()),
    "logarithm": lambda: Function(lambda x: (x.square() + 0.3).log()),
    "root": lambda: Function(lambda x: (x.abs() + 0.3).sqrt()),
    "inverse": lambda: Function(lambda x: 1.0 / (x.abs() + 0.3)),
    "softmax": lambda: nn.Softmax(-1),
    "by letters": lambda: Function(_by_letters),
    "bilinear": lambda: Function(lambda x, y: x @ y.transpose(1, 2) @ x / 4, nn.Linear(6, 6)),
}


def _net(draw):
    names = [draw.choice(list(PIECES)) for _ in range(draw.choice([1, 1, 2, 3]))]
    layers = []
    for name in names:
        piece = PIECES[name]()
        layers += [nn.Linear(_WIDTH, _WIDTH), piece]
        if draw.random() < 0.3:
            layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_TOKENS * _WIDTH, 3)).double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
                module.weight.normal_()
    return names, net.requires_grad_(False)


def _check(net, x, radius):
    """Secants from the center, secants between points, Jacobians at points."""
    near = certify(net, x, radius=radius, effort="fast")
    (constant,), (secant,) = near.constants, near.secants()
    d = torch.randn(30, *x.shape[1:], dtype=torch.float64)
    d = d / d.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    points = x + radius * torch.cat([torch.rand(15), torch.ones(15)]).double().reshape(-1, 1, 1) * d
    at, center = net(points), net(x)
    lost = 1e-12 * (1 + at.abs().max())  # the float64 forward of both points, values of size 1
    far = (points - x).flatten(1).norm(dim=1)
    assert bool(((at - center).norm(dim=1) <= secant.value * far + lost).all())
    apart = (points[1:] - points[:-1]).flatten(1).norm(dim=1)
    assert bool(((at[1:] - at[:-1]).norm(dim=1) <= constant.value * apart + lost).all())
    points.requires_grad_()
    outputs = net(points).sum(0)  # samples are independent of each other
    rows = [torch.autograd.grad(y, points, retain_graph=True)[0].flatten(1) for y in outputs]
    norms = torch.linalg.matrix_norm(torch.stack(rows, 1), 2)
    assert float(norms.max()) <= constant.value * (1 + 1e-9)  # observed 1e-15 of the SVD
    node = near._ends.walker.program.outputs[0]
    point = balls.Point(near._ends.walker, (x,))
    for dtype in (torch.float32, torch.float64) if constant.value < 1e6 else ():
        ball = balls.Ball(point, radius, dtype=dtype)
        assert bool(
            ((at - center).abs() <= ball.rows(ball.moves[node]) * far[:, None] + lost).all()
        )
    return constant.value / max(float(norms.max()), 1e-300)  # a dead ReLU makes it zero


def _check_nets(seeds):
    ratios, seen = [], set()
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        names, net = _net(draw)
        x = draw.choice([0.3, 1.0, 3.0]) * torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
        ratio = _check(net, x, draw.choice([0.0, 1e-4, 0.01, 0.1, 1.0]))
        ratios.append(ratio)
        seen.update(names if ratio < 1.5 else ())
    return ratios, seen


def test_no_point_of_a_ball_refutes_products_and_normalizations():
    ratios, _ = _check_nets(range(4))
    assert sum(r < 1.5 for r in ratios) >= 2


@pytest.mark.slow
def test_no_point_of_a_ball_refutes_a_thousand_networks_of_products():
    ratios, seen = _check_nets(range(100, 1100))
    assert seen == set(PIECES)
    assert sum(r < 1.5 for r in ratios) >= 400


def test_complex_values_keep_the_global_bound():
    turned = torch.tensor([1.0, 2.0j, 0.5 - 1.0j, 1.0], dtype=torch.complex128)
    net = Function(lambda x: torch.fft.irfft(torch.fft.rfft(x) * turned, n=_WIDTH).relu()).eval()
    x = torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
    assert certify(net, x, radius=0.1).constant.value == certify(net, x).lipschitz


def test_bounds_of_a_ball_are_no_constants_of_the_model():
    x = torch.zeros(2, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)).eval()
    near = certify(net, x, radius=0.1)
    assert isinstance(near, LocalCertificate) and len(near.constants) == 2
    assert all(type(b) is LocalBound and b.kind == "constant" for b in near.constants)
    assert all(b.kind == "secant" for b in near.secants())
    assert near.constant.value == max(b.value for b in near.constants)
    assert near.constants == certify(net, x).local_bound(x, 0.1)
    copy = pickle.loads(pickle.dumps(near))
    assert copy.constants == near.constants
    with pytest.raises(UncertifiableError, match="graph"):
        copy.secants()
    for found in (near.constant, near.secants()[0]):
        with pytest.raises((TypeError, AttributeError)):
            Bound(1.0) * found
        with pytest.raises((TypeError, AttributeError)):
            found * Bound(1.0)


def test_a_domain_that_is_left_has_no_bound_and_a_smaller_ball_has_one():
    net = Function(lambda x: 1.0 / x).eval()
    x = torch.full((1, 3), 0.5, dtype=torch.float64)
    assert certify(net, x, radius=0.6).constant.value == float("inf")
    (found,) = certify(net, x, radius=0.25).constants
    assert 4.0 <= found.value <= 1 / 0.25**2 * (1 + 1e-9)
    (alone,) = certify(net, x, radius=0.0).constants
    assert 4.0 <= alone.value <= 4.0 * (1 + 1e-8)


def test_refusals_name_the_way_that_works():
    x = torch.randn(1, _TOKENS, _WIDTH)
    for kind in ("written out", "fused"):
        with pytest.raises(UncertifiableError, match="certify\\(model, x, radius="):
            certify(Attention(kind).eval(), x)
        assert certify(Attention(kind).eval(), x, radius=0.01).constant.value < float("inf")
    with pytest.raises(UncertifiableError, match="certify\\(model, x, radius="):
        certify(Function(lambda x: x * x.sigmoid()).eval(), x)


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf"), True, "1"])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ValueError, match="radius"):
        certify(nn.Linear(3, 3).eval(), torch.zeros(1, 3), radius=radius)


def test_a_masked_score_has_no_share():
    torch.manual_seed(1)
    for kind in ("fused mask", "masked"):
        net, x = Attention(kind).double().eval(), torch.randn(1, _TOKENS, _WIDTH).double()
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(net, x)
        steepest = float(torch.linalg.matrix_norm(jacobian.reshape(x.numel(), -1), 2))
        (found,) = certify(net, x, radius=0.0).constants
        assert steepest <= found.value < steepest * (1 + 1e-5)  # observed 1.4e-6


def test_no_row_of_scores_may_be_masked_as_a_whole():
    """PyTorch returns NaN or zeros there, by its version and backend."""
    x, none = torch.randn(1, _TOKENS, _WIDTH), torch.zeros(_TOKENS, _TOKENS, dtype=torch.bool)
    fused = Function(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=none))
    assert certify(fused.eval(), x, radius=0.01).constant.value == float("inf")


def test_a_division_that_rounds_is_refused_in_balls_too():
    """It jumps: the bound was 80 where secants from the center had a slope of 134 and more."""
    x = torch.ones(1, 3)
    for mode in ("floor", "trunc"):
        jumps = Function(lambda x, m=mode: torch.div(10.0 * x, x.square() + 1.0, rounding_mode=m))
        with pytest.raises(UncertifiableError, match="must not round"):
            certify(jumps.eval(), x, radius=0.3)
    same = Function(lambda x: torch.div(x, x.square() + 1.0, rounding_mode=None)).eval()
    assert certify(same, x, radius=0.0).constant.value < 1e-9  # its slope at 1 is 0


def test_outputs_of_one_number_a_sample_have_bounds_in_balls():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    both = Function(lambda x: ((x * x).sum(1), x[:, 0] * x[:, 1])).eval()
    (found,) = certify(both, x, radius=0.0).constants
    assert 125**0.5 <= found.value < 125**0.5 + 1e-8  # rows (6, 8) and (4, 3): 10 and 5
    powers = Function(lambda x: (2.0**x, x ** torch.tensor([2.0, 3.0]))).eval()  # not followed
    assert certify(powers, x, radius=0.1).constant.value == float("inf")


class Steps(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = torch.zeros(x.shape[0], self.cell.hidden_size, dtype=x.dtype)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


def _by_letters(x):
    """Attention of two heads by einsum, and a normalization by hand."""
    y = x.reshape(-1, _TOKENS, 2, _WIDTH // 2)
    scores = torch.einsum("bihd,bjhd->bhij", y, y.tanh()).softmax(-1)
    x = torch.einsum("bhij,bjhd->bihd", scores, y).flatten(2)
    return x / (x.var(-1, unbiased=False, keepdim=True) + 0.1).sqrt()


def test_cells_variances_and_products_are_written_as_torch_computes_them():
    torch.manual_seed(0)
    x, h = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weights = [torch.randn(n, dtype=torch.float64) for n in ((16, 5), (16, 4), (16,), (16,))]
    aten = torch.ops.aten
    for target, rows, state in (
        (aten.rnn_tanh_cell.default, 4, h),
        (aten.rnn_relu_cell.default, 4, h),
        (aten.gru_cell.default, 12, h),
        (aten.lstm_cell.default, 16, [h, h + 1.0]),
    ):
        for some in (weights, weights[:2]):
            args = (x, state, *(w[:rows] for w in some))
            torch.testing.assert_close(WRITTEN[target](*args), target(*args))
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for dim, correction, keepdim in (([1], 0, True), ([1, 2], 1, False), ([-1], None, False)):
        found = WRITTEN[aten.var.correction](x, dim, correction=correction, keepdim=keepdim)
        wanted = torch.var(x, dim, correction=1 if correction is None else correction)
        torch.testing.assert_close(found.reshape(wanted.shape), wanted)
    sizes = dict(zip("bhijd", (3, 2, 4, 5, 6), strict=True))
    for equation in (
        "bhid,bhjd->bhij",
        "bhij,bjhd->bihd",
        "bi,bj->bji",
        "bi,bi->b",
        "bhi,bih->bih",
        "bdi,bdj->bji",
    ):
        a, b = (
            torch.randn([sizes[c] for c in t]).double() for t in equation.split("->")[0].split(",")
        )
        torch.testing.assert_close(product_of(equation)(a, b), torch.einsum(equation, a, b))
    for equation in (
        "bij,bi->bi",
        "bii,bi->bi",
        "bi,cj->bcij",
        "bi,jb->bij",
        "b...,b...->b...",
        "bi,bj",
    ):
        assert product_of(equation) is None


def test_letters_variances_and_cells_have_bounds_in_balls():
    torch.manual_seed(2)
    x = torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
    for model in (Function(_by_letters), Steps(nn.GRUCell(_WIDTH, 3))):
        model = model.double().eval()
        jacobian = torch.autograd.functional.jacobian(model, x)
        steepest = float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))
        (found,) = certify(model, x, radius=0.0).constants
        assert steepest <= found.value < steepest * (1 + 1e-5)  # observed 5e-7
    assert certify(Steps(nn.LSTMCell(_WIDTH, 3)).double().eval(), x, lower=False).lipschitz < 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_overflow_have_no_bound(dtype):
    """They raised an error of `spectral_norm_bound`, which names no way out, instead of inf."""
    matrix = torch.tensor([[1.0, float("nan")], [2.0, 3.0]], dtype=dtype)
    with pytest.raises(OverflowError):
        proved_norm(matrix)
