"""What the checker makes of many random single changes, and how long it takes.

    PYTHONPATH=.:checker python -m tests.checker.measure --changes 1000 --seed 0

Every change that makes a claim false must be rejected, every changed constant by its hash, and
every original accepted; otherwise it stops. It prints the counts, and the seconds of the processor
for a network of the demo and for ten wide convolutions.
"""

import argparse
import collections
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from orthonet import models
from orthonet.certify import certify
from orthonet_checker import Rejected, check
from orthonet_checker.verify import verify
from tests.checker import oracle
from tests.checker.mutations import mutate, store_of
from tests.checker.nets import NETS, deep_convolutions, save

NO_FUNCTION = (oracle.Nonsense, RuntimeError, ValueError, KeyError, IndexError, TypeError)
"""What the judge makes of a graph that is no function: nothing is claimed of one."""


def accepts(content: dict, arrays: dict) -> bool:
    """Whether all is verified; any other end than a rejection is an error."""
    try:
        return not verify(content, store_of(arrays)).assumed
    except Rejected:
        return False


def different(arrays: dict, values: dict) -> bool:
    """Whether a constant has other bytes."""
    return any(a.numpy().tobytes() != values[n].numpy().tobytes() for n, a in arrays.items())


def count(path_of: Callable[[str], Path], changes: int, seed: int) -> collections.Counter:
    """The counts, of changes of the saved networks in turn."""
    tally: collections.Counter = collections.Counter()
    for name in NETS:
        content, arrays = oracle.load(path_of(name))
        assert check(path_of(name)).assumed == []
        assert accepts(content, arrays)
        assert oracle.false_claims(content, arrays) == []
        tally["originals"] += 1
    rng, names = random.Random(seed), list(NETS)
    while tally["changes"] < changes:
        name = names[tally["changes"] % len(names)]
        content, arrays = oracle.load(path_of(name))
        other, values, kind = mutate(rng, content, arrays)
        changed = different(arrays, values)
        if other == content and not changed:
            continue
        tally["changes"] += 1
        if changed:
            tally["changed constants"] += 1
            assert not accepts(content, values), (name, kind, "accepted by hash")
        accepted = accepts(other, values)
        tally["accepted" if accepted else "rejected"] += 1
        try:
            found = oracle.false_claims(other, values)
        except NO_FUNCTION:
            assert not accepted, (name, kind, "accepted, and no function")
            tally["no function"] += 1
            continue
        assert not (found and accepted), (name, kind, found)
        tally["false" if found else "true"] += 1
        tally["true and rejected"] += not found and not accepted
    return tally


def seconds(path: Path) -> float:
    """Of the processor, for a check behind a first one, which sets up the matrix products."""
    check(path)
    start = time.process_time()
    assert check(path).assumed == []
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        known: dict[str, Path] = {}

        def path_of(name: str) -> Path:
            if name not in known:
                known[name] = save(name, Path(folder) / name)
            return known[name]

        tally = count(path_of, options.changes, options.seed)
        for key, value in tally.items():
            print(f"{key}: {value}")
        print(
            f"all {tally['originals']} originals accepted, all {tally['false']} false and "
            f"{tally['changed constants']} with other hashes rejected"
        )
        large = {
            "convnet_mnist": (models.convnet_mnist(), (1, 28, 28)),
            "ten convolutions of 64 channels": (deep_convolutions(), (3, 8, 8)),
        }
        for i, (name, (model, shape)) in enumerate(large.items()):
            path = Path(folder) / f"{i}.json"
            certify(model.eval(), torch.zeros(1, *shape), lower=False, effort="fast").save(path)
            print(f"{name}: {seconds(path):.3g} s")


if __name__ == "__main__":
    main()
