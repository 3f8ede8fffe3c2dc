"""Every cell of the table: green, or an error whose text is tested; and the page made of it."""

import functools
import json
import warnings

import pytest
import torch

from tests.works_with.columns import COLUMNS
from tests.works_with.page import PAGE, RESULTS, cell_of, render
from tests.works_with.rows import ROWS

# What every change should look at; the whole of the expensive columns is under `slow`.
SAMPLE = ("OrthoLinear", "OrthoConv2d, kernel 3, stride 2", "orthogonal", "aol (convolution)")
NEEDED = {
    "onnx": ("onnxruntime", "onnxscript"),
    "safetensors": ("safetensors",),
    "lightning": ("lightning.pytorch",),
    "accelerate": ("accelerate",),
}
CELLS = [
    pytest.param(
        column,
        row,
        id=f"{column}-{row}",
        marks=[pytest.mark.slow] if COLUMNS[column].slow and row not in SAMPLE else [],
    )
    for column in COLUMNS
    for row in ROWS
]


@functools.cache
def recorded() -> dict:
    return json.loads(RESULTS.read_text())


@pytest.mark.parametrize(("column", "row"), CELLS)
def test_cell(column, row):
    for needed in NEEDED.get(column, ()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries about their own imports
            pytest.importorskip(needed)
    found = cell_of(column, row)
    assert found == recorded()["cells"][column][row]


def test_the_results_cover_the_table_and_the_page_is_made_of_them():
    results = recorded()
    assert {c: set(cells) for c, cells in results["cells"].items()} == {
        column: set(ROWS) for column in COLUMNS
    }
    assert PAGE.read_text() == render(results)


def test_a_failing_cell_is_an_error_and_not_an_entry(monkeypatch):
    def broken(row):
        raise RuntimeError("something that no refusal explains")

    monkeypatch.setitem(COLUMNS, "deepcopy", COLUMNS["deepcopy"]._replace(check=broken))
    with pytest.raises(RuntimeError, match="no refusal explains"):
        cell_of("deepcopy", "OrthoLinear")


def test_muon_of_torch():
    """It takes matrices only, so the raw parameters of linear layers; they stay constrained."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with PyTorch 2.9")
    row = ROWS["OrthoLinear"]
    layer = row.make()
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    step = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        step.zero_grad()
        (layer(row.input()) - 1.0).square().mean().backward()
        step.step()
    values = torch.linalg.svdvals(layer.weight)
    assert (values - 1).abs().max() < 1e-5  # observed 3.6e-7
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon(ROWS["OrthoConv2d, kernel 3"].make().parameters())
