"""Run the notebooks of this folder, and turn them into pages of the documentation.

    python -m examples.notebooks [NAME ...]

runs every cell and writes what it prints, shows and draws into the notebook. `mkdocs.yml` names
this file as a hook: each notebook becomes a page under `tutorials/` with these outputs. Neither
needs Jupyter.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Notebook = dict[str, Any]


def notebooks() -> list[Path]:
    return sorted(HERE.glob("*.ipynb"))


def page_name(path: Path) -> str:
    return f"tutorials/{path.stem.replace('_', '-')}.md"


def source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(notebook: Notebook) -> Iterator[dict[str, Any]]:
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def digest(notebook: Notebook) -> str:
    """Return a hash of the code, its layout aside: `run` records which code the outputs show."""
    trees = [ast.dump(ast.parse(source(cell))) for cell in code_cells(notebook)]
    return hashlib.sha256("\0".join(trees).encode()).hexdigest()


def run(notebook: Notebook) -> Notebook:
    """Return the notebook with the outputs of its cells, run one after the other."""
    import matplotlib

    matplotlib.use("Agg")
    _figures()  # those that a run before left behind when it failed
    notebook = json.loads(json.dumps(notebook))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        cell["execution_count"] = number
        cell["outputs"] = _run_cell(source(cell), f"<cell {number}>", namespace)
    notebook["metadata"]["code_sha256"] = digest(notebook)
    return notebook


def _run_cell(code: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            value = None if code.rstrip().endswith(";") else shown
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())}
        )
    outputs += [_display({"image/png": png}) for png in _figures()]
    if value is not None:
        outputs.append(_display({"text/plain": _lines(repr(value))}))
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _display(data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def _figures() -> list[str]:
    """Return the open figures as PNG in base64, and close them."""
    from matplotlib import pyplot as plt

    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(
            file, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None}
        )
        found.append(base64.b64encode(file.getvalue()).decode())
    plt.close("all")
    return found


def markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the page of a notebook in Markdown, and its pictures by file name."""
    notebook, parts, pictures = json.loads(path.read_text()), [], {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(f"```python\n{source(cell).rstrip()}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem.replace('_', '-')}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the code above draws]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"This page is the notebook `examples/{path.name}` with its stored outputs.")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the documentation: a hook of mkdocs."""
    from mkdocs.structure.files import File

    for path in notebooks():
        text, pictures = markdown(path)
        name = page_name(path)
        files.append(File.generated(config, name, content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{picture}", content=content))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, e.g. resnet; all by default")
    names = parser.parse_args().names
    for path in notebooks():
        if not names or path.stem in names:
            start = time.process_time()
            notebook = run(json.loads(path.read_text()))
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
            print(f"{path.name}: {time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
