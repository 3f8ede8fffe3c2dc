"""The recipes of CONTRIBUTING, followed to the letter in a copy of the repository."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import house

CONTRIBUTING = house.CONTRIBUTING
ROOT = CONTRIBUTING.parent
AT_MOST = {"A layer": 3, "A map": 3, "A manifold": 2, "An operation": 1, "A recipe": 1}
STEP = re.compile(
    r"^`(?P<path>[^`]+)`, (?P<where>[^\n]+):\n\n```\w+\n(?P<text>.*?)^```$", re.M | re.S
)


class Step(NamedTuple):
    """A file to write, or lines to add to one."""

    path: str
    where: str
    text: str

    def changed(self, before: str) -> str:
        """The text of the file afterwards."""
        if self.where == "new":
            assert not before
            return self.text
        assert before, f"{self.path} is not there"
        if self.where == "at the end":
            return f"{before}\n\n{self.text}"
        if self.where.startswith("the import"):
            (line,) = ast.parse(self.text).body
            assert isinstance(line, ast.ImportFrom)
            names = "".join(f'    "{alias.name}",\n' for alias in line.names)
            start = "\n__all__ = [\n"
            assert before.count(start) == 1
            return before.replace(start, f"\n{self.text}{start}{names}")
        anchor = re.fullmatch(r"after (`+) ?(.+?) ?\1", self.where)
        assert anchor, f"where is {self.where!r}?"
        (found,) = [line for line in before.splitlines(True) if line.startswith(anchor[2])]
        return before.replace(found, found + self.text)


def recipes() -> dict[str, tuple[list[Step], list[str]]]:
    """The steps of each recipe, and the commands that run its laws."""
    (chapter,) = re.findall(
        r"^## How to add \.\.\.\n(.*?)^## ", CONTRIBUTING.read_text(), re.M | re.S
    )
    found = {}
    for section in chapter.split("\n### ")[1:]:
        name, text = section.split("\n", 1)
        steps = [Step(**match.groupdict()) for match in STEP.finditer(text)]
        assert text.count("\n```") == 2 * len(steps), f"{name}: a block that is no step"
        _, laws = text.split("\nLaws: ")
        found[name] = steps, re.findall(r"`([^`]+)`", laws.split("\n\n")[0])
    return found


def follow(steps: list[Step], root: Path) -> None:
    for step in steps:
        file = root / step.path
        file.write_text(step.changed(file.read_text() if file.exists() else ""))


def test_the_house_is_drawn_as_it_stands():
    assert house.drawn() == house.figure(), "python -m tests.house --write"


def test_recipes_touch_few_files_and_can_be_followed():
    assert list(recipes()) == list(AT_MOST)
    for name, (steps, laws) in recipes().items():
        assert 1 <= len({step.path for step in steps}) <= AT_MOST[name], name
        assert laws, name
        for step in steps:
            file = ROOT / step.path
            text = step.changed(file.read_text() if file.exists() else "")
            if file.suffix == ".py":
                compile(text, step.path, "exec")


@pytest.mark.slow
def test_recipes_stand_all_laws_that_they_name(tmp_path):
    for name in ("orthonet", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for steps, _ in recipes().values():
        follow(steps, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    tests, commands = [], [command for _, laws in recipes().values() for command in laws]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program in ("pytest", "python", "orthonet"), command
        start = [] if program == "python" else ["-m", program]
        ran = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-4000:]}\n{ran.stderr[-2000:]}"
        tests.append(program == "pytest")
    assert sum(tests) == 3


def test_floors_and_nearest_arrows_of_the_figure():
    arrows = {"roof": {"wall", "floor"}, "wall": {"floor"}, "floor": set(), "cellar": set()}
    assert house.floors(arrows) == [["floor", "cellar"], ["wall"], ["roof"]]
    assert house.nearest(arrows) == {**arrows, "roof": {"wall"}}
    rooms = house.rooms()
    assert "linalg" in rooms["reparametrizers"]
    assert "cli" in house.floors(rooms)[-1]


def test_a_name_without_a_place_is_listed_at_the_end_of_its_page():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = (ROOT / "docs" / "api" / "manifolds.md").read_text()
    assert hooks.complete("manifolds", page) == page
    entry = "::: orthonet.manifolds.Sphere\n"
    assert hooks.complete("manifolds", page.replace(entry, "")).endswith(
        f"## More\n\n{entry.strip()}"
    )
    assert hooks.published("reparametrizers") and hooks.published("init")
    assert "QR_ORTHO_PARAMS" not in hooks.published("reparametrizers")  # a value: told elsewhere
    assert hooks.published("no_such_room") == []
