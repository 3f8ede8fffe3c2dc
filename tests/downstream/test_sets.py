"""Conformal sets: the constants of the scores, and coverage under attack."""

import functools
import math
import pickle

import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.downstream import (
    ConformalSets,
    calibrate_sets,
    conformal_scores,
    score_bounds,
    score_lipschitz,
)
from orthonet.downstream._scores import SCORES

IN_LOGITS = ("sigmoid", "softmax", "margin", "excess")


@functools.cache
def example(dtype=torch.float64, classes=4):
    """A network, its certificate, and samples with labels that it half predicts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, classes)).to(dtype).eval()
    model.requires_grad_(False)
    x = torch.randn(160, 3, dtype=dtype)
    logits = 4 * model(x)
    labels = torch.distributions.Categorical(logits=logits.double()).sample()
    return model, certify(model, x[:1], lower=False), x, labels


def attacked(model, x, labels, eps, steps=20):
    """Points within eps whose true label has a large score."""
    delta = torch.zeros_like(x)
    for step in range(steps):
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(point), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, point)
        delta = delta + 2 * eps * (1 - step / steps) * nn.functional.normalize(slope, dim=1)
        delta = delta * (eps / delta.norm(dim=1, keepdim=True).clamp_min(eps))
    while bool((far := (x + delta - x).double().norm(dim=1) > eps).any()):
        delta = torch.where(far[:, None], 0.99 * delta, delta)
    return x + delta


def test_scores_are_what_their_table_says():
    z = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
    p = (z / 0.5).softmax(1)
    expected = {
        "sigmoid": 1 - torch.sigmoid(z / 0.5),
        "softmax": 1 - p,
        "margin": torch.tensor([[-1.5, 1.5, 3.0]], dtype=torch.float64),
        "excess": torch.stack([(p - p[:, i : i + 1]).clamp_min(0).sum(1) for i in range(3)], 1),
    }
    for score in SCORES:
        found = conformal_scores(z.float(), score=score, temperature=0.5)
        torch.testing.assert_close(found, expected[score], rtol=0, atol=1e-14)  # observed 1e-16


def differentiable(z, score, temperature):
    """The score of class 0."""
    p = (z / temperature).softmax(-1)
    if score == "sigmoid":
        return 1 - torch.sigmoid(z[:, 0] / temperature)
    if score == "softmax":
        return 1 - p[:, 0]
    if score == "margin":
        return z[:, 1:].amax(1) - z[:, 0]
    return (p - p[:, :1]).clamp_min(0).sum(1)


@pytest.mark.parametrize("score", IN_LOGITS)
def test_the_constant_of_a_score_is_right_and_sharp(score):
    """The norm of the gradient stays below it, and comes near it."""
    generator = torch.Generator().manual_seed(0)
    steepest = 0.0
    for classes, temperature in ((2, 1.0), (3, 0.3), (10, 2.0), (400, 0.7)):
        z = torch.randn(4000, classes, generator=generator, dtype=torch.float64)
        z = z * torch.rand(4000, 1, generator=generator, dtype=torch.float64) * 4 * temperature
        z[:50] = 0.0  # the steepest place of sigmoid, softmax and margin
        z[:50, 0] = torch.linspace(-1e-6, -0.02, 50) * temperature  # and of excess
        z.requires_grad_()
        (slope,) = torch.autograd.grad(differentiable(z, score, temperature).sum(), z)
        constant = score_lipschitz(score, temperature)
        ratio = slope.norm(dim=1).max().item() / constant
        assert ratio <= 1 + 1e-12
        steepest = max(steepest, ratio)
    assert steepest > 0.99  # observed 1 - 3e-13 or more; of excess .9987 for 400 classes
    assert score_lipschitz("margin", 1.0) == score_lipschitz("margin", 5.0)


@pytest.mark.parametrize("score", IN_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_nearby_lie_between_the_bounds(score, dtype):
    """Random and attacked points, tiny and huge eps, temperatures that saturate."""
    model, certificate, x, labels = example(dtype)
    logits = model(x)
    for eps, temperature in ((0.0, 1.0), (1e-7, 0.01), (0.2, 0.3), (3.0, 1.0)):
        low, high = score_bounds(logits, certificate, eps, x, score=score, temperature=temperature)
        clean = conformal_scores(logits, score=score, temperature=temperature)
        assert (low <= clean).all() and (clean <= high).all()
        near = [attacked(model, x, labels, eps, 5)] if eps else [x]
        near += [x + eps * 0.999 * nn.functional.normalize(torch.randn_like(x), dim=1)]
        for point in near if eps else [x.clone()]:
            found = conformal_scores(model(point), score=score, temperature=temperature)
            assert (low <= found).all() and (found <= high).all()
        if eps == 0.2:  # not wider than the constant says
            reach = score_lipschitz(score, temperature) * certificate.constant.value * eps
            assert (high - clean).max() <= reach * (1 + 1e-3)
            assert (clean - low).max() <= reach * (1 + 1e-3)
            assert (high - low).max() > 0.05 * reach


@pytest.mark.parametrize("score", IN_LOGITS)
def test_robust_sets_cover_under_attack(score):
    """Every calibration of some; the law is exact, so its mean over splits is near it or above."""
    model, certificate, x, labels = example()
    logits, eps, alpha = model(x), 0.3, 0.2
    points = attacked(model, x, labels, eps)
    generator = torch.Generator().manual_seed(0)
    clean, broken, robust, bounds = [], [], [], []
    for _ in range(30):
        order = torch.randperm(len(x), generator=generator)
        first, rest = order[:80], order[80:]
        sets = calibrate_sets(logits[first], labels[first], alpha, score=score)
        at = sets.predict(model(points[rest]))
        grown = sets.robust(model(points[rest]), certificate, eps, points[rest])
        assert (at <= grown).all()  # robust sets contain the plain ones
        own = labels[rest][:, None]
        clean.append(sets.predict(logits[rest]).gather(1, own).double().mean())
        broken.append(at.gather(1, own).double().mean())
        robust.append(grown.gather(1, own).double().mean())
        worst = sets.worst_case(logits[rest], labels[rest], certificate, eps, x[rest])
        assert worst.lower <= broken[-1] <= worst.upper and worst.lower <= worst.clean
        assert worst.uniform <= worst.lower and worst.proved <= worst.lower
        assert worst.clean == clean[-1]
        bounds.append(worst.proved)
    # The standard error of 30 splits is below .01.
    assert torch.stack(clean).mean() >= 1 - alpha - 0.02  # observed .788 to .801
    assert torch.stack(robust).mean() >= 1 - alpha  # observed .938 to .991
    assert torch.stack(broken).mean() < 1 - alpha - 0.05  # the attack is one; observed .685 to .728


def test_at_eps_zero_a_robust_set_is_the_plain_one():
    model, certificate, x, labels = example()
    logits = model(x)
    for score in IN_LOGITS:
        sets = calibrate_sets(logits, labels, 0.3, score=score)
        same = sets.robust(logits, certificate, 0.0, None) == sets.predict(logits)
        assert same.double().mean() > 0.99  # the score at the threshold itself may differ
    larger = [sets.robust(logits, certificate, eps, x).sum() for eps in (0.0, 0.1, 0.5, 50.0)]
    assert larger == sorted(larger) and larger[-1] == logits.numel()


def test_the_rounding_of_half_the_digits_counts():
    """With the rounding of a float32 forward, the bounds of a float32 network are wider."""
    _, fine, x, _ = example()
    model, coarse, x32, _ = example(torch.float32)
    logits = model(x32)
    inside = score_bounds(logits, coarse, 0.1, None, score="margin")
    outside = score_bounds(logits, coarse, 0.1, x32, score="margin")
    assert (outside[0] < inside[0]).all() and (inside[1] < outside[1]).all()
    with pytest.raises(ValueError, match="dtype that was certified"):
        score_bounds(logits, fine, 0.1, x, score="margin")


def test_pairs_of_the_last_layer_are_used():
    """Of a last layer with two equal rows the probabilities cannot move, however far inputs do."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
        x = torch.randn(5, 3, dtype=torch.float64)
        low, high = score_bounds(model(x), certify(model, x[:1], lower=False), 100.0, None)
    assert (high - low).max() < 1e-11  # the slack of computed scores; observed 1.1e-12


def test_too_few_samples_hold_everything():
    model, certificate, x, labels = example()
    with pytest.warns(UserWarning, match="Calibrate on at least 19 samples"):
        sets = calibrate_sets(model(x[:18]), labels[:18], 0.05)
    assert sets.threshold == math.inf
    assert sets.predict(model(x)).all() and sets.robust(model(x), certificate, 1.0, x).all()
    assert pickle.loads(pickle.dumps(sets)) == sets


GOOD = torch.zeros(3, 4, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: calibrate_sets(GOOD[:, :1], LABELS), "two classes"),
        (lambda c: calibrate_sets(GOOD[0], LABELS), "two classes"),
        (lambda c: calibrate_sets(GOOD[:0], LABELS[:0]), "with a sample"),
        (lambda c: calibrate_sets(GOOD * math.nan, LABELS), "logits must be finite"),
        (lambda c: calibrate_sets(GOOD, LABELS + 2), "class indices from 0 to 3"),
        (lambda c: calibrate_sets(GOOD, LABELS - 1), "class indices"),
        (lambda c: calibrate_sets(GOOD, LABELS.double()), "class indices"),
        (lambda c: calibrate_sets(GOOD, LABELS[:2]), "class indices"),
        (lambda c: calibrate_sets(GOOD, LABELS, 1.5), "alpha must be"),
        (lambda c: calibrate_sets(GOOD, LABELS, score="aps"), "score must be one of"),
        (lambda c: calibrate_sets(GOOD, LABELS, temperature=0.0), "temperature must be"),
        (lambda c: ConformalSets(math.nan, 0.1, 9), "threshold must be"),
        (lambda c: ConformalSets(1.0, 0.1, 9, "aps"), "score must be one of"),
        (lambda c: ConformalSets(1.0, 2.0, 9), "alpha must be"),
        (lambda c: score_lipschitz("raps"), "score must be one of"),
        (lambda c: ConformalSets(1.0, 0.1, 9).robust(GOOD, c, -1.0, None), "eps must be"),
        (lambda c: ConformalSets(1.0, 0.1, 9).robust(GOOD, c, math.inf, None), "eps must be"),
        (lambda c: ConformalSets(1.0, 0.1, 9).robust(GOOD, 1.0, 0.1, None), "certificate must be"),
        (
            lambda c: ConformalSets(1.0, 0.1, 9).robust(GOOD[:, :3], c, 0.1, None),
            "which has 4",
        ),
        (
            lambda c: ConformalSets(1.0, 0.1, 9).robust(GOOD, c, 0.1, torch.zeros(2, 3)),
            "one input for each row",
        ),
        (
            lambda c: ConformalSets(1.0, 0.1, 9).worst_case(
                GOOD, LABELS, c, 0.1, None, confidence=1.0
            ),
            "confidence must be",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(example()[1])


@pytest.mark.parametrize("score", IN_LOGITS)
def test_equal_logits_have_equal_sets_at_every_place_of_a_batch(score):
    # Vectors and their tails are computed by other instructions, and sums of other layouts in
    # another order: scores differed by 1e-16, and the class of all calibration samples was missing.
    torch.manual_seed(0)
    rows = [*3 * torch.randn(100, 1, 2), *3 * torch.randn(100, 1, 10)]
    for z in [torch.tensor([[4.032210826873779, 7.149658203125]]), *rows]:
        sets = calibrate_sets(z.expand(8, -1), torch.ones(8, dtype=torch.long), 0.2, score=score)
        assert sets.predict(z)[0, 1]
        assert sets.predict(z.expand(8, -1).T.contiguous().T)[:, 1].all()
