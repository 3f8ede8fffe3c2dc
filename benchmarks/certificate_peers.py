"""Bounds of Lipschitz constants compared with other libraries, on the same networks.

    python -m benchmarks.certificate_peers

Each figure is divided by the truth: the largest singular value of a convolution by Lanczos
iteration, or, for a network, the steepest secant that is found. Below 1 it is no bound.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks.certificates import glyphs, operator_norm, trained_perceptron
from orthonet.certify import certify

PACKAGES = ("orthonet", "orthogonium", "deel-torchlip")
Method = Callable[[nn.Module, Tensor], float]


def _ours(effort: str) -> Method:
    return lambda model, x: certify(model, x[:1], effort=effort, lower=False).constant.value


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


METHODS: dict[str, Method] = {
    "orthonet fast": _ours("fast"),
    "orthonet default": _ours("default"),
    "orthonet tight": _ours("tight"),
    "orthogonium get_conv_sv, product": _orthogonium,
    "deel-torchlip power iteration, product": _torchlip_product,
    "deel-torchlip Jacobian at samples": _torchlip_samples,
}


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def cases(quick: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The networks, and the shape of one sample."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "16->16 k3 8x8": (nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8)),
        "16->16 k3, 4 groups, 8x8": (nn.Conv2d(16, 16, 3, padding=1, groups=4), (16, 8, 8)),
        "8->16 k3 s2 16x16": (nn.Conv2d(8, 16, 3, 2, 1), (8, 16, 16)),
        "convnet 3x16x16": (_convnet(), (3, 16, 16)),
        "trained 5x64 perceptron": (trained_perceptron(epochs=2 if quick else 30), (64,)),
    }
    if not quick:
        torch.manual_seed(0)
        found["64->64 k3 32x32"] = nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)
    return {name: (model.eval(), shape) for name, (model, shape) in found.items()}


def truth(model: nn.Module, shape: tuple[int, ...], x: Tensor) -> float:
    """The norm of a convolution, or a secant of a network, which is at most its constant."""
    if isinstance(model, nn.Conv2d):
        return operator_norm(copy.deepcopy(model).double(), shape)
    if shape == (64,):
        x = torch.cat([x, glyphs(16, 1)[0]])
    found = certify(model, x, effort="tight").lower
    return float("nan") if found is None else found.value


def run(quick: bool = False) -> dict[str, Any]:
    """Every method on every network."""
    rows = []
    for name, (model, shape) in cases(quick).items():
        x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(2))
        reference = truth(model, shape, x)
        for method, bound in METHODS.items():
            start = time.process_time()
            row: dict[str, Any] = {"case": name, "method": method}
            if "samples" in method and x[0].numel() > 4096:
                row["error"] = "too large"
            else:
                try:
                    row["ratio"] = bound(model, x) / reference
                except ImportError as error:
                    row["error"] = f"does not run here: {error.msg}"
                except Exception as error:  # a peer may refuse or fail: that is a result
                    row["error"] = f"{type(error).__name__}: {error}"[:120]
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
        if len(set(cells)) == 1:  # the same error everywhere
            cells = [cells[0], *[""] * (len(cells) - 1)]
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
