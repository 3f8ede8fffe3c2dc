"""The page of the zoo is what its JSON says, and the JSON keeps the promises."""

import pytest

from benchmarks import zoo_page
from benchmarks.page import fill
from orthonet.recipes.zoo.report import HEADER

FOUND = zoo_page.reports()


def test_the_page_is_made_from_the_kept_results():
    page = zoo_page.PAGE.read_text()
    assert fill(page, zoo_page.tables(FOUND)) == page, "run `python -m benchmarks.zoo_page`"
    for name in FOUND:
        assert (zoo_page.DOCS / "assets" / f"zoo_{name}.png").exists()


@pytest.mark.parametrize("name", FOUND)
def test_no_kept_run_was_broken_or_not_finite(name):
    report = FOUND[name]
    for row in report.rows():
        assert row["broken"] == 0 < row["attempts"], row["method"]
        assert row["not_finite"] == 0, row["method"]
        assert row["constant"] <= 1 + 1e-6, row["method"]  # observed 1 + 2e-9
        assert row["certified"] == sorted(row["certified"], reverse=True)
        radii = [r for r in report.radii if r > 0]
        assert len(row["certified"]) == len(row["attacked"]) == len(radii)
        for proved, attacked in zip(row["certified"], row["attacked"], strict=True):
            assert proved <= attacked <= row["accuracy"]
    assert all(len(cells) == len(HEADER) for cells in report.cells())
