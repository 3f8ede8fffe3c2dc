"""The comparison of methods: one network, one budget, one certificate, a layer swapped."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from orthonet import _checks
from orthonet.recipes.data.digits import Images, Split, require_package, spaced
from orthonet.recipes.data.sets import IMAGE_SETS, load
from orthonet.recipes.images.config import TrainConfig
from orthonet.recipes.images.train import fit
from orthonet.recipes.running.files import versions, write_json
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.processes import launched
from orthonet.recipes.running.reading import Wanted, read_json
from orthonet.recipes.running.registry import Recipe, register
from orthonet.recipes.zoo.autoattack import require_autoattack
from orthonet.recipes.zoo.config import ZooConfig, run_config, zoo
from orthonet.recipes.zoo.cost import StepCost, step_cost
from orthonet.recipes.zoo.figures import zoo_figure
from orthonet.recipes.zoo.judge import judge
from orthonet.recipes.zoo.networks import deployed, missing, network, width_for
from orthonet.recipes.zoo.report import ZooReport

__all__ = ["bench_zoo", "chosen", "planned_run", "run_method"]

_VALIDATION = 1000  # images, evenly spaced, that a choice is judged on
_WANTED = Wanted("bench_zoo", "the runs of a comparison", "Remove it or choose another folder")


@guarded
def bench_zoo(
    config: ZooConfig, out: str | os.PathLike[str], *, progress: bool = False
) -> ZooReport:
    """Train, certify and attack the same network with each method, and compare.

    Methods are matched in the number of parameters, and in CPU time where there is a budget. Where
    several learning rates or loss radii are allowed, each method takes the pair whose mean
    certified accuracy over the radii is highest on 1000 validation images, after training with a
    share of the budget; the test images are not looked at.

    Into the folder `out` go `zoo.json`, rewritten after each choice and each run, and `zoo.png`.
    What `zoo.json` already holds is not repeated, so that an interrupted comparison continues where
    it was, and more seeds or methods can be added later.

    Args:
        config: What to run.
        out: A folder, made if it is missing.
        progress: Whether to write a line for each run to the standard error stream.

    Returns:
        The report.

    Raises:
        ModuleNotFoundError: A package of the extra `demo`, or torchattacks, is missing.
        ValueError: `zoo.json` holds runs under another protocol.
        UncertifiableError: An attack changed a class inside a certified radius.
        OSError: `out` cannot be written.
    """
    _checks.require(
        launched() == 1,
        "orthonet bench",
        "a comparison must run in one process",
        "Start it without torchrun",
        subject="zoo",
    )
    if config.autoattack:
        require_autoattack()
    folder = Path(out)
    file, data = folder / "zoo.json", load(config.dataset, config.data_root)
    validation = functools.cache(functools.partial(_validation, config))
    report = _earlier(file, config)
    skipped = tuple(filter(None, map(missing, config.methods)))
    names = [name for name in config.methods if not missing(name)]
    done = {(run["method"], run["seed"]) for run in report.runs}
    wanted = [(name, seed) for seed in range(config.seeds) for name in names]
    todo = [pair for pair in wanted if pair not in done]
    report = dataclasses.replace(report, skipped=skipped)

    def keep(report: ZooReport) -> ZooReport:
        write_json(file, {**report.to_dict(), "protocol": config.protocol()})
        return report

    with _Lines(progress, len(todo)) as tell:
        for sentence in skipped:
            tell(sentence, 0)
        for name, seed in todo:
            if name not in report.choices:
                choice = chosen(config, name, validation)
                report = keep(dataclasses.replace(report, choices={**report.choices, name: choice}))
            run = run_method(config, name, seed, data, report.choices[name])
            report = keep(dataclasses.replace(report, runs=(*report.runs, run)))
            tell(report.line(run), 1)
    picture = zoo_figure(folder / "zoo.png", report)
    return dataclasses.replace(report, files=(file, picture))


def _validation(config: ZooConfig) -> Split:
    """The training images without the validation images, and some of these."""
    data = load(config.dataset, config.data_root, validation=True)
    return data._replace(test=spaced(data.test, _VALIDATION))


def chosen(config: ZooConfig, name: str, data: Callable[[], Split]) -> dict[str, Any]:
    """Choose learning rate and loss radius of a method on validation images.

    Args:
        config: What to run.
        name: The method.
        data: Returns the images to train on, and those to judge on.

    Returns:
        The choice, and what each candidate reached: a list of learning rate, loss radius and mean
        certified accuracy, which is None where training did not stay finite.
    """
    candidates = config.candidates(name)
    tried: list[tuple[float, float, float | None]] = []
    if len(candidates) > 1:
        width = width_for(name, config.parameters, IMAGE_SETS[config.dataset].shape)
        for lr, radius in candidates:
            planned = run_config(config, name, 0, width, lr, radius, config.tuning)
            tried.append((lr, radius, _score(planned, name, data())))
    finite = [entry for entry in tried if entry[2] is not None]
    best = max(finite, key=lambda entry: entry[2] or 0.0)[:2] if finite else candidates[0]
    return {"lr": best[0], "radius": best[1], "tried": tried}


def _score(config: TrainConfig, name: str, data: Split) -> float | None:
    """Mean certified accuracy on the held-out images of `data`; None if training fails."""
    model = _trained(config, name, data)
    if isinstance(model, str):
        return None
    found = judge(deployed(name, model[0]), data.test, config.radii, attacked=-1)
    return statistics.fmean(found.certified)


def _trained(
    config: TrainConfig, name: str, data: Split
) -> tuple[nn.Module, list[dict[str, float]]] | str:
    """The trained network and its history, or why it did not stay finite."""
    arguments = config.model_arguments
    model = network(name, arguments["in_shape"], arguments["width"], config.seed)
    try:
        model, history = fit(config, data, model=model)
    except ValueError as error:  # the loss is not finite: a result, and not a good one
        return str(error)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    if not finite or not math.isfinite(history[-1]["loss"]):
        return "a parameter is not finite"
    return model, history


def planned_run(
    config: ZooConfig, name: str, seed: int, images: Images, choice: dict[str, Any]
) -> tuple[TrainConfig, StepCost]:
    """Return the training of one method within the budget, and what a step of it costs."""
    width = width_for(name, config.parameters, IMAGE_SETS[config.dataset].shape)
    planned = run_config(config, name, seed, width, choice["lr"], choice["radius"])
    model = network(name, IMAGE_SETS[config.dataset].shape, width, seed)
    return planned, step_cost(planned, images, model)


def run_method(
    config: ZooConfig, name: str, seed: int, data: Split, choice: dict[str, Any]
) -> dict[str, Any]:
    """Train, certify and attack a network, and return what came out as plain values."""
    planned, cost = planned_run(config, name, seed, data.train, choice)
    start = time.process_time()
    trained = _trained(planned, name, data)
    seconds = time.process_time() - start
    common = {
        "method": name,
        "seed": seed,
        "width": planned.model_arguments["width"],
        "lr": planned.lr,
        "radius": planned.radius,
        "versions": versions(),
    }
    if isinstance(trained, str):
        return {**common, "finite": False, "reason": trained}
    model, history = trained
    found = judge(
        deployed(name, model),
        data.test,
        config.radii,
        attacked=config.attacked,
        attack_steps=config.attack_steps,
        autoattack=config.autoattack,
        seed=seed,
    )
    steps = math.ceil(len(data.train.y) / planned.batch_size)
    taken = history[-1].get("steps", planned.epochs * steps)
    return {
        **common,
        **dataclasses.asdict(found),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": round(taken / steps, 2),
        "steps": taken,
        "finite": True,
        "seconds_per_step": cost.seconds,
        "saved_bytes": cost.saved_bytes,
        "training_cpu_seconds": round(history[-1].get("cpu_seconds", seconds), 3),
    }


def _earlier(file: Path, config: ZooConfig) -> ZooReport:
    """What the file holds already."""
    report = ZooReport(config.to_dict(), ())
    if not file.exists():
        return report
    content = read_json(file, _WANTED)
    good = isinstance(content, dict) and isinstance(content.get("runs"), list)
    if not good or not isinstance(content.get("protocol"), dict):
        _WANTED.fail(file, "it holds no protocol and runs")
    known, wanted = {**ZooConfig().protocol(), **content["protocol"]}, config.protocol()
    different = [k for k in wanted if known.get(k) != wanted[k]]
    _checks.require(
        not different,
        "bench_zoo",
        "the runs of one file must share their protocol",
        "Choose another folder",
        file=str(file),
        **{k: f"{wanted[k]!r} (there {known.get(k)!r})" for k in different},
    )
    return dataclasses.replace(
        report, runs=tuple(content["runs"]), choices=content.get("choices", {})
    )


class _Lines:
    """Lines on the standard error stream, by tqdm so that bars survive; or none."""

    def __init__(self, progress: bool, total: int) -> None:
        self.bar = (
            require_package("tqdm", "tqdm").tqdm(total=total, unit="run", desc="zoo")
            if progress
            else None
        )

    def __enter__(self):
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _tell(self, line: str, runs: int) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.bar.fp)
            self.bar.update(runs)


register(
    "zoo",
    Recipe(ZooConfig, zoo, bench_zoo, folder=lambda c: f"zoo-{c.dataset}"),
    command="bench",
)
