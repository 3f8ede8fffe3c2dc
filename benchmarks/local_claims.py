"""Radii that a file claims and the checker verifies, over those that the prover finds.

PYTHONPATH=.:checker python -m benchmarks.local_claims [--samples N] [--seconds S] [--nets NAME ...]

The networks and samples are those of `benchmarks.local_radii`. For each network: the medians of
the claimed radius over the global one and over that of `certificate.local_radius`, and CPU seconds
a sample to write the claims, and to check them. Every claim must be verified.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import _harness as harness
from benchmarks.local_radii import NETS, SORTS, trained
from orthonet.certify import LocalCertificate, certify


def measure(name: str, samples: int, seconds: float) -> list[str]:
    """Train, certify, write, check: one line of the table."""
    from orthonet_checker import check

    model, _, x, y = trained(name, samples, seconds)
    certificate = certify(model, x[:1], lower=False)
    whole, local = certificate.radius(model, x), certificate.local_radius(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        start = time.process_time()
        certificate.save(path)
        check(path)
        without = time.process_time() - start
        start = time.process_time()
        certificate.save(path, local=x, labels=y)
        middle = time.process_time()
        verdict = check(path)
        end = time.process_time()
        claimed = LocalCertificate.load(path)
    if verdict.assumed or len(verdict.local) != len(x):
        raise RuntimeError(f"{len(verdict.local)} of {len(x)} claims are verified")
    radii = torch.tensor([bound.radius for bound in claimed.constants], dtype=torch.float64)
    return [
        name,
        f"{float((radii / whole).median()):.2f}",
        f"{float((radii / local).median()):.2f}",
        f"{(middle - start) / len(x):.1f}",
        f"{(end - middle) / len(x):.1f}",
        f"{without:.1f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--nets", nargs="+", choices=(*NETS, *SORTS), default=list(NETS))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    header = [
        "network", "claimed over global, median", "claimed over `local_radius`, median",
        "CPU s a sample to write", "to check", "CPU s to write and check without claims",
    ]  # fmt: skip
    rows = []
    for name in chosen.nets:
        rows.append(measure(name, chosen.samples, chosen.seconds))
        print(rows[-1], flush=True)
    print(f"{chosen.samples} samples, {chosen.seconds:g} CPU seconds of training, one seed.\n")
    print(harness.table(header, rows))


if __name__ == "__main__":
    main()
