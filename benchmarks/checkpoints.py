"""Train the networks of `orthonet.models.create(name, pretrained=True)` and write their files.

    python -m benchmarks.checkpoints NAME [--checkpoint FILE] [--data FOLDER]

The recipe of NAME trains the network (for fashion, `--checkpoint` takes what `orthonet train
fashion` wrote instead). Its deployed copy is certified, and the certificate and the weights go to
orthonet/models/checkpoints. What it reaches on the whole test set goes to
benchmarks/results/checkpoints.json. The SHA-256 that is printed belongs into `PRETRAINED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from orthonet.certify import certify
from orthonet.models import convnet_series
from orthonet.models._pretrained import FOLDER, PRETRAINED, deployed
from orthonet.recipes import SeriesConfig, fashion, fit, load, load_checkpoint, train_series
from orthonet.recipes.running.files import write_json
from orthonet.recipes.sequences.series import _scaled

SERIES = {
    "japanese_vowels": SeriesConfig("JapaneseVowels", ("conv",), hidden=32, radius=1.0),
    "italy_power_demand": SeriesConfig("ItalyPowerDemand", ("conv",), hidden=32, radius=0.5),
}
FASHION = fashion(cpu_seconds=600.0, evaluated=0)


def trained_images(checkpoint: Path | None, root: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the recipe `fashion`, trained here or before."""
    if checkpoint is not None:
        model, config = load_checkpoint(checkpoint)
        return model, config.to_dict()
    config = dataclasses.replace(FASHION, data_root=root)
    return fit(config, load("fashion", root))[0], config.to_dict()


def trained_series(name: str, root: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the recipe `series`."""
    config = dataclasses.replace(SERIES[name], data_root=root)
    arguments = PRETRAINED[name].arguments
    with tempfile.TemporaryDirectory() as folder:
        train_series(config, folder)
        state = torch.load(next(Path(folder).rglob("model.pt")), weights_only=True)
    model = convnet_series(**arguments)
    model.load_state_dict({key: _single(value) for key, value in state.items()})
    return model, dataclasses.asdict(config)


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def test_set(name: str, root: str) -> tuple[Tensor, Tensor]:
    """The test samples, as the network takes them, and their classes."""
    if name == "fashion":
        return load("fashion", root).test
    data = _scaled(dataclasses.replace(SERIES[name], data_root=root))
    return data.test.x, data.test.y


def radii_of(name: str) -> tuple[float, ...]:
    """The radii at which certified accuracy is told."""
    return FASHION.radii if name == "fashion" else SERIES[name].radii


def measured(model: nn.Module, x: Tensor, y: Tensor, radii: tuple[float, ...]) -> dict[str, Any]:
    """What the deployed float32 network reaches, rounding included."""
    certificate = certify(model, x[:1], lower=False)
    parts = zip(x.split(250), y.split(250), strict=True)
    radius = torch.cat([certificate.radius(model, a, labels=b) for a, b in parts])
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(250)]) == y
    return {
        "samples": len(y),
        "accuracy": float(right.double().mean()),
        "radii": list(radii),
        "certified": [float((right & (radius > r)).double().mean()) for r in radii],
        "constant": certificate.constant.value,
    }


def main() -> None:
    """Train, certify, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("fashion", *SERIES))
    parser.add_argument("--checkpoint", type=Path, help="what `orthonet train fashion` wrote")
    parser.add_argument("--data", default="data", help="folder of the data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.name
    if name == "fashion":
        model, config = trained_images(options.checkpoint, options.data)
    else:
        model, config = trained_series(name, options.data)
    model = deployed(model).requires_grad_(False)
    x, y = test_set(name, options.data)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    certify(model, x[:1]).save(path)
    found = {**measured(model, x, y, radii_of(name)), "config": config}
    found["environment"] = harness.environment()
    file = harness.RESULTS / "checkpoints.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {**results, name: found})
    print(json.dumps({k: found[k] for k in ("accuracy", "radii", "certified", "constant")}))
    print("sha256", hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
