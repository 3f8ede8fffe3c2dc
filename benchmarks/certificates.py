"""Certificates: how tight, how fast, and what dominates.

    python -m benchmarks.certificates

Three tables: single convolutions against the truth by Lanczos iteration (from below), small affine
islands against their dense matrix, and whole networks with the rows that cost most.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthonet import layers
from orthonet.certify import LipschitzCertificate, certify
from orthonet.linalg import convolution_norm_bound


def largest_singular_value(kernel: Tensor, size: tuple[int, int], stride: int, pad: int) -> float:
    """From below, by Lanczos iteration on the operator and its adjoint, in float64."""
    kernel = kernel.double()
    x = torch.zeros(1, kernel.shape[1], *size, dtype=torch.float64, requires_grad=True)
    image = F.conv2d(x, kernel, None, stride, pad)

    def normal(v: Tensor) -> Tensor:
        with torch.no_grad():
            w = F.conv2d(v.reshape(x.shape), kernel, None, stride, pad)
        return torch.autograd.grad(image, x, w, retain_graph=True)[0].flatten()

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.numel(), dtype=torch.float64, generator=generator)
    basis, diagonal, beside = [v / v.norm()], [], []
    for _ in range(240):
        w = normal(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        q = torch.stack(basis)
        for _ in range(2):
            w = w - q.T @ (q @ w)
        beside.append(float(w.norm()))
        basis.append(w / beside[-1])
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(matrix)[-1].sqrt())


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


def resnet18(classes: int = 1000) -> nn.Module:
    """The architecture of torchvision's resnet18, with its initialization and fresh statistics."""
    blocks: list[nn.Module] = []
    inside = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(inside, width, stride), Block(width, width, 1)]
        inside = width
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(512, classes),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


def ortho_resnet() -> nn.Module:
    """A residual network of orthogonal layers."""

    def block(width: int) -> nn.Module:
        return layers.ConvexResidual(
            nn.Sequential(layers.OrthoConv2d(width, width, 3, padding=1), layers.MaxMin())
        )

    return nn.Sequential(
        layers.OrthoConv2d(3, 32, 3, padding=1), layers.MaxMin(), block(32), block(32),
        layers.SpaceToDepth2d(2), layers.OrthoConv2d(128, 64, 3, padding=1), layers.MaxMin(),
        block(64), block(64), nn.Flatten(), layers.OrthoLinear(64 * 64, 10),
    ).eval()  # fmt: skip


def convolutions() -> None:
    """Bound / truth and CPU seconds of single convolutions, for each effort."""
    print(f"{'convolution':34s}{'effort':10s}{'bound / truth':>14s}{'CPU s':>8s}  method")
    torch.manual_seed(0)
    for shape, size, stride in (
        ((16, 16, 3, 3), 8, 1), ((64, 3, 7, 7), 32, 2), ((64, 64, 3, 3), 32, 1),
        ((128, 64, 3, 3), 32, 2),
    ):  # fmt: skip
        kernel = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
        pad = shape[2] // 2
        truth = largest_singular_value(kernel, (size, size), stride, pad)
        name = f"{shape[1]}->{shape[0]} k{shape[2]} s{stride} zeros {size}x{size}"
        for effort in ("fast", "default", "tight"):
            start = time.process_time()
            found = convolution_norm_bound(
                kernel, (size, size), stride=stride, padding=pad, effort=effort
            )
            seconds = time.process_time() - start
            ratio = found.value / truth
            print(f"{name:34s}{effort:10s}{ratio:14.4f}{seconds:8.2f}  {found.method}")


def network(name: str, model: nn.Module, x: Tensor, effort: str) -> LipschitzCertificate:
    """Certify and print the bound, the time and the rows with the largest constants."""
    start, wall = time.process_time(), time.perf_counter()
    found = certify(model, x, effort=effort, lower=False)  # type: ignore[arg-type]
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    print(
        f"\n{name} ({effort}): bound {found.constant.value:.6g}, {seconds:.1f} CPU s, {wall:.1f} s"
    )
    for row in sorted(found.rows, key=lambda r: -r.constant)[:5]:
        print(f"    {row.constant:10.4g}  {row.path:24s}{row.op:28s}{row.method}")
    return found


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", default="default", choices=("fast", "default", "tight"))
    effort = parser.parse_args().effort
    convolutions()
    torch.manual_seed(0)
    network("orthogonal ResNet at 3x16x16", ortho_resnet(), torch.zeros(1, 3, 16, 16), effort)
    network("ResNet-18 at 3x64x64", resnet18(), torch.zeros(1, 3, 64, 64), effort)


if __name__ == "__main__":
    main()
