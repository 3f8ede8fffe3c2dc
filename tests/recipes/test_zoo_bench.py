"""The comparison of methods: what is equal, what is kept, what is counted."""

import json
from pathlib import Path

import pytest
import torch

from orthonet import cli, recipes
from orthonet.layers import available
from orthonet.models import convnet_zoo
from orthonet.recipes import Images, Split, ZooConfig, ZooReport, bench_zoo
from orthonet.recipes.images.train import build
from orthonet.recipes.zoo import bench as zoo
from orthonet.recipes.zoo import report as zoo_report
from orthonet.recipes.zoo.cost import step_cost
from tests.recipes.replaced import recorded

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def few(monkeypatch):
    train, test = recipes.load("digits")
    data = Split(Images(train.x[:128], train.y[:128]), Images(test.x[:40], test.y[:40]))
    monkeypatch.setattr(zoo, "load", lambda *_, **__: data)
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
        for proved, found in zip(run["certified"], run["attacked"][::2], strict=False):
            assert proved <= found <= run["accuracy"]
    made = []
    real = zoo.run_method

    def counted(config, name, seed, data):
        made.append((name, seed))
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(config, name, seed, data)

    monkeypatch.setattr(zoo, "run_method", counted)
    with pytest.raises(KeyboardInterrupt):
        bench_zoo(tiny(seeds=2), tmp_path)
    assert made == [("aol", 1), ("sll", 1)]
    made.clear()
    monkeypatch.setattr(
        zoo, "run_method", lambda c, n, s, d: made.append((n, s)) or real(c, n, s, d)
    )
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


def test_a_loss_that_is_not_finite_is_a_result(few, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("the loss must stay finite")

    monkeypatch.setattr(zoo, "fit", fails)
    report = bench_zoo(tiny(methods=("aol",)), tmp_path)
    assert report.rows()[0]["not_finite"] == 1
    assert "NOT FINITE" in report.line(report.runs[0])
    assert report.summary().count("\n") >= 3
    assert len(report.cells()[0]) == len(zoo_report.HEADER)


@pytest.mark.parametrize("method", ["aol", "bro", "soc", "sll", "sandwich"])
def test_the_width_is_the_nearest_to_the_parameters(method):
    width = zoo.width_for(method, 60_000, (1, 8, 8))

    def distance(width):
        model = convnet_zoo((1, 8, 8), layer=method, width=width)
        return abs(sum(p.numel() for p in model.parameters()) - 60_000)

    assert distance(width) == min(map(distance, (width - 4, width, width + 4)))


def test_the_cpu_budget_chooses_the_epochs(few, monkeypatch):
    monkeypatch.setattr(zoo, "step_cost", lambda *_: zoo.StepCost(0.05, 1))
    config, cost = zoo.planned_run(
        ZooConfig(budget="cpu", cpu_seconds=1.2, width=8, epochs=30), "aol", 0, few.train
    )
    assert (config.epochs, config.model_arguments["width"], cost.seconds) == (12, 8, 0.05)


def test_the_cost_counts_what_a_linear_network_keeps(monkeypatch):
    """A linear layer keeps its input for the weight's gradient, the loss its logits."""
    config = recipes.digits(model="mlp_digits", batch_size=64)
    monkeypatch.setattr(
        "orthonet.recipes.zoo.cost.build",
        lambda _: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
    )
    cost = step_cost(config, Images(torch.rand(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)))
    assert cost.seconds > 0
    assert 64 * 64 * 4 <= cost.saved_bytes <= 64 * (64 + 4 * 10) * 4 + 64 * 8 + 1024


def test_every_network_can_be_built_by_the_recipe():
    assert ZooConfig().methods == tuple(available("conv"))
    for name in ZooConfig().methods:
        arguments = {"layer": name, "width": 8}
        assert build(recipes.digits(model="convnet_zoo", model_arguments=arguments)) is not None


def test_the_command_passes_its_options(monkeypatch, capsys, tmp_path):
    made = recorded(monkeypatch, "zoo", command="bench")
    command = f"bench zoo --methods aol bro --seeds 2 --budget cpu --out {tmp_path} --quiet"
    assert cli.main(command.split()) == 0
    config = ZooConfig(methods=("aol", "bro"), seeds=2, budget="cpu")
    assert made == [(config, tmp_path, {"progress": False})]
    assert ZooReport(config.to_dict(), ()).summary().startswith("digits, budget 30 s")
    assert cli.main(["bench", "zoo", "--budget", "cpu", "--quiet"]) == 0
    assert made[1][1] == Path("runs/zoo-digits-cpu")
    with pytest.raises(SystemExit):
        cli.main(["bench", "zoo", "--methods", "nothing", "--quiet"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
