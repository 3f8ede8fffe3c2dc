"""A distance of distributions, a distance to a shape, a flow: each with what it promises."""

import json
import math

import pytest
import torch

from orthonet import cli
from orthonet.recipes import (
    FlowConfig,
    ResidualFlow,
    SDFConfig,
    W1Config,
    invert,
    sphere_trace,
    train_flow,
    train_sdf,
    train_w1,
)
from orthonet.recipes.beyond.flow import DENSITIES
from orthonet.recipes.beyond.report import grid
from orthonet.recipes.beyond.shapes import SHAPES, polygon, star
from orthonet.recipes.beyond.wasserstein import mean_below, shells
from orthonet.recipes.running.fitting import optimize
from tests.recipes.replaced import recorded

PNG = b"\x89PNG\r\n\x1a\n"


def written(report, folder, picture):
    assert [path.name for path in report.files] == ["model.pt", "metrics.json", picture]
    assert (folder / picture).read_bytes().startswith(PNG)
    content = json.loads((folder / "metrics.json").read_text())
    assert content["figures"] == report.figures
    assert content["history"] == report.history


@pytest.mark.parametrize("dimension", [2, 5])
def test_the_shells_are_as_far_apart_as_they_should_be(dimension):
    """By sorting: in one dimension, of the radii, the coupling of the quantiles is the best."""
    config = W1Config(dimension=dimension, gap=0.7)
    inner, outer = shells(config, 20_000, torch.Generator().manual_seed(0))
    assert inner.shape == outer.shape == (20_000, dimension)
    near, far = (points.norm(dim=1).sort().values for points in (inner, outer))
    assert (far - near).mean() == pytest.approx(0.7, abs=0.005)  # observed .00075
    assert inner.mean(0).abs().max() < 0.03  # observed .009
    assert far.max() <= config.reach[1] * (1 + 1e-6)


def test_the_lower_bound_of_a_mean_holds_as_often_as_it_says():
    """Coin flips: the bound may be above the mean in one of ten trials at most."""
    generator = torch.Generator().manual_seed(0)
    flips = (torch.rand(400, 500, generator=generator) < 0.3).double()
    above = sum(mean_below(row, 1.0, 0.1) > 0.3 for row in flips) / 400
    assert above <= 0.1  # observed 0.0025: the bound is careful
    assert mean_below(flips[0], 1.0, 0.1) > 0.15  # and says something; observed .219


def test_w1_is_a_lower_bound_whatever_was_learned(tmp_path):
    for iterations in (1, 60):
        # A seed whose untrained critic points the right way: a lower bound is cut at 0.
        config = W1Config(iterations=iterations, hidden=16, batch_size=64, samples=4000, seed=4)
        report = train_w1(config, tmp_path)
        found = report.figures
        assert found["lower"] < found["estimate"]
        assert found["lower"] <= found["distance"] == 1.0
    assert 1 <= found["constant"] <= 1 + 1e-6
    assert found["lower"] > 0.6  # observed 0.77
    written(report, tmp_path, "critic.png")
    assert train_w1(W1Config(dimension=3, iterations=2, samples=100), tmp_path).files


def test_signed_distances_of_the_shapes_are_exact():
    """Against the nearest of many points of the outline, and the sign by hand."""
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]).double()
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.9, 0.3]]).double()
    expected = torch.tensor([-1.0, 1.0, math.sqrt(2), -0.1]).double()
    torch.testing.assert_close(polygon(points, square), expected)
    for shape in SHAPES.values():
        x = torch.rand(500, shape.dimension, generator=torch.Generator().manual_seed(1)) * 2 - 1
        x = x.double().requires_grad_()
        (slope,) = torch.autograd.grad(shape.distance(x).sum(), x)
        # a distance has slope 1 almost everywhere
        torch.testing.assert_close(slope.norm(dim=1), torch.ones(500).double())
    assert star(torch.tensor([[0.0, 0.0], [0.0, 0.79], [0.0, 0.81]])).sign().tolist() == [-1, -1, 1]


class Ball(torch.nn.Module):
    def forward(self, x):
        return x.norm(dim=1, keepdim=True) - 0.5


def test_sphere_tracing_reaches_a_ball_and_never_enters_it():
    origins = torch.tensor([[-2.0, 0.0, 0.0], [-2.0, 0.3, 0.0], [-2.0, 0.6, 0.0]]).double()
    ahead = torch.tensor([[1.0, 0.0, 0.0]]).double().expand(3, 3)
    found = sphere_trace(Ball(), origins, ahead, constant=1.0, reach=5.0, tolerance=1e-6)
    assert found.hit.tolist() == [True, True, False]
    expected = torch.tensor([1.5, 2 - math.sqrt(0.25 - 0.09), 5.0]).double()
    torch.testing.assert_close(found.lengths, expected, rtol=0, atol=1e-5)  # observed 8.6e-7
    assert (found.lengths <= expected).all()
    # half of the steps' length with twice the constant, and still not inside
    slow = sphere_trace(Ball(), origins, ahead, constant=2.0, reach=5.0, tolerance=1e-6)
    assert (slow.steps > found.steps)[:2].all()
    with pytest.raises(ValueError, match="constant"):
        sphere_trace(Ball(), origins, ahead, constant=0.0, reach=1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_sdf_never_overshoots(shape, tmp_path):
    config = SDFConfig(shape=shape, iterations=100, hidden=16, batch_size=128, rays=16)
    report = train_sdf(config, tmp_path)
    found = report.figures
    assert found["overshoots"] == 0
    assert 1 - 1e-6 <= found["constant"] <= 1 + 1e-6
    assert found["mean_error"] < 0.12  # observed .053
    assert 0 < found["hits"] <= found["rays"]
    written(report, tmp_path, "distance.png")


def test_the_logarithm_of_the_flow_is_that_of_its_jacobian():
    torch.manual_seed(0)
    flow = ResidualFlow(3, 8, 0.9).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    logarithm = flow(x)[1]
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0].sum(0), x).movedim(1, 0)
    sign, expected = torch.linalg.slogdet(jacobian)
    assert (sign > 0).all()
    torch.testing.assert_close(logarithm, expected, rtol=0, atol=1e-12)  # observed 3.9e-16
    low, high = 3 * 2 * math.log(0.1), 3 * 2 * math.log(1.9)
    assert ((logarithm >= low) & (logarithm <= high)).all()


def test_the_inverse_of_the_flow_is_within_its_error():
    torch.manual_seed(0)
    flow = ResidualFlow(3, 8, 0.7).double().eval()
    x = torch.randn(50, 2, dtype=torch.float64)
    z = flow(x)[0].detach()
    for steps in (3, 500):
        found = invert(flow, z, [0.7 + 1e-9] * 3, steps)
        distance = (found.points - x).norm(dim=1)
        assert (distance <= found.error + 1e-15).all()
    assert found.error.max() < 1e-12  # observed 1.7e-14
    with pytest.raises(ValueError, match="constants"):
        invert(flow, z, [1.0] * 3)


def test_flow_has_mass_one_and_learns(tmp_path):
    config = FlowConfig(density="rings", blocks=2, hidden=16, iterations=60, batch_size=128)
    report = train_flow(config, tmp_path)
    found = report.figures
    assert found["mass"] == pytest.approx(1.0, abs=2e-2)  # observed 7.2e-5
    assert found["nats"] < found["base_nats"] + 0.3  # observed .1 below
    assert found["round_trip"] <= found["inverse_error"] < 1e-8
    assert 0 < found["constant"] <= 0.9 * (1 + 1e-6)  # observed 0.78: a chain is below its product
    written(report, tmp_path, "density.png")


@pytest.mark.parametrize("density", DENSITIES)
def test_points_of_the_densities_lie_on_their_curves(density):
    points = DENSITIES[density](4000, torch.Generator().manual_seed(0))
    assert points.mean(0).abs().max() < 0.12  # observed .03
    if density == "rings":
        radius = points.norm(dim=1)
        inner = (radius - 0.7).abs() < (radius - 1.8).abs()
        assert inner.float().mean() == pytest.approx(0.4, abs=0.03)  # observed .40
        off = torch.where(inner, radius - 0.7, radius - 1.8)
        assert off.square().mean().sqrt() == pytest.approx(0.1, abs=0.02)  # observed .10
    assert torch.equal(points, DENSITIES[density](4000, torch.Generator().manual_seed(0)))


def test_grid_covers_the_square():
    points = grid(-1.0, 1.0, 4)
    assert points[0, 1].tolist() == [-0.25, -0.75]
    assert points.flatten(0, 1).mean(0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: W1Config(dimension=1), "dimension"),
        (lambda: W1Config(confidence=1.0), "confidence"),
        (lambda: SDFConfig(shape="teapot"), "shape"),
        (lambda: FlowConfig(contraction=1.0), "contraction"),
    ],
)
def test_bad_values_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        optimize(
            torch.nn.Linear(1, 1),
            lambda: torch.tensor(math.nan),
            torch.Generator(),
            W1Config(iterations=1),
            progress=False,
            name="w1",
            folder=tmp_path,
            resume=False,
            tensorboard=False,
        )


def test_the_command_runs_each(tmp_path, capsys, monkeypatch):
    made = recorded(monkeypatch, "w1", "sdf", "flow")
    assert cli.main(["train", "w1", "--dimension", "5", "--gap", "2", "--quiet"]) == 0
    assert cli.main(f"train sdf --shape star --out {tmp_path} --quiet".split()) == 0
    assert cli.main(["train", "flow", "--density", "rings", "--iterations", "3", "--quiet"]) == 0
    assert [config for config, _, _ in made] == [
        W1Config(dimension=5, gap=2.0),
        SDFConfig(shape="star"),
        FlowConfig(density="rings", iterations=3),
    ]
    assert capsys.readouterr().out == "the summary\n" * 3
    with pytest.raises(SystemExit):
        cli.main(["train", "w1", "--shape", "star", "--quiet"])
    assert "orthonet train w1: error: unknown: --shape star" in capsys.readouterr().err
