"""`python -m tests.house`: how the library is built, in figures that any commit can be asked for.

Read are the sources alone: imports (also those inside of functions and for types only), files,
exports. Nothing of the library is loaded.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "orthonet"


def name_of(file: Path) -> str:
    """The dotted name of a module, `orthonet.linalg.matrix`."""
    parts = list(file.relative_to(ROOT.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """The file of every module of the library."""
    return {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the library that a file imports, wherever in it."""
    package = ["orthonet", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name if name in known else name.rpartition(".")[0]
            if found in known:
                yield found


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
    """How many files and folders each folder of the library holds."""
    folders = [ROOT, *(f for f in ROOT.rglob("*") if f.is_dir())]
    return {
        str(folder.relative_to(ROOT.parent)): sum(e.name != "__pycache__" for e in folder.iterdir())
        for folder in folders
        if folder.name != "__pycache__"
    }


def exports() -> dict[str, int]:
    """How many names each package publishes in `__all__`."""
    found = {}
    for name, file in modules().items():
        if file.name == "__init__.py":
            for node in ast.parse(file.read_text()).body:
                target = node.targets[0] if isinstance(node, ast.Assign) else None
                if getattr(target, "id", "") == "__all__" and isinstance(node.value, ast.List):
                    found[name] = len(node.value.elts)
    return found


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
        "type: ignore": sum(text.count("# type: ignore") for text in texts),
        "fmt: skip": sum(text.count("# fmt: skip") for text in texts),
    }


if __name__ == "__main__":
    for what, value in figures().items():
        sys.stdout.write(f"{what}: {value}\n")
