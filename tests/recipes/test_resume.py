"""A training that is killed goes on after its last whole epoch, as if nothing had happened."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orthonet import recipes
from orthonet.recipes import Images, Split, digits, fit, load
from orthonet.recipes.running import log as log_module
from tests.ranks import two_processes

# Not MaxMin: where a patch is black, the biases of a pair meet after a step of Adam, which moves
# each by the learning rate, and rounding would choose between them.
MODEL = {"channels": (4, 8), "hidden": (16,), "activation": "abs"}
SMALL = {"model_arguments": MODEL, "epochs": 4}
SCRIPT = """
import sys
from pathlib import Path
from orthonet.recipes import Images, Split, digits, fit, load
from tests.recipes.test_resume import few, SMALL
fit(digits(**SMALL), few(), folder=Path(sys.argv[1]), resume=True)
"""


def few() -> Split:
    data = load("digits")
    return Split(Images(*(t[:80] for t in data.train)), Images(*(t[:20] for t in data.test)))


def killed_after_an_epoch(command: list[str], folder: Path, name: str = "log") -> Path:
    """Kill a training as soon as it has written the log of its folder, and return that."""
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, deadline = folder / f"{name}.csv", time.monotonic() + 120
    try:
        while not log.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return log


def test_a_killed_process_loses_one_epoch_at_most(tmp_path):
    model, history = fit(digits(**SMALL), few())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    log = killed_after_an_epoch(command, tmp_path)
    done = len(log.read_text().splitlines()) - 1
    assert done >= 1
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # the state is replaced before the log, so at most one row is missing there
    assert len(saved["history"]) in (done, done + 1)
    resumed, rows = fit(digits(**SMALL), few(), folder=tmp_path, resume=True)
    assert rows == history or all(
        row == pytest.approx(other, rel=1e-3) for row, other in zip(rows, history, strict=True)
    )
    for name, tensor in model.state_dict().items():
        # another number of threads sums in another order: 1e-6
        assert torch.allclose(tensor, resumed.state_dict()[name], atol=1e-4)
    with log.open() as file:
        assert [int(float(row["epoch"])) for row in csv.DictReader(file)] == [1, 2, 3, 4]


def together(rank, folder):
    model, history = fit(digits(**SMALL), few(), folder=folder / str(rank))
    torch.save((model.state_dict(), history), folder / f"result{rank}")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    model, history = fit(digits(**SMALL), few())
    two_processes(together, tmp_path, tmp_path)
    (state, rows), (other, _) = (torch.load(tmp_path / f"result{rank}") for rank in (0, 1))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], other[name])
        assert torch.allclose(tensor, state[name], atol=1e-4)  # observed 5e-6
    for row, its in zip(history, rows, strict=True):
        assert row["loss"] == pytest.approx(its["loss"], rel=1e-3)
        assert row["train_accuracy"] == pytest.approx(its["train_accuracy"], abs=0.03)
    assert (tmp_path / "0" / "log.csv").exists()
    assert not (tmp_path / "1").exists()


def test_a_state_between_epochs_is_all_there_is(tmp_path):
    model, history = fit(digits(**SMALL), few())
    fit(digits(**SMALL), few(), folder=tmp_path)
    saved = (tmp_path / "state.pt").read_bytes()
    again, rows = fit(digits(**SMALL), few(), folder=tmp_path, resume=True)  # nothing is left to do
    assert rows == history
    assert (tmp_path / "state.pt").read_bytes() == saved
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    other = dataclasses.replace(digits(**SMALL), lr=0.5)
    with pytest.raises(ValueError, match="of the same training"):
        fit(other, few(), folder=tmp_path, resume=True)


OTHERS = {
    "w1": (recipes.train_w1, recipes.W1Config(iterations=12, hidden=4, batch_size=8, samples=50)),
    "sdf": (recipes.train_sdf, recipes.SDFConfig(iterations=12, hidden=4, batch_size=8)),
    "flow": (recipes.train_flow, recipes.FlowConfig(iterations=12, hidden=4, blocks=1)),
    "copying": (
        recipes.train_sequences,
        recipes.copying(
            delay=3, hidden=6, batch_size=4, iterations=12, log_every=4, models=("orthonet", "lstm")
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_go_on_too(monkeypatch, tmp_path, name):
    train, config = OTHERS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(config, whole)
    add, rows = log_module.Log.add, 0

    def interrupted(self, row):
        nonlocal rows
        rows += 1
        if rows == 5:  # of three of each model in "copying": in the second one
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(log_module.Log, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, broken)
    monkeypatch.undo()
    found = train(config, broken, resume=True)
    files = ("orthonet.pt", "lstm.pt") if name == "copying" else ("model.pt",)
    for file in files:
        weights = (torch.load(folder / file, weights_only=True) for folder in (whole, broken))
        for one, other in zip(*(w.values() for w in weights), strict=True):
            assert torch.equal(one, other)
    for log in whole.glob("*.csv"):
        ours, theirs = (
            list(csv.DictReader((folder / log.name).read_text().splitlines()))
            for folder in (broken, whole)
        )
        assert len(ours) == len(theirs)
        for mine, its in zip(ours, theirs, strict=True):
            assert {**mine, "seconds": 0} == {**its, "seconds": 0}
    if name == "copying":
        assert [r.loss for r in found.results] == [r.loss for r in expected.results]
    else:
        assert dict(found.figures) == dict(expected.figures)
    with pytest.raises(ValueError, match="of the same training"):
        train(dataclasses.replace(config, lr=config.lr / 2), broken, resume=True)


@pytest.mark.slow
def test_a_killed_training_on_sequences_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "orthonet",
        "train",
        "copying",
        "--delay",
        "3",
        "--hidden",
        "6",
        "--batch-size",
        "4",
        "--iterations",
        "1000",
        "--models",
        "orthonet",
        "--resume",
        "--quiet",
        "--out",
        str(tmp_path),
    ]
    log = killed_after_an_epoch(command, tmp_path, "orthonet")
    done = len(log.read_text().splitlines()) - 1
    state = torch.load(tmp_path / "orthonet.state.pt", weights_only=True)
    assert done >= 1
    assert len(state["history"]) in (done, done + 1)
    assert not (tmp_path / "metrics.json").exists()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    with log.open() as file:
        iterations = [int(float(row["iteration"])) for row in csv.DictReader(file)]
    assert iterations == list(range(10, 1001, 10))
    assert (tmp_path / "metrics.json").exists()
