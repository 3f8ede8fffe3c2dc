"""Finite-sample laws, exactly: every arrangement of small sets, every outcome of small trials."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from orthonet.downstream import conformal_quantile, share_bound


@pytest.mark.parametrize("values", [range(7), (0, 0, 0, 1, 1, 2, 2), (3, 3, 3, 3, 3)], ids=str)
def test_the_quantile_covers_as_often_as_it_says(values):
    """Over all choices of the fresh one among n + 1 exchangeable scores, and all levels."""
    pool = torch.tensor(list(values), dtype=torch.float64)
    total = len(pool)
    distinct = len(set(pool.tolist())) == total
    for numerator in range(1, 20):
        alpha = numerator / 20  # 0.05, 0.1, ...: as decimals, not as floats
        level = 1 - Fraction(numerator, 20)
        rank = math.ceil(total * level)
        covered = 0
        for fresh in range(total):
            rest = torch.cat([pool[:fresh], pool[fresh + 1 :]])
            if rank > total - 1:
                with pytest.warns(UserWarning, match="Calibrate on at least"):
                    threshold = conformal_quantile(rest, alpha)
                assert threshold == math.inf
            else:
                threshold = conformal_quantile(rest, alpha)
                assert threshold == rest.sort().values[rank - 1]
            covered += bool(pool[fresh] <= threshold)
        assert Fraction(covered, total) >= level
        if distinct:
            assert covered == rank


def test_ranks_are_exact_where_floats_are_not():
    """(n + 1)(1 - alpha) is an integer in decimals; 1 - 0.3 and 0.7 are different floats."""
    wrong = 0
    for number, alpha in itertools.product((9, 19, 99, 999), (0.1, 0.2, 0.3, 0.7, 0.9)):
        scores = torch.arange(1.0, number + 1.0)
        expected = math.ceil((number + 1) * (1 - Fraction(str(alpha))))
        assert conformal_quantile(scores, alpha) == expected
        assert conformal_quantile(scores.flip(0), alpha) == expected
        wrong += math.ceil((number + 1) * (1 - alpha)) != expected
    assert wrong > 0  # the naive formula fails somewhere in this list
    assert conformal_quantile(torch.arange(1.0, 10.0), 0.1) == 9  # and 9 samples are enough
    with pytest.warns(UserWarning, match="at least 9 samples"):
        assert conformal_quantile(torch.arange(1.0, 9.0), 0.1) == math.inf
    with pytest.warns(UserWarning, match="scores=0"):
        assert conformal_quantile(torch.empty(0), 0.5) == math.inf


def tail(hits, samples, p):
    """P(Bin(n, p) >= c) for a fraction p, exactly."""
    terms = (
        math.comb(samples, i) * p**i * (1 - p) ** (samples - i) for i in range(hits, samples + 1)
    )
    return sum(terms, Fraction(0))


def test_the_bound_of_a_share_is_that_of_clopper_and_pearson():
    for samples, confidence in itertools.product((1, 2, 7, 20), (0.5, 0.999)):
        for hits in range(samples + 1):
            risk = 1 - Fraction(str(confidence))
            found = share_bound(hits, samples, confidence)
            if hits == 0:
                assert found == 0.0
                continue
            assert tail(hits, samples, Fraction(found)) <= risk
            above = Fraction(found) + Fraction(1, 10**9)
            assert tail(hits, samples, above) > risk  # observed: already 1e-14 above


def test_the_bound_of_a_share_holds_as_often_as_it_says():
    """Over all outcomes of n trials, with their exact probabilities."""
    samples, confidence = 12, 0.9
    bounds = [share_bound(hits, samples, confidence) for hits in range(samples + 1)]
    assert bounds == sorted(bounds)
    for p in (Fraction(1, 10), Fraction(1, 2), Fraction(19, 20)):
        fails = sum(
            math.comb(samples, c) * p**c * (1 - p) ** (samples - c)
            for c in range(samples + 1)
            if bounds[c] > p
        )
        assert fails <= Fraction(1, 10)


def test_the_bound_of_a_share_does_not_overflow():
    assert 0.949 < share_bound(96_000, 100_000, 1 - 1e-9) < 0.96
    assert 0.0 < share_bound(1, 100_000) < 1e-6
    assert share_bound(100_000, 100_000) == pytest.approx(0.05**1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: conformal_quantile(torch.ones(3), 0.0), "alpha must be"),
        (lambda: conformal_quantile(torch.ones(3), 1.0), "alpha must be"),
        (lambda: conformal_quantile(torch.ones(3), math.nan), "alpha must be"),
        (lambda: conformal_quantile(torch.ones(3, 1), 0.1), "must be a vector"),
        (lambda: conformal_quantile(torch.tensor([0.0, math.nan]), 0.1), "without NaN"),
        (lambda: conformal_quantile([0.1], 0.1), "must be a tensor"),
        (lambda: conformal_quantile(torch.arange(3), 0.1), "floating-point"),
        (lambda: share_bound(4, 3), "hits must be at most"),
        (lambda: share_bound(-1, 3), "hits must be"),
        (lambda: share_bound(0, 0), "samples must be"),
        (lambda: share_bound(1, 2, 1.0), "confidence must be"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
