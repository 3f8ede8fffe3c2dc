"""The benchmark of attention finds no Jacobian above the constant, and makes its table."""

import pytest

from benchmarks import attention


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch.func.jvp
def test_rows_and_table():
    rows = attention.measure((2,), steps=2, widths=(1,))
    assert [(r["layer"], r["causal"]) for r in rows] == [
        (name, causal) for name in attention.KINDS for causal in (False, True)
    ]
    assert all(1.0 <= row["ratio"] < 8.0 for row in rows)
    assert rows[0]["bound"] < rows[0]["published"]
    table = attention.summary({"rows": rows}).splitlines()
    assert len(table) == 6
    assert table[2].startswith("| distance | 2 | 2.30 | 3.0 |")
