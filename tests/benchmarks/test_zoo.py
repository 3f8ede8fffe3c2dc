"""The page of the zoo is what its JSON says, and the JSON keeps the promises."""

import re

import pytest

from benchmarks import learning, zoo_page
from benchmarks.page import fill
from orthonet.recipes.zoo.report import HEADER

FOUND = zoo_page.reports()


def test_the_pages_are_made_from_the_kept_results():
    texts = zoo_page.tables(FOUND)
    for path in zoo_page.PAGES:
        page = path.read_text()
        assert fill(page, texts) == page, "run `python -m benchmarks.zoo_page`"
    shown = set(re.findall(r"assets/(zoo_\w+)\.png", zoo_page.PAGES[0].read_text()))
    assert shown
    assert shown <= {f"zoo_{name}" for name in FOUND}
    assert shown == {path.stem for path in (zoo_page.DOCS / "assets").glob("zoo_*.png")}


@pytest.mark.parametrize("name", FOUND)
def test_no_kept_run_was_broken(name):
    report = FOUND[name]
    radii = [r for r in report.radii if r > 0]
    for run in report.runs:
        if not run["finite"]:
            assert run["reason"]
            continue
        assert run["broken"] == 0 < run["attempts"], run["method"]
        assert run["certified"] == sorted(run["certified"], reverse=True)
        assert len(run["certified"]) == len(run["attacked"]) == len(radii)
        # of the attacked images alone: all of them, where only some are attacked
        few = run.get("certified_of_attacked", run["certified"])
        for proved, attacked in zip(few, run["attacked"], strict=True):
            assert proved <= attacked
        if run["method"] != "torch-spectral-norm":  # it bounds the norm of a reshaped kernel
            assert run["constant"] <= 1 + 1e-4, run["method"]  # observed 1 + 3e-6
    assert all(len(cells) == len(HEADER) for cells in report.cells())


def test_a_difference_counts_against_the_spread_of_seeds():
    def row(variant, seed, certified):
        shares = {"accuracy": 0.8, "certified": [certified], "cpu_seconds": 1.0}
        return {"variant": variant, "seed": seed, **shares}

    rows = [row("the recipe", 0, 0.5), row("the recipe", 1, 0.52), row("other", 0, 0.6)]
    lines = learning.summary({"rows": rows}).splitlines()
    assert lines[2].split("|")[6:10] == [" 51.00 ", " 1.41 ", "  ", "  "]
    assert lines[3].split("|")[6:10] == [" 60.00 ", " - ", " +9.00 ", " - "]
    rows.append(row("other", 1, 0.62))
    # two standard errors of the difference of two means: 2 sqrt(1.414^2 / 2 + 1.414^2 / 2)
    assert learning.summary({"rows": rows}).splitlines()[3].split("|")[8:10] == [
        " +10.00 ",
        " 2.83 ",
    ]
