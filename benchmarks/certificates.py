"""Certificates: how tight, how fast, and what dominates.

    python -m benchmarks.certificates
    python -m benchmarks.certificates --exact

Single convolutions against the truth by Lanczos iteration (from below), the median over many
small convolutions and affine islands, a trained perceptron between its product of norms and the
steepest secant, and whole networks with the rows that cost most. With `--exact`: small trained
networks, whose constant is found by branch and bound, next to every bound of it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from orthonet import layers
from orthonet.certify import certify, exact_constant, mlp_bound
from orthonet.linalg import convolution_norm_bound

PACKAGES = ("orthonet", "torchvision")
EFFORTS = ("fast", "default", "tight")
ROWS = 5  # of each network, the largest constants


def operator_norm(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """The norm of an affine map, from below, by Lanczos iteration in float64 (240 products)."""
    x = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    image = function(x)
    offset = image.detach()

    def normal(v: Tensor) -> Tensor:
        with torch.no_grad():
            w = function(v.reshape(x.shape)) - offset
        return torch.autograd.grad(image, x, w, retain_graph=True)[0].flatten()

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.numel(), dtype=torch.float64, generator=generator)
    basis, diagonal, beside = [v / v.norm()], [], []
    for _ in range(min(240, x.numel())):
        w = normal(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        q = torch.stack(basis)
        for _ in range(2):
            w = w - q.T @ (q @ w)
        beside.append(float(w.norm()))
        if beside[-1] < 1e-12 * diagonal[0]:
            break
        basis.append(w / beside[-1])
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(matrix)[-1].sqrt())


# single maps ----------------------------------------------------------------------------------


def convolutions(quick: bool) -> list[dict[str, Any]]:
    """Bound / truth and CPU seconds of single zero-padded convolutions, for each effort."""
    torch.manual_seed(0)
    cases = [(16, 16, 3, 8, 1), (3, 64, 7, 32, 2), (64, 64, 3, 32, 1), (64, 128, 3, 32, 2)]
    rows = []
    for inside, outside, taps, size, stride in cases[: 2 if quick else None]:
        conv = nn.Conv2d(inside, outside, taps, stride, taps // 2, bias=False)
        nn.init.normal_(conv.weight, std=(inside * taps * taps) ** -0.5)
        kernel = conv.weight.detach().clone()
        truth = operator_norm(conv.double(), (inside, size, size))
        for effort in EFFORTS:
            start = time.process_time()
            found = convolution_norm_bound(
                kernel,
                (size, size),
                stride=stride,
                padding=taps // 2,
                effort=effort,
            )
            seconds = time.process_time() - start
            name = f"{inside}->{outside} k{taps} s{stride}, {size}x{size}"
            rows.append(
                {
                    "case": name,
                    "effort": effort,
                    "excess": found.value / truth - 1.0,
                    "seconds": seconds,
                    "method": found.method,
                }
            )
    return rows


class _Sum(nn.Module):
    """x + f(x), or f(x) + g(x)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def _norm(channels: int) -> nn.Module:
    module = nn.BatchNorm2d(channels)
    module.running_mean.normal_()
    module.running_var.uniform_(0.2, 3.0)
    nn.init.uniform_(module.weight, 0.3, 2.0)
    return module


def _convolution(seed: int) -> tuple[nn.Module, int]:
    """A zero-padded convolution of some shape, and its input channels."""
    taps, stride = (3, 5, 3, 7)[seed % 4], (1, 1, 2)[seed % 3]
    inside, outside = (4, 8, 12)[seed % 3], (4, 8, 16)[seed // 3 % 3]
    groups = (1, 2)[seed // 4 % 2]
    return nn.Conv2d(inside, outside, taps, stride, taps // 2, groups=groups), inside


def _island(seed: int) -> tuple[nn.Module, int]:
    """Affine operations in a row, as they stand in networks."""
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), _norm(16)),
        lambda: _Sum(nn.Identity(), nn.Conv2d(8, 8, 3, padding=1)),
        lambda: _Sum(
            nn.Sequential(nn.Conv2d(8, 16, 1, 2), _norm(16)),
            nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), _norm(16)),
        ),
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1)),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1), _norm(16)),
    ]
    return kinds[seed % len(kinds)](), 8


def medians(quick: bool) -> list[dict[str, Any]]:
    """Bound / truth over many maps, with the default effort."""
    rows = []
    for name, make in (("zero-padded convolutions", _convolution), ("affine islands", _island)):
        for size in (8, 24):
            excess = []
            for seed in range(6 if quick else 24):
                torch.manual_seed(seed)
                module, channels = make(seed)
                module = module.double().eval()
                shape = (channels, size, size + seed % 3)
                example = torch.zeros(1, *shape, dtype=torch.float64)
                bound = certify(module, example, lower=False).constant.value
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.requires_grad_(False)
                excess.append(bound / operator_norm(module, shape) - 1.0)
            rows.append(
                {
                    "maps": f"{name} at {size}x{size}",
                    "count": len(excess),
                    "least": min(excess),
                    "median": statistics.median(excess),
                    "largest": max(excess),
                }
            )
    return rows


# networks -------------------------------------------------------------------------------------


def glyphs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes of 8x8 images: a random stroke pattern each, shifted, faded and with noise."""
    generator = torch.Generator().manual_seed(123)
    patterns = (torch.rand(10, 6, 6, generator=generator) > 0.55).float()
    generator.manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = torch.zeros(count, 8, 8)
    for image, label in zip(images, labels, strict=True):
        a, b = torch.randint(0, 3, (2,), generator=generator).tolist()
        ink = 0.6 + 0.4 * float(torch.rand(1, generator=generator))
        image[a : a + 6, b : b + 6] = ink * patterns[label]
    noise = 0.15 * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0.0, 1.0).flatten(1), labels


def trained_perceptron(depth: int = 5, width: int = 64, epochs: int = 30) -> nn.Module:
    """A plain ReLU network of `depth` linear layers that was fitted to the glyphs."""
    torch.manual_seed(0)
    x, labels = glyphs(4000, 0)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise([64, *[width] * (depth - 1), 10]):
        parts += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*parts[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def perceptron(quick: bool) -> dict[str, Any]:
    """A trained 5x64 perceptron: what is proved from above, and found from below."""
    model = trained_perceptron(epochs=2 if quick else 30)
    x, labels = glyphs(500, 1)
    accuracy = float((model(x).argmax(1) == labels).float().mean())
    rows = []
    lower = 0.0
    for effort in EFFORTS:
        start = time.process_time()
        found = certify(model, x[:32], effort=effort)
        seconds = time.process_time() - start
        lower = max(lower, 0.0 if found.lower is None else found.lower.value)
        rows.append({"effort": effort, "bound": found.constant.value, "seconds": seconds})
    return {
        "accuracy": accuracy,
        "product": mlp_bound(model, effort="fast").product,
        "lower": lower,
        "bounds": rows,
    }


def ortho_resnet() -> nn.Module:
    """A residual network of orthogonal layers."""

    def block(width: int) -> nn.Module:
        return layers.ConvexResidual(
            nn.Sequential(layers.OrthoConv2d(width, width, 3, padding=1), layers.MaxMin())
        )

    return nn.Sequential(
        layers.OrthoConv2d(3, 32, 3, padding=1),
        layers.MaxMin(),
        block(32),
        block(32),
        layers.SpaceToDepth2d(2),
        layers.OrthoConv2d(128, 64, 3, padding=1),
        layers.MaxMin(),
        block(64),
        block(64),
        nn.Flatten(),
        layers.OrthoLinear(64 * 64, 10),
    )


def _torchvision() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None)


def networks(quick: bool) -> list[dict[str, Any]]:
    """Bound, seconds and the rows with the largest constants of whole networks."""
    cases: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "orthogonal ResNet, 3x16x16": (ortho_resnet, (3, 16, 16)),
        "torchvision ResNet-18, 3x64x64": (_torchvision, (3, 64, 64)),
    }
    rows = []
    for name, (make, shape) in cases.items():
        if quick and "torchvision" in name:
            continue
        torch.manual_seed(0)
        try:
            model = make().eval()
        except ModuleNotFoundError:
            rows.append({"network": name, "error": "torchvision is not installed"})
            continue
        x = torch.zeros(1, *shape)
        for effort in ("fast", "default"):
            start, wall = time.process_time(), time.perf_counter()
            found = certify(model, x, effort=effort, lower=False)
            seconds, wall = time.process_time() - start, time.perf_counter() - wall
            largest = sorted(found.rows, key=lambda row: -row.constant)[:ROWS]
            shown = [
                {"path": r.path, "op": r.op, "constant": r.constant, "method": r.method}
                for r in largest
            ]
            rows.append(
                {
                    "network": name,
                    "effort": effort,
                    "bound": found.constant.value,
                    "excess": found.constant.value - 1.0,
                    "seconds": seconds,
                    "wall": wall,
                    "steps": len(found.rows),
                    "rows": shown,
                }
            )
    return rows


# exact constants ------------------------------------------------------------------------------

SMALL: list[tuple[str, tuple[int, ...], Callable[[], nn.Module]]] = [
    ("ReLU 2-16-2", (2, 16, 2), nn.ReLU),
    ("ReLU 2-16-16-2", (2, 16, 16, 2), nn.ReLU),
    ("MaxMin 2-16-16-2", (2, 16, 16, 2), layers.MaxMin),
    ("ReLU 4-12-2", (4, 12, 2), nn.ReLU),
    ("MaxMin 4-8-8-2", (4, 8, 8, 2), layers.MaxMin),
]


def small_network(sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    """A network that was fitted to the angle and the length of its first two inputs."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), activation()]
    model = nn.Sequential(*parts[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        x = torch.randn(256, sizes[0])
        length = x[:, :2].norm(dim=1)
        goal = torch.stack([(2.0 * length).sin(), x[:, 0] * x[:, 1] / (1.0 + length)], 1)
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def exact(quick: bool = False) -> list[dict[str, Any]]:
    """Bounds over the exact constant of small trained networks."""
    rows = []
    for name, sizes, activation in SMALL[: 1 if quick else None]:
        model = small_network(sizes, activation)
        x = torch.zeros(1, sizes[0])
        for norm in ("l2", "linf", "l1"):
            start = time.process_time()
            found = exact_constant(model, norm=norm, budget=200 if quick else 4000)
            row: dict[str, Any] = {
                "network": name,
                "norm": norm,
                "lower": found.lower,
                "upper": found.upper.value,
                "exact": found.exact,
                "splits": found.nodes,
                "seconds": time.process_time() - start,
            }
            efforts = EFFORTS if norm == "l2" else ("default",)
            row["certify"] = {
                e: certify(model, x, norm=norm, effort=e, lower=False).constant.value
                for e in efforts
            }
            if norm == "l2":
                row["product"] = mlp_bound(model, effort="fast").product
            rows.append(row)
    return rows


def exact_summary(rows: list[dict[str, Any]]) -> str:
    """The table of exact constants, in Markdown."""
    lines = []
    for row in rows:
        truth = row["upper"] if row["exact"] else row["lower"]
        value = f"{truth:.5g}" if row["exact"] else f"{row['lower']:.4g} to {row['upper']:.4g}"
        cells = [f"{row['product'] / truth:.3g}" if "product" in row else ""]
        cells += [
            f"{row['certify'][e] / truth:.3g}" if e in row["certify"] else "" for e in EFFORTS
        ]
        lines.append(
            [row["network"], row["norm"], value, *cells, row["splits"], f"{row['seconds']:.2g}"]
        )
    head = ["network", "norm", "constant", "product of norms", *EFFORTS, "splits", "CPU s"]
    return harness.table(head, lines)


# output ---------------------------------------------------------------------------------------


def run(quick: bool = False) -> dict[str, Any]:
    """All measurements."""
    return {
        "convolutions": convolutions(quick),
        "medians": medians(quick),
        "perceptron": perceptron(quick),
        "networks": networks(quick),
        "environment": harness.environment(packages=PACKAGES),
    }


def summary(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    rows = result["convolutions"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = {row["effort"]: row for row in rows if row["case"] == case}
        cells = [f"{_ratio(mine[e]['excess'])} ({mine[e]['seconds']:.2g} s)" for e in EFFORTS]
        lines.append([case, *cells, mine["default"]["method"]])
    head = ["zero-padded convolution: bound / truth", *EFFORTS, "default by"]
    texts = [harness.table(head, lines)]
    lines = [
        [row["maps"], row["count"], *(_ratio(row[k]) for k in ("least", "median", "largest"))]
        for row in result["medians"]
    ]
    texts.append(harness.table(["bound / truth", "maps", "least", "median", "largest"], lines))
    mlp = result["perceptron"]
    lines = [
        ["product of norms", f"{mlp['product']:.4g}", f"{mlp['product'] / mlp['lower']:.3g}", ""]
    ]
    for row in mlp["bounds"]:
        lines.append(
            [
                f'`effort="{row["effort"]}"`',
                f"{row['bound']:.4g}",
                f"{row['bound'] / mlp['lower']:.3g}",
                f"{row['seconds']:.2g}",
            ]
        )
    lines.append(["steepest secant", f"{mlp['lower']:.4g}", "1", ""])
    head = ["trained 5x64 perceptron", "constant", "over the steepest secant", "CPU s"]
    texts.append(harness.table(head, lines))
    lines, dominant = [], []
    for row in result["networks"]:
        if "error" in row:
            lines.append([row["network"], row["error"], "", "", ""])
            continue
        near = abs(row["excess"]) < 0.01
        bound = _ratio(row["excess"]) if near else f"{row['bound']:.4g}"
        lines.append(
            [row["network"], row["effort"], bound, f"{row['seconds']:.2g}", f"{row['wall']:.2g}"]
        )
        if row["effort"] == "default" and not near:
            dominant.append((row["network"], row["rows"]))
    texts.append(harness.table(["network", "effort", "bound", "CPU s", "s"], lines))
    for name, largest in dominant:
        lines = [[f"`{r['path']}`", r["op"], f"{r['constant']:.4g}", r["method"]] for r in largest]
        texts.append(harness.table([f"{name}, by row", "operation", "constant", "method"], lines))
    return "\n\n".join(texts)


def _ratio(excess: float) -> str:
    """1 + excess, as short as it says something."""
    return f"{1.0 + excess:.4f}" if abs(excess) >= 5e-4 else f"1 {excess:+.0e}".replace("+", "+ ")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small maps and networks")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    parser.add_argument("--exact", action="store_true", help="small networks alone")
    options = parser.parse_args()
    if options.exact:
        rows = exact(options.quick)
        print(exact_summary(rows))
        kept = {"exact": rows, "environment": harness.environment(packages=PACKAGES)}
        harness.write("exact_constants", kept, options.out)
        return
    result = run(options.quick)
    print(summary(result))
    harness.write("certificates", result, options.out)


if __name__ == "__main__":
    main()
