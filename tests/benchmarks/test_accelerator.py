"""The command for GPUs runs to its end on the CPU, and ends in time whatever a row does."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from benchmarks import _nets as nets
from benchmarks import accelerator
from benchmarks._candidates import OURS, PLAIN, Candidate

ARGUMENTS = ("--device", "cpu", "--small")


@pytest.mark.slow
def test_the_whole_command_on_the_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accelerator", *ARGUMENTS, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=accelerator.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "accelerator.json").read_text())
    tests, rows = result["tests"], result["rows"]
    assert tests.get("passed", 0) + tests.get("skipped", 0) > 0, tests
    assert not tests["names_failed"]
    settings = accelerator.SMALL
    assert len(rows) == len(list(accelerator.plan(settings)))
    for row in rows:
        assert row.get("error") in (None, "not installed"), row
        if row["library"] == OURS:
            # A 3 x 3 kernel has a matrix and 4 squares of factors. Observed 1e-6.
            assert row["residual"] <= 9 * 2e-6
            assert row["ratio"] > 0
            assert ("launches" in row) == (not row["compiled"])
        if row["preset"] == PLAIN["preset"] and not row["compiled"]:
            assert row["ratio"] == 1
            assert row["waits"] == 0
            assert row["launches"] > 0
    assert result["minutes"] < 8
    assert all(net.name in done.stdout for net in settings.eager)


def test_no_row_is_started_after_the_deadline():
    rows = accelerator.measure_all(accelerator.SMALL, ARGUMENTS, time.monotonic() - 1)
    assert len(rows) == len(list(accelerator.plan(accelerator.SMALL)))
    assert {row["error"] for row in rows} == {"no time left"}


class Stubborn:
    """A process that answers as told: a result, a time too long, or its end."""

    answers: tuple = ()
    started = 0

    def __init__(self, rows, arguments):
        type(self).started += 1
        self.rows = iter(rows)

    def next(self, seconds):
        got, ended = type(self).answers[0]
        type(self).answers = type(self).answers[1:]
        return {**got}, ended

    def close(self):
        pass


def test_a_row_that_fails_costs_its_process_and_no_other_row(monkeypatch):
    settings = replace(
        accelerator.SMALL,
        eager=(nets.mlp(1, 4, 2),),
        compiled=(),
        candidates=tuple(Candidate(OURS, name) for name in ("DEFAULT", "QR", "CHOLESKY")),
    )
    Stubborn.answers, Stubborn.started = (
        (({"ratio": 1}, False), ({"error": "slow"}, True), ({"ratio": 2}, False)),
        0,
    )
    monkeypatch.setattr(accelerator, "Worker", Stubborn)
    rows = accelerator.measure_all(settings, ARGUMENTS, time.monotonic() + 60)
    assert [row.get("ratio", row.get("error")) for row in rows] == [1, "slow", 2]
    assert [row["preset"] for row in rows] == ["DEFAULT", "QR", "CHOLESKY"]
    assert Stubborn.started == 2


def test_a_worker_is_given_up_after_its_time():
    row = next(accelerator.plan(accelerator.SMALL))
    worker = accelerator.Worker([row], ARGUMENTS)
    try:
        result, ended = worker.next(0.01)  # before it can have imported torch
        assert ended
        assert result["error"].startswith("stopped")
    finally:
        worker.close()
    assert worker.process.returncode != 0
    assert worker.next(10.0) == ({"error": "the process ended"}, True)


def test_a_failure_of_a_row_is_reported_and_ends_the_worker(monkeypatch, capsys):
    def fail(row, settings, device):
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(accelerator, "measure", fail)
    rows = list(accelerator.plan(accelerator.SMALL))[:2]
    accelerator.work(rows, accelerator.SMALL, "cpu")
    (line,) = capsys.readouterr().out.splitlines()
    result, ended = json.loads(line)
    assert result["error"] == "RuntimeError: out of memory"
    assert ended


def test_tests_that_fail_are_named(tmp_path):
    file = tmp_path / "test_marked.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_bad():\n    assert False\n"
        "@pytest.mark.gpu\ndef test_good():\n    pass\n"
        "def test_other():\n    assert False\n"
    )
    found = accelerator.run_tests([str(file)], 120.0)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert [name.rpartition("::")[2] for name in found["names_failed"]] == ["test_bad"]
    assert accelerator.run_tests([str(file)], 0.01)["error"].startswith("longer than")
    assert "tests/reparametrizers/test_engine_gpu.py" in accelerator.marked_tests()


def test_without_a_gpu_the_command_says_what_runs(monkeypatch, capsys):
    monkeypatch.setattr(accelerator.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    with pytest.raises(SystemExit):
        accelerator.main()
    assert "--device cpu" in capsys.readouterr().err
