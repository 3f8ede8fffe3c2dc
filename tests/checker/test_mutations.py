"""No single change that makes a claim false is accepted; the judge shares no code with anybody."""

import random

import pytest

from orthonet_checker import Rejected, check
from tests.checker import measure
from tests.checker.nets import NETS


def _check(tally, changes):
    """The judge must see something, and the checker must not reject all."""
    assert tally["originals"] == len(NETS)
    assert tally["changes"] == changes
    assert tally["false"] >= 0.15 * changes
    assert tally["changed constants"] >= changes / 8
    assert 0 < tally["accepted"] < changes * 0.3


def test_changes_that_make_a_claim_false_are_rejected(saved):
    """Also every changed constant, by its hash, and no original: `measure.count` asserts it."""
    _check(measure.count(saved, 150, 0), 150)


@pytest.mark.slow
def test_a_thousand_changes(saved):
    _check(measure.count(saved, 1000, 0), 1000)


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
