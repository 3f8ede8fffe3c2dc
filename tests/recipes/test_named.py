"""`orthonet certify package.module:function`: models and weights of the user's own."""

import json
import shlex
import sys

import pytest
import torch
from torch import nn

from orthonet import cli, recipes
from orthonet.layers import MaxMin, OrthoLinear
from tests.recipes.pictures import make_pictures

NETS = """
from torch import nn
from orthonet.layers import MaxMin, OrthoLinear

def make():
    return nn.Sequential(nn.Flatten(), OrthoLinear(64, 16), MaxMin(), OrthoLinear(16, 10))

def stock():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def colors():
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), OrthoLinear(12, 3))

def twice():
    return nn.LSTM(8, 8)

def none():
    return 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    name = "nets_of_a_user"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def trained() -> nn.Module:
    """Not trained, but unlike what a new one would be."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), OrthoLinear(64, 16), MaxMin(), OrthoLinear(16, 10)).eval()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_certificate_comes_first_and_the_report_before_the_attacks(
    nets, tmp_path, monkeypatch, capsys, suffix
):
    model, path, page = trained(), tmp_path / f"weights{suffix}", tmp_path / "report.html"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    seen = []
    real = recipes.images.evaluate.survivors

    def attack(*args, **kwargs):
        if not seen:
            seen.append((capsys.readouterr().out, page.read_text()))
        return real(*args, **kwargs)

    monkeypatch.setattr(recipes.images.evaluate, "survivors", attack)
    out = tmp_path / "out"
    command = f"certify {nets}:make --checkpoint {path} --data digits --attack-steps 1"
    command += f" --radii 0.1 --evaluated 40 --report {page} --out {out} --quiet"
    assert cli.main(command.split()) == 0
    (printed, first), rest = seen[0], capsys.readouterr().out
    assert printed.startswith("module ") and "Lipschitz constant (l2, upper): 1" in printed
    assert "clean accuracy" not in printed and "(40 images)" in rest
    assert "(l2, upper)" not in rest  # the certificate is printed once
    assert first.startswith("<!doctype html>") and first != page.read_text()
    found = json.loads((out / "metrics.json").read_text())
    images = recipes.load("digits").test
    chosen = torch.arange(40) * 360 // 40
    right = (model(images.x[chosen]).argmax(1) == images.y[chosen]).float().mean()
    assert found["evaluation"]["accuracy"] == pytest.approx(right.item())
    assert found["config"]["source"] == f"{nets}:make"
    assert not (out / ".lock").exists()


def test_pictures_of_a_folder(nets, tmp_path, capsys):
    pytest.importorskip("torchvision")
    folder = make_pictures(tmp_path / "pictures", 4)
    for data in (folder, folder / "train"):
        command = f"certify {nets}:colors --data {data} --input-shape 3 8 8 --attack-steps 1"
        assert cli.main([*command.split(), "--quiet"]) == 0
        number = 6 if data == folder else 12  # of `val`, and of the classes themselves
        assert f"({number} images)" in capsys.readouterr().out


def test_a_shape_is_enough_for_the_certificate(nets, capsys):
    assert cli.main([*f"certify {nets}:make --input-shape 1 8 8 --quiet".split()]) == 0
    out = capsys.readouterr().out
    assert "Lipschitz constant (l2, upper): 1" in out and "accuracy" not in out
    assert cli.main(f"certify {nets}:make --input-shape 1 8 8 --norm linf --quiet".split()) == 0
    assert "Lipschitz constant (linf, upper): " in capsys.readouterr().out


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_converted_model_is_certified_from_its_file(nets, capsys):
    """The command that `orthonet convert` prints runs as it is printed."""
    command = f"convert {nets}:stock --activation max_min --out 'new net.pt' --input-shape 1 8 8"
    assert cli.main(shlex.split(command)) == 0
    told = capsys.readouterr()
    assert told.err.startswith("orthonet: warning: orthogonalize: ")  # it is untrained
    assert told.err.count("\n") == 1
    assert "Lipschitz constant: at most 1" in told.out
    line = told.out.splitlines()[-1].removeprefix("certify it: orthonet ")
    assert line == "certify 'new net.pt' --trusted --input-shape 1 8 8"
    assert cli.main([*shlex.split(line), "--quiet"]) == 0
    assert "Lipschitz constant (l2, upper): 1" in capsys.readouterr().out
    line += " --data digits --evaluated 5 --attack-steps 1 --quiet"
    assert cli.main(shlex.split(line)) == 0
    assert "(5 images)" in capsys.readouterr().out


def test_mistakes_are_one_sentence(nets, tmp_path, capsys):
    shape = "--input-shape 1 8 8"
    files = {
        "empty.pt": b"",
        "cut.pt": b"PK\x03\x04 cut",
        "text.safetensors": b"hello",
        "other.pt": None,
        "list.pt": None,
        "pickle.pt": None,
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    for command, words in (
        (f"{nets}:make", "data or input_shape must be given"),
        (f"{nets}:make {shape} --out there", "out needs images"),
        (f"{nets}:make {shape} --local 3", "local needs images"),
        (f"{nets}:make {shape} --report .", "report must not be a folder"),
        (f"pickle.pt {shape}", "--trusted reads a model that was saved whole"),
        (f"absent.pt {shape} --trusted", "source must be a file that exists, got source='absent"),
        (f"other.pt {shape} --trusted", "it holds a state_dict"),
        (f"cut.pt {shape} --trusted", "must be a model that torch.save wrote whole, got path='cut"),
        (f"empty.pt {shape} --trusted", "must be a model that torch.save wrote whole"),
        (f"{nets}:absent {shape}", "must have a function of that name"),
        (f"{nets}:none {shape}", "must return a torch.nn.Module"),
        ("no_such_file:make --data digits", "No module named 'no_such_file'"),
        (f"{nets}:make --data nowhere", "data must be one of digits, mnist5k"),
        (f"{nets}:colors --data digits", "must take the images, got shape=(1, 1, 8, 8)"),
        (f"{nets}:twice --input-shape 4 8", "must return one tensor"),
        (f"{nets}:make --input-shape 0 8", "input_shape must be an integer >= 1"),
        (f"{nets}:make {shape} --checkpoint absent.pt", "absent.pt"),
        (f"{nets}:make {shape} --checkpoint empty.pt", "it is empty"),
        (f"{nets}:make {shape} --checkpoint cut.pt", "cut off, damaged"),
        (f"{nets}:make {shape} --checkpoint text.safetensors", "the file must be a state_dict"),
        (f"{nets}:make {shape} --checkpoint other.pt", "2 tensors are unknown (bias, ...)"),
        (f"{nets}:make {shape} --checkpoint list.pt", "it holds a list, not a state_dict"),
        (f"{nets}:make {shape} --checkpoint pickle.pt", "could run any code"),
        (f"{nets}:make {shape} --device cuda:99", "device must be one of this machine"),
        ("absent.pt", "absent.pt"),
    ):
        assert cli.main(["certify", *command.split(), "--quiet"]) == 1, command
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, (command, error)
