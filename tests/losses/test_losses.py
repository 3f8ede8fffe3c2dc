"""Every loss against its formula written out slowly, its gradient, its limits and its errors."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from orthonet import losses
from orthonet.losses import (
    HKRLoss,
    HKRMulticlassLoss,
    KRLoss,
    OffsetCrossEntropyLoss,
    SoftHKRMulticlassLoss,
    hinge_kr,
    hinge_kr_multiclass,
    kr,
    offset_cross_entropy,
    soft_hinge_kr_multiclass,
)

# Both sides are float64 sums of at most 30 terms of order 1; the largest difference observed
# between a loss and its slow twin is 4e-16.
EXACT = {"rtol": 1e-13, "atol": 1e-13}


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(12, 5, dtype=torch.float64)


@pytest.fixture
def classes() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 3])


def slow_offset_cross_entropy(s, y, offset, temperature):
    rows = []
    for row, k in zip(s, y.tolist(), strict=True):
        gaps = [row[k] - row[j] for j in range(len(row)) if j != k]
        total = sum(math.exp((offset - gap) / temperature) for gap in gaps)
        rows.append(temperature * math.log1p(total))
    return torch.tensor(rows, dtype=torch.float64)


def slow_kr(f, positive):
    up, down = f[positive], f[~positive]
    return down.mean() - up.mean()


def slow_multiclass(f, y, alpha, margin):
    q = f.shape[1]
    distance = sum(slow_kr(f[:, k], y == k) for k in range(q)) / q
    hinge = 0.0
    for row, k in zip(f.tolist(), y.tolist(), strict=True):
        others = [max(0.0, margin + row[j]) for j in range(q) if j != k]
        hinge += max(0.0, margin - row[k]) + sum(others) / (q - 1)
    return (1 - alpha) * distance + alpha * hinge / len(y)


def slow_soft(f, y, alpha, margin, temperature):
    rows = []
    for row, k in zip(f.tolist(), y.tolist(), strict=True):
        others = [row[j] for j in range(len(row)) if j != k]
        weights = [math.exp(g / temperature) for g in others]
        pairs = [(w / sum(weights), g) for w, g in zip(weights, others, strict=True)]
        distance = -row[k] + sum(w * g for w, g in pairs)
        hinge = max(0.0, margin - row[k]) + sum(w * max(0.0, margin + g) for w, g in pairs)
        rows.append((1 - alpha) * distance + alpha * hinge)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 0.5, math.sqrt(2)])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_offset_cross_entropy_is_its_formula(scores, classes, offset, temperature):
    got = offset_cross_entropy(
        scores, classes, offset=offset, temperature=temperature, reduction="none"
    )
    expected = slow_offset_cross_entropy(scores, classes, offset, temperature)
    torch.testing.assert_close(got, expected, **EXACT)


def test_offset_cross_entropy_without_offset_is_cross_entropy(scores, classes):
    got = offset_cross_entropy(scores, classes, offset=0.0)
    torch.testing.assert_close(got, F.cross_entropy(scores, classes), **EXACT)


def test_offset_is_sqrt_2_times_the_radius():
    """A cold loss vanishes exactly where the certified radius of a 1-Lipschitz net is reached."""
    radius = 0.5
    offset = math.sqrt(2) * radius
    gap = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64) * offset
    logits = torch.stack([gap, torch.zeros_like(gap), torch.full_like(gap, -5.0)], 1)
    loss = offset_cross_entropy(
        logits, torch.zeros(3, dtype=torch.long), offset=offset, temperature=1e-4, reduction="none"
    )
    assert loss[0].item() == pytest.approx(0.1 * offset, rel=1e-9)
    assert loss[1].item() == pytest.approx(1e-4 * math.log(2), rel=1e-9)
    assert loss[2].item() < 1e-300  # exp(-.07 / 1e-4); observed 0
    certified = gap / math.sqrt(2)
    assert (certified >= radius - 1e-12).tolist() == (loss < 1e-3).tolist()


def test_offset_cross_entropy_stays_finite_in_float32():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = offset_cross_entropy(logits, torch.tensor([0, 0]), offset=1.0, temperature=1e-3)
    loss.backward()
    assert loss.item() == pytest.approx((2e4 + 1) / 2, rel=1e-6)
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("labels", ["booleans", "zero_one", "signs"])
def test_kr_is_the_difference_of_the_means(labels):
    f = torch.randn(9, dtype=torch.float64)
    positive = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 0]).bool()
    kinds = {"booleans": positive, "zero_one": positive.long(), "signs": 2.0 * positive - 1}
    target = kinds[labels]
    torch.testing.assert_close(kr(f, target), slow_kr(f, positive), **EXACT)
    torch.testing.assert_close(kr(f[:, None], target[:, None]), slow_kr(f, positive), **EXACT)


def test_kr_averages_several_classifiers():
    f = torch.randn(8, 3, dtype=torch.float64)
    positive = torch.rand(8, 3) > 0.5
    positive[0], positive[1] = True, False
    expected = sum(slow_kr(f[:, k], positive[:, k]) for k in range(3)) / 3
    torch.testing.assert_close(kr(f, positive), expected, **EXACT)


@pytest.mark.parametrize("positive", [True, False])
def test_kr_of_a_batch_with_one_class_is_finite(positive):
    f = torch.randn(6, dtype=torch.float64, requires_grad=True)
    loss = kr(f, torch.full((6,), positive))
    loss.backward()
    torch.testing.assert_close(loss, -f.mean() if positive else f.mean(), **EXACT)
    torch.testing.assert_close(f.grad.abs(), torch.full_like(f, 1 / 6), **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("margin", [0.25, 1.5])
def test_hinge_kr_is_its_formula(alpha, margin):
    f = torch.randn(10, dtype=torch.float64)
    y = torch.tensor([1, 0] * 5)
    hinge = sum(
        max(0.0, margin - (2 * k - 1) * v) for v, k in zip(f.tolist(), y.tolist(), strict=True)
    )
    expected = (1 - alpha) * slow_kr(f, y > 0) + alpha * hinge / 10
    got = hinge_kr(f, y, alpha=alpha, margin=margin)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("margin", [0.25, 1.5])
def test_multiclass_hinge_kr_is_its_formula(scores, classes, alpha, margin):
    got = hinge_kr_multiclass(scores, classes, alpha=alpha, margin=margin)
    torch.testing.assert_close(got, slow_multiclass(scores, classes, alpha, margin), **EXACT)


def test_multiclass_hinge_of_two_opposite_scores_is_twice_the_binary_one():
    f = torch.randn(8, dtype=torch.float64)
    y = torch.tensor([0, 1] * 4)
    both = hinge_kr_multiclass(torch.stack([-f, f], 1), y, alpha=1.0, margin=0.7)
    torch.testing.assert_close(both, 2 * hinge_kr(f, y, alpha=1.0, margin=0.7), **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("margin", "temperature"), [(0.25, 1.0), (1.5, 1.0), (1.5, 0.1)])
def test_soft_hinge_kr_is_its_formula(scores, classes, alpha, margin, temperature):
    got = soft_hinge_kr_multiclass(
        scores, classes, alpha=alpha, margin=margin, temperature=temperature, reduction="none"
    )
    expected = slow_soft(scores, classes, alpha, margin, temperature)
    torch.testing.assert_close(got, expected, **EXACT)


def test_cold_soft_hinge_kr_looks_at_the_runner_up():
    f = torch.tensor([[0.2, 0.9, 0.5, -3.0]], dtype=torch.float64)
    loss = soft_hinge_kr_multiclass(f, torch.tensor([0]), alpha=0.0, temperature=1e-3)
    assert loss.item() == pytest.approx(0.9 - 0.2, rel=1e-12)


CASES = [
    (offset_cross_entropy, {"offset": 1.0, "temperature": 0.5}, "classes"),
    (kr, {}, "binary"),
    (hinge_kr, {"alpha": 0.5, "margin": 0.8}, "binary"),
    (hinge_kr_multiclass, {"alpha": 0.5, "margin": 0.8}, "classes"),
    (soft_hinge_kr_multiclass, {"alpha": 0.5, "margin": 0.8, "temperature": 0.6}, "classes"),
    (losses.lse_hinge_kr_multiclass, {"alpha": 0.5, "margin": 0.8, "temperature": 0.6}, "classes"),
    (losses.tau_bce_with_logits, {"tau": 3.0}, "binary"),
]
IDS = [case[0].__name__ for case in CASES]


def sample(kind):
    if kind == "binary":
        return torch.randn(7, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 0, 1])
    return torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3, 1, 0])


@pytest.mark.parametrize(("loss", "arguments", "kind"), CASES, ids=IDS)
def test_gradient(loss, arguments, kind):
    x, y = sample(kind)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y, reduction="none", **arguments), (x,))


@pytest.mark.parametrize(("loss", "arguments", "kind"), CASES, ids=IDS)
def test_reductions(loss, arguments, kind):
    x, y = sample(kind)
    each = loss(x, y, reduction="none", **arguments)
    assert each.shape == (7,)
    torch.testing.assert_close(loss(x, y, reduction="sum", **arguments), each.sum(), **EXACT)
    torch.testing.assert_close(loss(x, y, reduction="mean", **arguments), each.mean(), **EXACT)
    torch.testing.assert_close(loss(x, y, **arguments), each.mean(), **EXACT)


MODULES = [
    (OffsetCrossEntropyLoss, offset_cross_entropy, {"offset": 0.7, "temperature": 0.4}, "classes"),
    (KRLoss, kr, {}, "binary"),
    (HKRLoss, hinge_kr, {"alpha": 0.3, "margin": 0.8}, "binary"),
    (HKRMulticlassLoss, hinge_kr_multiclass, {"alpha": 0.3, "margin": 0.8}, "classes"),
    (
        SoftHKRMulticlassLoss,
        soft_hinge_kr_multiclass,
        {"alpha": 0.3, "margin": 0.8, "temperature": 0.4},
        "classes",
    ),
    (
        losses.LseHKRMulticlassLoss,
        losses.lse_hinge_kr_multiclass,
        {"alpha": 0.3, "margin": 0.8, "temperature": 0.4},
        "classes",
    ),
    (losses.TauBCEWithLogitsLoss, losses.tau_bce_with_logits, {"tau": 3.0}, "binary"),
    (losses.EMMALoss, losses.emma, {"radius": 0.4, "lipschitz": 2.0}, "classes"),
    (
        losses.LogitAnnealingLoss,
        losses.logit_annealing,
        {"offset": 0.6, "temperature": 0.4, "beta": 2.0},
        "classes",
    ),
    (
        losses.CertificateRegularizationLoss,
        losses.certificate_regularization,
        {"weight": 0.7},
        "classes",
    ),
    (losses.MultiMarginLoss, losses.multi_margin, {"margin": 0.8}, "classes"),
    (losses.TRADESLoss, losses.trades, {"beta": 0.7}, "two"),
]
MODULE_IDS = [case[0].__name__ for case in MODULES]


@pytest.mark.parametrize(("module", "function", "arguments", "kind"), MODULES, ids=MODULE_IDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_module_is_its_function(module, function, arguments, kind, reduction):
    x, y = sample("classes" if kind == "two" else kind)
    given = (x, x.flip(1), y) if kind == "two" else (x, y)
    loss = module(**arguments, reduction=reduction)
    expected = function(*given, **arguments, reduction=reduction)
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(same(*given), expected)
    for name, value in {**arguments, "reduction": reduction}.items():
        assert f"{name}={value!r}" in repr(loss)


@pytest.mark.parametrize(("module", "function", "arguments", "kind"), MODULES, ids=MODULE_IDS)
def test_module_has_the_defaults_of_its_function(module, function, arguments, kind):
    ours = inspect.signature(module).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert ours[name].default == parameter.default


@pytest.mark.parametrize("module", [KRLoss, HKRLoss, HKRMulticlassLoss, SoftHKRMulticlassLoss])
def test_defaults_work(module):
    x, y = sample("classes" if "Multiclass" in module.__name__ else "binary")
    x.requires_grad_()
    module()(x, y).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_target_may_be_a_narrow_integer(scores, classes):
    expected = hinge_kr_multiclass(scores, classes)
    assert torch.equal(hinge_kr_multiclass(scores, classes.to(torch.uint8)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OffsetCrossEntropyLoss(-1.0), "OffsetCrossEntropyLoss: offset must be"),
        (lambda: OffsetCrossEntropyLoss(math.inf), "offset=inf"),
        (lambda: OffsetCrossEntropyLoss(1.0, 0.0), "temperature must be a finite number > 0"),
        (lambda: OffsetCrossEntropyLoss(1.0, math.nan), "temperature=nan"),
        (lambda: OffsetCrossEntropyLoss(1.0, 1.0, "avg"), "reduction must be one of 'none'"),
        (lambda: KRLoss("avg"), "KRLoss: reduction"),
        (lambda: HKRLoss(alpha=10.0), r"HKRLoss: alpha must be a number in \[0, 1\]"),
        (lambda: HKRLoss(margin=0.0), "margin=0.0"),
        (lambda: HKRLoss(margin=True), "margin=True"),
        (lambda: HKRMulticlassLoss(alpha=-0.1), "HKRMulticlassLoss: alpha"),
        (lambda: SoftHKRMulticlassLoss(temperature=-1), "SoftHKRMulticlassLoss: temperature"),
        (lambda: losses.EMMALoss(-1.0), "EMMALoss: radius"),
        (lambda: losses.EMMALoss(1.0, 0.0), "EMMALoss: lipschitz"),
        (lambda: losses.LogitAnnealingLoss(beta=-1.0), "LogitAnnealingLoss: beta"),
        (lambda: losses.LogitAnnealingLoss(temperature=0.0), "temperature must be"),
        (lambda: losses.CertificateRegularizationLoss(-1.0), "weight=-1"),
        (lambda: losses.TRADESLoss(beta=-1.0), "TRADESLoss: beta"),
        (lambda: losses.MultiMarginLoss(0.0), "MultiMarginLoss: margin"),
        (lambda: losses.MultiMarginLoss(reduction="avg"), "MultiMarginLoss: reduction"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"logits must be \(batch, classes\)"),
        (torch.zeros(3, 1), torch.zeros(3).long(), "at least two classes"),
        (torch.zeros(3, 2), torch.zeros(4).long(), "one class index for each row"),
        (torch.zeros(3, 2), torch.zeros(3, 2), r"target.argmax\(1\)"),
        (torch.zeros(3, 2), torch.zeros(3).bool(), "one class index"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "largest=2"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), "smallest=-1"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), "floating-point"),
    ],
)
def test_bad_classes_are_refused(logits, target, message):
    for loss in (OffsetCrossEntropyLoss(1.0), HKRMulticlassLoss(), SoftHKRMulticlassLoss()):
        with pytest.raises(ValueError, match=message):
            loss(logits, target)


@pytest.mark.parametrize("loss", [KRLoss(), HKRLoss()])
def test_bad_binary_targets_are_refused(loss):
    with pytest.raises(ValueError, match="the same shape"):
        loss(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="the same shape"):
        loss(torch.tensor(0.0), torch.tensor(1))


def test_smooth_maximum_and_tempered_losses_are_their_formulas(scores, classes):
    alpha, margin, temperature = 0.3, 0.8, 0.4
    rows = []
    for row, k in zip(scores, classes.tolist(), strict=True):
        others = [math.exp(row[j] / temperature) for j in range(len(row)) if j != k]
        largest = temperature * math.log(sum(others))
        hinge = max(0.0, margin - row[k]) + max(0.0, margin + largest)
        rows.append((1 - alpha) * (largest - row[k]) + alpha * hinge)
    each = losses.lse_hinge_kr_multiclass(
        scores, classes, alpha=alpha, margin=margin, temperature=temperature, reduction="none"
    )
    torch.testing.assert_close(each, torch.tensor(rows, dtype=torch.float64), **EXACT)
    x, y = sample("binary")
    slow = [math.log1p(math.exp(-3.0 * f * (2 * t - 1))) / 3.0 for f, t in zip(x, y, strict=True)]
    each = losses.tau_bce_with_logits(x, y, tau=3.0, reduction="none")
    torch.testing.assert_close(each, torch.tensor(slow, dtype=torch.float64), **EXACT)
    tempered = F.cross_entropy(5.0 * scores, classes) / 5.0
    ours = offset_cross_entropy(scores, classes, offset=0.0, temperature=0.2)
    torch.testing.assert_close(ours, tempered, **EXACT)


def test_labels_made_for_the_whole_batch_serve_its_parts(scores, classes):
    """Two devices that average their share of labels times scores have the loss of the batch."""
    one_hot = F.one_hot(classes, scores.shape[1])
    labels = losses.kr_labels(one_hot.double())
    parts = zip(labels.chunk(2), scores.chunk(2), strict=True)
    shared = torch.stack([(a * b).mean() for a, b in parts]).mean()
    torch.testing.assert_close(-shared, kr(scores, one_hot), **EXACT)
    assert torch.equal(losses.kr_labels(torch.ones(3, 1)), torch.ones(3, 1))
    assert torch.equal(losses.kr_labels(torch.zeros(3)), -torch.ones(3))
    assert not losses.kr_labels(torch.tensor([True, False])).isnan().any()


def test_losses_compile_in_one_graph(scores, classes):
    loss = SoftHKRMulticlassLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, classes), loss(scores, classes))


def test_every_module_is_in_the_table():
    modules = {name for name in losses.__all__ if name.endswith("Loss")}
    assert modules == set(MODULE_IDS)
