"""The three jobs of a first hour at a small budget: constant 1, a proof, a page."""

import pytest
import torch

from examples import three_jobs
from orthonet import LipschitzCertificate

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_three_jobs_leave_a_report_a_proof_and_a_plain_model(tmp_path, capsys):
    three_jobs.jobs(tmp_path, epochs=1)
    assert capsys.readouterr().out.startswith("360 samples; Lipschitz constant")
    page = (tmp_path / "report.html").read_text()
    assert "average certified radius" in page and "<script" not in page
    found = LipschitzCertificate.load(tmp_path / "certificate.json")
    assert found.constant.value <= 1 + 1e-4  # five orthogonal maps, each off by at most 1e-5
    plain = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert not any(type(m).__module__.startswith("orthonet") for m in plain.modules())
    assert plain(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
