"""The benchmark of local radii runs to the end and shows no radius below the global one."""

import json

import pytest

from benchmarks import local_radii


@pytest.mark.slow
def test_a_row_of_every_network_is_kept_and_printed(capsys, tmp_path):
    pytest.importorskip("mlxtend")
    local_radii.main(["--samples", "2", "--seconds", "2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "local_radii.json").read_text())
    assert [row["network"] for row in result["rows"]] == list(local_radii.NETS)
    for row in result["rows"]:
        low, median, high = row["ratio"]
        assert 1.0 <= low <= median <= high
    assert result["rows"][0]["ratio"][1] > 1.1  # an unconstrained perceptron gains
    assert all(f"| {name} |" in capsys.readouterr().out for name in ["mlp"])


def test_the_summary_shows_every_row_and_where_the_attack_ends():
    row = {
        "network": "cnn", "parameters": 1234, "accuracy": 0.95, "samples": 7, "constant": 3.0,
        "global": 0.1, "local": 0.2, "ratio": [1.5, 2.0, 2.5], "attack": 8.0, "seconds": 0.25,
    }  # fmt: skip
    text = local_radii.summary({"train_seconds": 20.0, "rows": [row, {**row, "attack": 3.0}]})
    assert "7 samples, 20 CPU seconds of training" in text
    assert "| cnn | 1,234 | 95.0% | 0.1 | 0.2 | 2.00 [1.50, 2.50] | 8.00, where" in text
    assert "| 3.00 | 0.25 |" in text


def test_the_published_sizes_have_the_layers_that_are_published():
    counts = {n: sum(p.numel() for p in f().parameters()) for n, f in local_radii.PUBLISHED.items()}
    # 784 x 100 + 100 x 100 + 100 x 10 and biases; the convolutions likewise.
    assert counts == {"MLP": 89_610, "ConvSmall": 166_406, "ConvLarge": 1_974_762}
