"""Certified radii of networks trained without constraint, beside those of auto_LiRPA.

    python -m benchmarks.local_peers --python PYTHON [--samples N] [--optimized N] [--seconds S]

PYTHON is the interpreter of an environment in which auto_LiRPA runs. Its release 0.3 needs:
pip install torch==1.13.1 "numpy<1.25" appdirs pyyaml packaging sortedcontainers ninja tqdm and
pip install --no-deps auto_LiRPA==0.3. The networks are those of `benchmarks.local_radii`. The
largest radius at which its bounds keep every margin positive is found by bisection to 1 %. Its
bounds leave out rounding, ours include it. alpha-CROWN has N samples of its own: it is slow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks import local_radii
from orthonet.certify import certify

METHODS = {"CROWN": "CROWN", "alpha-CROWN": "CROWN-Optimized", "IBP": "IBP"}
NETS = ("mlp", "cnn", "residual")
OURS, SCRIPT = "orthonet", Path(__file__).with_name("_lirpa.py")
_ARGUMENTS = {  # what rebuilds a layer, beside its state
    nn.Linear: ("in_features", "out_features"),
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    nn.BatchNorm2d: ("num_features", "eps"),
    nn.AvgPool2d: ("kernel_size",),
    nn.ReLU: (),
    nn.Flatten: (),
}
_SPAN, _HALVINGS = 32.0, 10  # of global radii that are searched, both ways: to 0.7 %


def written(model: nn.Module, arrays: dict[str, Any], prefix: str = "") -> list[Any]:
    """The layers of a network as JSON holds them; their states go into `arrays`."""
    found: list[Any] = []
    for name, layer in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(layer, local_radii.Residual):
            branch = written(layer.branch, arrays, f"{path}.branch.")
            found.append(["Residual", branch, path])
            continue
        arguments = {key: getattr(layer, key) for key in _ARGUMENTS[type(layer)]}
        arrays.update({f"{path}.{key}": value for key, value in layer.state_dict().items()})
        found.append([type(layer).__name__, arguments, path])
    return found


def peer(python: str, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, method: str) -> Any:
    """What auto_LiRPA finds, in its own environment: radii and CPU seconds a sample."""
    arrays: dict[str, Any] = {}
    layers = json.dumps(written(model, arrays))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.npz"
        low, high = start / _SPAN, start * _SPAN
        np.savez(file, layers=layers, x=x, y=y, low=low, high=high, halvings=_HALVINGS, **arrays)
        command = [python, "-W", "ignore", str(SCRIPT), str(file), method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, method: str, radii: Tensor, start: Tensor, seconds: float) -> dict[str, Any]:
    """Quartiles of radii over the global ones."""
    share = {"case": name, "method": method, "samples": len(radii), "seconds": seconds}
    return {**share, "ratio": local_radii.quartiles(radii.double() / start)}


def run(
    python: str, samples: int, optimized: int, seconds: float, nets: Sequence[str] = NETS
) -> dict[str, Any]:
    """One row a network and method; the share of samples with a larger radius of ours beside."""
    rows, versions = [], set()
    for name in nets:
        model, _, x, y = local_radii.trained(name, samples, seconds)
        certificate = certify(model, x[:1], lower=False)
        start = certificate.radius(model, x)
        x, y, start = x[start > 0], y[start > 0], start[start > 0]  # rounding may leave nothing
        begun = time.process_time()
        ours = certificate.local_radius(model, x)
        rows.append(row(name, OURS, ours, start, (time.process_time() - begun) / len(x)))
        for method, their_name in METHODS.items():
            part = slice(optimized if "alpha" in method else None)
            found = peer(python, model, x[part], y[part], start[part], their_name)
            if "error" in found:
                rows.append({"case": name, "method": method, **found})
                continue
            radii = torch.tensor(found["radii"])
            versions.add(found["torch"])
            entry = row(name, method, radii, start[part], found["seconds"])
            wins = float((ours[part] > radii).double().mean())
            rows.append({**entry, "ours_larger": wins})
    environment = {
        **harness.environment(),
        "auto-LiRPA": "0.3",
        "its torch": ", ".join(sorted(versions)),
    }
    return {"rows": rows, "environment": environment}


def summary(result: dict[str, Any]) -> str:
    """Radii over the global ones, seconds, and how often ours is larger."""
    lines = []
    for entry in result["rows"]:
        if "error" in entry:
            lines.append([entry["case"], entry["method"], entry["error"], "", "", ""])
            continue
        low, median, high = (f"{value:.2f}" for value in entry["ratio"])
        wins = f"{entry['ours_larger']:.0%}" if "ours_larger" in entry else ""
        seconds, number = f"{entry['seconds']:.2f}", str(entry["samples"])
        lines.append(
            [entry["case"], entry["method"], number, f"{median} [{low}, {high}]", seconds, wins]
        )
    return harness.table(
        ["network", "method", "samples", "radius over global", "CPU s a sample", "ours larger"],
        lines,
    )


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter with auto_LiRPA")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--optimized", type=int, default=10, help="samples of alpha-CROWN")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each network")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.python, options.samples, options.optimized, options.seconds, options.nets)
    print(summary(result))
    harness.write("local_peers", result, options.out)


if __name__ == "__main__":
    main()
