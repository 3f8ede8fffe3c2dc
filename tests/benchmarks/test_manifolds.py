"""The comparison of constrained weights runs, and ours stay on the manifold."""

from benchmarks import manifolds


def test_every_row_has_a_time_and_a_residual():
    result = manifolds.run(((6, 6), (8, 3)), 2, 2)
    assert {row["triv"] for row in result["rows"]} == set(manifolds.TRIVS)
    for row in result["rows"]:
        assert row["seconds"] > 0
        if row["library"] == "orthonet":
            assert row["residual"] <= 2e-6
    assert "orthonet" in manifolds.summary(result)
