"""The recipe for folders of pictures: its loaders, its files, several processes, kill -9."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from orthonet import cli, recipes
from orthonet.recipes import FolderConfig, ImageFolders, TrainConfig, load_checkpoint
from tests.recipes.pictures import make_pictures
from tests.recipes.test_resume import killed_after_an_epoch

pytest.importorskip("torchvision")

SMALL = {"width": 4, "smallest": 4}


def config(folder, **changes) -> FolderConfig:
    values = {"epochs": 3, "batch_size": 12, "image_size": 8, "workers": 0, "attack_steps": 2}
    values |= {"data_root": str(folder), "model_arguments": SMALL, "evaluated": 10}
    return recipes.folder(**{**values, **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "run"
    return out, recipes.train(config(pictures), out, tensorboard=False)


def parts(source, epoch, rank=0, size=1):
    return list(source.batches(epoch, torch.Generator(), rank, size))


def test_trains_certifies_and_attacks(run, pictures):
    out, report = run
    assert report.config.model_arguments == {"in_shape": (3, 8, 8), "num_classes": 3, **SMALL}
    assert report.evaluation.constant == pytest.approx(1.0, abs=1e-4)  # 1 + 2e-6
    assert report.evaluation.broken == 0
    assert report.evaluation.accuracy > 0.8  # observed 1.0, one color for each class
    assert len(report.evaluation.radii) == 10
    assert report.history[-1]["test_accuracy"] > 0.8
    names = {"checkpoint.pt", "state.pt", "log.csv", "metrics.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert json.loads((out / "metrics.json").read_text())["config"]["image_size"] == 8
    model, loaded = load_checkpoint(out / "checkpoint.pt")
    assert loaded == report.config and isinstance(loaded, FolderConfig)
    assert TrainConfig.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded
    again = recipes.certify_checkpoint(out / "checkpoint.pt")
    assert again.evaluation == report.evaluation
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_the_batches_depend_on_seed_epoch_and_picture_alone(pictures):
    """Not on the workers, nor on the number of processes."""
    alone = parts(ImageFolders(config(pictures)), 1)
    assert [len(part.y) for part in alone] == [12, 12, 12, 12]
    by_workers = parts(ImageFolders(config(pictures, workers=2)), 1)
    for part, same in zip(alone, by_workers, strict=True):
        assert torch.equal(part.x, same.x) and torch.equal(part.y, same.y)
    source = ImageFolders(config(pictures))
    halves = [parts(source, 1, rank, 2) for rank in (0, 1)]
    for part, *both in zip(alone, *halves, strict=True):
        assert [half.counted for half in both] == [6, 6]
        together = torch.stack([half.x for half in both], 1).flatten(0, 1)
        assert torch.equal(part.x, together)
    state = torch.get_rng_state()
    other, later = parts(ImageFolders(config(pictures, seed=1)), 1), parts(source, 2)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(alone[0].x, other[0].x)
    assert not torch.equal(alone[0].x, later[0].x)
    seen = torch.cat([part.y for part in alone])
    assert seen.bincount().tolist() == [16, 16, 16]


@pytest.mark.parametrize(
    "change",
    [{"min_scale": 1.0}, {"flip": False}, {"shift": 2.0}, {"crop": 2}, {"noise": 0.1}],
    ids=str,
)
def test_every_field_of_the_augmentation_is_read(pictures, change):
    first = parts(ImageFolders(config(pictures)), 1)[0].x
    assert not torch.equal(first, parts(ImageFolders(config(pictures, **change)), 1)[0].x)


def test_every_validation_picture_is_seen_once(pictures):
    source = ImageFolders(config(pictures))
    sizes = {len(source.val): 24}
    for size in (1, 2, 5):
        seen = [y for rank in range(size) for batch in source.tests(rank, size) for y in batch.y]
        sizes[len(seen)] = 24
    assert sizes == {24: 24}
    assert source.evaluated().test.y.bincount().tolist() == [4, 3, 3]
    everything = ImageFolders(config(pictures, evaluated=0)).evaluated().test
    assert (
        everything.x.shape == (24, 3, 8, 8) and 0 <= everything.x.min() <= everything.x.max() <= 1
    )


def test_errors_say_what_to_do(pictures, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="FolderConfig: min_scale must be a number in"):
        recipes.folder(min_scale=0.0)
    with pytest.raises(ValueError, match="dataset must be one of 'folder'"):
        recipes.folder(dataset="digits")
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", "--image-size", "8"])
    assert "unknown: --image-size" in capsys.readouterr().err
    assert cli.main(["train", "folder", "--data", str(tmp_path / "absent")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    shutil.rmtree(copy / "val" / "red")
    with pytest.raises(ValueError, match=r"the same classes, got only_in_one=\['red'\]"):
        ImageFolders(config(copy))
    (copy / "train" / "blue" / "00.png").write_bytes(b"no picture")
    shutil.copytree(pictures / "val" / "red", copy / "val" / "red")
    with pytest.raises(ValueError, match=r"every file must be a whole picture, got file=.*00.png"):
        parts(ImageFolders(config(copy)), 1)
    with pytest.raises(ValueError, match=r"^orthonet train folder: every file .*00.png[^\n]*$"):
        parts(ImageFolders(config(copy, workers=1)), 1)
    with pytest.raises(ValueError, match="multiple of the number of processes, got batch_size=12"):
        parts(ImageFolders(config(pictures)), 1, 0, 5)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ModuleNotFoundError, match="Run: pip install torchvision"):
        ImageFolders(config(pictures))


def torchrun(*arguments, processes=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    place = ["--master-addr=localhost", f"--master-port={port}", "-m", "orthonet"]
    return [sys.executable, *launcher, *place, *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one(pictures, tmp_path):
    """By the command itself; workers read the pictures."""
    options = "--image-size 8 --epochs 2 --batch-size 12 --workers 1 --attack-steps 1 --quiet"
    command = ["train", "folder", "--data", str(pictures), *options.split(), "--seed", "2"]
    done = subprocess.run(
        torchrun(*command, "--out", str(tmp_path / "two")),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("clean accuracy") == 1  # the first process alone reports
    assert "none changed class" in done.stdout
    arguments = {"model_arguments": {}, "epochs": 2, "seed": 2, "workers": 0}
    one = config(pictures, **arguments)
    source = ImageFolders(one)
    model, history = recipes.fit(source.completed(), source)
    rows = json.loads((tmp_path / "two" / "metrics.json").read_text())["history"]
    for row, its in zip(history, rows, strict=True):
        assert row == pytest.approx(its, rel=1e-4)  # 1e-6
    loaded, _ = load_checkpoint(tmp_path / "two" / "checkpoint.pt")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, loaded.state_dict()[name], atol=1e-4), name  # 1e-6


SCRIPT = """
import sys
from pathlib import Path
from orthonet import recipes
from tests.recipes.test_folder import config
source = recipes.ImageFolders(config(sys.argv[1], epochs=6, workers=1))
recipes.fit(source.completed(), source, folder=Path(sys.argv[2]), resume=True)
"""


def test_a_killed_training_goes_on(pictures, tmp_path):
    """Killed while workers read; the rest is what it would have been."""
    command = [sys.executable, "-c", SCRIPT, str(pictures), str(tmp_path)]
    killed_after_an_epoch(command, tmp_path)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["history"]
    assert 1 <= len(saved) <= 6
    source = ImageFolders(config(pictures, epochs=6, workers=1))
    whole, history = recipes.fit(source.completed(), source)
    resumed, rows = recipes.fit(source.completed(), source, folder=tmp_path, resume=True)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, its in zip(history, rows, strict=True):
        assert row == pytest.approx(its, rel=1e-3)
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, resumed.state_dict()[name], atol=1e-4), name
