"""How long the projection of a ResNet-18 takes, and how far it moves the weights.

python -m benchmarks.projection [--threads N] [--model NAME]

CPU and wall seconds of `orthonet.orthogonalize` on a model of torchvision at its initialization
(which is the slow case: trained kernels end after fewer sweeps), and the distance that each kind of
layer is moved.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict

import torch

from orthonet import orthogonalize


def main() -> None:
    import torchvision

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="resnet18")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = getattr(torchvision.models, given.model)(weights=None)
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is untrained
        _, report = orthogonalize(model, return_report=True, progress=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{given.model}: {cpu:.1f} CPU s, {wall:.1f} s")
    layers = dict(model.named_modules())
    moved = defaultdict(list)
    for row in report.changed:
        moved[tuple(layers[row.name].weight.shape)].append(row.moved)
    for shape, values in moved.items():
        print(f"{shape!s:>22} {len(values):3} layers, moved {min(values):.4f} to {max(values):.4f}")


if __name__ == "__main__":
    main()
