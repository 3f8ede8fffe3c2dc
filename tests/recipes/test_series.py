"""Time series: certified below attacked, and what has no constant is only attacked."""

import dataclasses
import json

import pytest
import torch

from orthonet import cli
from orthonet.certify import sequence_bound
from orthonet.recipes import SeriesConfig, load_series, train_series
from orthonet.recipes.sequences import series
from orthonet.recipes.sequences.series import series_model


def write_waves(folder, train=24, test=12):
    """Two classes: slow and fast waves with random phases, in two channels, of unequal length."""
    generator = torch.Generator().manual_seed(0)
    head = "@problemName Waves\n@timeStamps false\n@classLabel true slow fast\n@data\n"
    for part, number in (("TRAIN", train), ("TEST", test)):
        lines = []
        for i in range(number):
            time = torch.arange(11.0 + i % 3)
            phase = 6 * torch.rand(2, 1, generator=generator)
            wave = torch.sin((0.4, 1.5)[i % 2] * time + phase)
            channels = [",".join(f"{v:.4f}" for v in row) for row in wave.tolist()]
            lines.append(":".join([*channels, ("slow", "fast")[i % 2]]))
        (folder / f"Waves_{part}.ts").write_text(head + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    return SeriesConfig(
        "Waves",
        hidden=8,
        frame=3,
        batch_size=16,
        iterations=30,
        lr=0.05,
        radius=0.3,
        radii=(0.05, 0.2),
        attack_steps=3,
        data_root=str(write_waves(data)),
    )


def test_certified_stays_below_attacked(config, tmp_path):
    report = train_series(config, tmp_path / "run")
    assert [each.model for each in report.results] == ["conv", "rnn", "lstm"]
    for each in report.results:
        for radius, attacked in each.attacked.items():
            assert each.certified.get(radius, 0.0) <= attacked <= each.accuracy
    conv, rnn, lstm = report.results
    assert conv.constant == pytest.approx(1.0, abs=1e-6)
    # 13 steps are 5 frames; an orthogonal network attains the bound of the last state.
    assert rnn.constant == pytest.approx(sequence_bound(5, final=True).value, abs=1e-4)
    assert lstm.constant is None and lstm.certified == {}
    assert conv.accuracy >= 0.7  # observed 1.0
    assert conv.certified[0.05] > 0.3  # observed 0.92
    text = report.summary()
    assert "- / " in text and "±" not in text
    assert all(str(path) in text for path in report.files)
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert kept["results"][0]["history"] == conv.history and kept["tuning"] == {}
    assert (tmp_path / "run" / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to train; one model alone, at other radii, is judged from its state.
    one = dataclasses.replace(config, models=("lstm",), radii=(0.1,), seeds=2)
    again = train_series(one, tmp_path / "run", resume=True)
    first, second = again.results
    assert (first.accuracy, first.history) == (lstm.accuracy, lstm.history)
    assert second.seed == 1 and second.history != first.history
    assert list(first.attacked) == [0.1]
    assert "±" in again.summary() and "seed 0 to 1" in again.summary()


@pytest.mark.slow
def test_tuning_chooses_on_validation_series_alone(config, tmp_path, monkeypatch):
    """The choice is the best of the grid, and the test series take no part in it."""
    read, asked = series.load_series, []

    def reading(name, root, *, validation):
        asked.append(validation)
        data = read(name, root, validation=validation)
        if not validation:  # without them the choice would fail
            data = data._replace(test=data.test._replace(y=data.test.y * 0))
        return data

    monkeypatch.setattr(series, "load_series", reading)
    monkeypatch.setattr(series, "FRAMES", (3, 4))
    monkeypatch.setattr(series, "LOSS_RADII", (0.5, 1.0))
    short = dataclasses.replace(config, iterations=3, attack_steps=1, tune=True)
    report = train_series(short, tmp_path / "run")
    assert asked == [False, True, True, True]
    assert {name: len(rows) for name, rows in report.tuning.items()} == {
        "conv": 4,
        "rnn": 8,
        "lstm": 4,
    }
    for each in report.results:
        rows = report.tuning[each.model]
        best = max(rows, key=lambda row: (row["score"], -row["loss"]))
        assert each.settings == {key: best[key] for key in ("lr", "radius", "frame")}
        assert len({row["score"] for row in rows} | {row["loss"] for row in rows}) > 2
    # In the chosen folder the same training stands that the settings alone would do.
    conv = report.of("conv")[0]
    plain = dataclasses.replace(short, tune=False, models=("conv",), **conv.settings)
    again = train_series(plain, tmp_path / "again").results[0]
    assert again.history == conv.history and again.accuracy == conv.accuracy


def test_the_rnn_reads_frames_of_the_padded_series(config):
    model = series_model(config, "rnn", (2, 13), 2).eval()
    x = torch.rand(4, 2, 13)
    padded = torch.cat([x, torch.zeros(4, 2, 2)], 2)
    assert torch.equal(model(x), model(padded))
    seen = []
    model.rnn.rnn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    assert torch.equal(seen[0][:, 1], x[:, :, 3:6].flatten(1))
    state = torch.get_rng_state()
    same = series_model(config, "rnn", (2, 13), 2).eval()
    assert torch.equal(model(x), same(x)) and torch.equal(state, torch.get_rng_state())


def test_the_command_trains_it(config, tmp_path, capsys):
    command = f"train series --dataset Waves --data {config.data_root} --models lstm --frame 4"
    command += " --iterations 4 --hidden 4 --attack-steps 1 --validation --quiet"
    assert cli.main([*command.split(), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Waves, 4 steps, seed 0") and "model.pt" in out
    assert len(load_series("Waves", config.data_root, validation=True).test.y) == 5
    missing = ["train", "series", "--dataset", "GunPoint", "--data", str(tmp_path), "--quiet"]
    if cli.main([*missing, "--out", str(tmp_path / "no"), "--iterations", "1"]) == 1:
        assert "pip install --no-deps aeon" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"models": ("gru",)},
        {"frame": 0},
        {"lr": 0.0},
        {"radius": -1.0},
        {"radii": (-1.0,)},
        {"temperature": 0.0},
        {"seed": -1},
        {"seeds": 0},
    ],
    ids=str,
)
def test_bad_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=f"SeriesConfig: {next(iter(changes))} must"):
        SeriesConfig(**changes)
