"""The benchmark of local radii runs to the end and shows no radius below the global one."""

import re

import pytest

from benchmarks import local_radii


@pytest.mark.slow
def test_a_row_of_every_network_is_printed(capsys):
    pytest.importorskip("mlxtend")
    local_radii.main(["--samples", "2", "--seconds", "2"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(local_radii.NETS)
    for row in rows:
        median, low, high = map(float, re.search(r"(\S+) \[(\S+), (\S+)\]", row).groups())
        assert 1.0 <= low <= median <= high
    assert rows[0].split()[4] > "1.1"  # an unconstrained perceptron gains
