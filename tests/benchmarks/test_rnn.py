"""The benchmark of the recurrent layers runs at tiny sizes and prints every candidate."""

from benchmarks import rnn


def test_every_candidate_is_measured_and_orthogonal():
    result = rnn.run(rnn.QUICK)
    rows = {row["name"]: row for row in result["kernels"]}
    assert {rnn.BASELINE, "plain loop", "orthonet triv cayley", "torch cayley, cached()"} <= set(
        rows
    )
    for name, row in rows.items():
        assert row["seconds"] > 0
        if name.startswith("orthonet"):
            assert row["residual"] <= 2e-6  # observed 3e-7
    text = rnn.summary(result)
    assert all(name in text for name in rows)
