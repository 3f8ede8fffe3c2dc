"""The benchmark of the orthogonalizers runs at tiny sizes and prints every preset."""

import json

import pytest

from benchmarks import _harness as harness
from benchmarks import linear_step, orthogonalizers
from benchmarks._candidates import OURS


@pytest.mark.slow
def test_every_orthogonalizer_is_measured_and_orthogonal(tmp_path):
    result = orthogonalizers.run(orthogonalizers.QUICK)
    path = harness.write("orthogonalizers", result, tmp_path)
    rows = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row["library"] == OURS]
    assert {row["preset"] for row in ours} == set(orthogonalizers.OUR_PRESETS)
    assert {row["shape"] for row in ours} == {"8x8", "2x6x4"}
    for row in ours:
        assert row["step"] > 0
        assert row["forward"] > 0
        assert row["residual"] <= 2e-6  # observed 3e-7
    text = orthogonalizers.summary(result)
    assert all(f"{OURS} {preset} |" in text for preset in orthogonalizers.OUR_PRESETS)


def test_whole_step_of_a_linear_layer():
    result = linear_step.run(((8, 16),), 0.0)
    ours = [row for row in result["rows"] if row["library"] == OURS]
    assert {row["preset"] for row in ours} == {
        c.preset for c in linear_step.ROWS if c.library == OURS
    }
    assert all(row["ratio"] > 0 and row["residual"] <= 2e-6 for row in ours)  # observed 7e-7
    assert "8, batch 16" in linear_step.summary(result)
