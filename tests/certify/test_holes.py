"""Reproductions of claims that were too small: each is refused now, or bounded from above."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet.certify import Bound, Call, Operand, certify
from orthonet.certify.ops.axes import interpolation
from orthonet.certify.rules import RECORDS as records
from orthonet.certify.rules import is_default
from orthonet.errors import UncertifiableError
from tests.certify.functions import Lambda
from tests.references import jacobian_reference

ATEN = torch.ops.aten


def bound(function, *shape):
    """Without the search from below, and from an input where every rectifier is off."""
    x = torch.full((1, *shape), -5.0, dtype=torch.float64)
    return certify(Lambda(function).eval(), x, lower=False).constant.value


def truth(function, *shape):
    """The largest of the norms of some Jacobians."""
    model = Lambda(function)
    points = torch.randn(20, *shape, dtype=torch.float64).abs() + 0.1
    return max(float(torch.linalg.matrix_norm(jacobian_reference(model, x), 2)) for x in points)


OVERLAPS = {
    "slices beyond the ends": lambda x: torch.cat([x[:, -6:].relu(), x[:, :2].relu()], 1),
    "slices beyond the end": lambda x: torch.cat([x[:, 1:9].relu(), x[:, -2:99].relu()], 1),
    "unordered split": lambda x: torch.cat([p.relu() for p in torch.tensor_split(x, (3, 1), 1)], 1),
    "negative split": lambda x: torch.cat([p.relu() for p in torch.tensor_split(x, (-9, 2), 1)], 1),
    "narrow": lambda x: torch.cat([x.narrow(1, 0, 3).relu(), x.narrow(1, -2, 2).relu()], 1),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_pieces_are_where_torch_cuts_them(name):
    found, least = bound(OVERLAPS[name], 4), truth(OVERLAPS[name], 4)
    assert found >= least * (1 - 1e-12)
    assert found <= math.sqrt(3) * (1 + 1e-9)  # an empty third part counts as one more


def test_disjoint_pieces_still_count_once():
    assert bound(lambda x: torch.cat([x[:, :-2].relu(), x[:, -2:99].relu()], 1), 4) <= 1 + 1e-9
    assert (
        bound(lambda x: torch.cat([p.relu() for p in x.tensor_split((1, 3), 1)], 1), 4) <= 1 + 1e-9
    )


UNREAD = {
    "topk": lambda x: torch.topk(x, 3, 1, sorted=False).values,
    "elu": lambda x: ATEN.elu(x, 1.0, 1.0, -1.0),
}


@pytest.mark.parametrize("name", UNREAD)
def test_arguments_that_make_a_map_jump_or_grow_are_refused(name):
    with pytest.raises(UncertifiableError):
        bound(UNREAD[name], 6)
    assert bound(lambda x: torch.topk(x, 3, 1).values, 6) == 1.0
    assert bound(lambda x: ATEN.elu(x, 1.0, 1.0, 3.0), 6) == pytest.approx(3.0)


RESIZED = {
    "linear1d": (lambda x: ATEN.upsample_linear1d.default(x, [9], False, 100.0), (1, 3)),
    "bilinear2d": (
        lambda x: ATEN.upsample_bilinear2d.default(x, [9, 9], False, 100.0, 100.0),
        (1, 3, 3),
    ),
    "nearest1d": (lambda x: ATEN.upsample_nearest1d.default(x, [9], 100.0), (1, 3)),
    "nearest2d": (lambda x: ATEN.upsample_nearest2d.default(x, [9, 9], None, 100.0), (1, 3, 3)),
    "nearest-exact1d": (lambda x: ATEN._upsample_nearest_exact1d.default(x, [9], 100.0), (1, 3)),
    "vec": (lambda x: ATEN.upsample_bilinear2d.vec(x, None, False, [3.0, 0.5]), (1, 3, 4)),
    "bicubic2d": (lambda x: ATEN.upsample_bicubic2d.default(x, [9, 3], True, 0.1, None), (1, 3, 3)),
}


@pytest.mark.parametrize("name", RESIZED)
def test_scale_factors_count_wherever_they_stand(name):
    function, shape = RESIZED[name]
    least = truth(function, *shape)
    assert least * (1 - 1e-12) <= bound(function, *shape) <= least * (1 + 1e-9)


def test_antialiased_interpolation_of_one_column():
    """The kernel of torch computes a wrong matrix where the other side is 1."""
    model = Lambda(lambda x: F.interpolate(x, size=(3, 2), mode="bilinear", antialias=True))
    x = torch.zeros(1, 1, 7, 2, dtype=torch.float64)
    least = float(torch.linalg.matrix_norm(jacobian_reference(model, x[0]), 2))
    found = certify(model.eval(), x, lower=False).constant.value
    assert least * (1 - 1e-12) <= found <= least * (1 + 1e-9)


def test_circular_padding_wraps_what_negative_pads_leave():
    """Two columns of four are left, and one of them is copied twice."""
    function = lambda x: F.pad(x, (1, -1, -1, 2), mode="circular")  # noqa: E731
    least = truth(function, 1, 4, 3)
    assert least == pytest.approx(2.0)
    assert least * (1 - 1e-12) <= bound(function, 1, 4, 3) <= least * (1 + 1e-9)
    for pads in ((2, -3), (-3, 2), (3, -2)):  # PyTorch raises, or reads memory before it is written
        with pytest.raises(
            UncertifiableError, match=r"circular padding must|must run|must be a function"
        ):
            bound(lambda x: F.pad(x, (*pads, 0, 0), mode="circular"), 1, 3, 4)  # noqa: B023


def test_a_constant_beyond_the_range_is_refused():
    with pytest.raises(UncertifiableError, match="the constant must be below the range"):
        bound(lambda x: x * 1e200 * 1e200, 2)


def test_windows_of_padding_alone_are_refused():
    with pytest.raises(UncertifiableError, match="every window of a max pooling must hold"):
        bound(lambda x: F.max_pool1d(x, 2, 1, 1, dilation=3), 1, 2)
    assert bound(lambda x: F.max_pool1d(x, 2, 1, 1, dilation=3), 1, 3) == 1.0


def test_largest_entries_without_channels():
    """PyTorch pools a sample of one dim along that dim."""
    model = Lambda(lambda x: F.max_pool1d(x, 2)).eval()
    x = torch.tensor([[1.0, 3.0, 2.0, 2.1]], dtype=torch.float64)
    near = certify(model, x, radius=0.3)
    assert near.constants[0].value == pytest.approx(1.0)
    model = Lambda(lambda x: F.max_pool2d(x * 3, 2, 1)).eval()
    near = certify(model, torch.arange(12.0).double().reshape(1, 3, 4), radius=0.1)
    assert near.constants[0].value == pytest.approx(3.0)


def test_an_empty_interval_is_constant():
    assert bound(lambda x: x.clamp(1, -1), 3) == 0.0
    assert bound(lambda x: F.hardtanh(x, 2.0, 2.0), 3) == 1.0  # a point is no empty interval


def test_places_of_long_axes_round_more():
    """R2: float32 puts a place at 3000 off by 1e-4, and so the margin by as much as x changes."""
    model = Lambda(lambda x: F.interpolate(x, size=3, mode="linear").flatten(1)).eval()
    x = (1e5 * torch.sin(torch.arange(6002.0) * 3.0))[None, None]
    found = certify(model, x, lower=False)
    observed = float((model(x).double() - model(x.double())).norm())
    assert observed > 1.0  # the rounding of the weights alone is 1e-2
    assert observed <= float(found.rounding(x)) < 1e4 * observed


def test_an_unknown_overload_or_argument_is_refused():
    assert "topk.default" in records
    assert is_default(ATEN.topk.default, "sorted", True)
    assert not is_default(ATEN.topk.default, "sorted", False)
    args = (Operand((3,), Bound(1.0)), 0.1, 0.3, True)
    call = Call("rrelu", "here", args, {}, (3,), "", ATEN.rrelu.default)
    with pytest.raises(UncertifiableError, match="'training' must have its default"):
        records["rrelu.default"].step(call)
    with pytest.raises(UncertifiableError, match="operation"):
        bound(lambda x: torch.renorm(x.flatten(1), 2, 1, 1.0), 3)


def test_every_record_covers_its_schema():
    """Whatever has no default is read, or said to be free."""
    for name, record in records.items():
        if not isinstance(name, str) or name == "getitem":
            continue
        op, _, overload = name.partition(".")
        packet = getattr(ATEN, op, None)
        if packet is None or overload not in packet.overloads():
            continue  # of another version of torch
        schema = getattr(packet, overload)._schema.arguments
        needed = {a.name for a in schema[1:] if not a.has_default_value()}
        assert needed <= record.reads | record.free, name
        assert schema[0].name not in record.free


CHANNELS = (8, 3, 3)
FINITE = {
    "threshold": (lambda x: F.threshold(x, 0.0, 0.0), (5,), 1.0),
    "leaky by hand": (lambda x: torch.where(x > 0, x, 0.1 * x), (5,), 1.0),
    "leaky from the left": (lambda x: torch.where(x <= 0, x * -3.0, x), (5,), 3.0),
    "negative part": (lambda x: torch.where(x < 0, 2 * x, 0.0), (5,), 2.0),
    "modulus by hand": (lambda x: torch.where(x >= 0, x, -x), (5,), 1.0),
    "median": (lambda x: x.median(1).values, (5,), 1.0),
    "kthvalue": (lambda x: x.kthvalue(2, 1).values, (5,), 1.0),
    "cummax": (lambda x: x.cummax(1).values, (5,), math.sqrt(5)),
    "std": (lambda x: x.std(1), (5,), 0.5),
    "std, biased": (lambda x: x.std(1, unbiased=False), (4,), 0.5),
    "norm of order 1": (lambda x: x.norm(p=1, dim=1), (9,), 3.0),
    "norm of order 3": (lambda x: torch.linalg.vector_norm(x, 3, 1), (9,), 1.0),
    "normalize": (lambda x: F.normalize(x, eps=0.1), (4,), 10.0),
    "write a column": (lambda x: _written(x), (4,), 1.0),
    "sigmoid tanh": (lambda x: x.sigmoid() * x.tanh(), (4,), 1.25),
    "exp": (lambda x: torch.exp(-x.relu()), (4,), 1.0),
    "reciprocal": (lambda x: 1 / (1 + x.relu()), (4,), 1.0),
    "square": (lambda x: x.clamp(-2, 1) ** 2, (4,), 4.0),
    "divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=1), (1, 4, 4), 2.0),
    "divisor, padded": (lambda x: F.avg_pool2d(x, 2, 1, 1, divisor_override=3), (1, 4, 4), None),
    "response": (lambda x: F.local_response_norm(x, 3, 1.0, 0.75, 2.0), (4, 2), None),
    "index_add": (lambda x: x.index_add(1, torch.tensor([0, 0, 1]), x[:, :3]), (4,), None),
    "scatter": (lambda x: x.scatter(1, PLACES.expand(x.shape[0], 2), 1.0), (4,), 1.0),
    "three factors": (lambda x: torch.einsum("bi,ij,jk->bk", x, MATRIX, MATRIX), (3,), None),
    "addmv": (lambda x: torch.addmv(x.new_zeros(x.shape[0]), x, MATRIX[0]), (3,), None),
    "inner": (lambda x: torch.inner(x, MATRIX), (3,), None),
    "bilinear": (
        lambda x: F.bilinear(x, MATRIX[:1].expand(x.shape[0], 3), MATRIX[None].relu()),
        (3,),
        None,
    ),
    "flat weight": (lambda x: F.linear(x, MATRIX[0])[:, None], (3,), None),
    "shuffle": (lambda x: _shuffled(F.conv2d(x, KERNEL)).contiguous().mean((2, 3)), CHANNELS, None),
}
PLACES = torch.tensor([[1, 2]])
MATRIX = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [2.0, 0.25, 1.0]], dtype=torch.float64)
KERNEL = torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(0)).double()


def test_a_choice_that_jumps_is_refused():
    for function in (
        lambda x: torch.where(x > 0, x, x + 1),
        lambda x: torch.where(x > 1, x, 2 * x),
        lambda x: torch.where(x > 0, x, 1.0),
    ):
        with pytest.raises(UncertifiableError, match="operation='gt'"):
            bound(function, 3)


def _written(x):
    x = x.clone()
    x[:, 0] = 0.0
    return x


def _shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@pytest.mark.parametrize("name", FINITE)
def test_what_has_a_finite_constant_is_bounded(name):
    function, shape, expected = FINITE[name]
    found = bound(function, *shape)
    assert found >= truth(function, *shape) * (1 - 1e-12)
    if expected is None:
        assert math.isfinite(found)
    else:
        assert expected * (1 - 1e-12) <= found <= expected * (1 + 1e-9)


def test_sparse_weights_are_refused_by_name():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", MATRIX.to_sparse())

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(UncertifiableError, match="weights must be dense tensors"):
        certify(Sparse().eval(), torch.zeros(1, 3, dtype=torch.float64))


def weighed(function, weights, *shape):
    """Behind a kink that hides it from a search, and with signed weights behind it."""
    row = torch.tensor([weights], dtype=torch.float64)
    return lambda x: F.linear(function((x - 1000).relu()).flatten(1), row)


UNCERTAIN = [n for n in range(2, 130) if not interpolation(2, n, "nearest", False, None).certain]


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(n, marks=[pytest.mark.slow] if place % 7 else [])
        for place, n in enumerate(UNCERTAIN)
    ],
)
def test_uncertain_places_of_nearest_entries_are_no_map_to_go_on_with(size):
    middle = size // 2
    weights = [0.0] * size
    weights[0], weights[middle], weights[-1] = -1.0, 1.0, -1.0
    function = weighed(lambda x: F.interpolate(x, size=size), weights)
    x = torch.full((1, 1, 2), 2000.0, dtype=torch.float64)
    least = float(torch.linalg.matrix_norm(jacobian_reference(Lambda(function), x[0]), 2))
    assert bound(function, 1, 2) >= least * (1 - 1e-12)


@pytest.mark.parametrize("scale", [-1.0, -0.5, math.nan, 0.0])
def test_scales_that_torch_does_not_take(scale):
    function = weighed(
        lambda x: ATEN.upsample_nearest1d.default(x, [4], scale), [1.0, -1.0, 0.0, 0.0]
    )
    assert bound(function, 1, 4) >= math.sqrt(2) * (1 - 1e-12)


LARGE = torch.tensor([1000000, 1000000])
HALF = torch.tensor([False, True])
BOUNDED = {
    "where": lambda x: torch.where(HALF, x.sigmoid(), LARGE),
    "masked_fill": lambda x: x.sigmoid().masked_fill(~HALF, LARGE[0]),
    "where not a number": lambda x: torch.where(HALF, x.sigmoid(), math.inf).clamp(0, 1e6),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_constants_of_every_dtype_count_in_an_interval(name):
    assert bound(lambda x: BOUNDED[name](x) * (x - 1000).sigmoid() * 4, 2) >= 1e6


def test_only_the_first_of_several_results_has_a_bound():
    with pytest.raises(UncertifiableError, match=r"only the first result|bounded from above"):
        bound(lambda x: (ATEN.log_sigmoid_forward.default(x - 1000)[1] * 9).exp(), 1)
    assert bound(lambda x: ATEN.log_sigmoid_forward.default(x)[0], 1) == 1.0


EXTREME = {
    "rsqrt": lambda x: (x.abs() + 1e-300).rsqrt(),
    "power": lambda x: x.relu() ** math.inf,
    "no power": lambda x: x.relu() ** math.nan,
    "response norm": lambda x: F.local_response_norm(x[:, None], 3, 1.0, 2.0, 1e-300),
}


@pytest.mark.parametrize("name", EXTREME)
def test_slopes_beyond_the_range_are_refused_in_a_sentence(name):
    with pytest.raises(UncertifiableError, match="got operation="):
        bound(EXTREME[name], 2)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_of_one_entry_is_constant(function):
    assert bound(lambda x: function(x, 1), 1, 3) == 0.0
    assert bound(lambda x: function(x, 1), 2, 3) > 0.4
