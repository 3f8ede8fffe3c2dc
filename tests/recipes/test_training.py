"""Configurations, the training loop and the checkpoints."""

import dataclasses
import json
import math
import re

import pytest
import torch
from torch import nn

from orthonet import losses
from orthonet.layers import OrthoConv2d
from orthonet.models import list_models
from orthonet.recipes import (
    ORTHO_PARAMS,
    Images,
    Split,
    TrainConfig,
    digits,
    fashion,
    fit,
    load,
    load_checkpoint,
    mnist5k,
    registered,
    save_checkpoint,
)
from orthonet.recipes.images.train import loss_of
from orthonet.recipes.running.files import write_atomically
from orthonet.recipes.running.log import Log

SMALL = {"model_arguments": {"channels": (4, 8), "hidden": (16,)}, "epochs": 2}


@pytest.fixture(scope="module")
def images() -> Split:
    data = load("digits")
    return Split(Images(*(t[:300] for t in data.train)), Images(*(t[:100] for t in data.test)))


@pytest.fixture(scope="module")
def few(images) -> Split:
    return Split(Images(*(t[:80] for t in images.train)), Images(*(t[:20] for t in images.test)))


@pytest.fixture(scope="module")
def reference(few) -> list[dict[str, float]]:
    return fit(digits(**SMALL), few)[1]


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_model_trains_on_the_digits_or_is_refused_by_one_sentence(few):
    two = Split(Images(few.train.x[:2], few.train.y[:2]), Images(few.test.x[:2], few.test.y[:2]))
    small = {"convnet_images": {"width": 4}, "convnet_xs": {"width": 2, "depth": 1}}
    refused = {}
    for name in list_models():
        config = digits(model=name, epochs=1, model_arguments=small.get(name, {}))
        try:
            model, history = fit(config, two)
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert model(two.test.x).shape == (2, 10) and len(history) == 1
    assert refused.keys() == {"convnet_mnist", "convnet_series"}
    start = r"fit: the model must make \(N, classes\) logits of images \(N, 1, 8, 8\), got model="
    assert re.match(rf"{start}'convnet_mnist', .*\. Choose a model", refused["convnet_mnist"])
    assert refused["convnet_series"].startswith("convnet_series: in_shape must be (channels, ")
    config = digits(model="convnet_mnist", unconstrained=True)
    with pytest.raises(ValueError, match=start):
        fit(config, two)
    with pytest.raises(ValueError, match=start):
        fit(digits(), two, model=nn.Conv2d(1, 10, 3))
    wide = digits(model="convnet", model_arguments={"num_classes": 12, "hidden": (8,)})
    assert fit(dataclasses.replace(wide, epochs=1), two)[0](two.test.x).shape == (2, 12)


IMAGES = [r.build for r in registered().values() if issubclass(r.config, TrainConfig)]


@pytest.mark.parametrize("build", IMAGES)
def test_recipe_is_frozen_and_survives_json(build):
    config = build(seed=3, epochs=7, model_arguments={"hidden": (8,)})
    assert (config.seed, config.epochs) == (3, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_offset_is_that_of_the_radius():
    assert digits(radius=0.5).offset == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "svhn"}, "TrainConfig: dataset must be one of"),
        ({"model": "resnet50"}, "model must be one of"),
        ({"ortho_params": "svd"}, "ortho_params must be one of 'default'"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"attack_steps": -1}, "attack_steps"),
        ({"lr": 0.0}, "lr must be a number in"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"warmup": 1.5}, "warmup"),
        ({"radius": -1.0}, "radius"),
        ({"shift": -1.0}, "shift"),
        ({"rotation": 200.0}, "rotation"),
        ({"zoom": 2.0}, "zoom"),
        ({"shear": -0.1}, "shear"),
        ({"seed": -1}, "seed"),
        ({"noise": -0.1}, "noise"),
        ({"cpu_seconds": -1.0}, "cpu_seconds"),
        ({"loss": "hinge"}, "loss must be one of 'offset', 'annealing', 'emma'"),
        ({"radii": (0.5, -1.0)}, "radii"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mnist5k(**changes)


def test_recipes_choose_what_a_norm_or_another_model_needs():
    config = mnist5k(norm="linf", lr=0.5)
    assert (config.model, config.lr, config.followed) == ("mlp", 0.5, 0.1)
    assert config.model_arguments == {"in_features": 784, "num_classes": 10, "norm": "linf"}
    assert config.offset == pytest.approx(2 * config.radius)
    assert "linf" in config.title
    assert digits(norm="linf").model_arguments["in_features"] == 64
    assert fashion().model_arguments
    assert fashion(model="convnet_mnist").model_arguments == {}
    with pytest.raises(ValueError, match="local must be 0 unless the norm is l2"):
        mnist5k(norm="linf", local=5)


def test_networks_without_constraint_train_and_come_back(few, tmp_path):
    config = digits(unconstrained=True, **{**SMALL, "epochs": 1})
    model, history = fit(config, few)
    kinds = {type(m) for m in model.modules() if hasattr(m, "weight")}
    assert kinds == {nn.Linear, nn.Conv2d}
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 3
    weight = model.get_submodule("linear1").weight
    assert (weight @ weight.T - torch.eye(len(weight))).abs().max() > 1e-3
    assert math.isfinite(history[0]["loss"])
    again, found = load_checkpoint(save_checkpoint(tmp_path / "a.pt", model, config))
    assert found == config
    assert torch.equal(again(few.test.x), model(few.test.x))


def test_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"unknown=\['color'\]"):
        TrainConfig.from_dict({**digits().to_dict(), "color": "red"})


@pytest.mark.parametrize("name", ORTHO_PARAMS)
def test_preset_reaches_the_model_and_trains(few, name):
    model, history = fit(digits(ortho_params=name, **{**SMALL, "epochs": 1}), few)
    conv = next(m for m in model.modules() if isinstance(m, OrthoConv2d))
    expected = ORTHO_PARAMS[name].build((1, 4, 4))
    kinds = {type(m) for m in conv.modules()}
    assert {type(m) for m in expected} <= kinds
    assert math.isfinite(history[0]["loss"])


def test_training_learns(images):
    model, history = fit(digits(**{**SMALL, "epochs": 4}), images)
    assert not model.training
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["test_accuracy"] > 0.7
    assert history[-1]["test_accuracy"] >= history[-1]["test_margin_accuracy"]
    rates = [row["lr"] for row in history]
    assert max(rates) <= digits().lr
    assert rates[0] < max(rates)
    with torch.no_grad():
        right = model(images.test.x).argmax(1) == images.test.y
    assert right.float().mean().item() == pytest.approx(history[-1]["test_accuracy"])


def test_same_seed_gives_the_same_weights(few):
    state = torch.get_rng_state()
    model, history = fit(digits(**SMALL), few)
    assert torch.equal(torch.get_rng_state(), state), "training must not use the global generator"
    torch.rand(5)
    again, history_again = fit(digits(**SMALL), few)
    assert history == history_again
    assert equal(states(model), states(again))
    other, _ = fit(digits(seed=1, **SMALL), few)
    assert not equal(states(model), states(other))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.01},
        {"batch_size": 100},
        {"warmup": 0.5},
        {"radius": 0.1},
        {"temperature": 1.0},
        {"shift": 1.0},
        {"rotation": 0.0},
        {"zoom": 0.0},
        {"shear": 0.0},
        {"noise": 0.1},
        {"loss": "annealing"},
        {"loss": "emma"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_training_is_read(few, reference, change):
    _, changed = fit(digits(**SMALL, **change), few)
    assert [row["loss"] for row in reference] != [row["loss"] for row in changed]


def test_the_losses_are_those_that_are_named():
    config = digits(radius=0.5, model_arguments={"lipschitz": 2.0}, temperature=0.3)
    logits, y = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    wanted = {
        "offset": losses.offset_cross_entropy(logits, y, offset=math.sqrt(2), temperature=0.3),
        "annealing": losses.logit_annealing(logits, y, offset=math.sqrt(2), temperature=0.3),
        "emma": losses.emma(logits, y, radius=0.5, lipschitz=2.0),
    }
    for name, value in wanted.items():
        found = loss_of(dataclasses.replace(config, loss=name))(logits, y)
        assert torch.equal(found, value), name


def test_a_training_of_limited_time_ends_with_it(few, tmp_path, monkeypatch):
    """Half a second a step: the schedule follows the time, and goes on where it was left."""
    clock = iter(range(10_000))
    monkeypatch.setattr("orthonet.recipes.images.train.time.process_time", lambda: next(clock) / 2)
    config = digits(**{**SMALL, "epochs": 1, "cpu_seconds": 3.0, "warmup": 0.5, "lr": 0.04})
    _, history = fit(config, few, folder=tmp_path)
    # 80 images are 2 steps of 64; each step reads the clock once, and so does each epoch
    assert [row["steps"] for row in history] == [2, 4, 6]
    assert [row["cpu_seconds"] for row in history] == [1.0, 2.0, 3.0]
    rates = [row["lr"] for row in history]
    # A cosine from lr / 25 up to lr in the first half, then down to 0, at 0, 1/3 and 2/3 of it.
    # The schedule has 2000 positions; observed 6e-4 off.
    assert rates == pytest.approx([0.0016, 0.0016 + 0.75 * 0.0384, 0.75 * 0.04], rel=5e-3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["schedule"]["last_epoch"] == 1999
    again = fit(config, few, folder=tmp_path, resume=True)[1]
    assert again == history
    other = tmp_path / "other"
    other.mkdir()
    made = Log.add
    monkeypatch.setattr(Log, "add", interrupting(made, after=1))
    with pytest.raises(KeyboardInterrupt):
        fit(config, few, folder=other)
    monkeypatch.setattr(Log, "add", made)
    assert fit(config, few, folder=other, resume=True)[1] == history


def interrupting(add, after):
    """`Log.add`, interrupted after some rows."""
    rows = []

    def interrupted(self, row):
        add(self, row)
        rows.append(row)
        if len(rows) == after:
            raise KeyboardInterrupt

    return interrupted


def test_a_diverging_loss_is_an_error(images):
    broken = Split(Images(images.train.x * math.nan, images.train.y), images.test)
    with pytest.raises(ValueError, match=r"fit: the loss must stay finite.*epoch=1"):
        fit(digits(**SMALL), broken)


def test_progress_goes_to_stderr(few, capsys):
    fit(digits(**SMALL), few, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "test=" in captured.err


def test_checkpoint_round_trip(few, tmp_path):
    config = digits(**SMALL)
    model, _ = fit(config, few)
    path = save_checkpoint(tmp_path / "new" / "model.pt", model, config)
    loaded, config_loaded = load_checkpoint(path)
    assert config_loaded == config
    assert not loaded.training
    assert equal(states(model), states(loaded))
    with torch.no_grad():
        assert torch.equal(loaded(few.test.x), model(few.test.x))
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]
    assert isinstance(torch.load(path, weights_only=True), dict)


def test_other_files_are_not_checkpoints(tmp_path):
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("not a checkpoint")
    torch.save({"state_dict": {}}, other)
    for path in (text, other):
        with pytest.raises(ValueError, match="must be a checkpoint of orthonet train"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_atomically(tmp_path / "file", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
