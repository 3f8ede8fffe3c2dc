"""The report page: self-contained, complete, escaped; and a real browser can show it."""

import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import Bound, RadiusCurve, certify, report_html


def page():
    model = nn.Sequential(nn.Flatten(), layers.OrthoLinear(9, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    certificate = certify(model, torch.zeros(1, 1, 3, 3))
    curve = RadiusCurve(torch.tensor([0.9, 0.4, 0.4, 0.0], dtype=torch.float64), 3)
    return certificate, report_html(
        certificate,
        title="a <b> & c",
        estimate=Bound(0.5, kind="estimate"),
        spectra=[("1", "9 to 8", [1.0] * 8), ("3", "8 to 3", [0.7])],
        curve=curve,
        attacked={0.0: 0.75, 0.5: 0.5},
    )


def test_the_page_holds_everything_and_loads_nothing():
    certificate, text = page()
    assert "a &lt;b&gt; &amp; c" in text and "<b> & c" not in text
    for outside in ("src=", "href=", "url(", "@import", "<script", "<link", "<img", "http"):
        assert outside not in text
    assert text.count("<svg") == 3 and "prefers-color-scheme: dark" in text
    assert text.count("<tr>") == len(certificate.rows) + 1
    for row in certificate.rows:
        assert row.method in text
    assert f"{certificate.constant.value:.9g}" in text and torch.__version__ in text
    assert "reached by a secant</dt><dd>0.5</dd>" in text
    assert certificate.lower is not None
    alone = report_html(certificate)
    assert f"reached by a secant</dt><dd>{certificate.lower.value:.6g}</dd>" in alone
    assert f"{certificate.constant.value / certificate.lower.value:.3g} times" in alone
    with pytest.raises(ValueError, match="estimate must come from below"):
        report_html(certificate, estimate=Bound(1.0))


def test_the_curve_is_where_the_samples_are():
    curve = RadiusCurve(torch.tensor([0.9, 0.4, 0.4, 0.0], dtype=torch.float64), 3)
    assert [curve.at(r) for r in (0.0, 0.1, 0.4, 0.8, 1.0)] == [0.75, 0.75, 0.25, 0.25, 0.0]
    assert curve.area == pytest.approx((0.9 + 0.4 + 0.4) / 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path, width):
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth,"
        "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 50)]"
        "</script></body>"
    )
    file = tmp_path / "report.html"
    file.write_text(page()[1].replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--window-size={width},900", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search("<title>(.*?)</title>", dom)[1] == "true,true"
