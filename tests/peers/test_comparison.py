"""Every cell of the table that compares libraries is what trying it gives."""

import warnings

import pytest

from tests.peers.comparison import EXPECTED, LIBRARIES, PAGES, PROBES, answer, installed, render


def disagreements(library: str) -> list[str]:
    letter = list(LIBRARIES).index(library)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers, and of projected checkpoints
        for title, cells in EXPECTED.items():
            if cells[letter] != "-" and answer(title, library) != (cells[letter] == "y"):
                found.append(title)
    return found


def test_every_row_is_tried():
    assert set(EXPECTED) == set(PROBES)
    assert all(len(cells) == len(LIBRARIES) for cells in EXPECTED.values())


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_cells_of_a_library(library):
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    assert disagreements(library) == []


def test_a_wrong_cell_is_found(monkeypatch):
    title = "Recurrent layers"
    monkeypatch.setattr("tests.peers.test_comparison.EXPECTED", {title: "nyyyy"})
    assert disagreements("orthonet") == [title]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_shows_the_table(page):
    assert f"<!-- comparison -->\n{render()}<!-- end -->" in page.read_text()
