import math

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import (
    Bound,
    LipschitzCertificate,
    apgd_ensemble_l2,
    apgd_l2,
    attack_certificate,
    certify,
    lipschitz_estimate,
    pgd_l2,
)


def linear_problem(classes: int, dtype=torch.float64):
    model = nn.Linear(6, classes).to(dtype).eval()
    x = torch.rand(60, 6, dtype=dtype)
    with torch.no_grad():
        logits = model(x)
    return model, x, logits


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_adaptive_attack_meets_the_distance_and_stays_in_the_ball(classes):
    model, x, logits = linear_problem(classes)
    y = logits.argmax(1) if classes > 1 else (logits[:, 0] > 0).long()
    distance = certify(model, x).radius(logits)
    for factor, share in ((1 - 1e-6, 0.0), (1 + 1e-2, 0.9)):
        points = apgd_l2(model, x, y, distance * factor, restarts=3, bounds=None)
        assert bool(((points - x).norm(dim=1) <= distance * factor).all())
        after = model(points)
        changed = (after.argmax(1) if classes > 1 else (after[:, 0] > 0).long()) != y
        # observed 0 and all but 2 of 60: it follows the nearest rival only
        assert float(changed.double().mean()) >= share
        assert share > 0 or not bool(changed.any())
    boxed = apgd_l2(model, x, y, 0.5)
    assert float(boxed.min()) >= 0.0
    assert float(boxed.max()) <= 1.0
    with pytest.raises(ValueError, match="every radius must be finite"):
        apgd_l2(model, x, y, -1.0)
    with pytest.raises(ValueError, match="apgd_l2: x must lie inside the box"):
        apgd_l2(model, x + 2.0, y, 1.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_attack_meets_the_distance_of_a_linear_classifier(classes):
    model, x, logits = linear_problem(classes)
    y = logits.argmax(1)
    distance = certify(model, x).radius(logits)  # exact for a linear model
    for factor, succeeds in ((1 - 1e-6, False), (1 + 1e-3, True)):
        radius = distance * factor
        points = pgd_l2(model, x, y, radius, restarts=classes, bounds=None)
        assert bool(((points - x).norm(dim=1) <= radius).all())
        changed = model(points).argmax(1) != y
        assert bool((changed == succeeds).all())


def test_attack_on_a_binary_classifier():
    model, x, logits = linear_problem(1)
    y = (logits[:, 0] > 0).long()
    distance = certify(model, x).radius(logits)
    for factor, succeeds in ((1 - 1e-6, False), (1 + 1e-3, True)):
        points = pgd_l2(model, x, y, distance * factor, restarts=1, bounds=None)
        assert bool((((model(points)[:, 0] > 0) != y) == succeeds).all())


@pytest.mark.parametrize("radius", [1e-7, 0.3, 50.0])
def test_attack_stays_in_the_ball_and_in_the_box(radius):
    model, x, logits = linear_problem(3, torch.float32)
    x[0, 0], x[1, 1] = 0.0, 1.0
    generator = torch.Generator().manual_seed(1)
    points = pgd_l2(model, x, logits.argmax(1), radius, generator=generator)
    assert points.dtype == x.dtype
    assert float((points.double() - x.double()).norm(dim=1).max()) <= radius
    assert float(points.min()) >= 0.0
    assert float(points.max()) <= 1.0
    again = pgd_l2(model, x, logits.argmax(1), radius, generator=generator.manual_seed(1))
    assert torch.equal(points, again)


def test_attack_uses_the_radius_of_each_sample():
    model, x, logits = linear_problem(2)
    radius = torch.linspace(0, 1, 60, dtype=torch.float64)
    points = pgd_l2(model, x, logits.argmax(1), radius, bounds=None)
    lengths = (points - x).norm(dim=1)
    assert torch.allclose(lengths, radius, atol=1e-9)  # a linear objective pushes to the sphere
    assert bool((lengths <= radius).all())


def test_no_certificate_of_an_orthogonal_network_breaks():
    model = nn.Sequential(
        layers.OrthoLinear(6, 32),
        layers.MaxMin(),
        layers.OrthoLinear(32, 16),
        layers.GroupSort(4),
        layers.UnitNormLinear(16, 4),
    ).eval()
    x = torch.rand(100, 6)
    y = model(x).argmax(1)
    report = attack_certificate(model, certify(model, x), x, y)
    assert (report.attacked, report.broken) == (100, 0)
    assert report.clean_accuracy == report.attacked_accuracy == 1.0
    assert bool((report.distances <= report.radii).all())
    assert "0 of 100 certificates broken" in str(report)


def test_a_wrong_certificate_is_found_out():
    model, x, logits = linear_problem(2)
    wrong = LipschitzCertificate(Bound(0.1 * certify(model, x).constant.value), (), (6,))
    report = attack_certificate(model, wrong, x, logits.argmax(1), bounds=None)
    assert report.broken > 30  # of 60; observed 60
    assert report.attacked_accuracy < 0.5


def test_the_ensemble_breaks_no_certificate():
    """Just inside the certified radius of each sample nothing changes, far outside much does."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), layers.OrthoLinear(25, 16), layers.MaxMin(), layers.UnitNormLinear(16, 5)
    ).eval()
    x = torch.rand(6, 1, 5, 5)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    certificate = certify(model, x)
    radius = certificate.radius(logits)
    state = torch.get_rng_state()
    points = apgd_ensemble_l2(model, x, y, radius)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(points, x)  # where a class changed, the certificate would be broken
    points = apgd_ensemble_l2(model, x, y, 8 * radius)
    changed = model(points).argmax(1) != y
    assert int(changed.sum()) >= 3  # of 6; observed 6
    assert torch.equal(points[~changed], x[~changed])
    distance = (points.double() - x.double()).flatten(1).norm(dim=1)
    assert bool((distance <= 8 * radius).all())
    assert float(points.min()) >= 0.0
    assert float(points.max()) <= 1.0
    report = attack_certificate(model, certificate, x, y, attack=apgd_ensemble_l2)
    assert (report.attacked, report.broken) == (6, 0)


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_the_ensemble_meets_the_distance_of_a_linear_classifier(classes):
    model, x, logits = linear_problem(classes)
    y = logits.argmax(1) if classes > 1 else (logits[:, 0] > 0).long()
    distance = certify(model, x).radius(logits)
    for factor, succeeds in ((1 - 1e-6, False), (1 + 1e-2, True)):
        points = apgd_ensemble_l2(model, x, y, distance * factor, bounds=None)
        assert bool(((points - x).norm(dim=1) <= distance * factor).all())
        after = model(points)
        changed = (after.argmax(1) if classes > 1 else (after[:, 0] > 0).long()) != y
        assert bool((changed == succeeds).all())  # every nearest rival is one of the targets


def test_points_of_other_attacks_are_checked():
    model, x, logits = linear_problem(3)
    y = logits.argmax(1)
    certificate = certify(model, x)
    for far in (lambda m, x, y, r: x + 9.0, lambda m, x, y, r: x + 2.0 * r[:, None]):
        assert attack_certificate(model, certificate, x, y, attack=far).broken == 0

    def near(model, x, y, radii):
        return apgd_l2(model, x, y, radii, steps=5, bounds=None)

    wrong = LipschitzCertificate(Bound(0.05 * certificate.constant.value), (), (6,))
    # of 60; observed 60
    assert attack_certificate(model, wrong, x, y, bounds=None, attack=near).broken > 30
    with pytest.raises(ValueError, match="one point for each sample"):
        attack_certificate(model, certificate, x, y, attack=lambda m, x, y, r: x[:1])
    with pytest.raises(ValueError, match="labels must be integers"):
        attack_certificate(model, certificate, x, y.double())
    with pytest.raises(ValueError, match="loss must be one of 'dlr', 'ce'"):
        apgd_l2(model, x, y, 0.1, loss="mse")
    with pytest.raises(ValueError, match="x must lie inside the box"):
        apgd_ensemble_l2(model, x + 2.0, y, 0.1)


def test_estimate_is_below_the_constant_and_near_it():
    linear = nn.Linear(8, 8).double().eval()
    x = torch.randn(10, 8, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    estimate = lipschitz_estimate(linear, x)
    assert estimate.kind == "estimate"
    # allowed 2 % below, observed 1e-4; above only by rounding
    assert 0.98 * truth <= estimate.value <= truth * (1 + 1e-9)

    network = nn.Sequential(layers.OrthoLinear(8, 8), layers.MaxMin(), layers.OrthoLinear(8, 8))
    bound = certify(network.eval(), x.float()).constant.value
    assert 0.99 <= lipschitz_estimate(network, x.float()).value <= bound  # observed 0.9999


def test_estimate_finds_a_steep_place():
    class Kink(nn.Module):
        def forward(self, x):
            return torch.relu(x - 1.0) * 3.0 + x

    estimate = lipschitz_estimate(Kink().eval(), torch.zeros(20, 1, dtype=torch.float64), steps=120)
    assert 3.9 <= estimate.value <= 4.0 + 1e-9  # 1 where it starts


def test_constant_model_and_errors():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2)

    assert lipschitz_estimate(Constant().eval(), torch.zeros(2, 3)) == Bound(0.0, kind="estimate")
    model, x, logits = linear_problem(2)
    y = logits.argmax(1)
    with pytest.raises(ValueError, match="inside the box"):
        pgd_l2(model, x + 1, y, 0.1)
    with pytest.raises(ValueError, match="finite and non-negative"):
        pgd_l2(model, x, y, math.inf)
    with pytest.raises(ValueError, match="one label for each sample"):
        pgd_l2(model, x, y[:3], 0.1)
    with pytest.raises(ValueError, match="eval mode"):
        pgd_l2(model.train(), x, y, 0.1)
