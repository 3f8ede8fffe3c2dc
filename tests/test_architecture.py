"""The arrows between the rooms, and what no file of the library may contain."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "orthonet"
FILES = sorted(ROOT.rglob("*.py"))

# A room sees the rooms above it, never one beside or below it.
LEVELS = (
    {"errors"},
    {"_checks"},
    {"linalg"},
    {"functional", "init"},
    {"reparametrizers"},
    {"manifolds"},
    {"constraints"},
    {"layers"},
    {"certify", "convert"},
    {"models"},
    {"recipes"},
    {"cli"},
)
BASE = {"errors", "_checks"}
SEES = {room: set().union(*LEVELS[:i]) for i, level in enumerate(LEVELS) for room in level}
SEES |= {"losses": BASE | {"functional"}, "optim": BASE | {"linalg", "manifolds"}}
for room in ("models", "recipes", "cli"):
    SEES[room] = SEES[room] | {"losses", "optim"}
SEES["testing"] = set(SEES)
SEES["__main__"] = {"cli"}
SEES["__init__"] = set(SEES) - {"testing", "cli"}

RUNTIME = {"torch", "einops"}
# The extras, inside functions.
LAZY = {"sklearn", "mlxtend", "matplotlib", "tqdm", "numpy", "safetensors"}


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[str, bool]]:
    """The absolute names that `file` imports, and whether it does so when it is loaded."""
    tree = ast.parse(file.read_text())
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(outer)
    }
    package = ["orthonet", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, node.module] if node.module else start)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in inside) for name in names]
    return found


def ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_point_left(file):
    room = room_of(file)
    assert room in SEES, f"{room} is not in the plan of the rooms"
    for name, at_load in imports(file):
        first, *rest = name.split(".")
        if first == "orthonet":
            target = rest[0] if rest else "orthonet"
            seen = SEES[room] | {room} | ({"__version__"} if room == "cli" else set())
            assert target in seen, f"{ids(file)} may not import {name}"
        elif first not in sys.stdlib_module_names:
            allowed = RUNTIME - {"einops"} if room == "linalg" else RUNTIME
            allowed = allowed if at_load or room == "linalg" else allowed | LAZY
            assert first in allowed, f"{ids(file)} may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_file_keeps_the_house_rules(file):
    source = file.read_text()
    assert source.count("\n") <= 600, "one idea a file"
    assert not any(word in source for word in ("TODO", "FIXME", "XXX")), "finish it or leave it out"
    for node in ast.walk(ast.parse(source)):
        where = f"{ids(file)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: an assert vanishes under python -O"
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else {""}
            )
            assert not caught & {"", "Exception", "BaseException"}, f"{where}: name the exception"
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            assert called != "cuda", f"{where}: the caller chooses the device"
            assert called != "print" or room_of(file) == "cli", f"{where}: a library does not print"
        assert getattr(node, "id", None) != "NotImplementedError", f"{where}: finish it"
