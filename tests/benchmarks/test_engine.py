"""The benchmark of whole steps runs at tiny sizes and covers what it says."""

from dataclasses import replace

import pytest

from benchmarks import _harness as harness
from benchmarks import _nets as nets
from benchmarks import engine
from benchmarks._candidates import OURS, PEER, PLAIN, TORCH, Candidate


@pytest.fixture(scope="module")
def quick():
    return engine.run(engine.QUICK)


@pytest.mark.slow
def test_every_candidate_is_timed_over_the_plain_network(quick):
    settings = engine.QUICK
    for compiled, measured in ((False, settings.eager), (True, settings.compiled)):
        candidates = settings.compiled_candidates if compiled else settings.candidates
        for net in measured:
            rows = [r for r in quick["rows"] if r["net"] == net.name and r["compiled"] == compiled]
            offered = [c for c in candidates if engine.offers(c, net)]
            assert len(rows) == len(offered) + 1
            assert rows[-1]["preset"] == PLAIN["preset"]
            assert rows[-1]["ratio"] == 1
            ours = [row for row in rows if row["library"] == OURS]
            assert ours
            for row in ours:
                assert row["ratio"] > 0
                assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
                assert row["saved_bytes"] > 0
                assert row["peak_bytes"] > 0
                # A 3 x 3 kernel has a matrix and 4 squares of factors. Observed 1e-6.
                assert row["residual"] <= (9 if net.convolutions else 1) * 2e-6
    text = engine.summary(quick)
    assert all(net.name in text for net in settings.eager)
    assert f"{settings.compiled[0].name}, compiled" in text


@pytest.mark.slow
def test_matrix_maps_are_not_asked_for_convolutions(quick):
    cnn = engine.QUICK.eager[1]
    assert cnn.convolutions
    assert not engine.offers(Candidate(TORCH, "cayley"), cnn)
    assert engine.offers(nets.PLAIN_LAYERS, cnn)
    assert not any(r["preset"] == "cayley" for r in quick["rows"] if r["net"] == cnn.name)
    assert any(r["preset"] == "cayley" for r in quick["rows"] if r["net"] != cnn.name)


def test_a_library_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(Candidate, "installed", property(lambda c: c.library != PEER))
    settings = replace(engine.QUICK, candidates=(Candidate(PEER, "QR"),))
    missing, plain = engine.measure(nets.linear(4, 2), settings, compiled=False)
    assert missing["error"] == "not installed"
    assert plain["ratio"] == 1
    assert "not installed" in engine.summary({"rows": [missing, plain]})


def test_networks_are_chosen_by_words_of_their_title():
    found = nets.named(engine.Settings().eager, ["CNN", "Linear"])
    assert [net.name.split()[0] for net in found] == ["Linear", "CNN"]


def test_the_clock_can_be_chosen():
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    steps = {"once": lambda: work(1.0), "thrice": lambda: work(3.0)}
    timings = harness.interleaved(steps, "once", rounds=(2, 2), clock=lambda: now)
    assert timings["thrice"].ratio == 3
