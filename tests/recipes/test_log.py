"""The rows of a training, as comma-separated values and as events of TensorBoard."""

import csv
import sys
import warnings

import pytest

from orthonet import cli, recipes
from orthonet.recipes.running.log import Log
from tests.recipes.replaced import recorded
from tests.recipes.test_resume import SMALL, few


def scalars(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard about its own imports
        module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = module.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def read(path):
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def rows_of(history, step):
    """What TensorBoard should hold: single precision."""
    tags = {tag for row in history for tag in row} - {step}
    return {
        tag: [(row[step], pytest.approx(row[tag], rel=1e-6)) for row in history] for tag in tags
    }


def test_a_training_is_in_both(tmp_path):
    pytest.importorskip("tensorboard")
    whole = recipes.digits(**SMALL)
    _, history = recipes.fit(whole, few(), folder=tmp_path, tensorboard=True)
    assert read(tmp_path / "log.csv") == history
    assert scalars(tmp_path / "tensorboard") == rows_of(history, "epoch")
    recipes.fit(whole, few(), folder=tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_a_resumed_training_replaces_what_came_after(tmp_path):
    pytest.importorskip("tensorboard")
    history = [{"epoch": i, "loss": 1.0 / i} for i in (1, 2, 3, 4)]
    with Log(tmp_path, "epoch", [], tensorboard=True) as log:
        for row in history[:3]:
            log.add({**row, "loss": 7.0})  # of a run that is killed after its third epoch ...
    with Log(tmp_path, "epoch", history[:2], tensorboard=True) as log:
        for row in history[2:]:  # ... and goes on after its second
            log.add(row)
    assert read(tmp_path / "log.csv") == history
    found = scalars(tmp_path / "tensorboard")["loss"]
    assert found == [(1, 7.0), *rows_of(history[1:], "epoch")["loss"]]


def test_sequences_and_others_write_theirs(tmp_path):
    pytest.importorskip("tensorboard")
    config = recipes.copying(
        delay=3, hidden=4, batch_size=4, iterations=4, log_every=2, models=("orthonet", "lstm")
    )
    report = recipes.train_sequences(config, tmp_path, tensorboard=True)
    for result in report.results:
        assert read(tmp_path / f"{result.model}.csv") == result.history
        found = scalars(tmp_path / "tensorboard" / result.model)
        assert found == rows_of(result.history, "iteration")
    config = recipes.W1Config(hidden=4, iterations=4, batch_size=8, samples=100)
    report = recipes.train_w1(config, tmp_path / "w1", tensorboard=True)
    assert read(tmp_path / "w1" / "log.csv") == report.history
    assert scalars(tmp_path / "w1" / "tensorboard") == rows_of(report.history, "iteration")


def test_the_command_asks_for_it(monkeypatch, tmp_path):
    made = recorded(monkeypatch, "digits")
    assert cli.main(["train", "digits", "--tensorboard"]) == 0
    assert [options for _, _, options in made] == [{"progress": True, "tensorboard": True}]


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for recipe in ("digits", "copying", "flow"):
        assert cli.main(["train", recipe, "--tensorboard", "--out", str(tmp_path / "run")]) == 1
        assert "Run: pip install tensorboard." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
