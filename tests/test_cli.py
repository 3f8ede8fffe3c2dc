"""The command line: what it parses, calls, prints and returns."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthonet import cli, recipes


@dataclasses.dataclass
class Printed:
    text: str = "the summary"

    def summary(self) -> str:
        return self.text


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of the recipes instead of making them."""
    made = []

    def record(name):
        def call(*positional, **keywords):
            made.append((name, positional, keywords))
            return Printed()

        return call

    monkeypatch.setattr(recipes, "train", record("train"))
    monkeypatch.setattr(recipes, "certify_checkpoint", record("certify"))
    return made


def test_train_passes_the_recipe_and_prints_the_summary(calls, capsys):
    assert cli.main(["train", "mnist5k"]) == 0
    expected = ("train", (recipes.mnist5k(), Path("runs/mnist5k")), {"progress": True})
    assert calls == [expected]
    assert capsys.readouterr().out == "the summary\n"


def test_every_option_of_train_changes_its_field(calls):
    command = "train digits --epochs 3 --batch-size 7 --lr 0.1 --radius 0.4 --temperature 0.3"
    command += " --seed 5 --ortho-params qr --attack-steps 9 --device cpu --out elsewhere"
    command += " --quiet --resume"
    assert cli.main(command.split()) == 0
    config = recipes.digits(
        epochs=3,
        batch_size=7,
        lr=0.1,
        radius=0.4,
        temperature=0.3,
        seed=5,
        ortho_params="qr",
        attack_steps=9,
        device="cpu",
    )
    assert calls == [("train", (config, Path("elsewhere")), {"progress": False, "resume": True})]


def test_certify_passes_its_options(calls):
    assert cli.main(["certify", "model.pt"]) == 0
    command = "certify model.pt --radii 0.1 0.2 --attack-steps 3 --device cpu --out there --quiet"
    assert cli.main(command.split()) == 0
    options = {
        "checkpoint": Path("model.pt"),
        "radii": [0.1, 0.2],
        "attack_steps": 3,
        "device": "cpu",
        "out": Path("there"),
        "progress": False,
    }
    plain = {"checkpoint": Path("model.pt"), "progress": True}
    assert calls == [("certify", (), plain), ("certify", (), options)]


def test_an_error_is_one_line_and_a_status(tmp_path, capsys):
    assert cli.main(["train", "digits", "--epochs", "0", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("orthonet: error: TrainConfig: epochs must be an integer >= 1")
    assert cli.main(["certify", str(tmp_path / "absent.pt")]) == 1
    assert "absent.pt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train imagenet", "train digits --epochs x"])
def test_a_wrong_command_line_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command.split())
    assert stopped.value.code == 2
    assert "usage: orthonet" in capsys.readouterr().err


def test_module_runs_as_the_command():
    command = [sys.executable, "-m", "orthonet", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("orthonet ")


def test_trains_and_certifies_for_real(tmp_path, capsys, monkeypatch):
    """A small run through every part, and the same numbers from the checkpoint."""
    train, test = recipes.load("digits")
    few = recipes.Split(
        recipes.Images(*(t[:400] for t in train)), recipes.Images(*(t[:60] for t in test))
    )
    monkeypatch.setattr("orthonet.recipes.images.run.load", lambda dataset: few)
    out = tmp_path / "run"
    command = f"train digits --epochs 3 --attack-steps 2 --quiet --out {out}"
    assert cli.main(command.split()) == 0
    trained = capsys.readouterr().out
    assert cli.main(["certify", str(out / "checkpoint.pt"), "--quiet"]) == 0
    certified = capsys.readouterr().out
    assert "Lipschitz constant (l2, upper): 1.0000" in certified
    lines = certified[certified.index("clean accuracy") :].splitlines()
    assert len(lines) == 8
    assert all(line in trained for line in lines)
    accuracy = float(trained.split("clean accuracy")[1].split("%")[0])
    assert accuracy > 60  # observed 83.3
    assert "none changed class" in trained


def test_convert_saves_the_model_and_prints_the_report(tmp_path, capsys, monkeypatch):
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = tmp_path / "new.pt"
    command = f"convert small_net:make --norm centering --activation abs --out {out}"
    assert cli.main(command.split()) == 0
    assert "3 changed, 0 skipped, 0 noted" in capsys.readouterr().out
    new = torch.load(out, weights_only=False)
    assert new(torch.ones(1, 3, 4, 4)).shape == (1, 8, 2, 2)
    again = f"convert torch.nn:Identity --checkpoint {tmp_path / 'absent.pt'} --out {out}"
    for wrong, message in (
        (f"convert small_net --out {out}", "package.module:function"),
        (f"convert small_net:absent --out {out}", "must have a function of that name"),
        (f"convert no_such_file:make --out {out}", "No module named"),
        (f"convert pathlib:Path --out {out}", "must return a torch.nn.Module"),
        (f"convert small_net:make --fallback nothing --out {out}", "fallback must be one of"),
        (again, "absent.pt"),
    ):
        assert cli.main(wrong.split()) == 1
        assert message in capsys.readouterr().err
