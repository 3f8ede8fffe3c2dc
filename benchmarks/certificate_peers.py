"""Bounds of Lipschitz constants beside those of other libraries, on the same networks.

    python -m benchmarks.certificate_peers

Each figure is divided by the truth: the largest singular value of a convolution by Lanczos
iteration, or, for a network, the steepest secant that is found. Below 1 it is no bound.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks.certificates import largest_singular_value
from orthonet.certify import certify

PACKAGES = ("orthonet", "orthogonium", "deel-torchlip", "auto-LiRPA")
Method = Callable[[nn.Module, Tensor], float]


def _ours(effort: str) -> Method:
    return lambda model, x: certify(model, x[:1], effort=effort, lower=False).constant.value  # type: ignore[arg-type]


def _orthogonium(model: nn.Module, x: Tensor) -> float:
    """The product of `get_conv_sv`; of linear layers as convolutions of one pixel."""
    from orthogonium.layers.conv.singular_values import get_conv_sv

    found = 1.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            layer = nn.Conv2d(module.in_features, module.out_features, 1)
            layer.weight.data = module.weight.data[:, :, None, None]
            module = layer
        if isinstance(module, nn.Conv2d):
            found *= float(get_conv_sv(module, n_iter=4, return_stab_rank=False))
    return found


def _torchlip_product(model: nn.Module, x: Tensor) -> float:
    """The product of the norms that its layers divide by: power iteration, flattened kernels."""
    from deel.torchlip.normalizers import spectral_normalization

    found = 1.0
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found *= float(spectral_normalization(module.weight.detach().flatten(1))[2])
    return found


def _torchlip_samples(model: nn.Module, x: Tensor) -> float:
    from deel.torchlip.utils import evaluate_lip_const

    return float(evaluate_lip_const(model, x, evaluation_type="jacobian_norm"))


def _lirpa(model: nn.Module, x: Tensor) -> float:
    """The Jacobian bound of auto_LiRPA in a ball of l2 radius 1, in the norm that it has."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore

    inside = x[:1]
    bounded = BoundedModule(model, inside)
    bounded.augment_gradient_graph(inside)
    ball = BoundedTensor(inside, PerturbationLpNorm(norm=2, eps=1.0))
    low, high = bounded.compute_jacobian_bounds(ball)
    return float(torch.maximum(low.abs(), high.abs()).flatten(1).norm())


METHODS: dict[str, Method] = {
    "orthonet fast": _ours("fast"),
    "orthonet default": _ours("default"),
    "orthonet tight": _ours("tight"),
    "orthogonium get_conv_sv, product": _orthogonium,
    "deel-torchlip power iteration, product": _torchlip_product,
    "deel-torchlip Jacobian at samples": _torchlip_samples,
    "auto_LiRPA Jacobian in a ball of 1": _lirpa,
}


def _trained(model: nn.Module, inside: int, steps: int) -> nn.Module:
    """Fitted to a function with ten classes, so that the weights are not random."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, inside, generator=generator)
    labels = (x @ torch.randn(inside, 10, generator=generator) + x[:, :10].square()).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = slice(step * 128 % 1024, step * 128 % 1024 + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def _perceptron(depth: int, steps: int) -> nn.Module:
    sizes = [32, *[64] * depth, 10]
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return _trained(nn.Sequential(*parts[:-1]), 32, steps)


def cases(quick: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The networks, and the shape of one sample."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "16->16 k3 8x8": (nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8)),
        "16->16 k3, 4 groups, 8x8": (nn.Conv2d(16, 16, 3, padding=1, groups=4), (16, 8, 8)),
        "8->16 k3 s2 16x16": (nn.Conv2d(8, 16, 3, 2, 1), (8, 16, 16)),
        "trained 5x64 perceptron": (_perceptron(5, 20 if quick else 600), (32,)),
    }
    if not quick:
        found["64->64 k3 32x32"] = nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)
    return {name: (model.eval(), shape) for name, (model, shape) in found.items()}


def truth(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of a convolution, or a secant of a network, which is at most its constant."""
    if isinstance(model, nn.Conv2d):
        kernel = model.weight.detach()
        if model.groups > 1:
            split, inside = kernel.chunk(model.groups), model.in_channels // model.groups
            kernel = torch.zeros(kernel.shape[0], model.in_channels, *kernel.shape[2:])
            rows = model.out_channels // model.groups
            for g, part in enumerate(split):
                kernel[g * rows : (g + 1) * rows, g * inside : (g + 1) * inside] = part
        return largest_singular_value(kernel, shape[1:], model.stride[0], model.padding[0])  # type: ignore[arg-type]
    found = certify(model, torch.zeros(1, *shape), effort="tight").lower
    return float("nan") if found is None else found.value


def run(quick: bool = False) -> dict[str, Any]:
    """Every method on every network."""
    rows = []
    for name, (model, shape) in cases(quick).items():
        reference = truth(model, shape)
        x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(2))
        for method, bound in METHODS.items():
            start = time.process_time()
            row: dict[str, Any] = {"case": name, "method": method}
            if "samples" in method and x[0].numel() > 4096:
                row["error"] = "too large"
            else:
                try:
                    row["ratio"] = bound(model, x) / reference
                except ModuleNotFoundError:
                    row["error"] = "not installed"
                except Exception as error:  # a peer may refuse or fail: that is a result
                    row["error"] = type(error).__name__
            row["seconds"] = time.process_time() - start
            rows.append(row)
    return {"rows": rows, "environment": harness.environment(packages=PACKAGES)}


def summary(result: dict[str, Any]) -> str:
    """Value over truth, and CPU seconds."""
    rows = result["rows"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            row.get("error") or f"{row['ratio']:.3f} ({row['seconds']:.1f} s)"
            for row in rows
            if row["method"] == method
        ]
        lines.append([method, *cells])
    return harness.table(["", *dict.fromkeys(row["case"] for row in rows)], lines)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few small networks")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.quick)
    print(summary(result))
    harness.write("certificate_peers", result, options.out)


if __name__ == "__main__":
    main()
