"""Conformal sets, bands and pixels: what is proved stays below what attacks find."""

import json

import pytest
import torch
from torch import nn

from orthonet import cli
from orthonet.recipes.downstream.attack import halves, raised
from orthonet.recipes.downstream.conformal import ConformalConfig, train_conformal
from orthonet.recipes.downstream.regression import RegressionConfig, train_regression
from orthonet.recipes.downstream.segmentation import (
    SegmentationConfig,
    drawn_shapes,
    train_segmentation,
)
from tests.recipes.replaced import recorded


def checked(report, folder, picture):
    assert [path.name for path in report.files] == ["model.pt", "metrics.json", picture]
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["figures"] == report.figures
    return report.figures["rows"]


def covers(rows, alpha):
    """The promises, on each of the splits where they are promises about a split."""
    for row in rows:
        for end in ("mean", "least", "largest"):
            assert row["worst"][end] <= row["attacked"][end] <= row["clean"][end]
            assert row["robust"][end] >= row["attacked"][end]
        assert row["robust"]["mean"] >= 1 - alpha
    assert rows[-1]["attacked"]["mean"] < 1 - alpha  # the attack is one
    assert rows[-1]["worst"]["mean"] < rows[0]["worst"]["mean"]


@pytest.mark.parametrize("score", ["softmax", pytest.param("excess", marks=pytest.mark.slow)])
def test_robust_sets_hold_under_attack(score, tmp_path):
    config = ConformalConfig(
        hidden=16, iterations=30, score=score, eps=(0.1, 0.5), splits=20, attack_steps=4
    )
    report = train_conformal(config, tmp_path)
    covers(checked(report, tmp_path, "coverage.png"), 0.1)  # observed .907 and .95
    assert "coverage wanted 0.9" in report.summary()


def test_robust_bands_hold_under_attack(tmp_path):
    config = RegressionConfig(hidden=8, iterations=30, splits=20, attack_steps=4, eps=(0.05, 0.3))
    report = train_regression(config, tmp_path)
    rows = checked(report, tmp_path, "band.png")
    covers(rows, 0.1)
    # Both ends move outward by the constant times eps, and by the rounding.
    grown = report.figures["constant"] * 0.3 * 2
    assert rows[1]["robust_size"]["mean"] > rows[1]["plain_size"]["mean"]
    assert rows[1]["robust_size"]["mean"] < rows[1]["plain_size"]["mean"] + 2 * grown


@pytest.mark.slow
def test_pixels_are_certified_below_attacked(tmp_path):
    config = SegmentationConfig(
        size=8, channels=4, layers=1, iterations=20, images=8, attack_steps=8, radii=(0.1, 0.4)
    )
    report = train_segmentation(config, tmp_path)
    for row in checked(report, tmp_path, "pixels.png"):
        assert row["pixelwise"] <= row["collective"] <= row["attacked"] <= report.figures["clean"]
    assert row["pixelwise"] < row["collective"] and row["attacked"] < report.figures["clean"]
    images = drawn_shapes(config, 50, torch.Generator().manual_seed(0))
    assert images.x.shape == (50, 3, 8, 8) and images.y.unique().tolist() == [0, 1, 2]
    hue = images.x.movedim(1, -1)
    assert hue[images.y == 1].mean(0)[0] > hue[images.y == 1].mean(0)[2] + 0.3  # reddish


def test_the_attack_stays_in_its_ball_and_raises_the_score():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).requires_grad_(False).eval()
    x = torch.randn(50, 2, 2, generator=torch.Generator().manual_seed(0))
    for eps in (0.0, 1e-3, 2.0):
        points, outputs = raised(model, x, eps, lambda z: z[:, 0], lambda z: z[:, 0].double(), 10)
        assert (points.double() - x.double()).flatten(1).norm(dim=1).max() <= eps
        assert torch.equal(outputs, model(points)) and (outputs >= model(x))[:, 0].all()
        # A linear score: the most is eps times its norm.
        gained = (outputs - model(x))[:, 0]
        torch.testing.assert_close(
            gained, torch.full_like(gained, eps * model[1].weight[0].norm()), rtol=1e-3, atol=2e-6
        )


def test_the_halves_share_nothing():
    for first, rest in halves(11, 5, 0):
        assert sorted([*first.tolist(), *rest.tolist()]) == list(range(11)) and len(first) == 5


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ConformalConfig(score="aps"), "score must be one of"),
        (lambda: ConformalConfig(alpha=0.0), "alpha must be"),
        (lambda: ConformalConfig(eps=(-0.1,)), "eps must be"),
        (lambda: ConformalConfig(splits=0), "splits must be"),
        (lambda: RegressionConfig(dataset="boston"), "dataset must be one of"),
        (lambda: RegressionConfig(lipschitz=0.0), "lipschitz must be"),
        (lambda: SegmentationConfig(channels=3), "channels even"),
        (lambda: SegmentationConfig(size=4), "size must be at least 8"),
        (lambda: SegmentationConfig(radii=(-1.0,)), "radii must be"),
    ],
)
def test_bad_configurations_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_command_runs_each(capsys, monkeypatch):
    made = recorded(monkeypatch, "conformal", "regression", "segmentation")
    for words in (
        "conformal --score margin --eps 0.1 0.2",
        "regression --dataset diabetes --lipschitz 1",
        "segmentation --size 12 --radii 0.5",
    ):
        assert cli.main(["train", *words.split(), "--quiet"]) == 0
    assert [config for config, _, _ in made] == [
        ConformalConfig(score="margin", eps=(0.1, 0.2)),
        RegressionConfig(dataset="diabetes", lipschitz=1.0),
        SegmentationConfig(size=12, radii=(0.5,)),
    ]
    assert capsys.readouterr().out == "the summary\n" * 3
