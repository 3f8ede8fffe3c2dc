"""The benchmarks of certificates run at small sizes: bounds hold and are tight."""

import pytest

from benchmarks import certificate_peers, certificates


@pytest.mark.slow
def test_bounds_are_tight_and_printed():
    result = certificates.run(quick=True)
    for row in result["convolutions"]:
        assert row["excess"] >= -1e-12, row
    for row in result["medians"]:
        assert row["least"] >= -1e-12
        assert row["median"] <= 0.05  # observed 2e-4 to 9e-3
    mlp = result["perceptron"]
    assert mlp["product"] > mlp["bounds"][-1]["bound"] >= mlp["lower"] > 0
    (fast, default) = (r for r in result["networks"] if "orthogonal" in r["network"])
    assert 0 <= default["excess"] <= 1e-4  # observed 1e-5
    assert fast["steps"] == default["steps"]
    text = certificates.summary(result)
    for row in (*result["convolutions"], *result["networks"]):
        assert row.get("case", row.get("network")) in text


@pytest.mark.slow
def test_exact_constants_are_below_the_bounds():
    rows = certificates.exact(quick=True)
    assert [row["norm"] for row in rows] == ["l2", "linf", "l1"]
    for row in rows:
        assert row["exact"]
        assert 0 < row["lower"] <= row["upper"]
        assert min(row["certify"].values()) >= row["upper"] * (1 - 1e-9)
    assert rows[0]["product"] >= rows[0]["certify"]["tight"]
    assert "ReLU 2-16-2" in certificates.exact_summary(rows)


@pytest.mark.slow
def test_peers_are_measured_or_named(monkeypatch):
    names = (
        "orthonet fast",
        "deel-torchlip power iteration, product",
        "auto_LiRPA Jacobian in a ball of 1",
    )
    monkeypatch.setattr(
        certificate_peers, "METHODS", {n: certificate_peers.METHODS[n] for n in names}
    )
    result = certificate_peers.run(quick=True)
    ours = [row["ratio"] for row in result["rows"] if row["method"] == names[0]]
    assert len(ours) == 5
    assert min(ours) >= 1 - 1e-12
    assert all("ratio" in row or row["error"] for row in result["rows"])
    assert all(name in certificate_peers.summary(result) for name in names)
