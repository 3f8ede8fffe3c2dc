"""`python -m tests.works_with.page` runs every cell, keeps the results and writes the page."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.works_with import trainers  # noqa: F401 (its columns)
from tests.works_with.columns import COLUMNS
from tests.works_with.refusals import refusal
from tests.works_with.rows import ROWS

__all__ = ["PAGE", "RESULTS", "cell_of", "render"]

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
GROUPS = {
    "layer": "Layers",
    "recurrent": "Recurrent layers",
    "zoo": "The zoo",
    "constraint": "Constraints on `nn.Linear`",
}


def cell_of(column: str, row: str) -> str:
    """Run one cell: "yes", or the explanation of a refusal whose error has the expected text."""
    torch.manual_seed(0)
    expected = refusal(column, ROWS[row])
    if expected is None:
        COLUMNS[column].check(ROWS[row])
        return "yes"
    try:
        COLUMNS[column].check(ROWS[row])
    except expected.error as error:
        if re.search(expected.match, str(error)):
            return expected.reason
        raise
    raise AssertionError(f"{row} works with {column} now: take the refusal out")


def render(results: dict[str, Any]) -> str:
    """Return the page, from the results."""
    cells: dict[str, dict[str, str]] = results["cells"]
    text = [
        "# Does it work with ...?",
        "",
        "After reading this page you know whether a layer or constraint works with a feature of",
        "PyTorch or of another package. Every cell is a test (`tests/works_with`).",
        "`python -m tests.works_with.page` generates this page from their results, last with",
        f"PyTorch {results['torch']}.",
        "",
        "## What works?",
        "",
        "| feature | what is tested | works for | refused, with a clear error |",
        "|---|---|---:|---|",
    ]
    reasons: list[str] = []
    for name, entries in cells.items():
        column = COLUMNS[name]
        good = sum(value == "yes" for value in entries.values())
        refused: dict[str, list[str]] = {}
        for row, value in entries.items():
            if value != "yes":
                refused.setdefault(value, []).append(row)
        notes = []
        for reason, rows in refused.items():
            if reason not in reasons:
                reasons.append(reason)
            notes.append(f"{len(rows)} ({reasons.index(reason) + 1})")
        tested = column.tested.replace("|", r"\|")
        text.append(
            f"| {column.title} | {tested} | {good} of {len(entries)} | {', '.join(notes)} |"
        )
    if reasons:
        text += ["", "## Why is a case refused?", ""]
        text += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    text += ["", "## Which layers and constraints are tested?", ""]
    text += [
        "A number is the reason above, and an empty cell works. A feature that a table does not",
        "name works with all its layers.",
        "",
    ]
    for group, title in GROUPS.items():
        names = [name for name, row in ROWS.items() if row.group == group]
        shown = [column for column in cells if any(cells[column][n] != "yes" for n in names)]
        refusing = [n for n in names if any(cells[column][n] != "yes" for column in shown)]
        text += [f"### {title}", ""]
        if shown:
            heads = " | ".join(COLUMNS[column].title for column in shown)
            text += [f"| | {heads} |", "|---|" + "---|" * len(shown)]
        for name in refusing:
            values = [cells[column][name] for column in shown]
            marks = ["" if v == "yes" else str(reasons.index(v) + 1) for v in values]
            text.append(f"| {name} | " + " | ".join(marks) + " |")
        working = [name for name in names if name not in refusing]
        text += [""] * bool(shown) + [f"Every feature works with: {'; '.join(working)}.", ""]
    return "\n".join(text).rstrip() + "\n"


def main() -> None:
    """Run all cells, or those of the columns that are named, and write results and page.

    With `--missing` only the cells that the results lack.
    """
    missing = "--missing" in sys.argv
    wanted = [name for name in sys.argv[1:] if name in COLUMNS] or list(COLUMNS)
    known = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else {}
    cells = {name: known.get(name, {}) for name in COLUMNS}
    for name in wanted:
        start, kept = time.process_time(), cells[name] if missing else {}
        cells[name] = {row: kept.get(row) or cell_of(name, row) for row in ROWS}
        seconds = time.process_time() - start
        count = len(ROWS) - len(kept)
        sys.stdout.write(f"{name}: {count} cells, {seconds:.0f} CPU seconds\n")
    results = {"torch": torch.__version__.split("+")[0], "cells": cells}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if all(len(entries) == len(ROWS) for entries in cells.values()):
        PAGE.write_text(render(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
