"""From a trained model to its certificate, its attack, its pictures and its files."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from orthonet import recipes
from orthonet.convert import to_plain
from orthonet.layers import MaxMin, OrthoConv2d, OrthoLinear
from orthonet.recipes import (
    Images,
    Spectrum,
    Split,
    TrainConfig,
    certify_checkpoint,
    digits,
    evaluate,
    layer_spectra,
    train,
)
from orthonet.recipes.images.evaluate import attack_radii, wilson
from orthonet.recipes.images.figures import radius_figure, spectra_figure, training_figure
from orthonet.testing import singular_values

PNG = b"\x89PNG\r\n\x1a\n"


class Threshold(nn.Module):
    """Two classes by the mean pixel: the distance to the boundary is known exactly."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.25] * 16, [-0.25] * 16]))
            self.head.bias.copy_(torch.tensor([-2.0, 2.0]))

    def forward(self, x):
        return self.head(x.flatten(1))


def test_the_interval_is_wilsons():
    """Its ends are the shares p with (found - p)^2 = z^2 p (1 - p) / n, solved by hand here."""
    for share, number in ((0.0, 40), (0.3, 40), (0.85, 1000), (1.0, 7)):
        for end in wilson(share, number):
            # both sides of the quadratic equation; observed 3e-17
            assert (share - end) ** 2 == pytest.approx(
                1.96**2 * end * (1 - end) / number, abs=1e-12
            )
        low, high = wilson(share, number)
        assert 0 <= low <= share <= high <= 1
        assert low < high


def threshold_images() -> Images:
    level = torch.tensor([0.1, 0.3, 0.45, 0.55, 0.8, 0.6])
    return Images(level.view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.tensor([1, 1, 1, 0, 0, 1]))


def test_evaluation_of_a_linear_classifier_is_exact():
    """Class 0 iff the mean exceeds 1/2; a uniform shift by d has length 4 d and is the worst."""
    radii = (0.1, 0.5, 1.0)
    found = evaluate(Threshold().eval(), threshold_images(), radii=radii, attack_steps=20)
    distance = [4 * abs(level - 0.5) for level in (0.1, 0.3, 0.45, 0.55, 0.8)] + [0.0]
    assert found.accuracy == pytest.approx(5 / 6)
    # Observed 4e-8: the pixels are rounded to float32.
    torch.testing.assert_close(found.radii, distance, rtol=0, atol=1e-6)
    assert found.certified == {r: sum(d > r for d in distance) / 6 for r in radii}
    # The gradient points at the boundary, so that the attack finds every image it can.
    assert found.attacked == {
        r: sum(d > r for d in distance) / 6 for r in [0.0, *attack_radii(radii)]
    }
    assert (found.attempts, found.broken) == (6, 0)
    assert found.constant == pytest.approx(math.sqrt(2), rel=1e-6)


def test_evaluation_of_a_linear_classifier_is_exact_in_l_infinity():
    radii = (2 / 255, 0.1, 0.25)
    found = evaluate(
        Threshold().eval(), threshold_images(), radii=radii, norm="linf", attack_steps=20
    )
    distance = [abs(level - 0.5) for level in (0.1, 0.3, 0.45, 0.55, 0.8)] + [0.0]
    # The pixels are rounded to float32, by 6e-8 of 1/2 at most.
    torch.testing.assert_close(found.radii, distance, rtol=0, atol=1e-6)
    assert found.certified == {r: sum(d > r for d in distance) / 6 for r in radii}
    assert all(found.attacked[r] == value for r, value in found.certified.items())
    assert (found.attempts, found.broken) == (6, 0)
    assert any(line.startswith("linf radius ") for line in found.lines())
    assert found.to_dict()["norm"] == "linf"


def test_local_radii_gain_without_constraint_and_nothing_else():
    images = threshold_images()
    linear = evaluate(Threshold().eval(), images, radii=(0.5,), attack_steps=3, local=6).local
    assert linear is not None
    assert linear.local == linear.whole
    # The rounding of the forward pass in float64 is all that is subtracted.
    distance = [4 * abs(level - 0.5) for level in (0.1, 0.3, 0.45, 0.55, 0.8)] + [0.0]
    torch.testing.assert_close(linear.whole, distance, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    with torch.no_grad():
        right = images._replace(y=net(images.x).argmax(1))
    found = evaluate(net, right, radii=(0.01,), attack_steps=3, local=4)
    assert found.local is not None
    assert len(found.local.whole) == 4
    pairs = list(zip(found.local.whole, found.local.local, strict=True))
    assert all(0 < whole <= local for whole, local in pairs)
    # Observed 1.6 to 3.1 with three seeds.
    assert max(local / whole for whole, local in pairs) > 1.1
    assert found.local.broken == 0
    assert any(line.startswith("median ") for line in found.lines())
    json.dumps(found.to_dict())


def test_evaluation_leaves_the_model_alone_and_repeats_itself():
    model = nn.Sequential(nn.Flatten(), OrthoLinear(16, 8), MaxMin(), OrthoLinear(8, 2)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(model, threshold_images(), radii=(0.2,), attack_steps=5, seed=1)
    second = evaluate(model, threshold_images(), radii=(0.2,), attack_steps=5, seed=1)
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_attacks_lie_between_and_beyond_the_radii():
    assert attack_radii([1.0, 0.0, 0.5]) == [0.5, 0.75, 1.0, 1.25, 1.5]


def test_spectra_are_those_of_the_dense_operators():
    model = nn.Sequential(
        OrthoConv2d(1, 4, 3, padding=1),
        MaxMin(),
        OrthoConv2d(4, 6, 2, stride=2),
        nn.Flatten(),
        OrthoLinear(54, 5),
    ).eval()
    spectra = layer_spectra(to_plain(model), torch.rand(2, 1, 6, 6))
    assert [s.layer for s in spectra] == ["0", "2", "4"]
    assert [s.operator for s in spectra] == ["1x6x6 → 4x6x6", "4x6x6 → 6x3x3", "54 → 5"]
    shapes = [(1, 6, 6), (4, 6, 6), (54,)]
    for spectrum, shape, name in zip(spectra, shapes, ("0", "2", "4"), strict=True):
        expected = singular_values(to_plain(model.get_submodule(name)).double(), shape)
        got = torch.tensor(spectrum.values, dtype=torch.float64)
        # Two float64 decompositions of one matrix; observed 2e-15.
        torch.testing.assert_close(got, expected.sort(descending=True).values, rtol=0, atol=1e-12)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_large_images_are_cut_and_it_says_so(monkeypatch):
    monkeypatch.setattr("orthonet.recipes.images.spectra._LARGEST", 100)
    conv = nn.Conv2d(4, 2, 3, padding=1).eval()
    (spectrum,) = layer_spectra(conv, torch.rand(1, 4, 20, 20))
    assert spectrum.operator == "4x5x5 → 2x5x5 (a part of the image)"
    assert len(spectrum.values) == 50


def test_figures_are_pictures(tmp_path):
    row = {"epoch": 1, "lr": 0.1, "loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.6}
    row["test_margin_accuracy"] = 0.2
    files = [
        training_figure(tmp_path / "a.png", [row], "one epoch"),
        radius_figure(
            tmp_path / "b.png", [0.0] * 2, {0.0: 0.0, 1.0: 0.0}, {1.0: 0.0}, "none right"
        ),
        spectra_figure(tmp_path / "c.png", [Spectrum("a", "1 → 1", [1.0])] * 5, "five"),
    ]
    for file in files:
        content = file.read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 5000
    assert sorted(tmp_path.iterdir()) == files


@pytest.fixture(scope="module")
def few() -> Split:
    data = recipes.load("digits")
    return Split(Images(*(t[:256] for t in data.train)), Images(*(t[:60] for t in data.test)))


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return digits(
        epochs=2,
        model_arguments={"channels": (4, 8), "hidden": (16,)},
        attack_steps=5,
        radii=(0.141, 0.5),
    )


@pytest.fixture(scope="module")
def report(few, config, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthonet.recipes.images.run.load", lambda *_, **__: few)
        yield train(config, tmp_path_factory.mktemp("runs") / "run")


def test_run_writes_its_files(report, config):
    folder = report.files[0].parent
    names = ["checkpoint.pt", "metrics.json", "training.png", "certified_accuracy.png"]
    assert [path.name for path in report.files] == [*names, "singular_values.png"]
    assert sorted(folder.iterdir()) == sorted(
        [*report.files, folder / "log.csv", folder / "state.pt"]  # of the training, to go on
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert TrainConfig.from_dict(metrics["config"]) == config
    assert metrics["history"] == report.history
    assert set(metrics["seconds"]) == {"training", "certificate and attack", "figures"}
    assert metrics["versions"]["torch"] == torch.__version__
    found = metrics["evaluation"]
    assert found["accuracy"] == report.evaluation.accuracy
    assert found["inside_certified_radius"] == {"attacked": 60, "changed_class": 0}
    assert len(found["radii"]) == 60
    assert found["certificate"][0]["path"] == "conv1"
    for row in found["at_radii"]:
        assert row["certified"] is None or row["certified"] <= row["attacked"]


def test_summary_tells_the_outcome(report):
    text = report.summary()
    assert f"{report.evaluation.accuracy:.1%}" in text
    assert "none changed class" in text
    assert "1.00000" in text
    for radius, value in report.evaluation.certified.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{radius:g} "))
        assert f"{value:.1%}" in line
    assert all(str(path) in text for path in report.files)


def test_same_seed_gives_the_same_metrics(report, config, tmp_path):
    again = train(config, tmp_path / "again")
    assert again.history == report.history
    assert again.evaluation.to_dict().keys() == report.evaluation.to_dict().keys()
    for name in ("accuracy", "constant", "radii", "certified", "attacked", "broken"):
        assert getattr(again.evaluation, name) == getattr(report.evaluation, name)


def test_checkpoint_is_certified_again(report, tmp_path):
    checkpoint = report.files[0]
    again = certify_checkpoint(checkpoint)
    assert again.files == ()
    assert again.history == []
    assert again.evaluation.radii == report.evaluation.radii
    alone = certify_checkpoint(checkpoint, input_shape=(1, 8, 8), report=tmp_path / "alone.html")
    assert alone.certificate.constant.value == pytest.approx(report.evaluation.constant, rel=1e-5)
    assert (tmp_path / "alone.html").stat().st_size > 0
    other = certify_checkpoint(checkpoint, out=tmp_path / "more", radii=(0.3,), attack_steps=2)
    assert list(other.evaluation.certified) == [0.3]
    assert [path.name for path in other.files] == [
        "metrics.json",
        "certified_accuracy.png",
        "singular_values.png",
    ]


def test_figures_package_is_looked_for_before_the_training(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"matplotlib must be.*Run: pip install matplotlib\.$"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_certificate_would_be_told():
    found = evaluate(Threshold().eval(), threshold_images(), radii=(0.5,), attack_steps=2)
    broken = recipes.Evaluation(**{**vars(found), "broken": 2})
    assert "2 CHANGED CLASS" in "\n".join(broken.lines())
