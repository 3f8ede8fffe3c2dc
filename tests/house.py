"""`python -m tests.house`: how the library is built, in figures that any commit can be asked for.

They are read from the sources: imports (also those inside of functions and for types only), files,
exports, docstrings. With `--write` the figure of the rooms in CONTRIBUTING is drawn anew; with
`--walks` the library is loaded, and the files are counted that a weight, an input, a model and a
configuration pass.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1] / "orthonet"
CONTRIBUTING = ROOT.parent / "CONTRIBUTING.md"
IGNORES = re.compile("# (?:type|pyright): " + "ignore")


def name_of(file: Path) -> str:
    """The dotted name of a module, `orthonet.linalg.matrix`."""
    parts = list(file.relative_to(ROOT.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """The file of every module of the library."""
    return {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


class Facts(NamedTuple):
    """What a file says of itself and of others: it is parsed once."""

    imports: list[tuple[str, str]]
    """(module, name) of `from module import name`, wherever in it; ("", module) of `import`."""
    published: list[str] | None
    """The names in `__all__`; None where there is none, or where it is computed."""


@functools.cache
def tree_of(file: Path) -> ast.Module:
    """The syntax of a file."""
    return ast.parse(file.read_text())


@functools.cache
def facts(file: Path) -> Facts:
    """Read the imports and the exports of a file."""
    package = ["orthonet", *file.relative_to(ROOT).parts[:-1]]
    tree = tree_of(file)
    imports: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [("", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            imports += [(source, alias.name) for alias in node.names]
    published = None
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if getattr(target, "id", "") != "__all__":
            continue
        if isinstance(node.value, ast.List):
            names = [e.value for e in node.value.elts if isinstance(e, ast.Constant)]
            published = [str(name) for name in names]
        elif isinstance(node, ast.AugAssign) and isinstance(node.value, ast.Attribute):
            part = file.parent / f"{ast.unparse(node.value.value)}.py"  # `__all__ += part.__all__`
            published = [*(published or []), *(facts(part).published or [])]
    return Facts(imports, published)


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the library that a file imports."""
    for source, name in facts(file).imports:
        full = f"{source}.{name}" if source else name
        found = full if full in known else full.rpartition(".")[0]
        if found in known:
            yield found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which module imports which, itself left out."""
    known = modules()
    return {name: set(imported(file, known)) - {name} for name, file in known.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            group = sorted(stack[place:])
            del stack[place:]
            if len(group) > 1:
                found.append(group)

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def room_of(module: str) -> str:
    """The room that a module stands in: the first name below the library."""
    return [*module.split("."), "__init__"][1]


def private_reaches(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports of a module with an underscore that stands in another room.

    `_checks` and `_torch` are rooms of their own, which all others see.
    """
    return [
        (name, other)
        for name, seen in arrows.items()
        for other in sorted(seen)
        if room_of(name) != room_of(other)
        and any(part.startswith("_") for part in other.split(".")[2:])
    ]


def entries() -> dict[str, int]:
    """How many files and folders each folder of the library holds, but for an empty marker."""
    left_out = {"__pycache__", "py.typed"}
    folders = [ROOT, *(f for f in ROOT.rglob("*") if f.is_dir())]
    return {
        str(folder.relative_to(ROOT.parent)): sum(e.name not in left_out for e in folder.iterdir())
        for folder in folders
        if folder.name != "__pycache__"
    }


def exports() -> dict[str, int]:
    """How many names each package publishes in `__all__`."""
    packages = {n: facts(f).published for n, f in modules().items() if f.name == "__init__.py"}
    return {name: len(names) for name, names in packages.items() if names is not None}


def _words(folder: str, ending: str) -> Iterator[tuple[Path, set[str]]]:
    """The words of the files of a folder of the repository."""
    for file in sorted((ROOT.parent / folder).rglob(f"*{ending}")):
        yield file, set(re.findall(r"\w+", file.read_text()))


def unnamed() -> set[tuple[str, str]]:
    """(package, name) of what is published and named by nothing but its own room.

    Tests, pages, examples and other rooms count; API pages and the history do not, nor do doors
    for users of other libraries, whose names are those libraries' own.
    """
    places = [("tests", ".py"), ("benchmarks", ".py"), ("examples", ".ipynb"), ("examples", ".py")]
    readers = [pair for place in places for pair in _words(*place)]
    readers += [(f, w) for f, w in _words("docs", ".md") if f.parent.name != "api"]
    outside = set().union(*(words for _, words in readers))
    for page in ("README.md", "CONTRIBUTING.md"):
        outside |= set(re.findall(r"\w+", (ROOT.parent / page).read_text()))
    inside: dict[str, set[str]] = {}
    for file, words in _words("orthonet", ".py"):
        if file.name != "__init__.py":
            inside.setdefault(room_of(name_of(file)), set()).update(words)
    found = set()
    for name, file in modules().items():
        room = room_of(name)
        if file.name == "__init__.py" and room not in ("compat", "__init__"):
            seen = outside.union(*(words for other, words in inside.items() if other != room))
            found |= {(name, n) for n in facts(file).published or () if n not in seen}
    return found


def untold(names: dict[str, set[str]], file: Path) -> list[tuple[str, str]]:
    """The names that a file imports from modules of other rooms that do not publish them."""
    mine = room_of(name_of(file))
    return [
        (source, name)
        for source, name in facts(file).imports
        if source in names and room_of(source) != mine
        if name not in names[source] and f"{source}.{name}" not in names
    ]


def rooms() -> dict[str, set[str]]:
    """Which room imports which, itself left out."""
    found: dict[str, set[str]] = {}
    for name, seen in graph().items():
        others = {room_of(other) for other in seen} - {room_of(name), "__init__"}
        found.setdefault(room_of(name), set()).update(others)
    return {room: seen for room, seen in sorted(found.items()) if not room.startswith("__")}


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by the longest way down: a room stands above all rooms that it imports from."""
    height: dict[str, int] = {}

    def climb(room: str) -> int:
        if room not in height:
            height[room] = 1 + max(map(climb, arrows[room]), default=-1)
        return height[room]

    for room in arrows:
        climb(room)
    return [[r for r in arrows if height[r] == floor] for floor in range(max(height.values()) + 1)]


def nearest(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows without those that lead where others lead, too."""
    beyond: dict[str, set[str]] = {}
    for floor in floors(arrows):
        for room in floor:
            beyond[room] = set().union(*(arrows[r] | beyond[r] for r in arrows[room]))
    return {room: seen - beyond[room] for room, seen in arrows.items()}


def sentence(room: str) -> str:
    """The first sentence that a room says of itself."""
    file = ROOT / room / "__init__.py"
    text = ast.get_docstring(
        ast.parse((file if file.exists() else ROOT / f"{room}.py").read_text())
    )
    first = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", first)[0]


def figure() -> str:
    """The house: one floor a line, and under it what its rooms hold and what they stand on."""
    arrows = rooms()
    near = nearest(arrows)
    width = max(map(len, arrows))
    lines = []
    for floor in reversed(floors(arrows)):
        lines.append("")
        for room in floor:
            on = ", ".join(sorted(near[room])) or "PyTorch"
            lines += [f"{room:{width}}  {sentence(room)}", f"{'':{width}}  stands on {on}"]
    return "\n".join(lines).strip() + "\n"


_START = "<!-- the house: python -m tests.house --write -->\n\n```text\n"


def _around() -> tuple[str, str, str]:
    """CONTRIBUTING before the figure, the figure, and what follows it."""
    before, start, rest = CONTRIBUTING.read_text().partition(_START)
    found, end, after = rest.partition("```\n")
    return before + start, found, end + after


def drawn() -> str:
    """The figure as it stands in CONTRIBUTING."""
    return _around()[1]


def write() -> None:
    """Draw the figure in CONTRIBUTING anew."""
    before, _, after = _around()
    CONTRIBUTING.write_text(before + figure() + after)


def docstring_lines() -> Iterator[str]:
    """All lines of at least four words in docstrings."""
    for file in modules().values():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for line in (ast.get_docstring(node) or "").splitlines():
                    if len(line.split()) >= 4:
                        yield line.strip()


def repeated() -> int:
    """How many lines of docstrings stand in an earlier place word for word."""
    counted = Counter(docstring_lines())
    return sum(counted.values()) - len(counted)


def passed(run: Callable[[], Any], kind: type = object) -> set[str]:
    """The files of the library of which a function runs while `run` does, in any thread.

    With a `kind`, only those that are given such an argument.
    """
    files: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            given = frame.f_locals.values()
            if kind is object or any(isinstance(value, kind) for value in given):
                files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {str(Path(f).relative_to(ROOT)) for f in files if Path(f).is_relative_to(ROOT)}


def walks() -> dict[str, set[str]]:
    """The files that a weight, an input, a model and a configuration pass, each for the first time.

    A weight from its parameter to its gradient; an input through a convolution in eval mode; a
    model on the way to its certificate: every file that runs. A configuration from the command
    line to the report: every file that is given it.
    """
    import torch
    from torch import nn

    from orthonet import cli, layers
    from orthonet.certify import certify
    from orthonet.recipes import TrainConfig

    linear = layers.OrthoLinear(8, 8)
    conv = layers.OrthoConv2d(2, 2, 3, padding=1).eval()
    model = nn.Sequential(
        layers.OrthoLinear(8, 8), layers.MaxMin(), layers.OrthoLinear(8, 2)
    ).eval()
    conv.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "digits", "--epochs", "1", "--out", str(Path(folder) / "run")]
        return {
            "weight": passed(lambda: linear.weight.square().sum().backward()),
            "input": passed(lambda: conv(torch.zeros(1, 2, 8, 8))),
            "model": passed(lambda: certify(model, torch.zeros(1, 8))),
            "config": passed(lambda: cli.main(command), TrainConfig),
        }


def figures() -> dict[str, object]:
    """All of them."""
    arrows, known = graph(), modules()
    texts = [file.read_text() for file in known.values()]
    crowded = {folder: n for folder, n in entries().items() if n > 20}
    return {
        "files": len(known),
        "lines": sum(text.count("\n") for text in texts),
        "longest file": max(text.count("\n") for text in texts),
        "circles": circles(arrows),
        "imports of another room's private module": len(private_reaches(arrows)),
        "folders of more than 20 entries": crowded,
        "names published by packages": sum(exports().values()),
        "of which under the names of other libraries": sum(
            n for package, n in exports().items() if room_of(package) == "compat"
        ),
        "published names that nothing else names": len(unnamed()),
        "type: ignore": sum(len(IGNORES.findall(text)) for text in texts),
        "fmt: skip": sum(text.count("# fmt: " + "skip") for text in texts),
        "docstring lines that repeat an earlier one": repeated(),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.house", description=__doc__)
    parser.add_argument("--write", action="store_true", help="draw the rooms in CONTRIBUTING anew")
    parser.add_argument("--walks", action="store_true", help="count the files that values pass")
    options = parser.parse_args()
    if options.write:
        write()
    shown = figures()
    if options.walks:
        shown |= {f"files that {what} passes": len(files) for what, files in walks().items()}
    for what, value in shown.items():
        sys.stdout.write(f"{what}: {value}\n")


if __name__ == "__main__":
    main()
