"""The benchmarks run at tiny sizes, and the pages show the results that are kept."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import _harness as harness
from benchmarks import page, presets
from benchmarks._candidates import OURS, conditioned
from orthonet.testing import tolerances


@pytest.fixture(scope="module")
def quick():
    return presets.run(presets.QUICK)


def test_every_preset_of_ours_is_measured_and_orthogonal(quick):
    for key in ("accuracy", "speed"):
        assert {r["preset"] for r in quick[key] if r["library"] == OURS} == set(presets.PRESETS)
    for row in quick["accuracy"]:
        if row["library"] == OURS and row["state"] in ("init", "trained"):
            # Observed 4e-7 and 1e-15 on these sizes.
            assert row["residual"] <= tolerances.PROMISE[getattr(torch, row["dtype"])], row
    measured = [row for row in quick["speed"] if row.get("error") != "not installed"]
    assert len(measured) >= 2 * (len(presets.PRESETS) + 1)
    for row in measured:
        assert row["train"]["ratio"] > 0
        assert row["saved_bytes"] >= 0
        assert row["peak_bytes"] > 0


def test_result_survives_json_and_makes_every_table(quick, tmp_path):
    path = harness.write("presets", quick | {"odd": [math.nan, math.inf]}, tmp_path)
    result = json.loads(path.read_text())
    assert result["odd"] == [None, None]
    made = page.tables(result)
    slots = {slot["title"] for p in page.PAGES for slot in page.SLOT.finditer(p.read_text())}
    assert slots
    assert slots <= set(made) | set(page.PRINTED)
    assert set(page.PRINTED) <= slots
    assert all(f"`{name}`" in made["Training step"] for name in presets.PRESETS)


def test_pages_show_the_kept_results():
    made = page.kept()
    for file in page.PAGES:
        assert page.fill(file.read_text(), made) == file.read_text(), (
            "run python -m benchmarks.page"
        )


def test_operator_of_a_convolution_is_the_convolution():
    kernel = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    layer = nn.Conv2d(4, 6, 3, 2, 1, bias=False, padding_mode="circular", dtype=torch.float64)
    layer.weight.data.copy_(kernel)
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    expected = layer(x[None]).flatten()
    got = harness.circular_operator(kernel, stride=2, size=6) @ x.flatten()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)  # observed 7e-15


def test_conditioned_matrix_has_its_condition_number():
    singular = torch.linalg.svdvals(conditioned(torch.zeros(8, 5, dtype=torch.float64)))
    # Observed 1000 to 12 digits.
    assert (singular[0] / singular[-1]).item() == pytest.approx(1e3, rel=1e-9)


def test_memory_kept_for_backward_is_counted_once_and_without_the_weight():
    layer = nn.Linear(16, 8)
    x = torch.randn(4, 16, requires_grad=True)
    assert harness.saved_bytes(lambda: layer(x), layer) == x.numel() * 4
    assert harness.peak_bytes(lambda: torch.zeros(1000)) >= 4000


def test_interleaved_sees_three_times_the_work(monkeypatch):
    """By a clock that only the steps move."""
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(harness.time, clock, lambda: now)
    timings = harness.interleaved({"once": lambda: work(1.0), "thrice": lambda: work(3.0)}, "once")
    assert timings["once"].ratio == 1
    assert timings["thrice"].ratio == 3
