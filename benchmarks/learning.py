"""What helps on Fashion-MNIST? One change at a time, judged on validation images.

    python -m benchmarks.learning [--epochs 1] [--seeds 3] [--only NAME ...] [--data FOLDER]

Each run trains the network of `orthonet train fashion` with one setting changed, for the same steps
on 50,000 training images, and is certified on 1000 of the 10,000 validation images. The test images
are not looked at. The JSON holds every run and continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import _harness as harness
from orthonet.recipes import TrainConfig, fashion, fit, load
from orthonet.recipes.data.digits import Split, spaced
from orthonet.recipes.zoo.judge import judge

LAYERS = {"in_shape": (1, 28, 28), "layer": "cholesky", "width": 28}
# What the literature credits, as changes of the recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "loss radius 1.5": {"radius": 1.5},
    "loss radius 0.5": {"radius": 0.5},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 0.4": {"temperature": 0.4},
    "logit annealing (LA)": {"loss": "annealing"},
    "EMMA": {"loss": "emma"},
    "shifts of a pixel": {"shift": 1.0},
    "noise of 0.1": {"noise": 0.1},
    "LipNeXt blocks": {"model_arguments": {**LAYERS, "layer": "lipnext"}},
    "AOC": {"model_arguments": {**LAYERS, "layer": "ortho"}},
    "one convolution": {"model_arguments": {**LAYERS, "depth": 1}},
    "six convolutions": {"model_arguments": {**LAYERS, "depth": 6}},
    "width 56": {"model_arguments": {**LAYERS, "width": 56}},
    "learning rate 0.003": {"lr": 0.003},
    "learning rate 0.02": {"lr": 0.02},
}
VALIDATION = 1000
HEADER = ("change", "seeds", "CPU s", "clean", "certified", "mean", "spread", "difference", "noise")


def measure(config: TrainConfig, data: Split) -> dict[str, Any]:
    """One training and its certificate on the validation images."""
    start = time.process_time()
    model = fit(config, data)[0]
    seconds = time.process_time() - start
    found = judge(model.double(), data.test, config.radii, attacked=-1)
    return {
        "seed": config.seed,
        "cpu_seconds": seconds,
        "accuracy": found.accuracy,
        "certified": found.certified,
        "constant": found.constant,
    }


def run(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every variant with every seed that the result does not hold yet."""
    data = load("fashion", options.data, validation=True)
    data = data._replace(test=spaced(data.test, VALIDATION))
    for seed in range(options.seeds):
        for name in options.only:
            rows = result["rows"]
            if any(row["variant"] == name and row["seed"] == seed for row in rows):
                continue
            config = fashion(**{"seed": seed, "epochs": options.epochs, **VARIANTS[name]})
            rows.append({"variant": name, **measure(config, data)})
            result["radii"] = list(config.radii)
            harness.write("learning", result, options.out)
            print(name, seed, f"{statistics.fmean(rows[-1]['certified']):.4f}", flush=True)
    return result


def summary(result: dict[str, Any]) -> str:
    """Means over the seeds; a difference counts where it exceeds the noise.

    The mean is that of the certified accuracies over the radii, the spread its standard deviation
    over the seeds (n - 1), the noise twice the standard error of the difference of two such means.
    """
    rows = result["rows"]
    by_name = {
        name: [row for row in rows if row["variant"] == name]
        for name in dict.fromkeys(row["variant"] for row in rows)
    }
    means = {
        name: [100 * statistics.fmean(row["certified"]) for row in found]
        for name, found in by_name.items()
    }
    spread = {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in means.items()}
    base = "the recipe"
    cells = []
    for name, found in by_name.items():
        certified = [
            statistics.fmean(v) for v in zip(*(r["certified"] for r in found), strict=True)
        ]
        difference = statistics.fmean(means[name]) - statistics.fmean(means[base])
        parts = (spread[each] ** 2 / len(means[each]) for each in (name, base))
        noise = 2 * sum(parts) ** 0.5
        several = min(len(means[name]), len(means[base])) > 1
        cells.append(
            [
                name,
                str(len(found)),
                f"{statistics.fmean(row['cpu_seconds'] for row in found):.0f}",
                f"{100 * statistics.fmean(row['accuracy'] for row in found):.1f}",
                " / ".join(f"{100 * value:.1f}" for value in certified),
                f"{statistics.fmean(means[name]):.2f}",
                f"{spread[name]:.2f}" if len(found) > 1 else "-",
                "" if name == base else f"{difference:+.2f}",
                "" if name == base else f"{noise:.2f}" if several else "-",
            ]
        )
    return harness.table(HEADER, cells)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / "learning.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if result.get("epochs", options.epochs) != options.epochs:
        raise SystemExit(f"{file} holds runs of {result['epochs']} epochs: choose another --out")
    result |= {"epochs": options.epochs, "environment": harness.environment()}
    result["config"] = dataclasses.asdict(fashion())
    print(summary(run(result, options)))


if __name__ == "__main__":
    main()
