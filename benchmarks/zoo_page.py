"""Write docs/zoo-benchmark.md, its pictures and the table of docs/api/models.md, from their JSON.

python -m benchmarks.zoo_page [--check] [--costs]

The JSON is that of `orthonet bench zoo --dataset NAME --out FOLDER`, FOLDER/zoo.json, kept as
benchmarks/results/zoo_NAME.json. `--costs` measures the cost of a step again, of all methods in
turn, counts what it launches, and writes both into the JSON: the times of a comparison come from
different hours of a machine. `benchmarks.learning` and `benchmarks.checkpoints` make the other two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _counts as counts
from benchmarks import _harness as harness
from benchmarks import _nets as nets
from benchmarks import learning
from benchmarks.page import DOCS, fill
from orthonet.models import certificate_path
from orthonet.recipes import ZooConfig, ZooReport, load
from orthonet.recipes.data.sets import IMAGE_SETS
from orthonet.recipes.running.files import write_json
from orthonet.recipes.zoo.bench import planned_run
from orthonet.recipes.zoo.figures import zoo_figure
from orthonet.recipes.zoo.networks import network, width_for
from orthonet.recipes.zoo.report import HEADER

PAGES = (DOCS / "zoo-benchmark.md", DOCS / "api" / "models.md")
# What the comparison was asked to reach on digits: accuracy, certified at 0.141, 0.5 and 1, in %.
TARGETS = {
    "ortho": (92.2, 88.3, 61.4, 8.9),
    "cayley": (92.2, 87.5, 60.0, 6.9),
    "aol": (91.4, 85.0, 52.2, 6.1),
    "soc": (90.0, 83.6, 47.8, 2.2),
    "cpl": (90.0, 82.2, 42.8, 0.6),
    "sll": (90.0, 74.2, 32.5, 0.0),
    "spectral": (86.9, 73.9, 18.1, 0.0),
}


def reports(folder: Path = harness.RESULTS) -> dict[str, ZooReport]:
    """The kept comparisons, by data set."""
    files = sorted(folder.glob("zoo_*.json"))
    return {
        file.stem.removeprefix("zoo_"): ZooReport.from_dict(json.loads(file.read_text()))
        for file in files
    }


def tables(found: dict[str, ZooReport]) -> dict[str, str]:
    """Every table of the page, by its title."""
    texts = {}
    for name, report in found.items():
        texts[f"Methods on {name}"] = harness.table(HEADER, report.cells())
        texts[f"Protocol on {name}"] = protocol(report)
        if any(choice["tried"] for choice in report.choices.values()):
            texts[f"Choices on {name}"] = choices(report)
        if any("launches" in run for run in report.runs):
            texts[f"Launches on {name}"] = launches(report)
        if any(run.get("autoattack") for run in report.runs):
            texts[f"AutoAttack on {name}"] = autoattack(report)
    if "digits" in found:
        texts["Targets on digits"] = targets(found["digits"])
    texts["What helps"] = learning.summary(_kept("learning"))
    texts["Pretrained networks"] = pretrained(_kept("checkpoints"))
    return texts


def _kept(name: str) -> dict[str, Any]:
    return json.loads((harness.RESULTS / f"{name}.json").read_text())


def pretrained(result: dict[str, Any]) -> str:
    """What the networks of the package reach on their whole test sets, in float32."""
    cells = []
    for name, row in sorted(result.items()):
        radii = " / ".join(_radius(radius) for radius in row["radii"])
        certified = " / ".join(f"{100 * share:.1f}" for share in row["certified"])
        size = certificate_path(name).with_suffix(".safetensors").stat().st_size
        accuracy, constant = f"{100 * row['accuracy']:.1f}", f"{row['constant']:.7f}"
        cells.append(
            [
                f"`{name}`",
                str(row["samples"]),
                accuracy,
                radii,
                certified,
                constant,
                f"{size >> 10}",
            ]
        )
    header = ("name", "test samples", "accuracy", "l2 radii", "certified", "constant", "kB")
    return harness.table(header, cells)


def targets(report: ZooReport) -> str:
    """What each method was to reach, and what it reached."""
    rows = {row["method"]: row for row in report.rows()}
    cells = []
    for name, wanted in TARGETS.items():
        if name in rows:
            reached = (rows[name]["accuracy"], *rows[name]["certified"][:3])
            texts = (
                " / ".join(f"{v:.1f}" for v in wanted),
                " / ".join(f"{100 * v:.1f}" for v in reached),
            )
            least = min(100 * r - w for r, w in zip(reached, wanted, strict=True))
            cells.append([name, *texts, f"{least:+.1f}"])
    return harness.table(("method", "target", "reached", "least difference"), cells)


def protocol(report: ZooReport) -> str:
    """What was run, in a sentence."""
    config, run = report.config, report.runs[0]
    seeds = sorted({row["seeds"] for row in report.rows()})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    noun = "seed" if seeds == [1] else "seeds"
    budget = (
        f"{config['budget']:g} CPU seconds" if config["budget"] else f"{config['epochs']} epochs"
    )
    radii = ", ".join(_radius(radius) for radius in report.radii)
    chosen = config["loss_radii"]
    asked = f"loss radius {chosen[0]:g}, " if len(chosen) == 1 else ""
    versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
    return (
        f"{number} {noun} a method, about {config['parameters']} parameters and {budget} each, "
        f"batches of {config['batch_size']}, {asked}temperature {config['temperature']:g}; l2 "
        f"radii {radii}; {attack(report)}. {versions}."
    )


def attack(report: ZooReport) -> str:
    """How the attacks were made; runs from before the deployed network was judged have no count."""
    run, steps = report.runs[0], report.config["attack_steps"]
    if "attacked_images" not in run:
        return f"PGD of {steps} steps"
    few = f"{run['attacked_images']} of the {run['images']} test images"
    return f"all test images certified, APGD of {steps} steps on {few}"


def choices(report: ZooReport) -> str:
    """What each method chose on validation images, and the mean certified accuracy of each pair."""
    pairs = list(
        dict.fromkeys(
            (lr, radius) for choice in report.choices.values() for lr, radius, _ in choice["tried"]
        )
    )
    rows = []
    for name, choice in report.choices.items():
        found = {(lr, radius): value for lr, radius, value in choice["tried"]}
        cells = []
        for pair in pairs:
            value = found.get(pair)
            text = "not finite" if value is None else f"{100 * value:.1f}"
            cells.append(f"**{text}**" if pair == (choice["lr"], choice["radius"]) else text)
        rows.append([name, *cells])
    return harness.table(("method", *(f"{lr:g}, {radius:g}" for lr, radius in pairs)), rows)


def launches(report: ZooReport) -> str:
    """How many operators a training step launches."""
    found = {run["method"]: run["launches"] for run in report.runs if "launches" in run}
    ordered = sorted(found.items(), key=lambda item: item[1])
    return harness.table(("method", "launches a step"), [[n, str(v)] for n, v in ordered])


def autoattack(report: ZooReport) -> str:
    """What AutoAttack left of the images that it attacked, beside APGD alone and what is proved."""
    rows, runs = [], [run for run in report.runs if run.get("autoattack")]
    for name in dict.fromkeys(run["method"] for run in runs):
        found = [run["autoattack"] for run in runs if run["method"] == name]
        means = []
        for key in ("certified", "apgd", "both"):
            columns = zip(*(f[key] for f in found), strict=True)
            means.append([100 * statistics.fmean(column) for column in columns])
        number = sum(f["images"] for f in found)
        rows.append([name, str(number), *(" / ".join(f"{v:.1f}" for v in m) for m in means)])
    return harness.table(("method", "images", "certified", "APGD", "AutoAttack and APGD"), rows)


def _radius(radius: float) -> str:
    """The field writes some radii as multiples of the step of a pixel."""
    steps = 255 * radius
    near = abs(steps - round(steps)) < 1e-9 and radius < 0.5
    return f"{round(steps)}/255" if near else f"{radius:g}"


def with_costs(report: ZooReport, rounds: int = 3) -> ZooReport:
    """The report with the cost of a step of every method, the least of some rounds."""
    config = dict(report.config)
    config["methods"] = tuple(dict.fromkeys(run["method"] for run in report.runs))
    plan, images = ZooConfig(**config), load(config["dataset"]).train
    costs = {}
    for _ in range(rounds):
        for name in plan.methods:
            choice = {"lr": 1e-4, "radius": plan.loss_radii[0]}
            found = planned_run(plan, name, 0, images, choice)[1]
            costs[name] = min(costs.get(name, found), found)
    launched = {name: _launches(plan, name, images.x) for name in plan.methods}
    runs = []
    for run in report.runs:
        name, cost = run["method"], costs[run["method"]]
        measured = {"seconds_per_step": cost.seconds, "saved_bytes": cost.saved_bytes}
        runs.append({**run, **measured, "launches": launched[name]})
    return dataclasses.replace(report, config=config, runs=tuple(runs))


def _launches(plan: ZooConfig, name: str, images: Tensor, warm_up: int = 3) -> int:
    """Operators that a step of a method launches, after some others."""
    shape = IMAGE_SETS[plan.dataset].shape
    model = network(name, shape, width_for(name, plan.parameters, shape)).train()
    step = nets.training_step(model, images[: plan.batch_size])
    for _ in range(warm_up):
        step()
    return counts.count(step).launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the page is out of date")
    parser.add_argument(
        "--costs", nargs="*", metavar="NAME", help="measure steps again, of these sets"
    )
    arguments = parser.parse_args()
    check, found = arguments.check, reports()
    if arguments.costs is not None:
        torch.set_num_threads(1)
        for name in arguments.costs or found:
            report = found[name] = with_costs(found[name])
            content = {**report.to_dict(), "protocol": ZooConfig(**report.config).protocol()}
            write_json(harness.RESULTS / f"zoo_{name}.json", content)
    for page in PAGES:
        old = page.read_text()
        new = fill(old, tables(found))
        if check and new != old:
            raise SystemExit(f"{page} is out of date: run `python -m benchmarks.zoo_page`")
        if not check:
            page.write_text(new)
    if check:
        return
    shown = PAGES[0].read_text()
    for name, report in found.items():
        if f"assets/zoo_{name}.png" in shown:
            zoo_figure(DOCS / "assets" / f"zoo_{name}.png", report)


if __name__ == "__main__":
    main()
