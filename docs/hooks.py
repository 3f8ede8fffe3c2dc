"""A hook of mkdocs: a page of the API lists at its end what its author has not placed by hand."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "orthonet"


def published(module: str) -> list[str]:
    """The classes and functions in `__all__` of `orthonet.<module>`, by how they are spelled."""
    files = (ROOT / module / "__init__.py", ROOT / f"{module}.py")
    for file in filter(Path.exists, files):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                return [name for name in ast.literal_eval(node.value) if not is_value(module, name)]
    return []


def is_value(module: str, name: str) -> bool:
    """Whether a name is that of a constant or of a module of its own."""
    return (name.isupper() and "_" in name) or (ROOT / module / f"{name}.py").exists()


def complete(module: str, markdown: str) -> str:
    """The page of `orthonet.<module>` with an entry for every name that it publishes."""
    entries = [f"::: orthonet.{module}.{name}" for name in published(module)]
    missing = [entry for entry in entries if entry not in markdown.splitlines()]
    return "\n\n".join([markdown, "## More", *missing]) if missing else markdown


def on_page_markdown(markdown, page, **_):
    """Called by mkdocs for every page."""
    file = Path(page.file.src_uri)
    return complete(file.stem, markdown) if file.parts[0] == "api" else None
