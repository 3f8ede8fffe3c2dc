"""Time series: certified below attacked, and what has no constant is only attacked."""

import dataclasses
import json

import pytest
import torch

from orthonet import cli
from orthonet.certify import sequence_bound
from orthonet.recipes import SeriesConfig, load_series, train_series
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
    by_name = {each.model: each for each in report.results}
    assert list(by_name) == ["conv", "rnn", "lstm"]
    for each in report.results:
        for radius, attacked in each.attacked.items():
            assert each.certified.get(radius, 0.0) <= attacked <= each.accuracy
    assert by_name["conv"].constant == pytest.approx(1.0, abs=1e-6)
    # 13 steps are 5 frames; an orthogonal network attains the bound of all states.
    assert by_name["rnn"].constant == pytest.approx(sequence_bound(5).value, abs=1e-4)
    assert by_name["lstm"].constant is None and by_name["lstm"].certified == {}
    assert by_name["conv"].accuracy >= 0.7  # observed 1.0
    assert by_name["conv"].certified[0.05] > 0.3  # observed 0.92
    text = report.summary()
    assert "- / " in text and all(str(path) in text for path in report.files)
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert kept["results"][0]["history"] == by_name["conv"].history
    assert (tmp_path / "run" / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is left to train; one model alone, at other radii, is judged from its state.
    one = dataclasses.replace(config, models=("lstm",), radii=(0.1,))
    again = train_series(one, tmp_path / "run", resume=True).results[0]
    assert (again.accuracy, again.history) == (by_name["lstm"].accuracy, by_name["lstm"].history)
    assert list(again.attacked) == [0.1]


def test_the_rnn_reads_frames_of_the_padded_series(config):
    model = series_model(config, "rnn", (2, 13), 2).eval()
    x = torch.rand(4, 2, 13)
    padded = torch.cat([x, torch.zeros(4, 2, 2)], 2)
    assert torch.equal(model(x), model(padded))
    seen = []
    model.rnn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
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
    ],
    ids=str,
)
def test_bad_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=f"SeriesConfig: {next(iter(changes))} must"):
        SeriesConfig(**changes)
