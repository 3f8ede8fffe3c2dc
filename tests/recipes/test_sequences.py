"""The recipes on sequences, and how gradients flow back through states."""

import json
import math

import pytest
import torch
from torch import nn

from orthonet import cli, layers, recipes
from orthonet.recipes import SequenceConfig, copying, gradient_norms, seq_mnist, train_sequences
from orthonet.recipes.sequences.data import copying_batch, task_of

TINY = {"hidden": 8, "batch_size": 4, "iterations": 3, "log_every": 2}


def test_batches_of_the_copying_problem():
    x, y = copying_batch(7, 5, torch.Generator().manual_seed(0))
    tokens = x.argmax(-1)
    assert x.shape == (27, 5, 10)
    assert torch.equal(x.sum(-1), torch.ones(27, 5))
    assert torch.equal(tokens[:10], y[-10:])
    assert set(y[-10:].unique().tolist()) <= set(range(1, 9))
    assert bool((tokens[16] == 9).all())
    assert int((tokens == 9).sum()) == 5
    assert int(y[:-10].sum()) == int(tokens[10:16].sum()) == int(tokens[17:].sum()) == 0
    assert copying(delay=7).baseline == pytest.approx(10 * math.log(8) / 27)


def test_pixels_come_one_by_one_in_one_order():
    plain, permuted = (task_of(seq_mnist(batch_size=3, permuted=p)) for p in (False, True))
    a, b = (task.draw(torch.Generator().manual_seed(0)) for task in (plain, permuted))
    assert a.x.shape == (784, 3, 1)
    assert torch.equal(a.y, b.y)
    assert not torch.equal(a.x, b.x)
    assert torch.equal(a.x.sort(0).values, b.x.sort(0).values)
    assert sum(batch.y.numel() for batch in plain.test) == 1000


def test_a_run_writes_its_files_and_is_reproducible(tmp_path):
    config = copying(delay=4, models=("orthonet", "lstm", "torch"), rebase=2, **TINY)
    report = train_sequences(config, tmp_path)
    again = train_sequences(config, tmp_path)
    assert [r.loss for r in report.results] == [r.loss for r in again.results]
    assert [file.name for file in report.files] == [
        "orthonet.pt",
        "lstm.pt",
        "torch.pt",
        "metrics.json",
        "training.png",
        "gradient_norms.png",
    ]
    assert all(file.stat().st_size > 0 for file in report.files)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["config"]["delay"] == 4
    assert [row["iteration"] for row in kept["results"][0]["history"]] == [2, 3]
    by_name = {r.model: r for r in report.results}
    assert by_name["orthonet"].orthogonality <= 2e-6
    assert by_name["lstm"].orthogonality > 0.1
    assert all(len(r.flow) == 24 for r in report.results)
    assert "loss without memory" in report.summary()


def test_command_line(tmp_path, capsys):
    command = (
        "train copying --delay 4 --hidden 8 --batch-size 4 --iterations 2 --lr-orthogonal 1e-3"
    )
    command += f" --triv cayley --init cayley --models orthonet --quiet --out {tmp_path}"
    assert cli.main(command.split()) == 0
    assert "copying, delay 4, hidden 8" in capsys.readouterr().out
    for recipe, foreign in (("copying", "--radius"), ("copying", "--task"), ("digits", "--delay")):
        with pytest.raises(SystemExit):
            cli.main(["train", recipe, foreign, "1", "--quiet"])
        assert f"orthonet train {recipe}: error: unknown: {foreign} 1" in capsys.readouterr().err


BAD = (
    {"task": "x"},
    {"models": ()},
    {"models": ("gru",)},
    {"delay": 0},
    {"lr": 0.0},
    {"triv": "qr"},
    {"init": "x"},
    {"nonlinearity": "x"},
    {"rebase": -1},
    {"clip": -1.0},
)


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=f"SequenceConfig: {next(iter(changes))} must"):
        SequenceConfig(**{"task": "copying", **changes})


@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["time", "batch"])
@pytest.mark.parametrize("nonlinearity", ["abs", "max_min", "identity"])
def test_gradients_are_flat_through_time(nonlinearity, options):
    layer = layers.OrthoRNN(3, 16, nonlinearity=nonlinearity, dtype=torch.float64, **options)
    x = torch.randn(50, 50, 3, dtype=torch.float64)

    def loss(y):
        return (y[:, -1] if layer.batch_first else y[-1]).square().sum()

    norms = gradient_norms(layer, x, loss)
    assert float((norms / norms[-1] - 1).abs().max()) < 1e-10
    tanh = gradient_norms(layers.OrthoRNN(3, 16, dtype=torch.float64, **options), x, loss)
    assert float(tanh[0] / tanh[-1]) < 0.1  # the slopes of tanh take it away


def test_gradient_norms_are_those_of_a_loop_by_hand():
    layer, x = nn.GRU(3, 4, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    cell = nn.GRUCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    h, states = None, []
    for step in x:
        h = cell(step, h)
        h.retain_grad()
        states.append(h)
    torch.stack(states).square().sum().backward()
    expected = torch.stack([h.grad.norm() for h in states])
    found = gradient_norms(layer, x, lambda y: y.square().sum())
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="must run in one direction"):
        gradient_norms(nn.RNN(3, 4, bidirectional=True), x, torch.sum)


@pytest.mark.slow
def test_the_copying_problem_is_solved(tmp_path):
    config = copying(delay=100, hidden=128, batch_size=64, iterations=300, models=("orthonet",))
    (result,) = recipes.train_sequences(config, tmp_path).results
    assert result.loss <= 0.005  # observed 4.6e-4
    assert result.score >= 0.99  # observed 1.0
