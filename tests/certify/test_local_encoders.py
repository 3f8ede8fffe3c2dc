"""PyTorch's attention layers in balls: no point of a ball refutes their bounds."""

import contextlib
import random

import pytest
import torch
from torch import nn

from orthonet.certify import certify, local_radius
from orthonet.certify.local.encoders import written_out
from orthonet.errors import UncertifiableError
from tests.certify.test_local_nonlinear import _TOKENS, _WIDTH, _check

_CAUSAL = nn.Transformer.generate_square_subsequent_mask(_TOKENS)
MASKS = {
    "none": lambda: None,
    "causal": lambda: _CAUSAL.clone(),
    "bool": lambda: _CAUSAL.isinf(),
    "float": lambda: torch.randn(_TOKENS, _TOKENS),
    "both": lambda: _CAUSAL + torch.randn(_TOKENS, _TOKENS),
}


class Classifier(nn.Module):
    def __init__(self, inner, mask):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(_TOKENS * _WIDTH, 3)
        self.register_buffer("mask", mask)

    def forward(self, x):
        if isinstance(self.inner, nn.MultiheadAttention):
            y, shares = self.inner(x, x, x.relu(), attn_mask=self.mask)
            y = y + 0.1 * shares.sum(-2, keepdim=True).mT.expand_as(y)
        else:
            y = self.inner(x, self.mask)
        return self.head(y.flatten(1))


def _layer(draw):
    return nn.TransformerEncoderLayer(
        _WIDTH,
        2,
        8,
        activation=draw.choice(["relu", "gelu"]),
        batch_first=True,
        norm_first=draw.choice([False, True]),
        layer_norm_eps=1e-2,
        bias=draw.choice([False, True]),
    )


LAYERS = {
    "attention": lambda draw: nn.MultiheadAttention(
        _WIDTH, draw.choice([1, 2, 3]), 0.1, draw.choice([False, True]), batch_first=True
    ),
    "layer": _layer,
    "encoder": lambda draw: nn.TransformerEncoder(
        _layer(draw), 2, draw.choice([None, nn.LayerNorm(_WIDTH)]), enable_nested_tensor=False
    ),
}


@contextlib.contextmanager
def _path(name, mask):
    """PyTorch's fused encoder layer reads a mask of floats as one of bool: not for those."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(name == "attention" or mask not in ("float", "both"))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _model(seed, name, mask):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Classifier(LAYERS[name](draw), MASKS[mask]()).eval()
    return draw, model.double().requires_grad_(False)


def _check_encoders(seeds):
    ratios = []
    for seed in seeds:
        names = list(LAYERS), list(MASKS)
        name, mask = names[0][seed % 3], names[1][seed % 5]
        draw, model = _model(seed, name, mask)
        x = draw.choice([0.3, 1.0, 3.0]) * torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
        with _path(name, mask):
            ratios.append(_check(model, x, draw.choice([0.0, 1e-3, 0.01, 0.1])))
    return ratios


def test_no_point_of_a_ball_refutes_an_encoder():
    assert max(_check_encoders([13])) < 1.5


@pytest.mark.slow
def test_no_point_of_a_ball_refutes_a_hundred_encoders():
    ratios = _check_encoders(range(10, 110))
    assert sum(r < 1.5 for r in ratios) >= 40


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_are_written_out_as_pytorch_computes_them(name):
    for seed, mask in enumerate(MASKS):
        _, model = _model(seed, name, mask)
        x = torch.randn(3, _TOKENS, _WIDTH, dtype=torch.float64)
        with _path(name, mask):
            twin = written_out(model, (x,))
        assert twin is not model and twin.head is model.head
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), _path(name, mask):
                # Both sum 6 to 24 products of size 1 in float64; observed 1e-15.
                torch.testing.assert_close(twin(x), model(x), rtol=1e-11, atol=1e-12)


def test_a_mask_that_pytorch_reads_in_two_ways_is_refused():
    layer = nn.TransformerEncoderLayer(_WIDTH, 2, 8, batch_first=True)
    model = Classifier(layer, MASKS["float"]()).eval()
    with pytest.raises(UncertifiableError, match="set_fastpath_enabled"):
        written_out(model, (torch.randn(1, _TOKENS, _WIDTH),))


def test_a_model_without_attention_is_the_same_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    assert written_out(model, (torch.zeros(1, 3),)) is model


class Wrong(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(_WIDTH, 2, **options)
        self.register_buffer(
            "mask", torch.zeros(_TOKENS, _TOKENS).index_fill_(1, torch.arange(1), -9.0)
        )

    def forward(self, x):
        return self.inner(x, x, x, attn_mask=self.mask, need_weights=False, is_causal=True)[0]


def test_what_is_not_known_in_a_ball_is_refused_by_a_sentence():
    x = torch.randn(1, _TOKENS, _WIDTH)
    for options, message in (
        ({}, "batch_first must be True"),
        ({"batch_first": True, "add_zero_attn": True}, "keys must come from the input"),
        ({"batch_first": True}, "is_causal"),  # a hint that is wrong
    ):
        with pytest.raises(UncertifiableError, match=message):
            certify(Wrong(**options).eval(), x, radius=0.01)
    hooked = Wrong(batch_first=True).eval()
    hooked.inner.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(UncertifiableError, match="hooks"):
        certify(hooked, x, radius=0.01)


class Added(nn.Module):
    """A mask that is added by hand."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.register_buffer("mask", _CAUSAL.clone())

    def forward(self, x):
        return (x[:, :, :_TOKENS] * self.times + self.mask).softmax(-1)


def test_infinite_entries_are_those_of_masks_of_attention():
    x = torch.randn(1, _TOKENS, _WIDTH)
    with pytest.raises(UncertifiableError, match="A mask with -inf in it needs a radius"):
        certify(Added(1.0).eval(), x)
    with pytest.raises(UncertifiableError, match=r"attn_mask of F\.scaled"):
        certify(Added(1.0).eval(), x, radius=0.01)
    for value in (float("inf"), float("nan")):
        model = Added(1.0).eval()
        model.mask[0, 0] = value
        with pytest.raises(UncertifiableError, match="step of the training"):
            certify(model, x, radius=0.01)
    layer = nn.Linear(3, 3).eval()
    with torch.no_grad():
        layer.weight[0, 0] = -float("inf")
    with pytest.raises(UncertifiableError, match="step of the training"):
        certify(layer, torch.zeros(1, 3), radius=0.01)


def _closest(model, x, most):
    """The distance from each sample to a point of another class that an ascent finds."""
    model = model.requires_grad_(False)
    top = model(x).argmax(1)
    found = torch.full((len(x),), float("inf"), dtype=x.dtype)
    for radius in [r * s for r in most.tolist() for s in (0.999, 1.5, 3.0, 10.0)]:
        d = torch.randn_like(x)
        for _ in range(15):
            d = radius * d / d.flatten(1).norm(dim=1).reshape(-1, 1, 1)
            z = (x + d).requires_grad_()
            out = model(z)
            rest = out.scatter(1, top[:, None], -float("inf")).amax(1)
            margin = rest - out.gather(1, top[:, None])[:, 0]
            flipped = (margin > 0) & (d.flatten(1).norm(dim=1) < found)
            found = torch.where(flipped.detach(), d.flatten(1).norm(dim=1), found)
            (slope,) = torch.autograd.grad(margin.sum(), z)
            d = d + radius * slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1).clamp_min(1e-30)
    return found


def test_models_without_a_global_constant_have_radii():
    _, model = _model(3, "attention", "causal")
    x = torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
    (radius,) = local_radius(model, x, model(x).argmax(1), steps=1)
    (closest,) = _closest(model, x, radius[None])
    assert 0 < radius < closest < 10 * radius


def test_radii_of_wrong_predictions_are_zero_and_other_labels_and_outputs_are_refused():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    x = torch.randn(2, 4)
    labels = (net(x).argmax(1) + torch.tensor([0, 1])) % 3
    found = local_radius(net, x, labels)
    assert found[0] > 0 and found[1] == 0 and found.dtype == torch.float64
    with pytest.raises(ValueError, match="labels"):
        local_radius(net, x, labels[:1])
    with pytest.raises(ValueError, match="2 to 4096 classes"):
        local_radius(nn.Sequential(net, nn.Unflatten(1, (3, 1))).eval(), x)


def test_radii_of_balls_are_those_of_the_certificate_where_there_is_one():
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        .double()
        .eval()
    )
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    certificate = certify(net, x)
    found, wanted = local_radius(net, x), certificate.local_radius(net, x)
    assert bool((found >= certificate.radius(net, x) * (1 - 1e-9)).all())
    # Both end a search that stops within 5 or 25 %.
    assert bool(((found / wanted - 1).abs() < 0.25).all())


def test_a_tie_has_no_radius_and_a_constant_model_an_infinite_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1), nn.Flatten()).eval()
    for parameter in net.parameters():
        parameter.detach().zero_()
    x = torch.zeros(1, 1, 2)
    assert local_radius(net, x).item() == 0.0
    net[2] = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    net[2][1].weight.detach().zero_()
    net[2][1].bias.detach().copy_(torch.tensor([1.0, 0.0]))
    assert local_radius(net.eval(), x).item() == float("inf")


class Widened(nn.Module):
    """A jump of the slope that no output near the example shows."""

    def forward(self, x):
        return x + 1e6 * (x - 30.0).relu()


def _changed_layer(change):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(_WIDTH, 2, 8, batch_first=True, layer_norm_eps=1e-2)
    change(layer)
    model = Classifier(layer, None)
    with torch.no_grad():
        model.head.bias.fill_(1e6)  # so that outputs differ by less than a share of the largest
    return model.eval()


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.01 * super().forward(x)


def _of_class(name, cls):
    return lambda layer: setattr(getattr(layer, name), "__class__", cls)


def test_what_the_fused_layer_skips_is_refused():
    x = torch.randn(1, _TOKENS, _WIDTH)
    changes = {
        "dropout1": lambda layer: setattr(layer, "dropout1", Widened()),
        "dropout ": lambda layer: setattr(layer, "dropout", Widened()),
        "linear1": _of_class("linear1", Scaled),
        "activation": lambda layer: setattr(layer, "activation", torch.tanh),
    }
    for message, change in changes.items():
        model = _changed_layer(change)
        with pytest.raises(
            UncertifiableError, match=rf"TransformerEncoderLayer: in balls {message}"
        ):
            certify(model, x, radius=0.1)
    tanh = nn.TransformerEncoderLayer(_WIDTH, 2, 8, activation=nn.GELU("tanh"), batch_first=True)
    with pytest.raises(UncertifiableError, match="activation must be the fused one"):
        written_out(Classifier(tanh, None).eval(), (x,))
    torch.backends.mha.set_fastpath_enabled(False)
    try:  # then the layers run as they stand, and the twin with them
        model = _changed_layer(changes["dropout1"])
        with torch.no_grad():
            model.inner.self_attn.out_proj.bias.fill_(40.0)
            twin = written_out(model, (x,))
            torch.testing.assert_close(twin.inner(x), model.inner(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_pytorch_runs_no_code_of_the_projection_behind_attention():
    x, torch_class = torch.randn(1, _TOKENS, _WIDTH), type(nn.MultiheadAttention(2, 1).out_proj)
    for kind in range(2):
        inner = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)
        if kind:
            inner.out_proj.__class__ = type("Own", (torch_class,), {"forward": Scaled.forward})
        else:
            inner.out_proj.register_forward_hook(lambda module, args, out: 0.01 * out)
        model = Classifier(inner, None).eval()
        with torch.no_grad():
            model.head.bias.fill_(1e6)  # which hides the factor from a comparison of outputs
            twin = written_out(model, (x,))
            found, want = twin.inner(x, x, x)[0], inner(x, x, x)[0]
        # Sums of 24 products in float32; a factor of 0.01 would show. Observed 1e-7.
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_wrong_hint_of_causality_is_refused():
    x, mask = torch.randn(1, _TOKENS, _WIDTH), torch.zeros(_TOKENS, _TOKENS)
    mask[2, 0] = -torch.inf
    for given in (mask, mask.isinf(), _CAUSAL + 1.0):
        model = Hinted(given).eval()
        with pytest.raises(UncertifiableError, match="MultiheadAttention: in balls is_causal"):
            written_out(model, (x,))
    for given in (_CAUSAL, _CAUSAL.isinf()):
        written_out(Hinted(given).eval(), (x,))
    assert certify(Hinted(_CAUSAL).eval(), x, radius=0.1).constant.value < torch.inf


class Hinted(nn.Module):
    """Attention whose mask is said to be causal, and a bias that hides small differences."""

    def __init__(self, mask):
        super().__init__()
        self.inner = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)
        self.register_buffer("mask", mask)

    def forward(self, x):
        y, _ = self.inner(x, x, x, attn_mask=self.mask, need_weights=False, is_causal=True)
        return y + 1e6


class Decoded(nn.Module):
    """A decoder that attends to its input, and to its input itself."""

    def __init__(self, norm_first, mask):
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(
            _WIDTH, 2, 8, 0.1, layer_norm_eps=1e-2, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(_TOKENS * _WIDTH, 3)
        self.register_buffer("mask", mask)

    def forward(self, x):
        y = self.inner(x, x.tanh(), tgt_mask=self.mask, tgt_is_causal=self.mask is not None)
        return self.head(y.flatten(1))


def test_no_point_of_a_ball_refutes_a_decoder():
    torch.manual_seed(0)
    model = Decoded(True, _CAUSAL.double()).double().eval().requires_grad_(False)
    x = torch.randn(1, _TOKENS, _WIDTH, dtype=torch.float64)
    assert _check(model, x, 1e-3) < 1.5  # observed 1.004
