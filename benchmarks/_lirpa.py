"""Radii by auto_LiRPA's linear bounds, in an environment of its own; reads and writes files only.

    PYTHON benchmarks/_lirpa.py NETWORK.npz METHOD

Its release 0.3 pins torch below 1.13 and runs on 1.13.1 with the one function below restored, so
this file imports neither orthonet nor anything newer. It prints JSON.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.onnx.symbolic_helper as helper
from torch import nn


def _set_opset_version(version):
    from torch.onnx._globals import GLOBALS

    GLOBALS.export_onnx_opset_version = version


helper._set_opset_version = _set_opset_version

from auto_LiRPA import BoundedModule, BoundedTensor  # noqa: E402
from auto_LiRPA.perturbations import PerturbationLpNorm  # noqa: E402


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


def build(layers, arrays):
    """The network of a list of layers."""
    made = []
    for kind, arguments, prefix in layers:
        if kind == "Residual":
            made.append(Residual(*build(arguments, arrays)))
            continue
        layer = getattr(nn, kind)(**arguments)
        state = {key: torch.tensor(arrays[f"{prefix}.{key}"]) for key in layer.state_dict()}
        layer.load_state_dict(state)
        made.append(layer)
    return made


def holds(model, x, rivals, radius, method):
    """Whether every margin of one sample is proved positive in a ball."""
    options = {"sparse_alpha": False, "sparse_features_alpha": False}
    bounded = BoundedModule(model, x, bound_opts=options, verbose=False)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=radius))
    low = bounded.compute_bounds(x=(ball,), C=rivals, method=method, bound_upper=False)[0]
    return bool((low > 0).all())


def radius(model, x, label, method, low, high, halvings):
    """The largest radius at which the class of one sample is proved, by bisection."""
    eye = torch.eye(model(x).shape[1])
    others = [j for j in range(len(eye)) if j != label]
    rivals = (eye[label] - eye[others])[None]
    for _ in range(halvings):
        middle = (low * high) ** 0.5
        if holds(model, x, rivals, middle, method):
            low = middle
        else:
            high = middle
    return low


def main():
    """Certify the samples of a file and print their radii."""
    file, method = sys.argv[1:]
    torch.set_num_threads(1)
    arrays = np.load(file)
    model = nn.Sequential(*build(json.loads(str(arrays["layers"])), arrays)).eval()
    x, labels = torch.tensor(arrays["x"]), arrays["y"].tolist()
    start, found = time.process_time(), []
    for i, label in enumerate(labels):
        low, high = float(arrays["low"][i]), float(arrays["high"][i])
        found.append(radius(model, x[i : i + 1], label, method, low, high, int(arrays["halvings"])))
    seconds = (time.process_time() - start) / len(x)
    print(json.dumps({"radii": found, "seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
