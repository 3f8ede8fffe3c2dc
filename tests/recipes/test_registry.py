"""Recipes by name: options, defaults and help come from the configuration, in one file."""

import dataclasses
import importlib
import sys

import pytest

from orthonet import cli, recipes
from orthonet.recipes.running import registry
from orthonet.recipes.running.options import training_fields
from tests.recipes.replaced import recorded

ALL = [(c, name) for c in ("train", "bench") for name in recipes.registered(c)]
ONE_FILE = '''
"""A recipe of a contributor, in a file of its own."""

import dataclasses

from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.registry import Recipe, register


@dataclasses.dataclass(frozen=True)
class SpiralConfig:
    """A spiral that is wound up.

    Attributes:
        turns: Turns of the spiral; a whole number.
        color: Its color.
        steps: Optimizer steps.
    """

    turns: int = 3
    color: str = option("red", choices=("red", "blue"), trains=False)
    steps: tuple[float, ...] = (1.0, 2.0)

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass
class Wound:
    text: str

    def summary(self):
        return self.text


def wind(config, out, *, progress):
    return Wound(f"{config} in {out}")


register("spiral", Recipe(SpiralConfig, SpiralConfig, wind))
'''


@pytest.fixture
def one_file(tmp_path, monkeypatch):
    """The package of recipes with a file more."""
    (tmp_path / "spiral.py").write_text(ONE_FILE)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("orthonet.recipes.spiral", None)
    vars(recipes).pop("spiral", None)


def test_a_recipe_is_added_in_one_file(one_file, capsys):
    assert cli.main(["train", "spiral", "--turns", "5", "--steps", "0.5", "--quiet"]) == 0
    expected = "SpiralConfig(turns=5, color='red', steps=(0.5,)) in runs/spiral\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "spiral", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in (
        "A spiral that is wound up.",
        "--turns N Turns of the spiral (3)",
        "--color NAME Its color: red, blue (red)",
        "--steps X [X ...] Optimizer steps (1 2)",
        "--out DIR Folder of the results (runs/spiral)",
    ):
        assert words in text
    assert "--resume" not in text  # `wind` does not take it
    config = recipes.registered()["spiral"].build()
    assert training_fields(config) == {"turns": 3, "steps": (1.0, 2.0)}
    with pytest.raises(ValueError, match="SpiralConfig: color must be one of 'red', 'blue'"):
        dataclasses.replace(config, color="green")


def test_every_option_has_help_and_the_default_of_its_recipe():
    for command, name in ALL:
        recipe = recipes.registered(command)[name]
        config, options = recipe.build(), recipe.parsed()
        assert recipe.summary, name
        assert len({option.name for option in options}) == len(options) > 5
        for option in options:
            where = f"{command} {name} --{option.name}"
            assert option.help and not any(c in option.help for c in ("\\", "`", "][")), where
            if not option.option.into:
                assert option.default == getattr(config, option.name), where
                assert option.default is not dataclasses.MISSING


def test_every_option_reaches_the_configuration(monkeypatch):
    """With another value than the default, and no other field changes."""
    for command, name in ALL:
        made = recorded(monkeypatch, name, command=command)
        recipe = recipes.registered(command)[name]
        before, words = dataclasses.asdict(recipe.build()), [command, name, "--quiet"]
        options = [o for o in recipe.parsed() if o.name != "local"]  # in l2 only, see below
        for option in options:
            flag, allowed = f"--{option.name.replace('_', '-')}", option.option.allowed()
            if option.kind is bool:
                words += [f"--no-{flag[2:]}" if option.default else flag]
            elif allowed:
                words += [flag, next(v for v in allowed if v not in (option.default, "geotorch"))]
            elif option.kind is str:
                words += [flag, "cpu:0"]
            else:
                first = option.default[:1] if option.many else (option.default,)
                value = next(iter(first), None) or 1
                words += [flag, str(value * 2 if option.kind is int else value * 0.5)]
        assert cli.main(words) == 0
        after = dataclasses.asdict(made.pop()[0])
        changed = {field for field in after if after[field] != before[field]}
        wanted = {option.option.into or option.name for option in options}
        assert wanted <= changed <= wanted | {"model_arguments"}  # another model has others
    made = recorded(monkeypatch, "digits")
    assert cli.main(["train", "digits", "--quiet", "--local", "3"]) == 0
    assert made.pop()[0] == recipes.digits(local=3)


def test_help_lists_the_recipes_and_their_own_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in recipes.registered())
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", "--help"])
    text = capsys.readouterr().out
    assert "--epochs N" in text and "Passes over the training images (30)" in text
    assert not any(flag in text for flag in ("--dataset", "--data-root", "--delay", "--dimension"))


def test_a_name_belongs_to_one_recipe():
    recipe = recipes.registered()["digits"]
    with pytest.raises(ValueError, match=r"register: every recipe needs its own name.*'digits'"):
        recipes.register("digits", recipe)
    with pytest.raises(ValueError, match="command must be one of"):
        recipes.register("other", recipe, command="play")
