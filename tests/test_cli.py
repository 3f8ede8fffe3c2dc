"""The command line: what it parses, calls, prints and returns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthonet import cli, convert, recipes
from orthonet.recipes.running.options import parsed_arguments
from tests.recipes.replaced import Printed, recorded


def test_train_passes_the_recipe_and_prints_the_summary(monkeypatch, capsys):
    made = recorded(monkeypatch, "mnist5k")
    assert cli.main(["train", "mnist5k"]) == 0
    assert made == [(recipes.mnist5k(), Path("runs/mnist5k"), {"progress": True})]
    assert capsys.readouterr().out == "the summary\n"


def test_every_option_of_train_changes_its_field(monkeypatch):
    made = recorded(monkeypatch, "digits")
    command = "train digits --epochs 3 --batch-size 7 --lr 0.1 --radius 0.4 --temperature 0.3"
    command += " --seed 5 --ortho-params qr --attack-steps 9 --device cpu --out elsewhere --flip"
    command += " --radii 0.2 0.1 --quiet --resume"
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
        flip=True,
        radii=(0.1, 0.2),
    )
    assert made == [(config, Path("elsewhere"), {"progress": False, "resume": True})]


def test_certify_passes_its_options(monkeypatch, capsys, tmp_path):
    made = []

    def record(*positional, tell, **keywords):
        made.append((*positional, keywords))
        return Printed()

    monkeypatch.chdir(tmp_path)
    Path("model.pt").touch()
    monkeypatch.setattr(recipes, "certify_checkpoint", record)
    monkeypatch.setattr(recipes, "certify_named", record)
    assert cli.main(["certify", "model.pt"]) == 0
    command = "certify model.pt --radii 0.1 0.2 --attack-steps 3 --device cpu --out there --quiet"
    assert cli.main(f"{command} --data pictures".split()) == 0
    command = "certify nets.mine:make --checkpoint a.pt --data digits --report page.html"
    assert cli.main(command.split()) == 0
    options = {
        "radii": [0.1, 0.2],
        "attack_steps": 3,
        "device": "cpu",
        "data_root": "pictures",
        "out": Path("there"),
        "progress": False,
    }
    config = recipes.CertifyConfig("nets.mine:make", checkpoint="a.pt", data="digits")
    assert made == [
        ("model.pt", {"progress": True}),
        ("model.pt", options),
        (config, {"report": Path("page.html"), "progress": True}),
    ]
    assert cli.main(["certify", "model.pt", "--checkpoint", "other.pt"]) == 1
    assert "--checkpoint is for a model that package.module:function" in capsys.readouterr().err


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
    monkeypatch.setattr("orthonet.recipes.images.run.load", lambda *_, **__: few)
    out = tmp_path / "run"
    command = f"train digits --epochs 3 --attack-steps 2 --quiet --out {out}"
    assert cli.main(command.split()) == 0
    trained = capsys.readouterr().out
    assert cli.main(["certify", str(out / "checkpoint.pt"), "--quiet"]) == 0
    certified = capsys.readouterr().out
    assert certified.startswith("module ")  # the certificate comes first
    constant = certified.index("Lipschitz constant (l2, upper): 1.0000")
    assert constant < certified.index("digits, convnet_digits") < certified.index("clean accuracy")
    lines = certified[certified.index("clean accuracy") :].splitlines()
    assert len(lines) == 9
    assert all(line in trained for line in lines)
    accuracy = float(trained.split("clean accuracy")[1].split("%")[0])
    assert accuracy > 60  # observed 83.3
    assert "none changed class" in trained


def test_convert_saves_the_model_and_prints_the_report(tmp_path, capsys, monkeypatch):
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8), nn.ReLU())\n"
        "def local():\n"
        "    class Own(nn.ReLU):\n"
        "        pass\n"
        "    return Own()\n"
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
    saved = out.read_bytes()
    for wrong, message in (
        (f"convert small_net --out {out}", "package.module:function"),
        (f"convert small_net:absent --out {out}", "must have a function of that name"),
        (f"convert no_such_file:make --out {out}", "No module named"),
        (f"convert pathlib:Path --out {out}", "must return a torch.nn.Module"),
        (f"convert small_net:make --fallback nothing --out {out}", "fallback must be one of"),
        (f"convert torch.nn:Linear --out {out}", "missing=['in_features', 'out_features']"),
        (
            f"convert small_net:make --out {tmp_path / 'no' / 'new.pt'}",
            "the folder of the file must exist",
        ),
        ("convert small_net:make --out new.onnx", "ends in .pt"),
        ("convert small_net:make --out .", "ends in .pt"),
        (f"convert small_net:make --input-shape 3 -4 4 --out {out}", "input_shape must be"),
        (f"convert small_net:make --out {tmp_path / 'new.safetensors'}", "ends in .pt"),
        (f"convert small_net:local --out {out}", "must be picklable"),
        (again, "absent.pt"),
    ):
        assert cli.main(wrong.split()) == 1
        assert message in capsys.readouterr().err
    assert out.read_bytes() == saved  # and nothing else is left
    assert {path.name for path in tmp_path.iterdir()} <= {"new.pt", "small_net.py", "__pycache__"}


def test_convert_opens_its_file_before_the_work(tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr("orthonet.recipes.named.convert.model_named", lambda *_: made.append(1))
    assert cli.main(f"convert a:b --out {tmp_path / 'no' / 'new.pt'}".split()) == 1
    assert "new.pt" in capsys.readouterr().err
    assert made == []


def test_convert_takes_the_options_of_orthogonalize(capsys):
    options = {parsed.name for parsed in parsed_arguments(convert.orthogonalize)}
    assert {"weights", "downsample", "fallback", "norm", "activation", "pool"} <= options
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in options)
