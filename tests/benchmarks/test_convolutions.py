"""The benchmark of the convolutions runs at tiny sizes and prints every candidate."""

import json

import pytest

from benchmarks import _harness as harness
from benchmarks import convolutions
from benchmarks._candidates import OURS


@pytest.mark.slow
def test_layers_and_kernels_are_measured(tmp_path):
    result = convolutions.run(convolutions.QUICK)
    kept = json.loads(harness.write("convolutions", result, tmp_path).read_text())
    names = {row["name"] for row in kept["layers"]}
    assert names >= {convolutions.PLAIN, convolutions.OWN_PAD, convolutions.TORCH_PAD}
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in kept["layers"])
    ours = [row for row in kept["kernels"] if row["name"].startswith(OURS)]
    assert len(ours) == len(convolutions.OUR_PRESETS)
    assert all(row["residual"] <= 1e-5 for row in ours)  # observed 5e-7
    text = convolutions.summary(result)
    assert all(f"| {name} |" in text for name in names)
