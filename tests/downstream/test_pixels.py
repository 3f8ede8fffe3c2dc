"""Radii of pixels: no attack inside them turns a pixel, nor more pixels than the bound says."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn

from orthonet.certify import LipschitzCertificate, certify
from orthonet.certify._bound import Bound
from orthonet.downstream import certified_pixel_accuracy, pixel_radii
from orthonet.layers import MaxMin, OrthoConv2d


@functools.cache
def example(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        OrthoConv2d(2, 4, 3, padding=1), MaxMin(), OrthoConv2d(4, 3, 3, padding=1)
    )
    model = model.to(dtype).eval().requires_grad_(False)
    x = torch.rand(3, 2, 6, 6, dtype=dtype)
    labels = model(x).argmax(1)
    labels[:, 0] = 0  # some are wrong
    return model, certify(model, x[:1], lower=False), x, labels


def attacked(model, x, labels, eps, target, steps=30):
    """Points within eps where `target` of the margins is small."""
    delta = torch.zeros_like(x)
    for step in range(steps):
        point = (x + delta).requires_grad_()
        with torch.enable_grad():
            margins = margins_of(model(point), labels)
            (slope,) = torch.autograd.grad(target(margins), point)
        slope = slope / slope.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)
        delta = delta - 2 * eps * (1 - step / steps) * slope
        length = delta.flatten(1).norm(dim=1)[:, None, None, None]
        delta = delta * (eps * (1 - 1e-6) / length.clamp_min(eps * (1 - 1e-6)))
    return x + delta


def margins_of(logits, labels):
    own = logits.gather(1, labels[:, None])[:, 0]
    other = logits.masked_fill(nn.functional.one_hot(labels, 3).movedim(-1, 1) == 1, -math.inf)
    return own - other.amax(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_attack_turns_a_pixel_within_its_radius(dtype):
    model, certificate, x, labels = example(dtype)
    logits = model(x)
    radii = pixel_radii(logits, certificate, x, labels=labels)
    assert radii.shape == (3, 6, 6)
    assert ((radii > 0) <= (logits.argmax(1) == labels)).all()
    exact = pixel_radii(logits, certificate, None, labels=labels)
    margins = margins_of(logits.double(), labels).clamp_min(0.0)
    expected = margins / (math.sqrt(2) * certificate.constant.value)
    assert (exact <= expected).all()
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=0)
    assert (radii <= exact).all() and (radii[exact > 0.01] > 0.9 * exact[exact > 0.01]).all()
    for row, column in ((3, 3), (5, 0)):
        target = lambda m, row=row, column=column: m[:, row, column].sum()  # noqa: E731
        for eps in (0.02, 0.1, 0.3):
            found = model(attacked(model, x, labels, eps, target)).argmax(1)
            sure = radii > eps
            assert (found[sure] == labels[sure]).all()


def test_no_attack_turns_more_pixels_than_the_bound():
    model, certificate, x, labels = example()
    logits, radii = model(x), (0.0, 0.05, 0.2, 0.5, 1.0)
    found = certified_pixel_accuracy(logits, labels, certificate, radii, x)
    assert list(found.collective) == sorted(found.collective, reverse=True)
    for eps, alone, together in zip(radii, found.pixelwise, found.collective, strict=True):
        assert alone <= together <= found.clean
        point = attacked(model, x, labels, eps, lambda m: m.clamp_min(-0.01).sum()) if eps else x
        survived = (model(point).argmax(1) == labels).double().mean()
        assert together <= survived <= 1
    assert found.pixelwise[0] == found.collective[0] == found.clean
    assert found.collective[3] > found.pixelwise[3] + 0.2  # observed .46 against .06


def certificate_of(constant, sizes):
    return LipschitzCertificate(Bound(constant), (), sizes)


def test_the_bound_of_all_pixels_is_the_best_that_the_constant_gives():
    """The identity: the most pixels that a perturbation turns, by trying all sets of pixels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, 2, 7, generator=generator, dtype=torch.float64)
        labels = torch.zeros(1, 7, dtype=torch.long)
        margins = logits[0, 0] - logits[0, 1]
        right = int((margins > 0).sum())
        costs = margins[margins > 0].square() / 2  # to turn a pixel, both logits meet
        for eps in (0.3, 1.0, 2.0):
            turned = max(
                size
                for size in range(right + 1)
                for some in itertools.combinations(costs.tolist(), size)
                if sum(some) <= eps**2
            )
            found = certified_pixel_accuracy(
                logits, labels, certificate_of(1.0, (2, 7)), [eps], None
            )
            assert found.clean == pytest.approx(right / 7)
            assert found.collective[0] == pytest.approx((right - turned) / 7)


def test_constants_of_pixels_and_ignored_labels():
    logits = torch.tensor([[[3.0, 3.0, 1.0], [0.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, 0, 1]])
    certificate = certificate_of(1.0, (3,))
    constants = torch.tensor([1.0, 0.5, 7.0])
    radii = pixel_radii(logits, certificate, None, constants=constants)
    expected = torch.tensor([[3.0, 6.0, 1.0]]).double() / math.sqrt(2)  # 7 is more than 1
    torch.testing.assert_close(radii, expected, rtol=1e-6, atol=0)
    still = pixel_radii(logits, certificate, None, constants=torch.zeros(3))
    assert still.isinf().all()
    found = certified_pixel_accuracy(logits, labels, certificate, [2.5], None, constants=constants)
    assert found.clean == pytest.approx(2 / 3)
    assert found.pixelwise[0] == found.collective[0] == pytest.approx(1 / 3)
    found = certified_pixel_accuracy(logits, labels, certificate, [0.1], None, ignore=1)
    assert found.clean == found.pixelwise[0] == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c, z, y: pixel_radii(z[:, :1], c, None), "two classes"),
        (lambda c, z, y: pixel_radii(z[:, :, 0, 0], c, None), "logits must be"),
        (lambda c, z, y: pixel_radii(z * math.inf, c, None), "logits must be finite"),
        (lambda c, z, y: pixel_radii(z, 1.0, None), "certificate must be"),
        (lambda c, z, y: pixel_radii(z, c, None, labels=y[:, 0]), "labels must be"),
        (lambda c, z, y: pixel_radii(z, c, None, constants=torch.ones(2)), "constants must be"),
        (lambda c, z, y: pixel_radii(z, c, None, constants=-torch.ones(6, 6)), "constants must"),
        (lambda c, z, y: pixel_radii(z, c, torch.zeros(2, 2, 6, 6).double()), "one input for"),
        (lambda c, z, y: certified_pixel_accuracy(z, y, c, [], None), "radii must be"),
        (lambda c, z, y: certified_pixel_accuracy(z, y, c, [-1.0], None), "eps must be"),
        (lambda c, z, y: certified_pixel_accuracy(z, y + 9, c, [0.1], None), "labels must be"),
        (
            lambda c, z, y: certified_pixel_accuracy(z, 0 * y, c, [0.1], None, ignore=0),
            "must have a pixel",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    model, certificate, x, labels = example()
    with pytest.raises(ValueError, match=words):
        call(certificate, model(x), labels)
