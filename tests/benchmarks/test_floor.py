"""The benchmark of floors runs at tiny sizes, and counts what a step calls."""

import torch

from benchmarks import floor


def test_every_step_has_a_floor():
    result = floor.run(floor.QUICK)
    assert {row["preset"] for row in result["rows"]} == set(floor.PRESETS)
    own = next(row for row in result["rows"] if row["preset"] == "DEFAULT")
    assert own["calls"].endswith("product")
    assert 4 <= int(own["calls"].split()[0]) <= 6  # 2 or 3 to the center, 2 backward
    assert all(row["floor"] > 0 and row["step"] > 0 for row in (*result["rows"], *result["cayley"]))
    assert all(row["floor"] > 0 and "product" in row["calls"] for row in result["kernels"])
    assert "DEFAULT" in floor.summary(result)


def test_the_recorder_counts_and_replays():
    a = torch.eye(3)
    recorder = floor.Recorder()
    with recorder:
        a @ a
        torch.linalg.solve_triangular(a, a, upper=True)
        a @ a[:, :1]  # a pass over memory
        a + a
    assert recorder.summary() == "1 product, 1 triangular solve"
    again = floor.Recorder()
    with again:
        recorder.replay()
    assert again.summary() == recorder.summary()
