"""Which choices keep the accuracy of an ordinary CNN when its layers become orthogonal.

python -m benchmarks.accuracy [--dataset digits|mnist5k|fashion] [--seeds N] [--epochs N]
    [--rate R] [--images N] [--rows I ...] [--quick]

One network as everybody writes it (two convolutions with batch norm, ReLU and max pooling, two
linear layers) is trained by Adam on each row of choices: clean test accuracy, certified accuracy at
a radius, and the certified constant, as mean and spread over the seeds. Prints a Markdown table,
those of docs/guide/accuracy.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import orthogonalize
from orthonet.certify import certify
from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.recipes.data.digits import Images, Split
from orthonet.recipes.data.sets import load

RADIUS = 0.1
TEMPERATURE = 0.1
RATE = 3e-3


def stock(channels: int, side: int) -> nn.Sequential:
    """The ordinary CNN."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(2 * channels * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "temperature": lambda: OffsetCrossEntropyLoss(0.0, TEMPERATURE),
    "offset": lambda: OffsetCrossEntropyLoss(2**0.5 * RADIUS, TEMPERATURE),
}
# row: options of orthogonalize (None: the stock network), loss
ROWS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "the stock network": (None, "cross-entropy"),
    "only its layers orthogonal": ({}, "cross-entropy"),
    "constant 1: centering, average pooling": (
        {"norm": "centering", "pool": "average"}, "cross-entropy",
    ),
    "constant 1: centering, l2 pooling": ({"norm": "centering", "pool": "l2"}, "cross-entropy"),
    "and a temperature of 0.1": ({"norm": "centering", "pool": "l2"}, "temperature"),
    "and max_min": ({"norm": "centering", "pool": "l2", "activation": "max_min"}, "temperature"),
    "and abs instead": ({"norm": "centering", "pool": "l2", "activation": "abs"}, "temperature"),
    "max_min, average pooling": (
        {"norm": "centering", "pool": "average", "activation": "max_min"}, "temperature",
    ),
    "max_min, no centering": (
        {"norm": "lip", "pool": "l2", "activation": "max_min"}, "temperature",
    ),
    "max_min and an offset": (
        {"norm": "centering", "pool": "l2", "activation": "max_min"}, "offset",
    ),
}  # fmt: skip


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Any:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        yield x[index], y[index]


def trained(
    model: nn.Module, loss: nn.Module, data: Any, epochs: int, seed: int, rate: float
) -> nn.Module:
    """Adam with a rate that falls to zero."""
    x, y = data.train.x, data.train.y
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        for a, b in batches(x, y, 64, 1000 * seed + epoch):
            optimizer.zero_grad()
            loss(model(a), b).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, data: Any) -> tuple[float, float, float]:
    """Clean and certified accuracy in percent, and the constant."""
    x, y = data.test.x, data.test.y
    certificate = certify(model, x[:2], effort="fast", lower=False)
    clean, proved = certificate.certified_accuracy(model(x), y, [0.0, RADIUS])
    return 100 * clean, 100 * proved, certificate.constant.value


def part(data: Any, images: int) -> Any:
    """The first images to train on, and a third as many to test on; 0 for all."""
    if not images:
        return data
    train, test = data.train, data.test
    return Split(
        Images(train.x[:images], train.y[:images]),
        Images(test.x[: images // 3], test.y[: images // 3]),
    )


def row(
    name: str, data: Any, seeds: int, epochs: int, rate: float = RATE
) -> list[tuple[float, float, float]]:
    options, loss = ROWS[name]
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = stock(16, data.train.x.shape[-1])
        if options is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what stays is meant to stay
                model = orthogonalize(model, weights="reset", **options)
        trained(model, LOSSES[loss](), data, epochs, seed, rate)
        found.append(measured(model, data))
    return found


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist5k", "fashion"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=RATE, help="the learning rate at first")
    parser.add_argument("--images", type=int, default=0, help="to train on, a third to test on")
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(ROWS)), help="from 0")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    given = parser.parse_args()
    seeds, epochs = (1, 2) if given.quick else (given.seeds, given.epochs)
    torch.set_num_threads(1)
    data = part(load(given.dataset), given.images)
    print(
        f"| choices | clean, % | certified at {RADIUS}, % | constant | s |\n|---|---|---|---|---|"
    )
    for name in [list(ROWS)[place] for place in given.rows]:
        start = time.process_time()
        clean, proved, constants = zip(*row(name, data, seeds, epochs, given.rate), strict=True)
        seconds = (time.process_time() - start) / seeds
        print(
            f"| {name} | {spread(list(clean))} | {spread(list(proved))} | "
            f"{max(constants):.4g} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
