"""The command that runs the tests under other kernels."""

import torch

from tests.processors import run, settings

TEST = """
import os
def test_kernels():
    assert os.environ.get("ATEN_CPU_CAPABILITY") != "avx2" or os.environ["OMP_NUM_THREADS"] != "2"
def test_other():
    assert True
"""


def test_a_setting_that_fails_is_named_and_arguments_reach_pytest(tmp_path, monkeypatch):
    file = tmp_path / "test_kernels.py"
    file.write_text(TEST)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    chosen = {name: settings("AVX512")[name] for name in ("own, 1 thread", "avx2, 2 threads")}
    rooted = [str(file), f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    assert run(chosen, rooted) == ["avx2, 2 threads"]
    assert run(chosen, [*rooted, "-k", "other"]) == []


def test_no_kernel_is_asked_for_that_the_processor_lacks():
    aten = {
        name: {e.get("ATEN_CPU_CAPABILITY") for e in settings(name).values()}
        for name in ("AVX512", "AVX2", "DEFAULT", "SVE256")
    }
    assert aten["AVX512"] == {None, "avx2", "default"}
    assert aten["AVX2"] == {None, "default"}
    assert aten["DEFAULT"] == aten["SVE256"] == {None}
    own = settings(torch.backends.cpu.get_cpu_capability())
    assert {e["OMP_NUM_THREADS"] for e in own.values()} == {"1", "2"}
