"""Every recipe under `torchrun`: several processes train what one trains."""

import json
import os
import socket
import subprocess
import sys

import pytest

from orthonet import cli, recipes
from tests.ranks import two_processes
from tests.recipes.pictures import make_pictures

# (run, configuration) of every recipe that is no classification of images: those are in
# test_resume.py and test_folder.py
OTHERS = {
    "copying": (
        recipes.train_sequences,
        recipes.copying(
            delay=8,
            hidden=16,
            batch_size=6,
            iterations=12,
            rebase=5,
            clip=1.0,
            log_every=4,
            models=("orthonet", "lstm"),
        ),
    ),
    "w1": (
        recipes.train_w1,
        recipes.W1Config(hidden=8, batch_size=16, iterations=12, samples=2000),
    ),
    "sdf": (
        recipes.train_sdf,
        recipes.SDFConfig("star", hidden=8, batch_size=17, iterations=12, rays=4),  # not even
    ),
    "flow": (
        recipes.train_flow,
        recipes.FlowConfig(blocks=2, hidden=4, batch_size=16, iterations=12),
    ),
}


def together(rank, folder, names):
    for name in names:
        run, config = OTHERS[name]
        report = run(config, folder / name)
        assert (report is None) == (rank == 1)


def histories(folder, name):
    metrics = json.loads((folder / name / "metrics.json").read_text())
    found = metrics.get("results", [metrics])
    return [
        [{k: v for k, v in row.items() if k != "seconds"} for row in part["history"]]
        for part in found
    ]


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "two").mkdir()
    two_processes(together, tmp_path, tmp_path / "two", list(OTHERS))
    for name, (run, config) in OTHERS.items():
        report = run(config, tmp_path / "one" / name)
        assert report.summary().count("written:") == 1
        alone, pair = (histories(tmp_path / many, name) for many in ("one", "two"))
        assert [len(rows) for rows in alone] == [len(rows) for rows in pair]
        for rows, its in zip(alone, pair, strict=True):
            assert len(rows) >= 3
            for row, other in zip(rows, its, strict=True):
                # The sums are made in another order. Raw weights differ more: where the weight made
                # of them has no derivative, Adam divides rounding by itself.
                assert row == pytest.approx(other, rel=1e-4, abs=1e-6), name
        logs = sorted(path.name for path in (tmp_path / "two" / name).glob("*.csv"))
        assert logs == (["lstm.csv", "orthonet.csv"] if name == "copying" else ["log.csv"])


TINY = {
    "digits": "--epochs 1 --attack-steps 1",
    "mnist5k": "--epochs 1 --attack-steps 1 --batch-size 1000",
    "folder": "--epochs 1 --attack-steps 1 --image-size 8 --batch-size 12 --workers 1",
    "copying": "--delay 5 --hidden 8 --iterations 4 --models orthonet",
    "seq-mnist": "--hidden 8 --iterations 2 --batch-size 8 --models orthonet",
    "w1": "--iterations 4 --hidden 8",
    "sdf": "--shape star --iterations 4 --hidden 8",
    "flow": "--iterations 4 --hidden 8",
    "conformal": "--iterations 4 --hidden 8 --attack-steps 1 --splits 2 --evaluated 20",
    "regression": "--iterations 4 --hidden 8 --attack-steps 1 --splits 2",
    "segmentation": "--iterations 4 --channels 4 --size 8 --images 2 --attack-steps 1",
    "text": "--iterations 4 --width 8 --length 8 --constants 2 --validation 4",
}


def test_the_table_of_commands_has_every_recipe():
    # These need their data, or take it where it is; the loop is that of digits.
    others = {"cifar10-xs", "cifar100-xs", "demo", "fashion", "mnist", "series"}
    assert {*TINY, *others} == recipes.registered().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_torchrun_runs_every_recipe(name, tmp_path):
    options = TINY[name].split()
    if name == "folder":
        pytest.importorskip("torchvision")
        options += ["--data", str(make_pictures(tmp_path / "pictures"))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=localhost"]
    command = [*launcher, f"--master-port={port}", "-m", "orthonet", "train", name, *options]
    done = subprocess.run(
        [sys.executable, *command, "--quiet", "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_comparison_runs_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench", "zoo"]) == 1
    assert "a comparison must run in one process" in capsys.readouterr().err
