"""Write the comparison of the zoo, docs/zoo-benchmark.md and its pictures, from its JSON.

python -m benchmarks.zoo_page [--check] [--costs]

The JSON is that of `orthonet bench zoo --dataset NAME --out FOLDER`, FOLDER/zoo.json, kept as
benchmarks/results/zoo_NAME.json. `--costs` measures the cost of a step again, of all methods in
turn, and writes it into the JSON: those of a comparison come from different hours of a machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import _harness as harness
from benchmarks.page import DOCS, fill
from orthonet.recipes import ZooConfig, ZooReport, load
from orthonet.recipes.running.files import write_json
from orthonet.recipes.zoo.bench import planned_run
from orthonet.recipes.zoo.figures import zoo_figure
from orthonet.recipes.zoo.report import HEADER

PAGE = DOCS / "zoo-benchmark.md"
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
    if "digits" in found:
        texts["Targets on digits"] = targets(found["digits"])
    return texts


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
        f"about {config['parameters']} parameters and {config['epochs']} epochs each"
        if config["budget"] == "parameters"
        else f"{config['cpu_seconds']:g} s of process time each"
    )
    radii = ", ".join(f"{radius:g}" for radius in report.radii)
    versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
    return (
        f"{number} {noun} a method, {budget}, batches of {config['batch_size']}, loss radius "
        f"{config['radius']:g}, temperature {config['temperature']:g}; l2 radii {radii}; PGD of "
        f"{config['attack_steps']} steps. {versions}."
    )


def with_costs(report: ZooReport, rounds: int = 3) -> ZooReport:
    """The report with the cost of a step of every method, the least of some rounds."""
    config = dict(report.config)
    config["methods"] = tuple(dict.fromkeys(run["method"] for run in report.runs))
    plan, images = ZooConfig(**config), load(config["dataset"]).train
    costs = {}
    for _ in range(rounds):
        for name in plan.methods:
            found = planned_run(plan, name, 0, images)[1]
            costs[name] = min(costs.get(name, found), found)
    runs = []
    for run in report.runs:
        cost = costs[run["method"]]
        runs.append({**run, "seconds_per_step": cost.seconds, "saved_bytes": cost.saved_bytes})
    return ZooReport(config, tuple(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the page is out of date")
    parser.add_argument("--costs", action="store_true", help="measure the cost of a step again")
    arguments = parser.parse_args()
    check, found = arguments.check, reports()
    if arguments.costs:
        found = {name: with_costs(report) for name, report in found.items()}
        for name, report in found.items():
            content = {**report.to_dict(), "protocol": ZooConfig(**report.config).protocol()}
            write_json(harness.RESULTS / f"zoo_{name}.json", content)
    old = PAGE.read_text()
    new = fill(old, tables(found))
    if check and new != old:
        raise SystemExit(f"{PAGE} is out of date: run `python -m benchmarks.zoo_page`")
    if check:
        return
    PAGE.write_text(new)
    for name, report in found.items():
        zoo_figure(DOCS / "assets" / f"zoo_{name}.png", report)


if __name__ == "__main__":
    main()
