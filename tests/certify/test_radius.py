import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from orthonet import UncertifiableError, layers
from orthonet.certify import (
    Bound,
    LipschitzCertificate,
    attack_certificate,
    certified_accuracy,
    certify,
)


def certificate(constant=2.0, pairs=None) -> LipschitzCertificate:
    return LipschitzCertificate(Bound(constant), (), (4,), pairs)


def test_radius_without_pairs_is_the_margin_over_root_two():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25]], dtype=torch.float64)
    radius = certificate().radius(logits)
    assert radius.dtype == torch.float64
    # rounded downward by a few units in the last place
    assert radius.tolist() == pytest.approx([2 / math.sqrt(8), 0.25 / math.sqrt(8)], rel=1e-14)
    assert Fraction(radius[0].item()) ** 2 * 8 <= 4


def test_ties_have_radius_zero():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert certificate().radius(logits).tolist() == [0.0, 0.0]
    assert certificate(0.0).radius(logits).tolist() == [0.0, 0.0]
    assert certificate(0.0).radius(torch.tensor([[1.0, 0.0]])).tolist() == [math.inf]


def test_binary_classifiers():
    vector = torch.tensor([4.0, -1.0, 0.0], dtype=torch.float64)
    for logits in (vector, vector[:, None]):
        assert certificate().radius(logits).tolist() == pytest.approx([2.0, 0.5, 0.0], rel=1e-15)
        share = certificate().certified_accuracy(logits, torch.tensor([1, 0, 0]), [0.0, 1.0])
        assert share == [1.0, pytest.approx(1 / 3)]


def test_linear_classifier_has_the_exact_distance():
    model = nn.Linear(5, 4).double().eval()
    x = torch.randn(50, 5, dtype=torch.float64)
    logits = model(x).detach()
    radius = certify(model, x).radius(logits)
    weight = model.weight.detach()
    top, y = logits.max(1)
    for i in range(50):
        truth = min(
            float((top[i] - logits[i, j]) / (weight[y[i]] - weight[j]).norm())
            for j in range(4)
            if j != y[i]
        )
        # never above the distance; allowed 1e-12 below, observed 2e-14
        assert truth * (1 - 1e-12) <= radius[i] <= truth


def test_pairs_are_outward_and_below_the_generic_constant():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    found = certify(model, torch.zeros(1, 6, dtype=torch.float64), effort="fast")
    features = Fraction(found.rows[-2].cumulative)
    rows = [[Fraction(v) for v in row] for row in model[2].weight.tolist()]
    for i in range(3):
        for j in range(3):
            square = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
            assert Fraction(found.pairs[i, j].item()) ** 2 >= square * features**2
    assert found.pairs.max() <= math.sqrt(2) * found.constant.value * (1 + 1e-15)
    logits = torch.randn(40, 3)
    generic = LipschitzCertificate(found.constant, (), (6,))
    assert bool((found.radius(logits) >= generic.radius(logits)).all())


def test_equal_rows_cannot_swap():
    model = nn.Linear(3, 3, bias=False).double().eval()
    with torch.no_grad():
        model.weight[1] = model.weight[0]
    pairs = certify(model, torch.zeros(1, 3, dtype=torch.float64)).pairs
    assert pairs[0, 1] == 0.0
    assert pairs[0, 2] > 0.0


def test_the_class_does_not_change_inside_the_radius():
    model = nn.Sequential(
        layers.OrthoLinear(6, 16), layers.MaxMin(), layers.UnitNormLinear(16, 4)
    ).eval()
    x = torch.randn(300, 6)
    found = certify(model, x)
    with torch.no_grad():
        logits = model(x)
        radius = found.radius(logits)
        for _ in range(20):
            step = torch.randn(300, 6, dtype=torch.float64)
            step *= 0.999 * (radius / step.norm(dim=1))[:, None]
            moved = model((x + step).float())
            assert torch.equal(moved.argmax(1), logits.argmax(1))


def test_certified_accuracy_counts():
    model = nn.Sequential(layers.OrthoLinear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight = torch.eye(2)
    x = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    y = torch.tensor([0, 0, 0, 1])
    found = certify(model, x)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    radii = [0.0, 0.5, 1.0, 2.0, 3.0]
    expected = [0.75, 0.75, 0.5, 0.25, 0.0]  # distances 1.41, 0.71, wrong, 2.12
    assert certified_accuracy(model, loader, radii, found) == expected
    assert found.certified_accuracy(model(x), y, radii) == expected


def test_errors():
    with pytest.raises(ValueError, match="logits must be finite"):
        certificate().radius(torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(ValueError, match="logits must be finite"):
        certificate().radius(torch.tensor([[math.inf, 0.0]]))
    with pytest.raises(ValueError, match="must be \\(N, classes\\)"):
        certificate().radius(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="logits must have 3 classes"):
        certificate(pairs=torch.ones(3, 3)).radius(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one label for each sample"):
        certificate().certified_accuracy(torch.zeros(2, 3), torch.zeros(3), [0.0])
    with pytest.raises(ValueError, match="the loader must not be empty"):
        certified_accuracy(nn.Identity().eval(), [], [0.0], certificate())
    with pytest.raises(ValueError, match="eval mode"):
        certified_accuracy(nn.Identity(), [], [0.0], certificate())


def test_other_norms_labels_and_targets():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25], [1.0, 1.0, 0.0]]).double()
    found = certificate()
    plain = found.radius(logits)
    assert torch.equal(found.radius(logits, norm="l1"), plain)
    linf = found.radius(logits, norm="linf")
    assert bool((linf * 2 <= plain).all())  # four entries; rounded downward
    assert linf.tolist() == pytest.approx((plain / 2).tolist(), rel=1e-14)
    labels = torch.tensor([0, 2, 0])
    assert found.radius(logits, labels=labels).tolist() == [plain[0].item(), 0.0, 0.0]
    aimed = found.radius(logits, target=torch.tensor([2, 0, 2]))
    assert aimed.tolist() == pytest.approx([3 / math.sqrt(8), 0.5 / math.sqrt(8), 0.0], rel=1e-14)
    assert 1.0 <= found.band(0.5) <= 1.0 + 1e-15 and found.band(0.5, norm="linf") >= 2.0
    curve = found.curve(logits, labels)
    assert curve.clean == pytest.approx(2 / 3) and curve.area == pytest.approx(plain[0].item() / 3)
    for bad in ({"norm": "l3"}, {"labels": torch.zeros(3)}, {"target": torch.tensor([0, 1, 3])}):
        with pytest.raises(ValueError, match="LipschitzCertificate"):
            found.radius(logits, **bad)
    with pytest.raises(ValueError, match="non-negative"):
        found.band(-1.0)


def test_tight_effort_is_smaller_and_holds_against_an_attack():
    model = (
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        .double()
        .eval()
    )
    x = torch.rand(40, 6, dtype=torch.float64)
    loose, tight = certify(model, x), certify(model, x, effort="tight")
    assert tight.constant.value < 0.8 * loose.constant.value  # 0.58 observed
    assert "LipSDP" in tight.rows[-1].method
    logits = model(x).detach()
    assert bool((tight.radius(logits) >= loose.radius(logits)).all())
    assert (
        attack_certificate(model, tight, x, logits.argmax(1), restarts=3, bounds=None).broken == 0
    )


@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 6), (5, 7), ()])
def test_inputs_that_do_not_fit_are_refused(shape):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()
    found = certify(model, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="one sample for each row of the logits"):
        found.radius(torch.randn(5, 3), inputs=torch.zeros(shape))
    assert len(found.radius(torch.randn(5, 3), inputs=torch.zeros(5, 2, 3))) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 3])
def test_logits_lose_at_least_the_rounding_of_their_dtype(dtype, classes):
    """R6: the radius of rounded logits lies below that of any exact logits that round to them."""
    logits = torch.randn(200, classes, dtype=torch.float64).to(dtype)
    info = torch.finfo(dtype)
    unit, tiny = Fraction(info.eps) / 2, 4 * Fraction(info.smallest_normal) * Fraction(info.eps)
    slack = Fraction(2) ** -48  # of the float64 roundings of the radius itself, 8 of 2^-53
    for row, found in zip(logits.tolist(), certificate().radius(logits).tolist(), strict=True):
        exact, radius = [Fraction(v) for v in row], Fraction(found)
        if classes == 1:
            size = abs(exact[0])
            assert radius * 2 < size * (1 - unit) or found == 0.0
            assert radius * 2 >= (size * (1 - 2 * unit) - tiny) * (1 - slack)
            continue
        top = max(exact)
        margins = [(top - v, unit * (abs(top) + abs(v))) for v in exact if v != top]
        worst = max(Fraction(0), min(margin - off for margin, off in margins))
        assert radius**2 * 8 < worst**2 or found == 0.0
        # and no more than one further rounding of each logit, for the other point
        least = max(Fraction(0), min(margin - 2 * off - tiny for margin, off in margins))
        root = Fraction(math.sqrt(8)) * (1 + slack)
        assert radius * root >= least - slack * max(map(abs, exact))


def test_logits_of_a_float32_model_carry_its_rounding_in_float64_too():
    model = nn.Linear(5, 4).eval()
    x = torch.randn(50, 5)
    found, logits = certify(model, x), model(x).detach()
    assert torch.equal(found.radius(logits.double()), found.radius(logits))
    assert bool((found.radius(model.double()(x.double()).detach()) > 0).all())


def test_the_ends_of_the_range_round_downward():
    """R3: margins near the overflow and among the subnormal numbers."""
    largest = torch.finfo(torch.float64).max
    found = certificate(1.0).radius(torch.tensor([[largest, -largest]], dtype=torch.float64))
    assert (
        0.0 < found.item() < math.inf
        and Fraction(found.item()) ** 2 * 2 <= (2 * Fraction(largest)) ** 2
    )
    tiny = torch.tensor([[5e-324, 0.0], [1e-320, 0.0], [2.0, 2.0 - 2.0**-52]], dtype=torch.float64)
    for constant in (1e-300, 0.75, 1.0, 3.0):
        radii = certificate(constant).radius(tiny).tolist()
        for radius, (a, b) in zip(radii, tiny.tolist(), strict=True):
            assert (
                Fraction(radius) ** 2 * 2 * Fraction(constant) ** 2
                <= (Fraction(a) - Fraction(b)) ** 2
            )
    steep = certificate(1e-300).radius(torch.tensor([[1e300, 0.0]], dtype=torch.float64)).item()
    assert steep == largest  # the quotient overflows, the distance is finite
    flat = certificate(1.0).radius(torch.tensor([[1e-320, 0.0]]).double(), norm="linf").item()
    assert Fraction(flat) ** 2 * 8 <= Fraction(1e-320) ** 2


@pytest.mark.parametrize("shape", [(3,), (5,), (5, 1), (5, 4)])
def test_logits_of_another_number_of_classes_are_refused(shape):
    """R5: one sample of three classes is not three samples of a binary classifier."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()).eval()
    found = certify(model, torch.zeros(1, 6))
    assert found.output_shapes == ((3,),)
    with pytest.raises(ValueError, match="logits must have 3 classes"):
        found.radius(torch.randn(shape))
    with pytest.raises(ValueError, match="logits must have 3 classes"):
        found.certified_accuracy(torch.randn(shape), torch.zeros(shape[0]).long(), [0.0])
    with pytest.raises(ValueError, match="logits must have 3 classes"):
        found.radius(torch.randn(shape), inputs=torch.zeros(shape[0], 6))
    binary = certify(nn.Sequential(nn.Linear(6, 1)).eval(), torch.zeros(1, 6))
    assert len(binary.radius(torch.randn(5))) == len(binary.radius(torch.randn(5, 1))) == 5
    with pytest.raises(ValueError, match="logits must have 1 classes"):
        binary.radius(torch.randn(5, 2))


def test_floats_change_a_class_that_exact_arithmetic_never_changes():
    """Two equal rows: the difference of the logits is constant, until x swallows the bias."""
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([0.0, 1.0]))
    found, x = certify(model, torch.zeros(1, 2)), torch.zeros(1, 2)
    for options in ({}, {"target": torch.tensor([0])}):
        radius = float(found.radius(model, x, **options))
        assert 1e4 < radius < 1e8 * math.sqrt(2)  # where it changes; observed 1e6
    far = torch.full((1, 2), radius / math.sqrt(2))
    assert model(x).argmax() == model(far).argmax() == model(-far).argmax() == 1


class Absorbing(nn.Module):
    """A function whose rounding is that of 1e7."""

    def forward(self, x):
        total = ((x + 1e7) - 1e7).sum(1)
        return torch.stack([-total, total], 1)


def test_a_forward_pass_in_another_dtype_than_the_certified_one_is_refused():
    model = Absorbing().eval()
    found = certify(model, torch.zeros(1, 1, dtype=torch.float64))
    x = torch.tensor([[0.6]])
    assert float(found.radius(model, x.double())) > 0.5
    with pytest.raises(ValueError, match="of the dtypes that were certified"):
        found.radius(model, x)
    with pytest.raises(ValueError, match="of the dtypes that were certified"):
        found.radius(model(x.double()).float(), inputs=x.double())
    assert float(certify(model, x).radius(model, x)) == 0.0


def test_the_forward_pass_sees_a_copy_of_the_inputs():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 1.0
            x.zero_()
            return torch.stack([-y[:, 0], y[:, 0]], 1)

    model, x = Writes().eval(), torch.tensor([[3.0, 1.0]])
    before = x.clone()
    try:
        found = certify(model, torch.zeros(1, 2))
    except UncertifiableError:
        return  # a forward that writes to its input may be refused as well
    assert torch.equal(found.radius(model, x), found.radius(model(x.clone()), inputs=before))
    assert torch.equal(x, before)


def test_low_precision_counts_wherever_float32_is_computed():
    class Widened(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x).double()

    model, x = Widened().eval(), torch.randn(2, 3)
    found = certify(model, x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(UncertifiableError, match="float32"):
            found.radius(model, x)
    finally:
        torch.set_float32_matmul_precision(before)
