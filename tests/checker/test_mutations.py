"""No single change that makes a claim false is accepted; the judge shares no code with anybody."""

import collections
import random

import pytest
import torch

from orthonet_checker import Rejected, check
from orthonet_checker.verify import verify
from tests.checker import oracle
from tests.checker.mutations import mutate, store_of
from tests.checker.nets import NETS


def _changed(content, arrays, other, values) -> bool:
    same = all(
        a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in ((arrays[n], values[n]) for n in arrays)
    )
    return content != other or not same


def _accepts(content, arrays) -> bool:
    store = store_of(arrays)
    try:
        return not verify(content, store, store).assumed
    except Rejected:
        return False


def _falsehoods(content, arrays) -> list[str]:
    return oracle.false_claims(content, arrays)


@pytest.mark.parametrize("name", NETS)
def test_originals_are_accepted_and_true(saved, name):
    content, arrays = oracle.load(saved(name))
    assert check(saved(name)).assumed == []
    assert _accepts(content, arrays)
    assert _falsehoods(content, arrays) == []


def _run(saved, count, judged):
    """The number of false claims that the judge found among `judged` rejected changes, too."""
    rng, tally = random.Random(0), collections.Counter()
    names = list(NETS)
    while tally["tried"] < count:
        name = names[tally["tried"] % len(names)]
        content, arrays = oracle.load(saved(name))
        other, values, kind = mutate(rng, content, arrays)
        if not _changed(content, arrays, other, values):
            continue
        tally["tried"] += 1
        if _accepts(other, values):
            tally["accepted"] += 1
            assert _falsehoods(other, values) == [], (name, kind)
        elif judged > tally["judged"] and not kind.startswith(("swap", "drop")):
            try:
                found = _falsehoods(other, values)
            except (oracle.Nonsense, RuntimeError, ValueError, KeyError, IndexError, TypeError):
                continue  # no function at all
            tally["judged"] += 1
            tally["false"] += bool(found)
    return tally


def test_changes_that_make_a_claim_false_are_rejected(saved):
    tally = _run(saved, 150, judged=30)
    # The judge must see something: of 30 rejected changes it refutes 17.
    assert tally["false"] >= 8
    assert 0 < tally["accepted"] < 60  # observed 24: gains rounded up, weights made smaller


@pytest.mark.slow
def test_a_thousand_changes(saved):
    tally = _run(saved, 1000, judged=1000)
    # Observed: 99 accepted and true, 901 rejected, of which the judge can run 563 and refutes 279;
    # the others are no certificate at all, or claim more than the rule proves and are true.
    assert tally["false"] >= 150
    assert tally["accepted"] < 300


@pytest.mark.parametrize("name", NETS)
def test_every_changed_byte_of_the_weights_is_rejected(saved, name, tmp_path):
    """With the hashes of the certificate, no change of a constant is too small."""
    data = saved(name).with_suffix(".safetensors").read_bytes()
    text = saved(name).read_text()
    start = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(name)
    (tmp_path / "certificate.json").write_text(text)
    for _ in range(20):
        place = rng.randrange(start, len(data))
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "certificate.safetensors").write_bytes(changed)
        with pytest.raises(Rejected, match="SHA-256"):
            check(tmp_path / "certificate.json")
    (tmp_path / "certificate.safetensors").write_bytes(data)
    assert check(tmp_path / "certificate.json").assumed == []
