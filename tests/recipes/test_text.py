"""Characters: the text, the models, and what the recipe says of them."""

import dataclasses

import pytest
import torch
from torch.nn.functional import one_hot

from orthonet import cli
from orthonet.certify import certify
from orthonet.recipes import (
    LipschitzCharacters,
    PlainCharacters,
    TextConfig,
    python_topics,
    train_text,
)
from orthonet.recipes.text.data import read_text
from tests.recipes.replaced import recorded
from tests.recipes.test_beyond import written

TINY = TextConfig(
    attention=("distance",),
    constants=(0.5,),
    length=8,
    characters=12,
    width=12,
    heads=2,
    batch_size=4,
    iterations=12,
    validation=10,
)


def test_the_text_is_numbered_by_frequency_and_split():
    text = read_text("aab" * 400 + "xyz", 3)
    assert text.characters[:2] == "ab"
    assert len(text.train) == 1203 * 9 // 10
    assert torch.equal(text.train[:6], torch.tensor([0, 0, 1, 0, 0, 1]))
    assert text.validation[-3:].tolist() == [2, 2, 2]
    x, y = text.batch(5, 7, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (5, 7)
    assert torch.equal(x[:, 1:], y[:, :-1])
    x, y = text.pieces(7, 4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[0], text.validation[:7])
    step = (len(text.validation) - 8) // 3
    assert all(torch.equal(y[i], text.validation[i * step + 1 :][:7]) for i in range(4))
    with pytest.raises(ValueError, match="2 characters or more"):
        read_text("short", 3)
    assert read_text(python_topics(), 64).characters[0] == " "


@pytest.mark.parametrize("attention", ["distance", "cosine", "mixing"])
def test_no_model_reads_ahead(attention):
    lipschitz = LipschitzCharacters(6, 5, 8, 2, (attention,), 3.0)
    plain = PlainCharacters(6, 5, 8, 2, 1)
    lipschitz.requires_grad_(False), plain.requires_grad_(False)
    x = one_hot(torch.randint(6, (2, 5)), 6).float()
    other = x.clone()
    other[:, 3:] = other[:, 3:].roll(1, -1)
    for model in (lipschitz.eval(), plain.eval()):
        torch.testing.assert_close(model(x)[:, :3], model(other)[:, :3])
        assert float((model(x) - model(other))[:, 3:].abs().max()) > 1e-4


@pytest.mark.slow
def test_the_recipe_proves_what_it_says(tmp_path):
    report = train_text(TINY, tmp_path)
    found = report.figures
    assert found["steepest_0.5"] <= found["constant_0.5"] <= 0.5 * (1 + 1e-5)
    assert 0 < found["rounding_0.5"] < 0.1
    assert found["certified_0.5"] <= found["accuracy_0.5"]
    assert report.summary().count(" %") == 3
    written(report, tmp_path, "text.png")
    model = LipschitzCharacters(12, 8, 12, 2, ("distance",), 0.5).eval()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    names = {k.removeprefix("0_5."): v for k, v in state.items() if k.startswith("0_5.")}
    model.load_state_dict(names)
    x = torch.zeros(1, 8, 12)
    assert certify(model, x, lower=False).constant.value == pytest.approx(found["constant_0.5"])


@pytest.mark.slow
def test_it_goes_on_and_learns(tmp_path):
    first = train_text(TINY, tmp_path / "one")
    train_text(TINY, tmp_path / "two")
    again = train_text(TINY, tmp_path / "two", resume=True)
    assert dict(again.figures) == dict(first.figures)
    longer = dataclasses.replace(TINY, iterations=300, constants=(32.0,), batch_size=32)
    found = train_text(longer, tmp_path / "long").figures
    assert max(found["loss_32"], found["loss_plain"]) < 2.4  # of log 12 = 2.48


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": ("dot",)}, "attention must be one of"),
        ({"constants": ()}, "one block and one constant"),
        ({"constants": (0.0,)}, "constants must be"),
        ({"heads": 5}, "heads must divide width"),
        ({"length": 0}, "length must be"),
    ],
)
def test_bad_values_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TextConfig(**options)


def test_the_command(monkeypatch):
    made = recorded(monkeypatch, "text")
    command = "train text --attention mixing cosine --constants 2 8 --iterations 3 --quiet"
    assert cli.main(command.split()) == 0
    config = TextConfig(attention=("mixing", "cosine"), constants=(2.0, 8.0), iterations=3)
    assert [c for c, _, _ in made] == [config]
