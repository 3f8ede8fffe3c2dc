"""The arrows between the rooms, and what no file of the library may contain."""

import ast
import sys
from pathlib import Path

import pytest

from tests import house
from tests.each import each

ROOT = Path(__file__).parents[1] / "orthonet"
FILES = sorted(ROOT.rglob("*.py"))

# A room sees the rooms above it, never one beside or below it.
LEVELS = (
    {"errors"},
    {"_checks"},
    {"_torch"},
    {"linalg"},
    {"functional", "init"},
    {"reparametrizers"},
    {"manifolds"},
    {"constraints"},
    {"layers"},
    {"certify"},
    {"convert", "downstream"},
    {"models"},
    {"recipes"},
    {"cli"},
)
BASE = {"errors", "_checks", "_torch"}
SEES = {room: set().union(*LEVELS[:i]) for i, level in enumerate(LEVELS) for room in level}
SEES |= {"losses": BASE | {"functional"}}
SEES |= {"optim": BASE | {"linalg", "reparametrizers", "manifolds"}}
for room in ("models", "recipes", "cli"):
    SEES[room] = SEES[room] | {"losses", "optim"}
SEES["compat"] = set().union(*LEVELS[:-2], {"losses", "optim"})
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
    package = ["orthonet", *file.relative_to(ROOT).parts[:-1]]
    found, nodes = [], [(house.tree_of(file), True)]
    while nodes:
        node, at_load = nodes.pop()
        at_load &= not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        nodes += [(child, at_load) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, node.module] if node.module else start)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, at_load) for name in names]
    return found


def ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


@each("file", FILES)
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


def test_nothing_goes_in_circles():
    """Also not for types only, or inside of functions."""
    assert house.circles(house.graph()) == []


def test_no_room_looks_behind_the_doors_of_another():
    """A module with an underscore belongs to its own room; `testing` may look everywhere."""
    assert house.private_reaches(house.graph()) == []


def test_rooms_take_of_each_other_what_is_published():
    """What a module imports from another room stands in the `__all__` of that module."""
    known = {name: house.facts(file).published for name, file in house.modules().items()}
    names = {name: set(found) for name, found in known.items() if found is not None}
    taken = {ids(file): house.untold(names, file) for file in FILES if room_of(file) != "testing"}
    assert {file: found for file, found in taken.items() if found} == {}
    hidden = {**names, "orthonet.linalg": names["orthonet.linalg"] - {"haar"}}
    assert ("orthonet.linalg", "haar") in house.untold(hidden, ROOT / "manifolds" / "_stiefel.py")


def test_circles_and_reaches_are_found():
    arrows = {"orthonet.a.x": {"orthonet.b._y"}, "orthonet.b._y": {"orthonet.a.x"}}
    assert house.circles(arrows) == [["orthonet.a.x", "orthonet.b._y"]]
    assert house.private_reaches(arrows) == [("orthonet.a.x", "orthonet.b._y")]
    inside = {"orthonet.b.x": {"orthonet.b._y"}, "orthonet.b._y": {"orthonet._checks"}}
    assert house.circles({**inside, "orthonet._checks": set()}) == []
    assert house.private_reaches(inside) == []
    arrows = house.graph()
    assert "orthonet.linalg.matrix" in arrows["orthonet.linalg.polar"]  # imports are seen
    assert house.exports()["orthonet.manifolds"] > 10


def test_folders_stay_small():
    assert {f: n for f, n in house.entries().items() if n > 23} == {}


def test_tests_mirror_the_rooms():
    """A room that is a package has a folder of tests of its name, and no other folder is there."""
    here = Path(__file__).parent
    folders = {file.parent.name for file in here.glob("*/test_*.py")}
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    beside = {"benchmarks", "checker"}
    assert all((here.parent / name).is_dir() for name in beside)
    assert folders == packages | beside | {"peers", "works_with"}


def test_what_is_published_is_used():
    """A name that no test, page, example or other room names is for nobody."""
    unnamed = house.unnamed()
    assert len(unnamed) <= 30
    assert not [n for p, n in unnamed if house.room_of(p) in ("layers", "manifolds", "losses")]


def test_docstrings_say_a_fact_once():
    """Most of what may repeat are short lines: the shape of an output, a row of an example."""
    assert house.repeated() <= 520
    assert house.repeated() > 0  # lines are seen


def test_tools_are_seldom_silenced():
    """Types are mended rather than ignored, and ruff lays out the lines."""
    texts = {file: file.read_text() for file in FILES}
    ignores = sum(len(house.IGNORES.findall(text)) for text in texts.values())
    assert 0 < ignores <= 60
    by_hand = {ids(file) for file, text in texts.items() if "# fmt: skip" in text}
    assert by_hand == set(), "let ruff lay it out"


@each("file", FILES)
def test_file_keeps_the_house_rules(file):
    source, name = file.read_text(), ids(file)
    assert source.count("\n") <= 600, "one idea a file"
    assert not any(word in source for word in ("TODO", "FIXME", "XXX")), "finish it or leave it out"
    for node in ast.walk(house.tree_of(file)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
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
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            returned = ast.unparse(node.returns) if node.returns else ""
            inferred = any(
                "custom_op" in d and "schema=" not in d
                for d in map(ast.unparse, node.decorator_list)
            )
            assert not inferred or "list[" not in returned, f"{where}: PyTorch 2.6 needs a schema"
        assert getattr(node, "id", None) != "NotImplementedError", f"{where}: finish it"


# Attributes of objects of torch. Not here: the dictionaries of an `nn.Module` (`_parameters`, ...),
# `_load_from_state_dict` and a tensor's `_version`, on which every subclass of torch's classes
# relies and which torch cannot change.
PRIVATE = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_conv_forward",
    "_current_level",
    "_execution_engine",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_output_padding",
    "_qualified_op_name",
    "_reversed_padding_repeated_twice",
    "_schema",
}


def privates_of_torch(tree: ast.Module) -> list[str]:
    """What a file uses of torch whose name starts with an underscore, however it is reached."""

    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    known, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    known.add(alias.asname or "torch")
                    found += [alias.name] if any(map(private, alias.name.split("."))) else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                known.add(alias.asname or alias.name)
                path = f"{node.module}.{alias.name}"
                found += [path] if any(map(private, path.split("."))) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            ours = isinstance(root, ast.Name) and root.id in known
            if node.attr in PRIVATE or (ours and private(node.attr)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value in PRIVATE:
            found.append(node.value)  # getattr(module, "_forward_hooks")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._nn",
        "import torch as t\nt.autograd.forward_ad._current_level",
        "from torch import nn\nnn.modules._functions",
        "from torch.utils._device import DeviceContext",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch._dynamo",
        "def f(module): return module._forward_hooks",
        "def f(module): return getattr(module, '_forward_hooks')",
    ],
)
def test_privates_of_torch_are_found(source):
    assert privates_of_torch(ast.parse(source))


@each("file", [f for f in FILES if f != ROOT / "_torch.py"])
def test_only_one_file_uses_the_privates_of_torch(file):
    assert privates_of_torch(house.tree_of(file)) == [], "give it a name in orthonet/_torch.py"


def test_privates_of_torch_are_found_where_they_are():
    assert len(privates_of_torch(house.tree_of(ROOT / "_torch.py"))) > 20
