"""The worked examples approach their references, and draw; the notebooks run."""

import json

import pytest

from examples import manifolds
from examples.notebooks import code_cells, digest, markdown, notebooks, run, source


@pytest.mark.parametrize("name", manifolds.EXAMPLES)
def test_an_example_approaches_its_reference(name, tmp_path):
    example, title, label = manifolds.EXAMPLES[name]
    curve = example(40)
    assert len(curve) == 40
    assert curve[-1] < 0.7 * curve[0]
    picture = manifolds.draw(tmp_path / f"{name}.png", curve, title, label)
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_outputs_of_a_notebook_belong_to_its_code(path):
    notebook = json.loads(path.read_text())
    cells = list(code_cells(notebook))
    assert notebook["metadata"]["code_sha256"] == digest(notebook), (
        f"run `python -m examples.notebooks {path.stem}`"
    )
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    text, pictures = markdown(path)
    assert text.startswith("# ") and "After reading this page you can" in text
    assert pictures and all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert any(source(cell).count("assert ") for cell in cells)  # it says what must hold


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """Its own assertions hold, and the outputs have the form of the stored ones."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    for before, now in zip(code_cells(notebook), code_cells(run(notebook)), strict=True):
        kinds = [[list(o.get("data", {"text": 0})) for o in c["outputs"]] for c in (before, now)]
        assert kinds[0] == kinds[1]


def test_a_cell_shows_what_it_prints_draws_and_ends_with():
    cells = [
        "import matplotlib.pyplot as plt\nplt.plot([0, 1]);",
        "print('one')\n1 + 1",
        "x = 3",
    ]
    notebook = {
        "metadata": {},
        "cells": [
            {"cell_type": "code", "source": [text], "outputs": [], "metadata": {}} for text in cells
        ],
    }
    outputs = [cell["outputs"] for cell in run(notebook)["cells"]]
    assert [list(output["data"]) for output in outputs[0]] == [["image/png"]]
    assert outputs[1][0]["text"] == ["one\n"] and outputs[1][1]["data"] == {"text/plain": ["2"]}
    assert outputs[2] == []
