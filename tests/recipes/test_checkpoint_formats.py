"""Checkpoints hold tensors: safetensors give the same model, pickles of objects are refused."""

import pytest
import torch

from orthonet import cli, recipes
from orthonet.recipes.images.train import build


def test_safetensors_give_the_same_model_and_the_report_is_written(tmp_path, capsys):
    config = recipes.digits()
    model = build(config).eval()
    path = recipes.save_checkpoint(tmp_path / "model.safetensors", model, config)
    again, same = recipes.load_checkpoint(path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), again(x)) and same.to_dict() == config.to_dict() | {
        "device": "cpu"
    }
    page = tmp_path / "report.html"
    options = ["--input-shape", "1", "8", "8", "--report", str(page), "--quiet"]
    assert cli.main(["certify", str(path), *options]) == 0
    assert "Lipschitz constant" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_other_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("hello")
    with pytest.raises(ValueError, match="must be a checkpoint"):
        recipes.load_checkpoint(path)


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"could run any code.*torch.nn.modules.linear.Linear"):
        recipes.load_checkpoint(tmp_path / "model.pt")
