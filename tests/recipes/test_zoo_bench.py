"""The comparison of methods: what is equal, what is kept, what is counted."""

import importlib.machinery
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from orthonet import cli, recipes
from orthonet.errors import UncertifiableError
from orthonet.layers import available
from orthonet.models import convnet_zoo
from orthonet.recipes import Images, Split, ZooConfig, ZooReport, bench_zoo
from orthonet.recipes.zoo import bench, networks
from orthonet.recipes.zoo import report as zoo_report
from orthonet.recipes.zoo.autoattack import autoattack_l2
from orthonet.recipes.zoo.config import zoo
from orthonet.recipes.zoo.cost import step_cost
from orthonet.recipes.zoo.judge import judge, require_below
from orthonet.recipes.zoo.networks import PEERS, Peer, deployed, network, width_for
from tests.recipes.replaced import recorded

PNG = b"\x89PNG\r\n\x1a\n"
ROOM = {"lr": 0.01, "radius": 0.5, "tried": []}


@pytest.fixture
def few(monkeypatch):
    train, test = recipes.load("digits")
    data = Split(Images(train.x[:128], train.y[:128]), Images(test.x[:40], test.y[:40]))
    monkeypatch.setattr(bench, "load", lambda *_, **__: data)
    return data


def tiny(**changes) -> ZooConfig:
    values = {
        "methods": ("aol", "sll"),
        "seeds": 1,
        "parameters": 20_000,
        "epochs": 2,
        "attack_steps": 3,
        "radii": (0.1, 0.5),
    }
    return ZooConfig(**{**values, **changes})


def test_a_run_is_written_after_each_method_and_goes_on(few, tmp_path, monkeypatch):
    report = bench_zoo(tiny(), tmp_path)
    content = json.loads((tmp_path / "zoo.json").read_text())
    assert [run["method"] for run in content["runs"]] == ["aol", "sll"]
    assert (tmp_path / "zoo.png").read_bytes().startswith(PNG)
    for run in report.runs:
        assert run["finite"]
        assert run["broken"] == 0 < run["attempts"] <= 40
        assert 0 < run["constant"] <= 1 + 1e-9
        # proved below found below clean
        for proved, found in zip(run["certified"], run["attacked"], strict=True):
            assert proved <= found <= run["accuracy"]
        assert run["certified_of_attacked"] == run["certified"]  # all of them are attacked
    made = []
    real = bench.run_method

    def counted(config, name, seed, *rest):
        made.append((name, seed))
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(config, name, seed, *rest)

    monkeypatch.setattr(bench, "run_method", counted)
    with pytest.raises(KeyboardInterrupt):
        bench_zoo(tiny(seeds=2), tmp_path)
    assert made == [("aol", 1), ("sll", 1)]
    made.clear()
    monkeypatch.setattr(bench, "run_method", lambda *a: made.append(a[1:3]) or real(*a))
    longer = bench_zoo(tiny(seeds=2), tmp_path)
    assert made == [("sll", 1)]
    assert longer.runs[:2] == tuple(content["runs"])
    assert [row["seeds"] for row in longer.rows()] == [2, 2]
    seeds, certified, spread = (
        zoo_report.HEADER.index(n) for n in ("seeds", "certified", "spread")
    )
    for row in longer.cells():
        each = [100 * run["certified"][1] for run in longer.runs if run["method"] == row[0]]
        assert row[seeds] == "2"
        assert row[certified].split(" / ")[1] == f"{sum(each) / 2:.1f}"
        assert row[spread].split(" / ")[1] == f"{abs(each[0] - each[1]) / 2:.1f}"
    assert {row[spread] for row in report.cells()} == {"-"}  # one seed has none
    with pytest.raises(ValueError, match=r"epochs=.*there 2"):
        bench_zoo(tiny(epochs=3), tmp_path)


def diverges(*_, **__):
    raise ValueError("the loss must stay finite")


def test_a_loss_that_is_not_finite_is_a_result(few, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "fit", diverges)
    report = bench_zoo(tiny(methods=("aol",), loss_radii=(0.5, 1.0)), tmp_path)
    assert report.rows()[0]["not_finite"] == 1
    assert "NOT FINITE" in report.line(report.runs[0])
    assert report.choices["aol"]["tried"] == [(0.005, 0.5, None), (0.005, 1.0, None)]
    assert report.summary().count("\n") >= 3
    assert len(report.cells()[0]) == len(zoo_report.HEADER)


def test_each_method_chooses_on_validation_images(tmp_path, monkeypatch):
    """The choice never reads the test images, and a run takes the best pair."""
    train, test = recipes.load("digits")
    asked = []

    def load(*_, validation=False):
        asked.append(validation)
        held = slice(300, 340)
        part = Images(train.x[held], train.y[held]) if validation else test
        return Split(Images(train.x[:64], train.y[:64]), Images(part.x[:40], part.y[:40]))

    monkeypatch.setattr(bench, "load", load)
    scores = {(0.01, 0.5): 0.2, (0.01, 1.0): 0.7, (0.02, 0.5): None, (0.02, 1.0): 0.1}
    budgets = []

    def score(config, name, data):
        assert data.test.x.equal(train.x[300:340])
        budgets.append(config.epochs)
        return scores[config.lr, config.radius]

    monkeypatch.setattr(bench, "_score", score)
    config = tiny(methods=("aol",), epochs=4, learning_rates=(0.01, 0.02), loss_radii=(0.5, 1.0))
    report = bench_zoo(config, tmp_path)
    assert budgets == [1, 1, 1, 1]  # a quarter of 4 epochs each
    assert asked == [False, True]
    assert (report.runs[0]["lr"], report.runs[0]["radius"]) == (0.01, 1.0)
    kept = json.loads((tmp_path / "zoo.json").read_text())["choices"]["aol"]
    assert {(lr, radius): value for lr, radius, value in kept["tried"]} == scores


def test_a_budget_is_spent_and_not_exceeded(few):
    run = bench.run_method(tiny(budget=0.5), "cholesky", 0, few, ROOM)
    # by the last step, which takes some milliseconds; observed .508
    assert 0.5 <= run["training_cpu_seconds"] < 0.5 + 50 * run["seconds_per_step"] + 0.5
    assert run["steps"] >= 2
    assert run["epochs"] == round(run["steps"] / 2, 2)


def test_an_attack_inside_a_certified_radius_stops_the_comparison():
    with pytest.raises(UncertifiableError, match=r"radius=0.5, images=\[1\]"):
        require_below(torch.tensor([True, True, False]), torch.tensor([True, False, False]), 0.5)
    require_below(torch.tensor([True, False]), torch.tensor([True, True]), 0.5)


def test_a_wrong_certificate_is_found(monkeypatch):
    """With radii three times too large, APGD breaks images that count as certified."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().eval().requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    model[1].bias.zero_()
    x = torch.tensor([[0.6, 0.4, 0.5, 0.5], [0.7, 0.3, 0.5, 0.5]]).view(2, 1, 2, 2)
    images, far = Images(x, torch.tensor([0, 0])), 0.2 / math.sqrt(2)
    found = judge(model, images, (0.0, 0.9 * far, 1.1 * far))
    assert found.certified == [1.0, 1.0, 0.5]
    assert found.attacked == found.certified_of_attacked == [1.0, 0.5]
    assert (found.attempts, found.broken, found.accuracy) == (2, 0, 1.0)
    none = judge(model, images, (far,), attacked=-1)
    assert (none.attacked, none.attacked_images, none.attempts) == ([], 0, 0)
    real = recipes.zoo.judge.certify(model, x[:1].double(), lower=False)

    class Wrong:
        constant = real.constant

        def radius(self, *arguments, **keywords):
            return 3 * real.radius(*arguments, **keywords)

    monkeypatch.setattr(recipes.zoo.judge, "certify", lambda *_, **__: Wrong())
    with pytest.raises(UncertifiableError, match="no attack may change the class"):
        judge(model, images, (1.5 * far,))


def attacks_of(move):
    """A stand-in for torchattacks, which darkens the first pixel by `move` times the radius."""
    package = types.ModuleType("torchattacks")
    package.__spec__ = importlib.machinery.ModuleSpec("torchattacks", None)

    class AutoAttack:
        def __init__(self, model, norm, eps, n_classes, seed):
            assert (norm, n_classes, seed) == ("L2", 4, 7)
            self.eps = eps

        def __call__(self, x, y):
            torch.rand(3)  # the real one draws from the global generator, and seeds it
            moved = x.clone()
            moved[:, 0, 0, 0] -= move * self.eps
            return moved

    package.AutoAttack = AutoAttack
    return package


def test_autoattack_counts_beside_apgd_and_never_leaves_the_ball(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).double().eval().requires_grad_(False)
    model[1].weight.copy_(torch.eye(4))
    model[1].bias.zero_()
    x = torch.tensor([[0.6, 0.4, 0.1, 0.1], [0.7, 0.3, 0.1, 0.1]]).view(2, 1, 2, 2)
    images = Images(x, torch.tensor([0, 0]))
    for move in (1.0, 9.0):  # 9: points far outside, which are shortened
        monkeypatch.setitem(sys.modules, "torchattacks", attacks_of(move))
        before = torch.get_rng_state()
        found = judge(model, images, (0.0, 0.1, 0.21), autoattack=2, seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        expected = {"images": 2, "certified": [1.0, 0.5], "apgd": [1.0, 0.5], "both": [1.0, 0.5]}
        assert found.autoattack == expected
    points = autoattack_l2(model.float(), x, images.y, 0.05, seed=7)
    assert ((points - x).double().flatten(1).norm(dim=1) <= 0.05).all()
    model[1] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="four classes, got classes=3"):
        autoattack_l2(model.eval(), x, images.y, 0.05)
    assert judge(model.double().eval(), images, (0.1,), autoattack=0).autoattack is None


def test_autoattack_that_is_not_installed_is_said_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps torchattacks"):
        bench_zoo(tiny(autoattack=5), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["aol", "bro", "soc", "sll", "sandwich", "torch-orthogonal"])
def test_the_width_is_the_nearest_to_the_parameters(method):
    width = width_for(method, 60_000, (1, 8, 8))

    def distance(width):
        model = network(method, (1, 8, 8), width)
        return abs(sum(p.numel() for p in model.parameters()) - 60_000)

    assert distance(width) == min(map(distance, (width - 4, width, width + 4)))


def test_the_cost_counts_what_a_linear_network_keeps():
    """A linear layer keeps its input for the weight's gradient, the loss its logits."""
    config = recipes.digits(model="mlp_digits", batch_size=64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = Images(torch.rand(64, 1, 8, 8), torch.zeros(64, dtype=torch.long))
    cost = step_cost(config, images, model)
    assert cost.seconds > 0
    assert 64 * 64 * 4 <= cost.saved_bytes <= 64 * (64 + 4 * 10) * 4 + 64 * 8 + 1024


def test_the_networks_differ_in_their_layers_only():
    """A peer's network has a peer's layer wherever ours has one, and is deployed as it computes."""
    ours = [type(m).__name__ for m in convnet_zoo((1, 8, 8), width=8)]
    x = torch.rand(3, 1, 8, 8)
    for name in ("torch-orthogonal", "torch-spectral-norm"):
        model = network(name, (1, 8, 8), 8)
        mine = [type(m).__name__ for m in model]
        same = [a == b for a, b in zip(ours, mine, strict=True)]
        assert same == [not kind.startswith("Ortho") for kind in ours]
        plain = deployed(name, model)
        assert {type(m) for m in plain.modules() if hasattr(m, "weight")} == {nn.Conv2d, nn.Linear}
        # two floats of logits of size 1, through seven layers; observed 3e-7
        assert torch.allclose(plain(x.double()).float(), model(x), atol=1e-5)


def test_a_missing_peer_is_skipped_by_a_sentence(few, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "fit", diverges)  # a run takes no time
    absent = Peer("no_such_package", "no-such", nn.Conv2d, nn.Linear)
    monkeypatch.setitem(PEERS, "absent", absent)
    report = bench_zoo(tiny(methods=("absent", "cholesky")), tmp_path)
    assert [run["method"] for run in report.runs] == ["cholesky"]
    sentence = "absent is skipped: no_such_package is missing. Run: pip install no-such"
    assert report.skipped == (sentence,)
    assert sentence in report.summary()
    with pytest.raises(ModuleNotFoundError, match="no_such_package must be installed"):
        network("absent", (1, 8, 8), 8)


def test_every_network_of_ours_can_be_built():
    assert ZooConfig().methods == networks.method_names() == (*available("conv"), *PEERS)
    for name in available("conv"):
        assert network(name, (1, 8, 8), 8) is not None


def test_whole_data_sets_take_the_protocol_of_the_field():
    config = zoo(dataset="fashion", seeds=2)
    assert (config.budget, config.seeds) == (3600.0, 2)
    assert config.radii == pytest.approx((36 / 255, 72 / 255, 108 / 255, 0.5, 1.0, 1.58))
    assert len(config.candidates("aol")) == len(config.learning_rates) * len(config.loss_radii) > 1
    assert zoo().budget == 0
    assert zoo().candidates("aol") == [(0.005, 0.75)]
    assert zoo().candidates("ortho") == [(0.02, 0.75)]


def test_the_command_passes_its_options(monkeypatch, capsys, tmp_path):
    made = recorded(monkeypatch, "zoo", command="bench")
    command = f"bench zoo --methods aol bro --seeds 2 --budget 30 --out {tmp_path} --quiet"
    assert cli.main(command.split()) == 0
    config = ZooConfig(methods=("aol", "bro"), seeds=2, budget=30.0)
    assert made == [(config, tmp_path, {"progress": False})]
    summary = ZooReport(config.to_dict(), ()).summary()
    assert summary.startswith("digits, 100000 parameters, 30 CPU seconds;")
    assert cli.main(["bench", "zoo", "--dataset", "fashion", "--quiet"]) == 0
    assert made[1][:2] == (zoo(dataset="fashion"), Path("runs/zoo-fashion"))
    with pytest.raises(SystemExit):
        cli.main(["bench", "zoo", "--methods", "nothing", "--quiet"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
