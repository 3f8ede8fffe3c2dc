"""Products with constant tensors and choices by constant masks and indices, against Jacobians."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet.certify import Bound, certify, register_rule, rules
from orthonet.certify.graph.replay import Replay
from orthonet.errors import UncertifiableError
from tests.references import jacobian_reference


class Fixed(nn.Module):
    """A function of the input and of constants: a matrix, stacks, a vector, a mask, an index."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("w", torch.randn(6, 6, generator=draw))
        self.register_buffer("heads", torch.randn(3, 6, 2, generator=draw))
        self.register_buffer("b", torch.randn(6, generator=draw))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("index", torch.tensor([1, 0, 1]))

    def forward(self, x):
        return self.function(self, x)


# The function and the shape of a sample.
def written(mask, x, value):
    x = x.clone()
    x[:, mask] = value
    return x


LINEAR = {
    "einsum": (lambda s, x: torch.einsum("oi,bi->bo", s.w, x), (6,)),
    "einsum, of the channels": (lambda s, x: torch.einsum("bchw,oc->bohw", x, s.w), (6, 2, 3)),
    "einsum, heads": (lambda s, x: torch.einsum("bhi,hij->bhj", x, s.heads), (3, 6)),
    "einsum, sums": (lambda s, x: torch.einsum("bhi,ij->bj", x, s.w), (3, 6)),
    "einsum, dots": (lambda s, x: torch.einsum("b...i,oi->b...o", x, s.w), (2, 3, 6)),
    "einsum, implicit": (lambda s, x: torch.einsum("bi,ic", x, s.w), (6,)),
    "einsum, diagonal": (lambda s, x: torch.einsum("bi,i->bi", x, s.b), (6,)),
    "einsum, three": (lambda s, x: torch.einsum("bi,ij,jk->bk", x, s.w, s.w), (6,)),
    "einsum, alone": (lambda s, x: torch.einsum("bij->bji", x), (2, 3)),
    "einsum, alone, sum": (lambda s, x: torch.einsum("bij->bj", x), (2, 3)),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, dims=([1], [1])), (6, 2)),
    "tensordot of two": (lambda s, x: torch.tensordot(x, s.heads, dims=([2, 1], [1, 0])), (3, 6)),
    "stack": (lambda s, x: x @ s.heads, (3, 2, 6)),
    "stack on the left": (lambda s, x: s.heads @ x, (3, 2, 4)),
    "stack of one input": (lambda s, x: x[:, None] @ s.heads, (2, 6)),
    "stack of one on the left": (lambda s, x: s.heads.mT @ x[:, None], (6, 4)),
    "vector": (lambda s, x: x @ s.b, (2, 6)),
    "expanded": (lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], 6, 6)), (2, 6)),
    "expanded on the left": (lambda s, x: torch.bmm(s.w.expand(x.shape[0], 6, 6), x), (6, 2)),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w, alpha=-0.5, beta=2.0), (6,)),
    "baddbmm": (
        lambda s, x: torch.baddbmm(s.b, x, s.w.expand(x.shape[0], 6, 6), alpha=0.3),
        (2, 6),
    ),
    "add, like the input": (lambda s, x: x - s.b.expand_as(x), (6,)),
    "add, typed like it": (lambda s, x: x + s.b.type_as(x), (6,)),
    "scale, like the input": (lambda s, x: x * s.b.expand_as(x), (6,)),
    "view as": (lambda s, x: (x * s.b).view_as(x).reshape_as(x), (6,)),
    "where": (lambda s, x: torch.where(s.mask, x, 0.0), (6,)),
    "where, repeated": (lambda s, x: torch.where(s.mask[:, None], x[:, None], s.b), (6,)),
    "where of two": (lambda s, x: torch.where(s.mask, x @ s.w, x * s.b), (6,)),
    "where, like it": (lambda s, x: torch.where(s.mask.expand_as(x), s.b, x), (6,)),
    "masked fill": (lambda s, x: (x @ s.w).masked_fill(s.mask, 3.0) @ s.w, (6,)),
    "gather": (lambda s, x: x.gather(1, s.index.expand(x.shape[0], 3)), (6,)),
    "gather of rows": (
        lambda s, x: x.gather(1, s.index[:, None].expand(x.shape[0], 3, 4)),
        (2, 4),
    ),
    "index": (lambda s, x: x[:, s.index] @ s.w[:3], (6,)),
    "two indices": (lambda s, x: x[:, s.index, s.index], (3, 4)),
    "a number at a mask": (lambda s, x: written(s.mask, x @ s.w, 2.0), (6,)),
    "values at a mask": (lambda s, x: written(s.mask, x, x[:, :4] @ s.w[:4, :4]), (6,)),
    "one value at a mask": (lambda s, x: written(s.mask, s.b.expand_as(x), x[:, :1]), (6,)),
    "triangle": (lambda s, x: (x @ s.w).tril(-1) + x.triu(1), (6, 6)),
    "mask of a product": (lambda s, x: (x @ s.w) * s.mask * 2.0, (6,)),
    "stack of one matrix": (lambda s, x: x @ s.w[None], (3, 2, 6)),
    "vector on the left": (lambda s, x: s.b @ x, (6, 2)),
    "vector, contracted": (lambda s, x: torch.tensordot(s.b, x * 2.0, dims=([0], [1])), (6,)),
    "windows": (lambda s, x: x.unfold(1, 3, 2), (9,)),
    "patches": (lambda s, x: F.unfold(x, 3, padding=1, stride=2), (2, 5, 6)),
    "patches, dilated": (lambda s, x: F.unfold(x, 2, dilation=2), (1, 5, 4)),
    "patches and back": (
        lambda s, x: F.fold(F.unfold(x, (2, 3)), (4, 5), (2, 3)),
        (2, 4, 5),
    ),
    "convolution by patches": (lambda s, x: s.w[:4, :4] @ F.unfold(x, 2), (1, 4, 4)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_bound_is_the_norm_and_the_rounding_is_bounded(name):
    function, shape = LINEAR[name]
    model, exact = Fixed(function).eval(), Fixed(function)
    with torch.no_grad():
        model.b.mul_(100.0)
    exact.load_state_dict(model.state_dict())
    exact.double()
    x = 3 * torch.randn(40, *shape)
    found = certify(model, x[:2])
    error = (model(x).double() - exact(x.double())).reshape(len(x), -1).norm(dim=1)
    assert bool((error <= found.rounding(x)).all())
    jacobian = jacobian_reference(exact, x[0].double())
    truth = float(torch.linalg.matrix_norm(jacobian, 2))
    # observed 1e-11 above
    assert truth * (1 - 1e-12) <= found.constant.value <= truth * (1 + 1e-9)
    assert found.lower is None or found.lower.value <= found.constant.value * (1 + 1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_the_operation_alone_is_sound(name):
    """Behind an activation no island takes it up: the rule itself is asked."""
    function, shape = LINEAR[name]
    model = Fixed(function).double().eval()
    x = torch.randn(2, *shape, dtype=torch.float64)
    both = nn.Sequential(nn.Sigmoid(), model, nn.Tanh()).eval()
    truth = float(torch.linalg.matrix_norm(jacobian_reference(model, x[0]), 2))
    found = certify(both, x, lower=False).constant.value
    assert truth * 0.25 * (1 - 1e-12) <= found <= truth * 0.25 * 1.5


REFUSED = {
    "product": (lambda s, x: torch.einsum("bi,bi->b", x, x), "no global Lipschitz constant"),
    "three": (lambda s, x: torch.einsum("bi,bj,jk->bk", x, x, s.w), "no Lipschitz constant"),
    "batch sum": (lambda s, x: torch.einsum("bi,ij->j", x, s.w), "dim 0 must stay the batch"),
    "trace": (lambda s, x: torch.einsum("bi,jj->bi", x, s.w), "stand once in a tensor"),
    "mask of the input": (lambda s, x: torch.where(x > 0, s.b, x), "gt"),
    "index of the input": (lambda s, x: x.gather(1, x.argsort(1)), "argsort|float32 or float64"),
    "index of the batch": (
        lambda s, x: x.gather(1, torch.arange(x.shape[0])[:, None]),
        "the same for every sample",
    ),
    "mask of the batch": (
        lambda s, x: torch.where((torch.arange(x.shape[0]) > 0)[:, None], x, 2 * x),
        "the same for every sample",
    ),
    "number of samples": (lambda s, x: x * (1 + x.shape[0] // 4), "argument 'other' must be a con"),
    "number of entries": (lambda s, x: x * (1 + x.numel() // 24), "argument 'other' must be a con"),
    "later samples": (
        lambda s, x: x * (1 + 9 * (torch.arange(x.shape[0]) >= 5).to(x.dtype))[:, None],
        "the same for every sample",
    ),
    "earlier samples": (
        lambda s, x: x * (1 + (x.new_ones(x.shape[0], 1).cumsum(0) - 3).clamp(min=0)),
        "the same for every sample",
    ),
    "input that learns": (lambda s, x: 9 * x if x.requires_grad else x, "gradient mode is one"),
    "one sample and gradients": (
        lambda s, x: 9 * x if x.shape[0] == 1 and torch.is_grad_enabled() else x,
        "on each other or on their number",
    ),
    "filled with the input": (
        lambda s, x: x.new_full((x.shape[0], 3), x.sum().item()),
        "certify: ",
    ),
    "added to the input": (
        lambda s, x: torch.addmm(x, x.new_ones(x.shape[0], 6), 1e-3 * s.w) @ s.w,
        "the tensor to add must be a constant",
    ),
    "many samples": (
        lambda s, x: 9 * x if x.shape[0] > 100 else x,
        "branches .* on the batch size",
    ),
    "gradients": (lambda s, x: 9 * x if torch.is_grad_enabled() else x, "gradient mode is one"),
    "sum of samples": (lambda s, x: s.w[:4, :4] @ x, "dim 0 must stay the batch|any size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_constant_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(UncertifiableError, match=message):
        certify(Fixed(function).eval(), torch.randn(4, 6))


def test_the_state_of_a_recurrent_layer_is_refused_by_its_name():
    with pytest.raises(UncertifiableError, match=r"output 1 of RNN.*return the first"):
        certify(nn.RNN(4, 5, batch_first=True).eval(), torch.randn(2, 3, 4))


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e170])
def test_many_blocks_are_bounded_by_their_frobenius_norms(scale):
    weight = scale * torch.randn(300, 2, 3, dtype=torch.float64)
    found = certify(
        Fixed(lambda s, x: torch.einsum("bhi,hji->bhj", x, weight)).double().eval(),
        torch.zeros(1, 300, 3, dtype=torch.float64),
        lower=False,
    )
    truth = float(torch.linalg.matrix_norm(weight / scale, 2).max()) * scale
    # 1.09 was seen
    assert truth <= found.constant.value <= 1.5 * truth


REPEATED = {
    "maximum": lambda s, x: torch.maximum(x[:, 1:6], x[:, :1]),
    "minimum": lambda s, x: torch.minimum(x[:, :1] * 1.0, 1e-3 * x.flip(1)),
    "max": lambda s, x: torch.max(x[:, :1], 1e-3 * x),
    "hypot": lambda s, x: torch.hypot(1e-3 * x[:, 1:6], x[:, :1]),
    "factor": lambda s, x: x[..., None] * s.b,
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_broadcasting_repeats_is_counted(name):
    model = Fixed(REPEATED[name]).double().eval()
    x = torch.randn(8, 6, dtype=torch.float64)
    x[:, 0] += 3.0 if name != "minimum" else -3.0
    truth = max(float(torch.linalg.matrix_norm(jacobian_reference(model, v), 2)) for v in x)
    found = certify(model, x, lower=False).constant
    # 2.1 was seen: both operands count as free, and the largest factor for all of them
    assert truth * (1 - 1e-12) <= found.value <= 2.5 * truth
    assert name != "factor" or found.kind == "upper"


SCALARS = {
    "masked fill": lambda s, x: (x @ s.w).masked_fill(s.mask, 1.1),
    "where": lambda s, x: torch.where(s.mask, x @ s.w, 1000.1),
    "clamp": lambda s, x: (x @ s.w).clamp(min=1.1, max=1000.1),
    "pad": lambda s, x: F.pad(x @ s.w, (1, 2), value=1.1),
    "hardtanh": lambda s, x: F.hardtanh(x @ s.w, 1.1, 3.3),
    "maximum": lambda s, x: torch.maximum(x @ s.w, torch.tensor(1.1)),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCALARS)
def test_the_rounding_of_scalars_counts(name, dtype):
    model = Fixed(SCALARS[name]).eval()
    x = 1e-3 * torch.randn(20, 6)
    found = certify(model, x[:1], lower=False, autocast=dtype)
    exact = Replay(found._walker.program).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        seen = model(x).double()
    error = (seen - exact(x.double()).detach()).norm(dim=1)
    limit = found.rounding(x)
    assert bool((error <= limit).all())
    if name != "maximum" or dtype is not None:  # a tensor of float32 is what it is
        assert float(limit.max()) < 1e4 * float(error.max())  # observed 40


def test_masked_attention_weights_have_a_rounding():
    model = Fixed(lambda s, x: torch.softmax(x.masked_fill(s.mask, float("-inf")), -1)).eval()
    x = torch.randn(5, 6)
    limit = certify(model, x, lower=False).rounding(x)
    assert bool(limit.isfinite().all()) and float(limit.max()) < 1e-3


def test_a_bound_below_what_is_reached_is_refused(monkeypatch):
    monkeypatch.setattr(rules, "_FUNCTIONS", dict(rules._FUNCTIONS))
    register_rule("tanh")(lambda call: (Bound(0.5), "wrong"))
    with pytest.raises(UncertifiableError, match="must not be below what a search has reached"):
        certify(nn.Tanh().eval(), torch.zeros(1, 3))


def test_samples_that_are_numbers():
    assert certify(nn.Tanh().eval(), torch.zeros(4)).constant.value == 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x[:, s.index[:0]],
        lambda s, x: torch.einsum("bi,io->bo", x, s.w[:, :0]),
        lambda s, x: x[:, :0].gather(1, s.index[:0].expand(x.shape[0], 0)),
    ],
    ids=["index", "product", "gather"],
)
def test_of_nothing_nothing_comes(function):
    assert certify(Fixed(function).eval(), torch.zeros(2, 6)).constant.value == 0.0
