"""The house writes American English."""

from tests.spelling import american, british, files


def test_no_british_spelling():
    found = [line for path in files() for line in british(path)]
    assert not found, "run `python -m tests.spelling --fix`: " + ", ".join(found[:20])


def test_spelling_keeps_case_and_finds_words_in_identifiers():
    assert american("Centred GREY colour_map CentredMap recentred_polar") == (
        "Centered GRAY color_map CenteredMap recentered_polar"
    )
    for word in ("cancellation", "analyses", "precise", "exercise", "modeling", "centerpiece"):
        assert american(word) == word
